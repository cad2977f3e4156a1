"""N of M: a verdict stands when enough of the last answers agree on it, so that one slow answer changes nothing."""

from collections import deque
from dataclasses import dataclass

from zops.health.verdict import Verdict
from zops.watch.healing import TABLE


@dataclass(frozen=True, slots=True)
class Answer:
    """What one probe of an instance said; `at` is in seconds since the epoch."""

    at: float
    verdict: Verdict
    code: str = ""
    layer: str = ""
    reason: str = ""

    @property
    def gravity(self) -> int:
        """How bad it is: 0 ok, 1 degraded, 2 failed with nothing to do about it, 3 failed and to be healed."""
        if self.verdict != "failed":
            return 0 if self.verdict == "ok" else 1
        return 2 if TABLE.get(self.code, "report") == "report" else 3


class Latch:
    """Keeps the last answers of an instance.

    Args:
        failures: how many bad answers make a bad verdict.
        of: among how many answers.
    """

    def __init__(self, failures: int, of: int) -> None:
        self._failures = failures
        self._answers: deque[Answer] = deque(maxlen=of)

    def see(self, answer: Answer) -> None:
        """Take one more answer; the oldest is forgotten."""
        self._answers.append(answer)

    def clear(self) -> None:
        """Forget every answer: what they were about is not there any more."""
        self._answers.clear()

    @property
    def newest(self) -> Answer | None:
        """The last answer, None when there is none."""
        return self._answers[-1] if self._answers else None

    @property
    def standing(self) -> Answer | None:
        """The newest of the worst answers that are numerous enough; None while there are too few to say anything.

        An ok answer stands only where no worse ones do. Answers that call for a heal are counted apart from those that
        do not: two of them are needed, whatever else was seen.
        """
        for gravity in (3, 2, 1):
            bad = [answer for answer in self._answers if answer.gravity >= gravity]
            if len(bad) >= self._failures:
                # A worse one that is not numerous enough counts, and is not the one that stands.
                return next(answer for answer in reversed(bad) if answer.gravity == gravity)
        newest = self.newest
        return newest if newest and newest.gravity == 0 else None

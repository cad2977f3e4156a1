"""A plan: ordered, idempotent steps, each of which looks first whether it is already done."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

from zops.errors import ZopsError
from zops.events import Report


@dataclass(frozen=True, slots=True)
class Look:
    """What a step found without changing anything: whether there is nothing left to do, and why (not)."""

    done: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `look` only reads; `act` does what is left and returns, in a few words, what it did."""

    name: str
    look: Callable[[], Look]
    act: Callable[[Report], str]
    claimed: bool = False
    """Whether nobody else may change the deployment from this step on, until one that is not claimed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step went: `found` (nothing was left to do), `done`, or `would` (a dry run's view of what is left)."""

    step: str
    state: Literal["found", "done", "would"]
    text: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        """Return the outcome as documented in docs/reference/json.md."""
        return {"step": self.step, "state": self.state, "text": self.text, "seconds": round(self.seconds, 3)}


def run(
    steps: Sequence[Step],
    report: Report,
    *,
    dry_run: bool = False,
    go_on: str = "",
    claim: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Outcome]:
    """Run the steps in order and yield how each went; stop at the first that fails.

    Args:
        steps: the plan.
        report: where the steps report their progress.
        dry_run: only look, never act.
        go_on: the command that goes on after what failed was mended.
        claim: keeps others from changing the deployment; held during claimed steps, unless the run is dry.

    Raises:
        ZopsError: the failing step's own error, its message naming the step, its hint ending with `go_on`.
    """
    with ExitStack() as held:
        has_claim = False
        for step in steps:
            began = time.monotonic()
            try:
                if step.claimed and not has_claim and not dry_run:
                    held.enter_context(claim())
                elif not step.claimed:
                    held.close()
                has_claim = step.claimed
                look = step.look()
                if look.done or dry_run:
                    state: Literal["found", "would"] = "found" if look.done else "would"
                    yield Outcome(step.name, state, look.reason, time.monotonic() - began)
                    continue
                text = step.act(report)
            except ZopsError as error:
                error.message = f"step {step.name} failed: {error.message}"
                error.hint = "; then go on with: ".join(part for part in (error.hint, go_on) if part)
                error.details["step"] = step.name
                raise
            yield Outcome(step.name, "done", text, time.monotonic() - began)

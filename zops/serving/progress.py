"""Whether the workers get on: what a stuck queue is told by."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zops.serving.answers import Moved

if TYPE_CHECKING:
    from zops.serving.making import Making


class Progress:
    """Notes each forward and each picture; all times are those of the event loop, in seconds."""

    def __init__(self) -> None:
        self.made = 0
        """Pictures since the start."""
        self._moved_at = 0.0
        self._heard: dict[int, tuple[int | None, int]] = {}

    def begin(self, now: float) -> None:
        """Note that there is something to do again: what was idle for want of work was not stuck."""
        self._moved_at = now

    def hear(self, worker: int, batch: int | None, forwards: int, now: float) -> None:
        """Take note of how far a worker says that its batch is."""
        if self._heard.get(worker) != (batch, forwards):
            self._heard[worker] = (batch, forwards)
            if forwards:
                self._moved_at = now

    def finish(self, now: float) -> None:
        """Note a picture."""
        self.made += 1
        self._moved_at = now

    def facts(self, now: float, waiting: "Iterable[Making]", *, busy: bool) -> Moved:
        """Return how the queue moves, as /readyz shows it.

        Args:
            now: the time.
            waiting: requests that wait.
            busy: whether anything waits or runs.
        """
        arrived = min((making.arrived for making in waiting), default=None)
        return {
            "oldest_s": None if arrived is None else round(now - arrived, 3),
            "idle_s": round(now - self._moved_at, 3) if busy else None,
            "made": self.made,
        }

"""One request on its way: what its client can watch, and what the scheduler keeps of each of its pictures."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from zops.serving.errors import ApiError
from zops.serving.messages import Made, Picture, Preview, Shape

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request that succeeded."""

    made: tuple[Made, ...]
    """In the order of the request's pictures."""
    queue_s: float
    """From the request's arrival until its first picture was given to a worker."""
    retries: int
    """Pictures that were tried again because their worker was lost."""
    workers: tuple[int, ...]
    """Index of the worker that made each picture."""


@dataclass(eq=False, slots=True)
class Part:
    """One picture of a making, between its arrival and its answer."""

    making: "Making"
    picture: Picture
    losses: int = 0
    """Workers that were lost with this picture."""
    worker: int | None = None
    """The worker that makes it, or made it; None while it waits."""
    forwards: int = 0
    made: Made | None = None
    previews: int = 0

    @property
    def shape(self) -> Shape:
        """What it must have in common with the pictures of its batch."""
        return self.making.shape

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return self.made is None and not self.making.finished


class Making:
    """One request on its way. Made by `Scheduler.submit`; all calls belong into the event loop."""

    def __init__(
        self,
        shape: Shape,
        pictures: tuple[Picture, ...],
        client: str,
        *,
        arrived: float,
        deadline: float,
        on_end: Callable[["Making"], None],
    ) -> None:
        self.shape = shape
        self.client = client
        self.state: State = "queued"
        self.parts = tuple(Part(self, picture) for picture in pictures)
        self.arrived = arrived
        self.deadline = deadline
        """Moments on the event loop's clock."""
        self._began = arrived
        self._on_end = on_end
        self._error: ApiError | None = None
        self._events: list[Preview | Made] = []
        self._news: set[asyncio.Future[None]] = set()

    # --- what a client sees

    @property
    def finished(self) -> bool:
        """Whether it ended, well or not."""
        return self.state not in {"queued", "running"}

    @property
    def progress(self) -> float:
        """How much of it is done, 0 to 1, by forwards; a worker tells them twice a second."""
        planned = max(1, int(self.shape.forwards * self.shape.strength))
        done = sum(1.0 if part.made else min(1.0, part.forwards / planned) for part in self.parts)
        return done / len(self.parts)

    async def outcome(self) -> Outcome:
        """Wait for the end. Cancelling the waiting leaves the making as it is.

        Raises:
            ApiError: when it failed, was cancelled, or was not done within the request timeout.
        """
        while not self.finished:
            await self._wait()
        if self._error:
            raise self._error
        return Outcome(
            made=tuple(part.made for part in self.parts if part.made),
            queue_s=self._began - self.arrived,
            retries=sum(part.losses for part in self.parts),
            workers=tuple(part.worker for part in self.parts if part.worker is not None),
        )

    async def events(self) -> AsyncIterator[Preview | Made]:
        """Yield previews and finished pictures from the first on, as they come, until the making ends.

        Raises:
            ApiError: as `outcome` does.
        """
        seen = 0
        while True:
            while seen < len(self._events):
                yield self._events[seen]
                seen += 1
            if self.finished:
                break
            await self._wait()
        if self._error:
            raise self._error

    def cancel(self) -> None:
        """Drop what waits and stop what runs; does nothing when it has ended."""
        if not self.finished:
            self._end("cancelled", ApiError("cancelled", "the request was cancelled before its images were finished"))

    # --- what the scheduler tells it

    def begin(self, now: float) -> None:
        """Note that its first picture went to a worker."""
        self.state, self._began = "running", now

    @property
    def queue_s(self) -> float:
        """Seconds that it waited for its first worker, once it runs."""
        return self._began - self.arrived

    def show(self, part: Part, preview: Preview) -> None:
        """Pass a preview on, unless it is one of a second try that was seen already."""
        if preview.index >= part.previews:
            part.previews = preview.index + 1
            self._tell(preview)

    def add(self, part: Part, made: Made) -> None:
        """Take a finished picture; the last one ends the making well."""
        part.made = made
        self._tell(made)
        if all(other.made for other in self.parts):
            self._end("succeeded")

    def fail(self, error: ApiError) -> None:
        """End it with an error; does nothing when it has ended."""
        if not self.finished:
            self._end("failed", error)

    def _tell(self, event: Preview | Made) -> None:
        self._events.append(event)
        self._wake()

    def _end(self, state: State, error: ApiError | None = None) -> None:
        self.state, self._error = state, error
        self._wake()
        self._on_end(self)

    async def _wait(self) -> None:
        """Wait for news."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def _wake(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)

"""Clients that each ask an instance for one image after the other, and what they saw."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from zops.errors import ZopsError
from zops.health.client import Client

PROMPTS = (
    "a lighthouse on a cliff at sunrise, photograph",
    "portrait of an old fisherman, 85 mm, window light",
    "a street sign that says HARBOUR 7, rain at night",
)
RETRY_S = 0.2
"""What a client that was refused for a full queue waits; the server's own Retry-After is a whole second or more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One image as its client saw it: moments by the monotonic clock, and how many were made together."""

    began: float
    ended: float
    batch_size: int

    @property
    def seconds(self) -> float:
        """From the request to the decoded answer."""
        return self.ended - self.began


@dataclass
class Seen:
    """What all clients of one level saw within the window that counts."""

    window_s: float
    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        """Images that were answered within the window, a second of it."""
        return len(self.answers) / self.window_s


def load_with(url: str, clients: int, size: int, *, warm_s: float, window_s: float, timeout_s: float) -> Seen:
    """Have clients ask for images until the window is over, and return what they saw in it.

    Before the window they ask for `warm_s` seconds, and until each had an answer: queues fill, shapes become warm.
    An answer counts when it came within the window; a client's last request is waited for and does not count.

    Raises:
        ZopsError: the error of the first client, when no client had an answer.
    """
    crowd = _Crowd(url, size, timeout_s)
    threads = [threading.Thread(target=crowd.ask, args=(n,), name=f"zops-bench-{n}") for n in range(clients)]
    try:
        for thread in threads:
            thread.start()
        crowd.wait_warm(clients, time.monotonic() + warm_s)
        begin = time.monotonic()
        crowd.stopped.wait(window_s)
        end = time.monotonic()
    finally:
        crowd.stopped.set()
        for thread in threads:
            thread.join()
    return crowd.seen(begin, end)


class _Crowd:
    """Clients at work; each on a thread and a connection of its own."""

    def __init__(self, url: str, size: int, timeout_s: float) -> None:
        self.stopped = threading.Event()
        self._url, self._size, self._timeout_s = url, f"{size}x{size}", timeout_s
        self._lock = threading.Lock()
        self._answers: list[Answer] = []
        self._refused: list[float] = []
        self._failed: list[tuple[float, ZopsError]] = []
        self._answered: set[int] = set()
        self._change = threading.Condition(self._lock)

    def ask(self, number: int) -> None:
        client = Client(self._url, timeout_s=self._timeout_s)
        count = 0
        while not self.stopped.is_set():
            began = time.monotonic()
            seed = 1000 * number + count
            # The number makes each prompt a new one: a server may remember what it has encoded.
            prompt = f"{PROMPTS[seed % len(PROMPTS)]}, {seed}"
            try:
                made = client.generate(prompt, size=self._size, seed=seed)
            except ZopsError as error:
                self._take_error(number, error)
                self.stopped.wait(RETRY_S)
                continue
            ended, count = time.monotonic(), count + 1
            batch = int(made.images[0].receipt.get("batch_size", 1))
            with self._change:
                self._answers.append(Answer(began, ended, batch))
                self._answered.add(number)
                self._change.notify_all()

    def wait_warm(self, clients: int, until: float) -> None:
        """Wait until a moment has come and each client had an answer, or it is clear that this will not be."""
        last = until + self._timeout_s
        with self._change:
            while time.monotonic() < until or len(self._answered) < clients:
                if len(self._failed) >= clients or time.monotonic() > last:
                    return
                self._change.wait(0.05)

    def seen(self, begin: float, end: float) -> Seen:
        if not self._answers and self._failed:
            raise self._failed[0][1]
        return Seen(
            end - begin,
            [answer for answer in self._answers if begin <= answer.ended <= end],
            sum(begin <= moment <= end for moment in self._refused),
            [error.message for moment, error in self._failed if begin <= moment <= end],
        )

    def _take_error(self, number: int, error: ZopsError) -> None:
        with self._change:
            if error.code == "instance-busy":
                self._refused.append(time.monotonic())
                self._answered.add(number)  # by a refusal; the crowd is larger than the queue
            else:
                self._failed.append((time.monotonic(), error))
            self._change.notify_all()


def batch_sizes(answers: Sequence[Answer]) -> list[float]:
    """Return the size of the batch that each image was made in."""
    return [float(answer.batch_size) for answer in answers]

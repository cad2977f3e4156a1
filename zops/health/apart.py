"""Questions that are asked at the same time, each in a thread that nobody has to wait for."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Answer = TypeVar("Answer")


def ask_apart(
    questions: Sequence[Callable[[], Answer]], *, timeout_s: float | None = None
) -> Iterator[tuple[int, Answer]]:
    """Call each in a thread of its own and yield its number and what it returned, in the order of arrival.

    The threads are daemons: one that never ends keeps neither the caller nor the end of the program waiting, which is
    what a pool's threads would do.

    Args:
        questions: what is called.
        timeout_s: how long answers are waited for, all together; what comes later is not yielded. For ever when empty.

    Raises:
        BaseException: whatever one of them raised.
    """
    arrived: queue.SimpleQueue[tuple[int, Answer | None, BaseException | None]] = queue.SimpleQueue()

    def ask(number: int, question: Callable[[], Answer]) -> None:
        try:
            arrived.put((number, question(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            arrived.put((number, None, error))

    for number, question in enumerate(questions):
        threading.Thread(target=ask, args=(number, question), name=f"ask-{number}", daemon=True).start()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for _ in questions:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            number, answer, error = arrived.get(timeout=left)
        except queue.Empty:
            return
        if error is not None:
            raise error
        yield number, answer  # type: ignore[misc] # without an error there is an answer

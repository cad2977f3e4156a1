"""Work that stays in the background: at a given rate, and behind everything else that wants the disk."""

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from zops.cache.lanes import Stopped
from zops.cache.reading import CHUNK

# ioprio_set(2) has no wrapper in the C library; the numbers are the kernel's, by architecture.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13


def stand_back() -> None:
    """Let everything else go first: the lowest priority for the processor, idle for the disk; of this thread alone."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


class Pace:
    """Lets bytes pass at a rate: whoever wants some waits until they are due."""

    def __init__(
        self, rate: float, *, clock: Callable[[], float] = time.monotonic, wait: Callable[[float], object] | None = None
    ) -> None:
        self.stopped = threading.Event()
        self._rate = rate
        self._clock = clock
        self._wait = wait or self.stopped.wait
        self._due = clock()

    @property
    def step(self) -> int:
        """Bytes to ask for at a time: about a tenth of a second's worth, in whole blocks of a disk."""
        return max(64 << 10, min(CHUNK, int(self._rate / 10) // 4096 * 4096))

    def spend(self, count: int) -> None:
        """Wait until `count` more bytes may be read; time in which nothing was read is not made up for."""
        now = self._clock()
        self._due = max(self._due, now - self.step / self._rate) + count / self._rate
        if self._due > now:
            self._wait(self._due - now)
        if self.stopped.is_set():
            raise Stopped

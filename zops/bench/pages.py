"""Bring files into a known state of the page cache, and prove it by their residency: nothing is warm by assumption."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from zops.cache.pages import resident_bytes
from zops.errors import HostShort

State = Literal["cold", "warm"]
STATES: tuple[State, ...] = ("warm", "cold")
TOLERANCE = 0.001
"""Share of the bytes that may be in the wrong place: the kernel drops or keeps a page here and there."""
_EVICT_TRIES = 100
_STEP = 8 << 20


def share(files: Sequence[Path]) -> float:
    """Return the share of files' bytes that is in the page cache, 0 to 1."""
    total = sum(path.stat().st_size for path in files)
    return sum(resident_bytes(path) for path in files) / total if total else 1.0


def bring(files: Sequence[Path], state: State) -> float:
    """Bring files into a state and return the share that is in memory then.

    Raises:
        HostShort: `page-cache` when the kernel does not obey: too little memory, or a file that others keep mapped.
    """
    move: Callable[[Sequence[Path]], None] = {"cold": _evict, "warm": _read}[state]
    move(files)
    found = share(files)
    if abs(found - (state == "warm")) > TOLERANCE:
        raise HostShort(
            f"the page cache cannot be made {state}: {found:.1%} of the files are in memory",
            code="page-cache",
            hint="end what uses the files or the memory (zops ps), or leave those cases out with --only",
        )
    return found


def _evict(files: Sequence[Path]) -> None:
    """Drop files; pages that are on their way to the disk or from it are waited for."""
    for _ in range(_EVICT_TRIES):
        for path in files:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if share(files) <= TOLERANCE:
            return
        time.sleep(0.05)


def _read(files: Sequence[Path]) -> None:
    buffer = bytearray(_STEP)
    for path in files:
        if resident_bytes(path) >= path.stat().st_size:
            continue
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

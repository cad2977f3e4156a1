"""What every benchmark needs: a cold page cache, medians, memory, a table."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache; what is not on the disk yet is written first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def seconds(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], runs: int = 3) -> float:
    """Return the median of how long a call takes."""
    return statistics.median(seconds(call) for _ in range(runs))


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had, since it began or since `reset_peak_rss`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak_rss() -> None:
    """Forget the peak so far: from now on it is what the process has now, or more."""
    Path("/proc/self/clear_refs").write_text("5")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under their heads, columns two spaces apart."""
    table = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

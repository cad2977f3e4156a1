"""What every benchmark measures with: the page cache emptied or filled and proven so, medians, memory, a table."""

import ctypes
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from zops.cache.pages import resident_bytes


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, and prove it by their residency; pages that are on their way are waited for."""
    paths = list(paths)
    total = sum(path.stat().st_size for path in paths)
    for _ in range(100):
        for path in paths:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = sum(resident_bytes(path) for path in paths)
        if left <= total * 0.001:
            return
        time.sleep(0.05)
    raise AssertionError(f"{left} of {total} bytes are still in memory")


def warm(paths: Iterable[Path]) -> None:
    """Read files into the page cache, and prove it by their residency."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass
        # Some kernels drop a few pages of their own accord.
        assert resident_bytes(path) >= path.stat().st_size * 0.99, f"{path} does not stay in memory"


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_seconds(work: Callable[[], object], runs: int = 3, *, before: Callable[[], object] = lambda: None) -> float:
    """Return the median of how long a piece of work takes; `before` is called before each run and not counted."""
    taken = []
    for _ in range(runs):
        before()
        taken.append(seconds(work))
    return statistics.median(taken)


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had, since it began or since `reset_peak_rss`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak_rss() -> None:
    """Forget the peak so far: from now on it is what the process has now, or more."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_child_rss_bytes() -> int:
    """Return the largest resident set that any child that ended had so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def sync() -> None:
    """Write out everything that is dirty, so that one measurement does not pay for the one before."""
    ctypes.CDLL(None).sync()


def describe_host() -> str:
    """Return what the figures were measured on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].partition(": ")[2] if names else "unknown CPU"
    kernel = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Linux {kernel}"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their heads, columns two spaces apart."""
    table = [tuple(columns), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

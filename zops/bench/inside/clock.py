"""Time and memory in a measuring process, on a GPU or without one."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

GB = 1e9
_PAUSE_S = 0.01


def on_gpu() -> bool:
    """Tell whether this process computes on a GPU."""
    return torch.cuda.is_available()


def wait() -> None:
    """Wait until the GPU has nothing left to do."""
    if on_gpu():
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes, the GPU's part included."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def repeated(work: Callable[[], object], *, least: int, most: int, budget_s: float) -> list[float]:
    """Return the times of `least` calls, and of more up to `most` while `budget_s` lasts."""
    taken: list[float] = []
    while len(taken) < least or (len(taken) < most and sum(taken) + taken[-1] <= budget_s):
        taken.append(seconds(work))
    return taken


def gpu_seconds(work: Callable[[], object], *, runs: int = 20, warm: int = 3) -> list[float]:
    """Return the times of single pieces of GPU work by events, without the launch; wall time where there is no GPU."""
    for _ in range(warm):
        work()
    if not on_gpu():
        return [seconds(work) for _ in range(3)]
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    wait()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def gpu_peak_gb(work: Callable[[], object]) -> float:
    """Return the most GPU memory that was allocated during one call, all that lay there before included."""
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() / GB


def anonymous_bytes() -> int:
    """Return this process' anonymous memory: heap and pinned buffers, not the page cache that it maps."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


@dataclass
class Watched:
    """The most anonymous host memory above what there was, in bytes; complete after the `with` block."""

    peak: int = 0


@contextmanager
def watch_memory() -> Iterator[Watched]:
    """Sample the anonymous memory of this process, a hundred times a second."""
    before, ended, watched = anonymous_bytes(), threading.Event(), Watched()

    def look() -> None:
        while True:
            watched.peak = max(watched.peak, anonymous_bytes() - before)
            if ended.wait(_PAUSE_S):
                return

    watcher = threading.Thread(target=look, name="zops-bench-memory")
    watcher.start()
    try:
        yield watched
    finally:
        ended.set()
        watcher.join()
        watched.peak = max(watched.peak, anonymous_bytes() - before)

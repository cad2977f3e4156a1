"""Stages of a long measurement on a lent GPU: each on its own clock and in its own try, results on disk after each."""

import gc
import json
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Overdue(Exception):
    """Raised in a stage that takes longer than it may."""


class Book:
    """What was measured so far; written to a file after every stage, so that nothing is lost by what fails later."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self.path = path
        self.began = time.monotonic()
        self.budget_s = budget_s
        self.results: dict[str, Any] = {}

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.began)

    @contextmanager
    def stage(self, name: str, limit_s: float):
        """Yield a dict for the stage's figures; skip nothing, but stop at the limit or at the end of the budget."""
        figures: dict[str, Any] = {}
        self.results[name] = figures
        limit = int(min(limit_s, self.left_s))
        began = time.monotonic()
        try:
            if limit < 3:
                raise Overdue("no time left")
            signal.signal(signal.SIGALRM, _overdue)
            signal.alarm(limit)
            yield figures
        except BaseException as trouble:
            if isinstance(trouble, KeyboardInterrupt):
                raise
            figures["trouble"] = f"{type(trouble).__name__}: {trouble}"[:500]
            print(f"!! {name}: {figures['trouble']}", file=sys.stderr)
            if not isinstance(trouble, Overdue):
                traceback.print_exc()
        finally:
            signal.alarm(0)
            figures["took_s"] = round(time.monotonic() - began, 2)
            free()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.results, indent=1, default=str))
            print(f"== {name} [{figures['took_s']} s, {self.left_s:.0f} s left] {_short(figures)}", flush=True)


def _overdue(_number: int, _frame: Any) -> None:
    raise Overdue("longer than the stage may take")


def _short(figures: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in figures.items() if k != "took_s"}, default=str)
    return text if len(text) < 1500 else text[:1500] + "..."


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], *, runs: int = 5, warm: int = 2) -> dict[str, float]:
    """Return median, fastest and 99th percentile (the slowest, below 100 runs) of a call, in seconds."""
    for _ in range(warm):
        work()
    taken = []
    for _ in range(runs):
        wait()
        began = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - began)
    taken.sort()
    return {
        "s": round(statistics.median(taken), 5),
        "least_s": round(taken[0], 5),
        "p99_s": round(taken[min(len(taken) - 1, int(len(taken) * 0.99))], 5),
        "n": runs,
    }


def gpu_seconds(work: Callable[[], object], *, runs: int = 20, warm: int = 3) -> float:
    """Return the median time of a piece of GPU work by events, seconds."""
    if not torch.cuda.is_available():
        return timed(work, runs=3, warm=1)["s"]
    for _ in range(warm):
        work()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    wait()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def steady_seconds(work: Callable[[], object], lasting_s: float = 1.0) -> float:
    """Return the mean time of a piece of GPU work over as long as an image takes, seconds.

    A card that may draw 700 W does not hold the clock of the first milliseconds.
    """
    runs = max(3, int(lasting_s / gpu_seconds(work, runs=5)))

    def again() -> None:
        for _ in range(runs):
            work()

    return gpu_seconds(again, runs=1, warm=1) / runs


def clocks() -> str:
    query = "--query-gpu=name,driver_version,clocks.sm,power.draw,temperature.gpu"
    argv = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as trouble:
        return str(trouble)


# First match decides. Names are those of kernels as the profiler shows them; a Triton kernel's is its function's.
_ROWS = {"_norm", "_add_norm", "_gated", "_rotate", "_quantise", "_sum_pieces", "_sum_groups", "_apply", "_add"}
_CLASSES = (
    ("attention", ("attention", "flash", "fmha", "sdpa", "softmax")),
    ("convolutions", ("conv", "fprop", "implicit_gemm", "nhwc")),
    ("products", ("gemm", "gemv", "nvjet", "cutlass", "scaled_mm", "xmma", "cublas", "splitk")),
    ("copies", ("memcpy", "memset")),
)


def _class_of(kernel: str) -> str:
    if kernel in _ROWS:
        return "fused rows"
    low = kernel.lower()
    return next((kind for kind, words in _CLASSES if any(word in low for word in words)), "other")


def profile(work: Callable[[], object]) -> dict[str, Any]:
    """Return milliseconds of GPU time by class, the largest kernels, and how long the GPU had nothing to do."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    if not torch.cuda.is_available():
        return {}
    work()
    wait()
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        began = time.perf_counter()
        work()
        wait()
        wall = time.perf_counter() - began
    by_class: dict[str, float] = {}
    kernels = []
    for row in recorded.key_averages():
        spent = row.self_device_time_total / 1e3
        if spent <= 0:
            continue
        kind = _class_of(row.key)
        by_class[kind] = by_class.get(kind, 0.0) + spent
        kernels.append((round(spent, 3), row.count, row.key[:90]))
    busy = sum(by_class.values())
    return {
        "wall_ms": round(wall * 1e3, 2),
        "busy_ms": round(busy, 2),
        "idle_ms": round(wall * 1e3 - busy, 2),
        "by_class_ms": {kind: round(spent, 2) for kind, spent in sorted(by_class.items(), key=lambda pair: -pair[1])},
        "largest": sorted(kernels, reverse=True)[:28],
    }

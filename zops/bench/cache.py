"""Row 5: what the cache gives: from the disk, from the page cache, slim, verified, and as tensors on the device."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zops.bench.load import load_once, runs_of
from zops.bench.machine import weight_files
from zops.bench.pages import STATES, State, bring
from zops.bench.run import Bench, Case
from zops.cache.manifest import read_manifest
from zops.cache.reading import CHUNK, OpenFile, new_buffer
from zops.cache.verify import verify
from zops.cache.warm import warm
from zops.errors import SnapshotMissing
from zops.events import silent, task
from zops.host.disk import measure_read

READERS = 4
METHODS = {
    "disk": "one reader, past the page cache (O_DIRECT), for a second",
    "page cache": f"{READERS} readers, all weights, from the page cache into buffers",
    "zops cache warm": "from a cold page cache to all in memory",
    "verify quick": "zops cache verify: size, time and inode of each file, headers of the weights",
    "verify deep": "zops cache verify --deep: SHA-256 of every byte",
    "verify reread": "zops cache verify --reread: BLAKE3 of every byte",
    "tensors on the device": "from the first read to the last tensor on the device, in a fresh process",
}
Seconds = Callable[[], float]


def measure(bench: Bench) -> None:
    """Measure every step on the full and, where there is one, on the slim snapshot."""
    cases = [case for case in _cases(bench) if bench.wants("cache", case)]
    with task(bench.report, "cache", "measuring the cache", total=len(cases), unit="cases") as counter:
        for case in cases:
            with bench.attempt("cache", case, f"{case['step']}, {case['weights']}, {case['page cache']}"):
                _measure_case(bench, case)
            counter.advance(1)


def _cases(bench: Bench) -> list[Case]:
    found: list[Case] = []
    steps: dict[str, tuple[State, ...]] = {
        "disk": ("cold",), "zops cache warm": ("cold",), "page cache": ("warm",), "verify quick": ("warm",),
        "verify deep": STATES, "verify reread": ("warm",), "tensors on the device": STATES,
    }  # fmt: skip
    for weights in bench.request.snapshots:
        for step, states in steps.items():
            kept = states[:1] if bench.request.quick and step == "verify deep" else states
            found += [{"step": step, "weights": weights, "page cache": state} for state in kept]
    return found


def _measure_case(bench: Bench, case: Case) -> None:
    snapshot = bench.request.snapshots[case["weights"]]
    step, state = case["step"], case["page cache"]
    files = weight_files(snapshot)
    total = sum(path.stat().st_size for path in files)
    if step == "disk":
        largest = max(files, key=lambda path: path.stat().st_size)
        rate = measure_read(largest)
        if rate is None:
            raise SnapshotMissing(f"{largest} is too small for a read to tell anything")
        bench.add("cache", case, "rate", [rate / 1e9], unit="GB/s", better="more", method=METHODS[step])
        return
    if step == "tensors on the device":
        taken = _tensors(bench, case)
    elif step == "zops cache warm":
        taken = [_timed(files, "cold", lambda: warm(snapshot, silent).seconds)]
    elif step == "page cache":
        taken = [_timed(files, "warm", lambda: _read_all(files)) for _ in range(runs_of(bench))]
    else:
        taken = [_timed(files, state, lambda: _verify(snapshot, step)) for _ in range(runs_of(bench))]  # type: ignore[arg-type] # one of STATES
    bench.add("cache", case, "time", taken, unit="s", better="less", method=METHODS[step])
    if step != "verify quick":
        rates = [total / each / 1e9 for each in taken]
        bench.add("cache", case, "rate", rates, unit="GB/s", better="more", method=METHODS[step])


def _timed(files: list[Path], state: State, work: Seconds) -> float:
    bring(files, state)
    return work()


def _tensors(bench: Bench, case: Case) -> list[float]:
    """Return what the loads of this run have told already, else load now."""
    known = bench.result.find(
        "load", "tensors on the device", way="zops", weights=case["weights"], page_cache=case["page cache"]
    )
    if known:
        return list(known.samples)
    state: State = "cold" if case["page cache"] == "cold" else "warm"
    runs = range(runs_of(bench))
    return [load_once(bench, "zops", case["weights"], state)["tensors on the device"] for _ in runs]


def _verify(snapshot: Path, step: str) -> float:
    if read_manifest(snapshot) is None:
        raise SnapshotMissing(f"{snapshot} has no manifest to verify it by", hint="write one with: zops cache pin")
    began = time.monotonic()
    verify(snapshot, deep=step == "verify deep", reread=step == "verify reread", report=silent).require()
    return time.monotonic() - began


def _read_all(files: list[Path]) -> float:
    """Read files in chunks by several threads and return the seconds."""
    chunks = [(path, start) for path in files for start in range(0, path.stat().st_size, CHUNK)]

    def read(mine: list[tuple[Path, int]]) -> None:
        buffer = new_buffer()
        opened: dict[Path, OpenFile] = {}
        try:
            for path, start in mine:
                stream = opened.setdefault(path, OpenFile(path)) if path not in opened else opened[path]
                stream.copy_cached(buffer, start, min(CHUNK, stream.size - start))
        finally:
            for stream in opened.values():
                stream.close()

    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(read, chunks[index::READERS]) for index in range(READERS)]:
            done.result()
    return time.monotonic() - began

"""How fast a snapshot is brought into the page cache, and how fast it is told how much of it is there.

python -m benchmarks.cache.warm [--size-gb 4] [--dir DIR] [--runs 3] [--json FILE]
"""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

from benchmarks.cache.figures import Figure, rounds, run, write_cache
from benchmarks.measure import evict
from zops.cache.warm import residency, warm
from zops.events import silent

STEP = 8 << 20
REAL_SIZE = 33_000_000_000


def read_ahead(shards: list[Path]) -> None:
    """Bring files in by readahead(2), 8 MiB at a time, in two threads that take the next file when they have one."""
    libc = ctypes.CDLL(None)
    queue = sorted(shards, key=lambda path: path.stat().st_size)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not queue:
                    return
                path = queue.pop()
            descriptor = os.open(path, os.O_RDONLY)
            for offset in range(0, path.stat().st_size, STEP):
                libc.readahead(descriptor, ctypes.c_int64(offset), ctypes.c_size_t(STEP))
            os.close(descriptor)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(root: Path, size_gb: float, runs: int) -> list[Figure]:
    cache = root / "cache"
    cache.mkdir()
    shards = write_cache(cache, size_gb)
    total = sum(path.stat().st_size for path in shards)
    shares: list[float] = []

    def be_cold() -> None:
        shares.append(residency(cache).share)
        evict(shards)

    took = rounds(
        {
            "warm": lambda: warm(cache, silent, room_bytes=lambda: 1 << 50),
            "readahead": lambda: read_ahead(shards),
            "cat": lambda: subprocess.run(["cat", *map(str, shards)], stdout=subprocess.DEVNULL, check=True),
        },
        runs, be_cold,
    )  # fmt: skip
    assert min(shares[1:]) > 0.99, f"not everything was brought in: {shares}"

    def rate(seconds: float) -> str:
        return f"{total / seconds / 1e9:.2f} GB/s"

    return [
        Figure("warm", rate(took["warm"]), f"two threads of readahead(2) {rate(took['readahead'])}",
               took["readahead"] / took["warm"], 0.9),
        Figure("warm", rate(took["warm"]), f"cat {rate(took['cat'])}", took["cat"] / took["warm"], 0),
    ]  # fmt: skip


def measure_residency(root: Path, runs: int) -> Figure:
    """Measure how long it takes to tell the residency of files as large as the real ones (sparse: it reads nothing)."""
    cache = root / "large"
    (cache / "transformer").mkdir(parents=True)
    (cache / "model_index.json").write_text("{}")
    for number in range(18):
        with (cache / "transformer" / f"{number}.safetensors").open("wb") as stream:
            stream.truncate(REAL_SIZE // 18)
    took = rounds({"residency": lambda: residency(cache)}, max(runs, 5), lambda: None)["residency"]
    return Figure("residency of 33 GB", f"{took * 1000:.2f} ms", "20 ms", 0.02 / took, 1)


def main() -> int:
    """Measure, print, and return 1 when a bar was missed."""
    return run(
        __doc__.partition("\n")[0],
        lambda root, size_gb, runs: [*measure(root, size_gb, runs), measure_residency(root, runs)],
    )


if __name__ == "__main__":
    sys.exit(main())

"""How fast a snapshot is verified, beside what the hash, the disk and `sha256sum` do in the same run.

python -m benchmarks.cache.verify [--size-gb 4] [--dir DIR] [--runs 3] [--json FILE]
"""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.cache.figures import Figure, read_all, rounds, run, write_cache
from benchmarks.measure import evict, peak_rss_bytes, reset_peak_rss
from zops.cache.hashing import digest_files
from zops.cache.reading import CHUNK, OpenFile, new_buffer
from zops.cache.verify import pin, verify
from zops.cache.warm import residency
from zops.events import silent

MEMORY = 256 << 20
# A page or two that the kernel dropped do not make a cache cold.
WARM = 0.9999


def side_by_side(work: Callable[[int], None]) -> None:
    """Do the work in two threads, and wait for both."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hash_memory(total: int) -> Callable[[], None]:
    """Return what hashes as many bytes as the cache has, out of memory, in two threads, by OpenSSL."""
    content = os.urandom(MEMORY)

    def work(_number: int) -> None:
        digest, left = hashlib.sha256(), total // 2
        while left > 0:
            digest.update(memoryview(content)[: min(left, MEMORY)])
            left -= MEMORY

    return lambda: side_by_side(work)


def read_disk(shards: list[Path]) -> None:
    """Read the cache from the disk, past the page cache, in two threads, into huge pages."""
    halves = ((shards[0], shards[3], shards[4], shards[5]), (shards[1], shards[2]))

    def work(number: int) -> None:
        buffer = new_buffer()
        for path in halves[number]:
            file = OpenFile(path)
            for start in range(0, file.size, CHUNK):
                file.from_disk(buffer, start, min(CHUNK, file.size - start))
            file.close()

    side_by_side(work)


def sha256sum(shards: list[Path]) -> None:
    """Do what people do: `sha256sum`, two processes side by side."""
    subprocess.run(
        ["xargs", "-0", "-n1", "-P2", "sha256sum"], input="\0".join(map(str, shards)).encode(),
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def measure(root: Path, size_gb: float, runs: int) -> list[Figure]:
    cache = root / "cache"
    cache.mkdir()
    shards = write_cache(cache, size_gb)
    total = sum(path.stat().st_size for path in shards)
    pin(cache, "owner/name", "r1", silent)
    paths = {path.name: path for path in shards}

    def deep() -> None:
        verify(cache, deep=True, report=silent).require()

    def reread() -> None:
        verify(cache, deep=False, reread=True, report=silent).require()

    def be_warm() -> None:
        for _ in range(5):  # the kernel may still be dropping what was evicted a moment ago
            if residency(cache).share < WARM:
                read_all(shards)
        assert residency(cache).share >= WARM, f"the cache does not stay in memory: {residency(cache)}"

    def be_cold() -> None:
        evict(shards)

    peaks = []
    for prepare in (be_warm, be_cold):
        prepare()
        reset_peak_rss()
        before = peak_rss_bytes()
        deep()
        peaks.append((peak_rss_bytes() - before) / len(os.sched_getaffinity(0)))
    memory = max(peaks)
    warm = rounds(
        {
            "memory": hash_memory(total), "deep": deep, "reread": reread, "sha256sum": lambda: sha256sum(shards),
            "both": lambda: digest_files(paths, ("sha256", "blake3"), silent, ""),
        },
        runs, be_warm,
    )  # fmt: skip
    cold = rounds(
        {
            "memory": hash_memory(total), "disk": lambda: read_disk(shards), "deep": deep, "reread": reread,
            "sha256sum": lambda: sha256sum(shards),
        },
        runs, be_cold,
    )  # fmt: skip

    def rate(seconds: float) -> str:
        return f"{total / seconds / 1e9:.2f} GB/s"

    limit = max(cold["disk"], cold["memory"])
    slower = "disk" if cold["disk"] > cold["memory"] else "SHA-256 in memory"
    return [
        Figure("deep, warm", rate(warm["deep"]), f"SHA-256 in memory {rate(warm['memory'])}",
               warm["memory"] / warm["deep"], 0.9),
        Figure("deep, warm, recording BLAKE3", rate(warm["both"]), f"SHA-256 in memory {rate(warm['memory'])}",
               warm["memory"] / warm["both"], 0),
        Figure("deep, cold", rate(cold["deep"]), f"{slower} {rate(limit)}", limit / cold["deep"], 0.9),
        Figure("deep, warm", rate(warm["deep"]), f"two sha256sum {rate(warm['sha256sum'])}",
               warm["sha256sum"] / warm["deep"], 4),
        Figure("deep, cold", rate(cold["deep"]), f"two sha256sum {rate(cold['sha256sum'])}",
               cold["sha256sum"] / cold["deep"], 4),
        Figure("reread, warm", rate(warm["reread"]), f"deep {rate(warm['deep'])}", warm["deep"] / warm["reread"], 2.5),
        Figure("reread, cold", rate(cold["reread"]), f"disk {rate(cold['disk'])}", cold["disk"] / cold["reread"], 0),
        Figure("memory a thread", f"{memory / 2**20:.0f} MiB", "64 MiB", (64 << 20) / max(memory, 1), 1),
    ]  # fmt: skip


def measure_quick(root: Path, runs: int) -> Figure:
    """Measure the quick verification of a thousand files, a tenth of them weights."""
    cache = root / "many"
    cache.mkdir()
    (cache / "model_index.json").write_text("{}")
    (cache / "tokenizer").mkdir()
    (cache / "transformer").mkdir()
    for number in range(999):
        if number % 10:
            (cache / "tokenizer" / f"{number}.json").write_text(str(number))
        else:
            header = b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
            (cache / "transformer" / f"{number}.safetensors").write_bytes(
                len(header).to_bytes(8, "little") + header + b"x"
            )
    assert len(pin(cache, "owner/name", "r1", silent).files) == 1000

    def quick() -> None:
        verify(cache, deep=False, report=silent).require()

    took = rounds({"quick": quick}, max(runs, 5), lambda: None)["quick"]
    return Figure("quick, 1,000 files", f"{took * 1000:.1f} ms", "50 ms", 0.05 / took, 1)


def main() -> int:
    """Measure, print, and return 1 when a bar was missed."""
    return run(
        __doc__.partition("\n")[0],
        lambda root, size_gb, runs: [*measure(root, size_gb, runs), measure_quick(root, runs)],
    )


if __name__ == "__main__":
    sys.exit(main())

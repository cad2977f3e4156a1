"""A cache in the shape of the real one, and figures beside the bars that they are held to."""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import print_table, seconds

# Shares of the six shards: three of fp32 with 25 % each, three of bf16 with a quarter of the whole together.
SHARES = (0.25, 0.25, 0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3)


@dataclass(frozen=True)
class Figure:
    """What was measured, beside what it is compared to. `ratio` is better the larger it is; `bar` 0 is no bar."""

    what: str
    measured: str
    compared_to: str
    ratio: float
    bar: float

    @property
    def verdict(self) -> str:
        return "" if not self.bar else "PASS" if self.ratio >= self.bar else "missed"


def write_cache(root: Path, size_gb: float) -> list[Path]:
    """Write a snapshot of six shards of random bytes, and return them."""
    (root / "model_index.json").write_text("{}")
    noise = os.urandom(32 << 20)
    shards = []
    for number, share in enumerate(SHARES):
        length = int(size_gb * 1e9 * share)
        tensor = {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}
        header = json.dumps({f"w{number}": tensor}).encode()
        path = root / "transformer" / f"shard-{number}.safetensors"
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, length, len(noise)):
                stream.write(number.to_bytes(4, "little"))
                stream.write(noise[: min(len(noise), length - start) - 4])
            os.fsync(stream.fileno())
        shards.append(path)
    return shards


def read_all(paths: Sequence[Path]) -> None:
    """Bring files into the page cache by reading them."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def rounds(cases: dict[str, Callable[[], object]], runs: int, before: Callable[[], None]) -> dict[str, float]:
    """Return the median seconds of each case; they take turns, so that what else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, call in cases.items():
            before()
            times[name].append(seconds(call))
    return {name: statistics.median(each) for name, each in times.items()}


def show(figures: Sequence[Figure], target: Path | None) -> int:
    """Print the figures, write them as JSON where asked to, and return 1 when a bar was missed."""
    rows = [
        (f.what, f.measured, f.compared_to, f"{f.ratio:.2f}", f"{f.bar:g}" if f.bar else "", f.verdict) for f in figures
    ]
    print_table(("what", "measured", "compared to", "ratio", "bar", ""), rows)
    if target:
        target.write_text(json.dumps([{**asdict(f), "verdict": f.verdict} for f in figures], indent=1) + "\n")
    return int(any(f.verdict == "missed" for f in figures))


def run(description: str, measure: Callable[[Path, float, int], Sequence[Figure]]) -> int:
    """Read the options that these benchmarks share, measure in a directory of its own, and show the figures.

    Args:
        description: what is measured, for --help.
        measure: is given the directory, the size of the cache in GB and the number of rounds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--dir", type=Path, help="where to put the cache (default: the temporary directory)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="zops-bench-", dir=given.dir))
    try:
        figures = measure(root, given.size_gb, given.runs)
    finally:
        shutil.rmtree(root)
    return show(figures, given.json)


__all__ = ["Figure", "read_all", "rounds", "run", "show", "write_cache"]

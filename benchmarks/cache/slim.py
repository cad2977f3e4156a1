"""How fast a slim snapshot is made, against `cp` of the same bytes in the same run, and in how much memory.

    python -m benchmarks.cache.slim DIRECTORY [--size-gb 2] [--runs 3] [--json FILE]

Makes a float32 snapshot of the size that is asked for in DIRECTORY, which must be on the disk that is to be measured,
and removes it afterwards. "cold" means that nothing of the snapshot is in the page cache when the work begins, proven
by its residency; "warm" that all of it is. `cp` copies the snapshot with `--reflink=never`; both sides end with
everything flushed to the disk, since slim does not end before.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import describe_host, evict, median_seconds, peak_child_rss_bytes, print_table, sync, warm
from zops.cache.slim import plan_slim
from zops.cache.verify import pin
from zops.events import silent

SHARDS = 3
TENSOR_ELEMENTS = 3840 * 2560
# A process of its own, so that its memory can be told; it prints how long it worked, without its start.
CHILD = """
import sys
from pathlib import Path
from zops.cache.slim import plan_slim, slim
from zops.events import silent
print(slim(plan_slim(Path(sys.argv[1])), silent).seconds)
"""
RATIO_WANTED = 0.7
RSS_WANTED = 1_000_000_000


def make_snapshot(root: Path, size: int) -> Path:
    """Write a pinned snapshot of `size` bytes: a sharded float32 transformer and what belongs to it."""
    folder = root / "transformer"
    folder.mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (folder / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    block = (np.random.default_rng(0).standard_normal(TENSOR_ELEMENTS, dtype=np.float32) * 0.02).tobytes()
    weights = {}
    for shard in range(1, SHARDS + 1):
        name = f"diffusion_pytorch_model-{shard:05d}-of-{SHARDS:05d}.safetensors"
        tensors = [f"layers.{shard}.{i}.weight" for i in range(max(1, size // SHARDS // len(block)))]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for i, tensor in enumerate(tensors):
            span = [i * len(block), (i + 1) * len(block)]
            header[tensor] = {"dtype": "F32", "shape": [3840, 2560], "data_offsets": span}
            weights[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _ in tensors:
                stream.write(block)
    index = {"metadata": {"total_size": len(weights) * len(block)}, "weight_map": weights}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    pin(root, "bench/slim", "r1", silent)
    return root


def measure(root: Path, size: int, runs: int) -> dict[str, Any]:
    """Return the figures."""
    parent = make_snapshot(root / "r1", size)
    files = [path for path in parent.rglob("*") if path.is_file()]
    plan = plan_slim(parent)
    copy = root / "copy"
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def clean() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(plan.target, ignore_errors=True)
        sync()

    def copy_it() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", parent, copy], check=True)
        subprocess.run(["sync", *(str(path) for path in copy.rglob("*") if path.is_file())], check=True)

    def slim_it(prepare: Callable[[], None]) -> float:
        prepare()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, parent], env=environ, check=True, stdout=subprocess.PIPE, text=True
        )
        return float(done.stdout)

    figures: dict[str, Any] = {"host": describe_host(), "parent_bytes": plan.manifest.size, "slim_bytes": plan.size}
    for state, prepare in (("cold", evict), ("warm", warm)):

        def before(prepare: Any = prepare) -> None:
            clean()
            prepare(files)

        figures[state] = {
            "cp_s": median_seconds(copy_it, runs, before=before),
            "slim_s": statistics.median(slim_it(before) for _ in range(runs)),
        }
        figures[state]["ratio"] = figures[state]["cp_s"] / figures[state]["slim_s"]
    figures["peak_rss_bytes"] = peak_child_rss_bytes()
    return figures


def main() -> int:
    """Measure, print, and return 1 when a figure is not what is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-gb", type=float, default=6.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, dest="json_file", metavar="FILE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory, prefix="zops-bench-slim-") as root:
        figures = measure(Path(root), int(asked.size_gb * 1e9), asked.runs)
    gigabytes = figures["parent_bytes"] / 1e9
    print(f"slim of {gigabytes:.2f} GB float32, medians of {asked.runs}; {figures['host']}")
    rows = [
        (
            state,
            f"{gigabytes / figures[state]['cp_s']:.2f} GB/s",
            f"{gigabytes / figures[state]['slim_s']:.2f} GB/s",
            f"{figures[state]['ratio']:.2f}",
            f">= {RATIO_WANTED}",
        )
        for state in ("cold", "warm")
    ]
    print_table(("page cache", "cp + sync", "slim", "slim / cp", "wanted"), rows)
    print(f"peak memory: {figures['peak_rss_bytes'] / 1e6:.0f} MB (wanted: < {RSS_WANTED / 1e6:.0f} MB)")
    if asked.json_file:
        asked.json_file.write_text(json.dumps(figures, indent=1) + "\n")
    well = all(figures[state]["ratio"] >= RATIO_WANTED for state in ("cold", "warm"))
    return 0 if well and figures["peak_rss_bytes"] < RSS_WANTED else 1


if __name__ == "__main__":
    sys.exit(main())

"""How fast verified weights get onto the GPU, against what users would use instead, in the same run.

    python -m benchmarks.gpu.load SNAPSHOT... [--runs 3] [--cold] [--json FILE]

Each way runs in a fresh process, its imports and the start of CUDA are not counted; "warm" means that every file is in
the page cache, proven by its residency, "cold" that none is. Host memory is anonymous memory above what the process
had before the load (pinned buffers count, the page cache does not); GPU memory is the allocator's peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import describe_host, evict, print_table, warm


def stream(snapshot: Path, *, verify: bool = False, readers: int | None = None) -> dict[str, Any]:
    """zops: the pipeline, complete and on the GPU."""
    import torch

    from zops.cache.manifest import read_manifest
    from zops.serving import assemble
    from zops.serving.streaming import WeightStream

    files = assemble.weight_files(snapshot)
    manifest = read_manifest(snapshot) if verify else None
    paths = [path for group in files.values() for path in group]
    weights = WeightStream(snapshot, paths, "cuda", torch.bfloat16, verify=manifest, readers=readers)
    models = {component: assemble.make_empty(snapshot, component) for component in files}
    rest = assemble.load_rest(snapshot, list(files))
    built = time.perf_counter()
    streamed = weights.result()
    joined = time.perf_counter()
    for component in files:
        assemble.give_weights(models[component], component, streamed.take(component), "cuda")
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline(**models, **rest)
    torch.cuda.synchronize()
    print(f"waited {joined - built:.3f} s, gave in {time.perf_counter() - joined:.3f} s", file=sys.stderr)
    return {"pipeline": pipeline, "stream_s": streamed.seconds, "verified_by": streamed.verified_by}


def seed_way(snapshot: Path) -> dict[str, Any]:
    """The seed's way."""
    import torch
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(str(snapshot), dtype=torch.bfloat16, low_cpu_mem_usage=True)
    return {"pipeline": pipeline.to("cuda")}


def device_map(snapshot: Path) -> dict[str, Any]:
    """diffusers straight to the GPU."""
    import torch
    from diffusers import ZImagePipeline

    return {"pipeline": ZImagePipeline.from_pretrained(str(snapshot), dtype=torch.bfloat16, device_map="cuda")}


def runai(snapshot: Path) -> dict[str, Any]:
    """Run:ai Model Streamer: tensors only, no models."""
    from runai_model_streamer import SafetensorsStreamer

    from zops.serving import assemble

    paths = [str(snapshot / path) for group in assemble.weight_files(snapshot).values() for path in group]
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        return {"tensors": {name: tensor.to("cuda") for name, tensor in streamer.get_tensors()}}


WAYS: dict[str, Callable[..., dict[str, Any]]] = {
    "zops": stream,
    "zops, 4 readers": lambda snapshot: stream(snapshot, readers=4),
    "zops, 12 readers": lambda snapshot: stream(snapshot, readers=12),
    "zops, verified": lambda snapshot: stream(snapshot, verify=True),
    "runai-model-streamer": runai,
    "device_map=cuda": device_map,
    "seed: low_cpu_mem_usage, .to(cuda)": seed_way,
}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


def child(way: str, snapshot: Path) -> None:
    import diffusers
    import torch
    import transformers

    _ = diffusers.ZImagePipeline, transformers.AutoModel
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    before, peak, ended = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = WAYS[way](snapshot)
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    ended.set()
    watcher.join()
    figures = {k: v for k, v in kept.items() if isinstance(v, float | str)}
    print(json.dumps({"s": taken, "host_gb": (peak - before) / 1e9, "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}
                     | figures))  # fmt: skip


def measure(way: str, snapshot: Path, runs: int, *, cold: bool) -> dict[str, Any]:
    results = []
    files = sorted(snapshot.rglob("*.safetensors"))
    for _ in range(runs):
        (evict if cold else warm)(files)
        command = [sys.executable, "-m", "benchmarks.gpu.load", "--child", way, str(snapshot)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
        if ended.returncode != 0:
            print(ended.stderr[-1500:], file=sys.stderr)
            return {"error": ended.stderr.strip().splitlines()[-1][:200] if ended.stderr.strip() else "?"}
        print(way, ended.stdout.strip().splitlines()[-1], ended.stderr.strip()[-200:], file=sys.stderr, flush=True)
        results.append(json.loads(ended.stdout.strip().splitlines()[-1]))
    return {"s": statistics.median(r["s"] for r in results), "all_s": [r["s"] for r in results],
            "host_gb": max(r["host_gb"] for r in results), "gpu_gb": max(r["gpu_gb"] for r in results)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshots", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], Path(asked.child[1]))
        return
    print(describe_host())
    rows, results = [], {}
    for snapshot in asked.snapshots:
        total = sum(path.stat().st_size for path in snapshot.rglob("*.safetensors"))
        for way in asked.ways:
            result = measure(way, snapshot, asked.runs, cold=asked.cold)
            results[f"{snapshot.name}: {way}"] = result | {"bytes": total, "cold": asked.cold}
            if asked.json:
                asked.json.write_text(json.dumps(results, indent=1))
            if "s" in result:
                figures = (f"{result['s']:.2f}", f"{total / result['s'] / 1e9:.1f}", f"{result['host_gb']:.2f}",
                           f"{result['gpu_gb']:.1f}")  # fmt: skip
            else:
                figures = (result["error"], "", "", "")
            rows.append((snapshot.name, "cold" if asked.cold else "warm", way, *figures))
    print_table(("snapshot", "cache", "way", "s", "GB/s", "host GB", "GPU GB"), rows)


if __name__ == "__main__":
    main()

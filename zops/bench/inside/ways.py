"""The ways in which a pipeline can come from a snapshot onto the device; each returns it ready to be called."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline

from zops.bench.inside.clock import on_gpu, wait
from zops.cache.manifest import read_manifest
from zops.serving import assemble
from zops.serving.streaming import WeightStream


@dataclass(frozen=True)
class Loaded:
    """A pipeline on the device, and seconds of the parts of its loading where they can be told."""

    pipeline: Any
    parts: dict[str, float] = field(default_factory=dict)


def stream(snapshot: Path, dtype: torch.dtype, *, verify: bool = False) -> Loaded:
    """Load as zops does: bytes stream to the device while empty models are built; compare digests where asked."""
    device = "cuda" if on_gpu() else "cpu"
    files = assemble.weight_files(snapshot)
    paths = [path for group in files.values() for path in group]
    manifest = read_manifest(snapshot) if verify else None
    weights = WeightStream(snapshot, paths, device, dtype, verify=manifest)
    models = {component: assemble.make_empty(snapshot, component) for component in files}
    rest = assemble.load_rest(snapshot, list(files))
    streamed = weights.result()
    began = time.perf_counter()
    for component in files:
        assemble.give_weights(models[component], component, streamed.take(component), device)
    pipeline = ZImagePipeline(**models, **rest)
    pipeline.set_progress_bar_config(disable=True)
    wait()
    return Loaded(pipeline, {"tensors on the device": streamed.seconds, "assembly": time.perf_counter() - began})


def diffusers_way(snapshot: Path, dtype: torch.dtype, *, low_memory: bool) -> Loaded:
    """Load as diffusers' documentation shows: into host memory, then to the device."""
    pipeline = ZImagePipeline.from_pretrained(
        str(snapshot), dtype=dtype, low_cpu_mem_usage=low_memory, local_files_only=True
    )
    return Loaded(pipeline.to("cuda") if on_gpu() else pipeline)


def device_map(snapshot: Path, dtype: torch.dtype) -> Loaded:
    """Let diffusers load straight to the device."""
    device = "cuda" if on_gpu() else "cpu"
    return Loaded(ZImagePipeline.from_pretrained(str(snapshot), dtype=dtype, device_map=device, local_files_only=True))


WAYS: dict[str, Callable[[Path, torch.dtype], Loaded]] = {
    "zops": stream,
    "zops, verified": partial(stream, verify=True),
    "device_map": device_map,
    "low_cpu_mem_usage=True": partial(diffusers_way, low_memory=True),
    "low_cpu_mem_usage=False": partial(diffusers_way, low_memory=False),
}

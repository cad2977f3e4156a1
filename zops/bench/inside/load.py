"""One load of a snapshot in this fresh process: time, host memory, GPU memory. Imports and CUDA's start are before."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from zops.bench.inside.clock import GB, on_gpu, seconds, watch_memory
from zops.bench.inside.ways import WAYS, Loaded


def measure(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """Load the task's `snapshot` in its `way` and tell what it took."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    _import_lazy_parts()
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    if on_gpu():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    kept: list[Loaded] = []
    gc.collect()
    with watch_memory() as watched:
        taken = seconds(lambda: kept.append(WAYS[task["way"]](Path(task["snapshot"]), dtype)))
    figures = {"time": taken, "host memory": watched.peak / GB}
    if on_gpu():
        figures["GPU memory"] = torch.cuda.max_memory_allocated() / GB
    tell(figures=figures | kept[0].parts, device=torch.cuda.get_device_name() if on_gpu() else "cpu")


def _import_lazy_parts() -> None:
    """Import the classes that every way needs; both libraries import them only when they are named."""
    from diffusers import (  # noqa: PLC0415 - naming them is the import
        AutoencoderKL,  # noqa: F401 - as above
        FlowMatchEulerDiscreteScheduler,  # noqa: F401 - as above
        ZImageTransformer2DModel,  # noqa: F401 - as above
    )
    from transformers import Qwen2Tokenizer, Qwen3Model  # noqa: PLC0415, F401 - as above

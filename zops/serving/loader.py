"""From a verified snapshot on disk to a pipeline on the device. Runs in the worker; torch is imported here only.

Facts about diffusers 0.42 that shape this module: a dtype given as text becomes float32 with a warning, so real torch
dtypes are passed; the pipeline's device_map takes "cuda" and refuses "auto" and "cuda:0"; the loader checks no hashes,
so the snapshot is checked against its marker right before.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zops import __version__
from zops.cache.manifest import require_verified
from zops.serving.generate import find_fault, make_images
from zops.serving.messages import Entered, FromWorker, Passed, Ready, WorkerSettings

WARMUP_PROMPT = "a lighthouse on a cliff at sunrise, photograph"
Send = Callable[[FromWorker], None]


class WarmupFailed(Exception):
    """Raised when the first image is no picture: black, flat or not made of numbers."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline that made a good image, and what it runs on."""

    pipeline: Any
    ready: Ready


@contextmanager
def _phase(send: Send, name: str) -> Iterator[None]:
    send(Entered(name))
    began = time.monotonic()
    yield
    send(Passed(name, time.monotonic() - began))


def load(settings: WorkerSettings, send: Send) -> Loaded:
    """Load the snapshot, make the warm-up image and look at it, telling each phase.

    Raises:
        ZopsError: when the snapshot is not there, not verified, or changed since it was.
        WarmupFailed: when the warm-up image is not a picture.
    """
    prepare_environment(settings)
    with _phase(send, "imports"):
        import torch  # noqa: PLC0415 - only the worker may pay for it
        from diffusers import ZImagePipeline  # noqa: PLC0415

    with _phase(send, "verify"):
        require_verified(Path(settings.snapshot))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(settings.dtype, device)
    with _phase(send, "load"):
        pipeline = _build(ZImagePipeline, Path(settings.snapshot), device, dtype)
    with _phase(send, "warmup"):
        _warm_up(pipeline, settings)
    return Loaded(pipeline, Ready(_device_name(device), str(dtype).removeprefix("torch."), _versions()))


def prepare_environment(settings: WorkerSettings) -> None:
    """Set what the libraries read when they are imported: no hub, no telemetry, repeatable matrix products."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # cuBLAS picks its workspace by stream otherwise, and equal seeds could give unequal images.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if settings.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpus


def _build(pipeline_class: Any, snapshot: Path, device: str, dtype: Any) -> Any:
    import diffusers  # noqa: PLC0415 - imported already, see load()
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cudnn.benchmark = False  # it picks kernels by timing, so equal seeds could give unequal images
    torch.backends.cudnn.deterministic = True
    pipeline = pipeline_class.from_pretrained(
        str(snapshot),
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=True,
        dtype=dtype,
        **({"device_map": "cuda"} if device == "cuda" else {}),
    )
    pipeline.set_progress_bar_config(disable=True)
    # Decoding one image at a time makes an image independent of its neighbours in a batch, to the bit in bfloat16.
    pipeline.vae.enable_slicing()
    return pipeline


def _dtype(asked: str, device: str) -> Any:
    import torch  # noqa: PLC0415 - imported already, see load()

    chosen = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(asked, asked)
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen]


def _warm_up(pipeline: Any, settings: WorkerSettings) -> None:
    images = make_images(
        pipeline,
        [WARMUP_PROMPT],
        [0],
        width=settings.warmup_size,
        height=settings.warmup_size,
        forwards=settings.forwards,
        guidance_scale=settings.guidance_scale,
    )
    fault = find_fault(images[0])
    if fault:
        raise WarmupFailed(f"the warm-up image is {fault}: these weights, on this device, in this dtype, do not work")


def _device_name(device: str) -> str:
    import torch  # noqa: PLC0415 - imported already, see load()

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    import diffusers  # noqa: PLC0415 - imported already, see load()
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    return {
        "zops": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        "transformers": str(transformers.__version__),
    }

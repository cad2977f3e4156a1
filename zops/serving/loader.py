"""From a verified snapshot on disk to a pipeline on the device. Runs in the worker; torch is imported here only.

Facts about diffusers 0.42 that shape this module: a dtype given as text becomes float32 with a warning, so real torch
dtypes are passed; the loader checks no hashes, so the snapshot is checked against its marker right before; `from_pipe`
casts the weights that two pipelines share, so the second pipeline is built by its constructor.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zops import __version__
from zops.cache.manifest import Manifest, require_verified
from zops.serving.generate import Pipelines, decode, denoise, encode_prompts, find_fault, template_of
from zops.serving.messages import Entered, FromWorker, Passed, Picture, Ready, Shape, WorkerSettings
from zops.serving.preview import Projection

WARMUP_PROMPT = "a lighthouse on a cliff at sunrise, photograph"
_WEIGHTS = ".safetensors"
Send = Callable[[FromWorker], None]


class WarmupFailed(Exception):
    """Raised when the first image is no picture: black, flat or not made of numbers."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Pipelines that made a good image, what was learned from it, and what they run on."""

    pipelines: Pipelines
    projection: Projection
    ready: Ready
    memory: Callable[[], tuple[int, int] | None]
    """Returns used and total bytes of the device, None where that cannot be told. May be called by any thread."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the weights go, and as what."""

    device: str
    """cuda or cpu."""
    dtype: Any
    """A torch.dtype."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The three networks, with their weights on the device."""

    transformer: Any
    text_encoder: Any
    vae: Any


@dataclass(frozen=True, slots=True)
class _WarmUp:
    projection: Projection
    pixel_bytes: float | None


def load(settings: WorkerSettings, send: Send) -> Loaded:
    """Load the snapshot, make the warm-up image and look at it, telling each phase.

    Raises:
        ZopsError: when the snapshot is not there, not verified, or changed since it was.
        WarmupFailed: when the warm-up image is not a picture.
    """
    prepare_environment(settings)
    with _phase(send, "imports"), _no_collection():
        _import_all()
    snapshot = Path(settings.snapshot)
    with _phase(send, "verify"):
        manifest = require_verified(snapshot)
    target = _target(settings)
    began = time.monotonic()
    with _phase(send, "read"):
        weights = read_weights(snapshot, target)
    read_s = time.monotonic() - began
    with _phase(send, "build"):
        pipelines = build(snapshot, weights)
    with _phase(send, "warmup"):
        warm = _warm_up(pipelines, settings)
    ready = Ready(
        device=_device_name(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=_versions(),
        memory_free=_memory_free(target.device),
        pixel_bytes=warm.pixel_bytes,
        template=template_of(pipelines.generate.tokenizer),
        cache_bytes=_weight_bytes(manifest),
        cache_seconds=read_s,
    )
    gc.freeze()  # the pipelines stay until the end as well
    return Loaded(pipelines, warm.projection, ready, _memory_gauge(target.device))


def prepare_environment(settings: WorkerSettings) -> None:
    """Set what the libraries read when they are imported: no hub, no telemetry, threads, repeatable matrix products."""
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
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)


def read_weights(snapshot: Path, target: Target) -> Weights:
    """Read the weights of the three networks from the disk onto the device, one network after the other."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel  # noqa: PLC0415 - imported already
    from transformers import Qwen3Model  # noqa: PLC0415 - as above

    # Straight to the GPU, shard by shard: by way of the host it would take as much of its memory as there are weights.
    placed = {"device_map": "cuda"} if target.device == "cuda" else {}

    def read(network: Any, directory: str) -> Any:
        model = network.from_pretrained(
            str(snapshot / directory),
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=True,
            dtype=target.dtype,
            **placed,
        )
        return model.eval()

    return Weights(
        transformer=read(ZImageTransformer2DModel, "transformer"),
        text_encoder=read(Qwen3Model, "text_encoder"),
        vae=read(AutoencoderKL, "vae"),
    )


def build(snapshot: Path, weights: Weights) -> Pipelines:
    """Put both pipelines together around the weights, wherever these came from."""
    import torch  # noqa: PLC0415 - imported already
    from diffusers import (  # noqa: PLC0415 - as above
        FlowMatchEulerDiscreteScheduler,
        ZImageImg2ImgPipeline,
        ZImagePipeline,
    )
    from transformers import Qwen2Tokenizer  # noqa: PLC0415 - as above

    torch.backends.cudnn.benchmark = False  # it picks kernels by timing, so equal seeds could give unequal images
    torch.backends.cudnn.deterministic = True
    generate = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(str(snapshot / "scheduler"), local_files_only=True),
        tokenizer=Qwen2Tokenizer.from_pretrained(str(snapshot / "tokenizer"), local_files_only=True),
        transformer=weights.transformer,
        text_encoder=weights.text_encoder,
        vae=weights.vae,
    )
    edit = ZImageImg2ImgPipeline(**generate.components)
    for pipeline in (generate, edit):
        pipeline.set_progress_bar_config(disable=True)
    # Decoding one image at a time makes an image independent of its neighbours in a batch, to the bit in bfloat16.
    weights.vae.enable_slicing()
    return Pipelines(generate, edit)


@contextmanager
def _phase(send: Send, name: str) -> Iterator[None]:
    send(Entered(name))
    began = time.monotonic()
    yield
    send(Passed(name, time.monotonic() - began))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector away from imports and from what they made.

    They make half a million objects and throw few away: looking for those took 0.8 of 3.1 s, and 0.2 s once after.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_all() -> None:
    """Import the very classes that are used; the libraries' own packages import lazily."""
    import diffusers  # noqa: PLC0415 - only the worker may pay for it
    import torch  # noqa: PLC0415, F401 - as above
    import transformers  # noqa: PLC0415 - as above
    from diffusers import (  # noqa: PLC0415 - as above
        AutoencoderKL,  # noqa: F401 - importing it is what this is for
        FlowMatchEulerDiscreteScheduler,  # noqa: F401 - as above
        ZImageImg2ImgPipeline,  # noqa: F401 - as above
        ZImagePipeline,  # noqa: F401 - as above
        ZImageTransformer2DModel,  # noqa: F401 - as above
    )
    from transformers import Qwen2Tokenizer, Qwen3Model  # noqa: PLC0415, F401 - as above

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _target(settings: WorkerSettings) -> Target:
    import torch  # noqa: PLC0415 - imported already

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(settings.dtype, settings.dtype)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return Target(device, {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen])


def _weight_bytes(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files if entry.path.endswith(_WEIGHTS))


def _warm_up(pipelines: Pipelines, settings: WorkerSettings) -> _WarmUp:
    """Make an image, look at it, and learn from it what it costs and how its latents become colours."""
    import torch  # noqa: PLC0415 - imported already

    size = settings.warmup_size
    shape = Shape("generate", size, size, settings.forwards, settings.guidance_scale, bucket=0)
    pictures = [Picture("warmup", WARMUP_PROMPT, seed=0)]
    on_gpu = pipelines.generate.device.type == "cuda"
    captions = encode_prompts(pipelines, shape, pictures)
    if on_gpu:
        # The text encoder's share does not grow with the image.
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    latents = denoise(pipelines, shape, pictures, captions, lambda _step: True)[0]
    pixels = decode(pipelines, latents)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    fault = find_fault(pixels)
    if fault:
        raise WarmupFailed(f"the warm-up image is {fault}: these weights, on this device, in this dtype, do not work")
    return _WarmUp(Projection.fit(latents, pixels), (peak - before) / size**2 if on_gpu else None)


def _memory_free(device: str) -> int | None:
    import torch  # noqa: PLC0415 - imported already

    if device != "cuda":
        return None
    # What torch holds for later counts as free: the next image takes it from there.
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _memory_gauge(device: str) -> Callable[[], tuple[int, int] | None]:
    import torch  # noqa: PLC0415 - imported already

    def look() -> tuple[int, int] | None:
        try:
            free, total = torch.cuda.mem_get_info()
        except RuntimeError:
            return None  # the device failed; the thread that uses it says so
        return total - free, total

    return look if device == "cuda" else lambda: None


def _device_name(device: str) -> str:
    import torch  # noqa: PLC0415 - imported already

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    import diffusers  # noqa: PLC0415 - imported already
    import torch  # noqa: PLC0415 - as above
    import transformers  # noqa: PLC0415 - as above

    return {
        "zops": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        "transformers": str(transformers.__version__),
    }

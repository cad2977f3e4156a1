"""From a verified snapshot on disk to a pipeline under its preset on the device. Runs in the worker.

The bytes stream to the device while the libraries are imported and the models are made empty (`streaming`,
`assemble`); then the preset is applied and, on the first start of a host, held to the images of eager (`quality`).
torch is imported here only; what the libraries do not check is: the snapshot, against its marker, right before.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops import __version__
from zops.cache.manifest import Manifest, require_verified
from zops.serving.accelerate.choice import Device, Wanted, choose, count_weights, has_triton
from zops.serving.assemble import give_weights, load_rest, make_empty, weight_files
from zops.serving.generate import Pipelines, Step, decode, denoise, encode_prompts, find_fault, template_of
from zops.serving.messages import (
    Entered,
    FromWorker,
    Gate,
    Noticed,
    Passed,
    Picture,
    Ready,
    Shape,
    WorkerSettings,
)
from zops.serving.preview import Projection
from zops.serving.quality import Exam
from zops.serving.streaming import Streamed, WeightStream
from zops.serving.volume import Volume, open_volume

if TYPE_CHECKING:
    from zops.serving.accelerate.preset import Applied

WARMUP_PROMPT = "a lighthouse on a cliff at sunrise, photograph"
# With the template around them, captions of up to 32, 64, 96 and 128 tokens: nearly all that people write.
_CAPTION_WORDS = (1, 10, 20, 30)
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
    chores: Iterator[None] = field(default_factory=lambda: iter(()))
    """Each step does a little of what makes later requests faster; for the worker's first idle moments."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the weights go, and as what."""

    device: str
    """cuda or cpu."""
    dtype: Any
    """A torch.dtype."""


@dataclass(frozen=True, slots=True)
class _WarmUp:
    projection: Projection
    pixel_bytes: float | None


def load(settings: WorkerSettings, send: Send) -> Loaded:
    """Load the snapshot, apply the preset, make the warm-up image and look at it, telling each phase.

    Raises:
        ZopsError: when the snapshot is not there, not verified, or changed since it was; when the device cannot
            compute the preset, or its images fail the quality gate.
        WarmupFailed: when the warm-up image is not a picture.
    """
    volume = open_volume(settings.kernels, settings.gpus)
    prepare_environment(settings, volume)
    snapshot = Path(settings.snapshot)
    with _phase(send, "verify"):
        manifest = require_verified(snapshot)
    with _phase(send, "imports"), _no_collection():
        import torch  # noqa: F401, PLC0415 - only the worker may pay for it

        target = _target(settings)
        wanted = Wanted(settings.preset, settings.fp8_text, settings.force_preset)
        choice = choose(wanted, _device(target.device), count_weights(snapshot))
        exam = Exam(choice, manifest.digest, settings.warmup_size, settings.forwards, settings.force_preset, volume)
        send(Entered("read"))
        # Needs torch and nothing else, so the rest of the imports costs no time while there are bytes to wait for.
        stream = _start_stream(snapshot, manifest, target, exam, verify=settings.verify_on_load)
        _import_all()
    send(Entered("build"))
    began = time.monotonic()
    with _no_collection():
        empty = {component: make_empty(snapshot, component) for component in weight_files(snapshot)}
        parts = load_rest(snapshot, tuple(empty))
    made_s = time.monotonic() - began
    read = stream.result()
    send(Passed("read", read.seconds))
    if not read.pinned:
        send(Noticed("this host refuses to pin memory (ulimit -l), so weights were copied to the GPU slowly"))
    began = time.monotonic()
    pipeline = build(empty, parts, read, target)
    send(Passed("build", made_s + time.monotonic() - began))
    with _phase(send, "gate"):
        applied, gate = _apply(pipeline, exam)
    if gate.trouble:
        send(Noticed(f"preset {choice.preset}, {gate.result}: {gate.trouble}"))
    pipelines = Pipelines(pipeline, applied)
    with _phase(send, "warmup"):
        warm = _warm_up(pipelines, settings)
    ready = Ready(
        device=_device_name(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=_versions(),
        memory_free=_memory_free(target.device),
        pixel_bytes=warm.pixel_bytes,
        template=template_of(pipeline.tokenizer),
        cache_bytes=read.bytes_read,
        cache_seconds=read.seconds,
        preset=choice.preset,
        gate=gate,
        packs=choice.preset != "eager",
        notes=(f"preset {choice.preset}: {choice.reason}", *map(str, applied.notes)),
    )
    gc.freeze()  # the pipeline stays until the end as well
    chores = _chores(pipelines, settings) if target.device == "cuda" else iter(())
    return Loaded(pipelines, warm.projection, ready, _memory_gauge(target.device), chores)


def prepare_environment(settings: WorkerSettings, volume: Volume | None = None) -> None:
    """Set what the libraries read when they are imported: no hub, no telemetry, threads, where compilers keep files."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # cuBLAS picks its workspace by stream otherwise, and equal seeds could give unequal images.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Weights that are narrowed on arrival leave holes of all sizes; pages can be given back, whole segments could not.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if volume is not None:
        os.environ |= volume.environment
    if settings.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpus
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)


def build(empty: dict[str, Any], parts: dict[str, Any], read: Streamed, target: Target) -> Any:
    """Give empty models their weights and put the pipeline together around them."""
    import torch  # noqa: PLC0415 - imported already
    from diffusers import ZImagePipeline  # noqa: PLC0415 - as above

    torch.backends.cudnn.benchmark = False  # it picks kernels by timing, so equal seeds could give unequal images
    torch.backends.cudnn.deterministic = True
    for component, model in empty.items():
        tensors = {
            name: tensor
            for path, held in read.files.items()
            if path.startswith(f"{component}/")
            for name, tensor in held.items()
        }
        parts[component] = give_weights(model, component, tensors, target.device)
    pipeline = ZImagePipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    # Decoding one image at a time makes an image independent of its neighbours in a batch, to the bit in bfloat16.
    pipeline.vae.enable_slicing()
    return pipeline


def _start_stream(snapshot: Path, manifest: Manifest, target: Target, exam: Exam, *, verify: bool) -> WeightStream:
    from zops.serving.accelerate.fp8 import quantise_on_arrival  # noqa: PLC0415 - imports torch

    choice = exam.choice
    # Once eager's images are not needed, fp8 never holds more of the wide weights than are on their way.
    narrow = choice.preset == "fp8" and not (exam.needs_references and choice.eager_fits)
    paths = [path for of_component in weight_files(snapshot).values() for path in of_component]
    return WeightStream(
        snapshot,
        paths,
        target.device,
        target.dtype,
        verify=manifest if verify else None,
        arrived=quantise_on_arrival(text=choice.fp8_text) if narrow else None,
    )


def _apply(pipeline: Any, exam: Exam) -> "tuple[Applied, Gate]":
    """Apply the preset and hold it to eager's images, which are made before: the preset changes the pipeline."""
    from zops.serving.accelerate.gate import render  # noqa: PLC0415 - imports torch
    from zops.serving.accelerate.preset import apply  # noqa: PLC0415 - as above
    from zops.serving.accelerate.text import remember  # noqa: PLC0415 - as above

    device = pipeline.vae.device
    channels = pipeline.transformer.in_channels
    images = partial(render, size=exam.size, forwards=exam.forwards, device=device, channels=channels)
    references = None
    if exam.needs_references:
        references = exam.find_references(lambda: images(apply(pipeline, "eager")))
    applied = apply(pipeline, exam.choice.preset, fp8_text=exam.choice.fp8_text)
    if exam.choice.preset != "eager":
        applied = replace(applied, encode=remember(applied.encode))
    return applied, exam.judge(references, lambda: images(applied))


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
    import transformers  # noqa: PLC0415 - as above
    from diffusers import (  # noqa: PLC0415 - as above
        AutoencoderKL,  # noqa: F401 - importing it is what this is for
        FlowMatchEulerDiscreteScheduler,  # noqa: F401 - as above
        ZImagePipeline,  # noqa: F401 - as above
        ZImageTransformer2DModel,  # noqa: F401 - as above
    )
    from transformers import Qwen2Tokenizer, Qwen3Model  # noqa: PLC0415, F401 - as above

    from zops.serving.accelerate import gate  # noqa: PLC0415, F401 - as above

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _target(settings: WorkerSettings) -> Target:
    import torch  # noqa: PLC0415 - imported already

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(settings.dtype, settings.dtype)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return Target(device, {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen])


def _device(device: str) -> Device:
    import torch  # noqa: PLC0415 - imported already

    if device != "cuda":
        return Device("cpu")
    properties = torch.cuda.get_device_properties(0)
    return Device("cuda", (properties.major, properties.minor), properties.total_memory, has_triton())


def _warm_up(pipelines: Pipelines, settings: WorkerSettings) -> _WarmUp:
    """Make an image, look at it, and learn from it what it costs and how its latents become colours."""
    import torch  # noqa: PLC0415 - imported already

    size = settings.warmup_size
    shape = Shape("generate", size, size, settings.forwards, settings.guidance_scale, bucket=0)
    pictures = [Picture("warmup", WARMUP_PROMPT, seed=0)]
    on_gpu = pipelines.device.type == "cuda"
    captions = encode_prompts(pipelines, shape, pictures)
    if on_gpu:
        # The text encoder's share does not grow with the image.
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    latents = denoise(pipelines, shape, pictures, captions, _go_on)[0]
    pixels = decode(pipelines, latents)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    fault = find_fault(pixels)
    if fault:
        raise WarmupFailed(f"the warm-up image is {fault}: these weights, on this device, in this dtype, do not work")
    if on_gpu:
        _make_again(pipelines, shape)  # captures the graph, which the first request would wait for
        torch.cuda.empty_cache()
    return _WarmUp(Projection.fit(latents, pixels), (peak - before) / size**2 if on_gpu else None)


def _make_again(pipelines: Pipelines, shape: Shape) -> None:
    pictures = [Picture("warmup", WARMUP_PROMPT, seed=0)]
    captions = encode_prompts(pipelines, shape, pictures)
    decode(pipelines, denoise(pipelines, shape, pictures, captions, _go_on)[0])


def _chores(pipelines: Pipelines, settings: WorkerSettings) -> Iterator[None]:
    """Do, a step at a time, what later requests would wait a little for: graphs of other sizes and caption lengths.

    None of it compiles anything, so the server is ready before it; a graph is captured by the second call.
    """
    import torch  # noqa: PLC0415 - imported already

    shape = Shape("generate", 0, 0, settings.forwards, settings.guidance_scale, bucket=0)
    try:
        for size in settings.sizes:
            for _ in range(0 if size == settings.warmup_size else 2):
                _make_again(pipelines, replace(shape, width=size, height=size))
                yield
        for words in _CAPTION_WORDS:
            for turn in range(2):  # other words each time: a prompt that is known is not encoded
                pipelines.applied.encode([f"{WARMUP_PROMPT}{f', {turn}' * words}"])
                yield
    except torch.OutOfMemoryError:
        pass  # requests of these sizes will be told; this is no reason to fail
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _go_on(_step: Step) -> bool:
    return True


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

"""From a verified snapshot on disk to a pipeline under its preset on the device. Runs in the worker.

The bytes stream to the device while the libraries are imported and the models are made empty (`streaming`,
`assemble`); then the preset is applied and, on the first start of a host, held to the images of eager (`quality`).
torch is imported here only; what the libraries do not check is: the snapshot, against its marker, right before.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops import __version__
from zops.cache.manifest import Manifest, require_verified
from zops.errors import HostShort
from zops.serving.accelerate.choice import Choice, Wanted, choose, count_weights, demands
from zops.serving.assemble import give_weights, load_rest, make_empty, weight_files
from zops.serving.generate import Pipelines, template_of
from zops.serving.memory import Told, count_free, gauge, give_back
from zops.serving.messages import Entered, FromWorker, Gate, Noticed, Passed, Ready, WorkerSettings
from zops.serving.placement import place
from zops.serving.preview import Projection
from zops.serving.quality import Exam, PresetRefused
from zops.serving.streaming import Streamed, WeightStream
from zops.serving.target import Target, describe_device, find_target, name_device, prepare_environment
from zops.serving.volume import Volume, open_volume
from zops.serving.warmup import chores, warm_up

if TYPE_CHECKING:
    from zops.serving.accelerate.preset import Applied
    from zops.serving.followers import Followers

Send = Callable[[FromWorker], None]
# On the CPU, where "cards" share the host's memory, every place will do.
_PLENTY = 1 << 60


@dataclass(frozen=True, slots=True)
class Loaded:
    """Pipelines that made a good image, what was learned from it, and what they run on."""

    pipelines: Pipelines
    projection: Projection
    ready: Ready
    memory: Callable[[], Told]
    """Returns used and total bytes of each card, none where that cannot be told. May be called by any thread."""
    chores: Iterator[None] = field(default_factory=lambda: iter(()))
    """Each step does a little of what makes later requests faster; for the worker's first idle moments."""
    close: Callable[[], None] = lambda: None
    """Ends the processes of the other cards, where there are any."""


@dataclass(frozen=True, slots=True)
class _Start:
    """What all attempts of one start have in common."""

    settings: WorkerSettings
    snapshot: Path
    manifest: Manifest
    target: Target
    volume: Volume | None
    send: Send

    def examine(self, choice: Choice) -> Exam:
        """Return the exam of a preset."""
        settings = self.settings
        return Exam(
            choice, self.manifest.digest, settings.warmup_size, settings.forwards, settings.force_preset, self.volume
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """What an attempt made."""

    pipeline: Any
    applied: "Applied"
    gate: Gate
    read: Streamed


def load(settings: WorkerSettings, send: Send) -> Loaded:
    """Load the snapshot, apply the preset, make the warm-up image and look at it, telling each phase.

    Under `auto` a preset that the quality gate refuses gives way to the next one, which is loaded anew: what a preset
    replaces is gone.

    Raises:
        ZopsError: when the snapshot is not there, not verified, or changed since it was; when the device cannot
            compute the preset, or its images fail the quality gate.
        WarmupFailed: when the warm-up image is not a picture.
    """
    with ExitStack() as ending:
        loaded = _load(settings, send, ending)
        return replace(loaded, close=ending.pop_all().close)


def _load(settings: WorkerSettings, send: Send, ending: ExitStack) -> Loaded:
    volume = open_volume(settings.kernels, settings.gpus)
    prepare_environment(settings, volume)
    snapshot = Path(settings.snapshot)
    with _phase(send, "verify"):
        manifest = require_verified(snapshot)
    with _phase(send, "imports"), _no_collection():
        import torch  # noqa: F401, PLC0415 - only the worker may pay for it

        start = _Start(settings, snapshot, manifest, find_target(settings), volume, send)
        wanted = Wanted(settings.preset, settings.fp8_text, settings.force_preset)
        choice = choose(wanted, describe_device(start.target), count_weights(snapshot))
        waiting = [start.examine(each) for each in (choice, *choice.fallbacks)]
        refused = _drop_refused(waiting)
        exam = waiting.pop(0)
        followers = _call_followers(start, exam, ending)
        send(Entered("read"))
        # Needs torch and nothing else, so the rest of the imports costs no time while there are bytes to wait for.
        stream = _start_stream(start, exam)
        _import_all()
    while isinstance(made := _attempt(start, exam, stream, followers), PresetRefused):
        if not waiting:
            raise made
        ending.close()
        refused.append(f"{exam.choice.preset}: {made.trouble}")
        exam = waiting.pop(0)
        send(Noticed(f"{made.message}; serving {exam.choice.preset} instead"))
        gc.unfreeze()  # what was made in a start that seemed good may be in cycles
        gc.collect()
        give_back(start.target.cards[0])
        followers = _call_followers(start, exam, ending)
        send(Entered("read"))
        stream = _start_stream(start, exam)
    fallback = f"the quality gate refused {', '.join(refused)}" if refused else ""
    return _finish(start, exam.choice, made, followers, fallback)


def _drop_refused(waiting: list[Exam]) -> list[str]:
    """Drop the presets that an earlier start refused, but never the last one; return which, and why."""
    dropped = []
    while len(waiting) > 1 and (gate := waiting[0].refused):
        dropped.append(f"{waiting.pop(0).choice.preset}: {gate.trouble}")
    return dropped


def _attempt(start: _Start, exam: Exam, stream: WeightStream, followers: "Followers | None") -> _Made | PresetRefused:
    """Put the pipeline together and apply the preset; return what the gate says where it refuses.

    No name here holds a tensor of weights while the preset is applied: what it replaces is freed one by one, not at
    the end.
    """
    send, target = start.send, start.target
    send(Entered("build"))
    began = time.monotonic()
    with _no_collection():
        empty = {component: make_empty(start.snapshot, component) for component in weight_files(start.snapshot)}
        parts = load_rest(start.snapshot, tuple(empty))
    made_s = time.monotonic() - began
    read = stream.result()
    send(Passed("read", read.seconds))
    if not read.pinned:
        send(Noticed("this host refuses to pin memory (ulimit -l), so weights were copied to the GPU slowly"))
    began = time.monotonic()
    pipeline = build(empty, parts, read, stream.devices)
    send(Passed("build", made_s + time.monotonic() - began))
    try:
        with _phase(send, "gate"):
            applied, gate = _apply(pipeline, exam, target, followers)
    except PresetRefused as refusal:
        return refusal.with_traceback(None)  # its frames hold the pipeline
    if gate.trouble:
        send(Noticed(f"preset {exam.choice.preset}, {gate.result}: {gate.trouble}"))
    return _Made(pipeline, applied, gate, read)


def _finish(start: _Start, choice: Choice, made: _Made, followers: "Followers | None", fallback: str) -> Loaded:
    """Make the warm-up image, and say what was made."""
    settings, target = start.settings, start.target
    pipelines = Pipelines(made.pipeline, made.applied)
    with _phase(start.send, "warmup"):
        warm = warm_up(pipelines, settings, target.cards)
    notes = [f"preset {choice.preset}: {choice.reason}", *map(str, made.applied.notes)]
    if settings.parallel == "context" and not followers:
        notes.append("several cards on one image: left out, eager is computed by one")
    ready = Ready(
        device=name_device(target),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=_versions(),
        memory_free=warm.memory_free,
        pixel_bytes=warm.pixel_bytes,
        template=template_of(made.pipeline.tokenizer),
        cache_bytes=made.read.bytes_read,
        cache_seconds=made.read.seconds,
        preset=choice.preset,
        gate=made.gate,
        packs=choice.preset != "eager",
        notes=tuple([fallback, *notes] if fallback else notes),
        fallback=fallback,
    )
    gc.freeze()  # the pipeline stays until the end as well
    own = gauge(target.cards)
    return Loaded(
        pipelines,
        warm.projection,
        ready,
        (lambda: (*own(), *followers.memory())) if followers else own,
        chores(pipelines, settings) if target.on_gpu else iter(()),
    )


def build(empty: dict[str, Any], parts: dict[str, Any], read: Streamed, devices: Mapping[str, str]) -> Any:
    """Give empty models their weights, which are then theirs alone, and put the pipeline together around them.

    Args:
        empty: the models without weights, by component.
        parts: the components that have none.
        read: the weights; taken out of it.
        devices: of each component.
    """
    import torch  # noqa: PLC0415 - imported already
    from diffusers import ZImagePipeline  # noqa: PLC0415 - as above

    torch.backends.cudnn.benchmark = False  # it picks kernels by timing, so equal seeds could give unequal images
    torch.backends.cudnn.deterministic = True
    for component, model in empty.items():
        parts[component] = give_weights(model, component, read.take(component), devices[component])
    pipeline = ZImagePipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    # Decoding one image at a time makes an image independent of its neighbours in a batch, to the bit in bfloat16.
    pipeline.vae.enable_slicing()
    return pipeline


def _call_followers(start: _Start, exam: Exam, ending: ExitStack) -> "Followers | None":
    """Start the processes of the other cards, where several work on an image: they load while this one does."""
    settings, preset = start.settings, exam.choice.preset
    if settings.parallel != "context" or settings.cards < 2 or preset == "eager":
        return None
    from zops.serving.followers import Followers, stay_on_this_host  # noqa: PLC0415 - few workers need it

    stay_on_this_host()
    followers = Followers(settings, preset)
    ending.callback(followers.close)
    return followers


def _start_stream(start: _Start, exam: Exam) -> WeightStream:
    from zops.serving.accelerate.fp8 import quantise_on_arrival  # noqa: PLC0415 - imports torch

    choice = exam.choice
    # Once eager's images are not needed, fp8 never holds more of the wide weights than are on their way.
    narrow = choice.preset == "fp8" and not (exam.needs_references and choice.eager_fits)
    return WeightStream(
        start.snapshot,
        [path for of_component in weight_files(start.snapshot).values() for path in of_component],
        _place(start, choice, narrow=narrow),
        start.target.dtype,
        verify=start.manifest if start.settings.verify_on_load else None,
        arrived=quantise_on_arrival(text=choice.fp8_text) if narrow else None,
    )


def _place(start: _Start, choice: Choice, *, narrow: bool) -> dict[str, str]:
    """Return the card of each component.

    Raises:
        HostShort: when they do not fit on several cards; on a single one that shows.
    """
    cards = start.target.cards
    if len(cards) == 1:
        return dict.fromkeys(weight_files(start.snapshot), cards[0])
    weights = count_weights(start.snapshot)
    asked = demands(weights, bytes_each=start.target.dtype.itemsize, fp8=narrow, fp8_text=choice.fp8_text)
    free = [_PLENTY if (bytes_ := count_free(card)) is None else bytes_ for card in cards]
    places = place(asked, free)
    if places is None:
        room = " and ".join(f"{bytes_ / 1e9:.1f} GB" for bytes_ in free)
        raise HostShort(
            f"the model's components do not fit on {len(cards)} cards with {room} free",
            code="split-too-large",
            hint="end what else uses these GPUs; or set serve.preset: fp8 and serve.fp8_text: true",
        )
    return {component: cards[place] for component, place in places.items()}


def _apply(pipeline: Any, exam: Exam, target: Target, followers: "Followers | None") -> "tuple[Applied, Gate]":
    """Apply the preset and hold it to eager's images, which are made before: the preset changes the pipeline."""
    from zops.serving.accelerate.cards import ALONE  # noqa: PLC0415 - imports torch
    from zops.serving.accelerate.gate import render  # noqa: PLC0415 - as above
    from zops.serving.accelerate.lead import Lead  # noqa: PLC0415 - as above
    from zops.serving.accelerate.preset import apply  # noqa: PLC0415 - as above
    from zops.serving.accelerate.text import remember  # noqa: PLC0415 - as above

    device = pipeline.transformer.x_pad_token.device
    channels = pipeline.transformer.in_channels
    images = partial(render, size=exam.size, forwards=exam.forwards, device=device, channels=channels)
    references = None
    if exam.needs_references:
        references = exam.find_references(lambda: images(apply(pipeline, "eager")))
    cards = followers.join(target.cards[0]) if followers else ALONE
    applied = apply(pipeline, exam.choice.preset, fp8_text=exam.choice.fp8_text, cards=cards)
    if followers:
        applied = replace(applied, denoise=Lead(applied.denoise, followers.tell))
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

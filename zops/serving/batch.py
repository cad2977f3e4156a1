"""A batch of pictures from its arrival to the last answer. Runs in the worker.

Every picture is answered exactly once, whatever becomes of its companions: one that is cancelled does not stop them, a
bad one does not fail them, and when memory is short they are made in smaller batches.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zops.serving.generate import (
    Interrupted,
    Pipelines,
    Step,
    count_tokens,
    decode,
    denoise,
    encode_prompts,
    forwards_run,
    to_rgb,
)
from zops.serving.messages import (
    MAX_PROMPT_TOKENS,
    Answer,
    Batch,
    Cancelled,
    Failed,
    Made,
    Picture,
    Preview,
    Shape,
)
from zops.serving.preview import Previews, Projection


class DeviceLost(Exception):
    """Raised when the device failed: after an error in its midst CUDA answers every call with the same error."""


@dataclass(slots=True)
class Progress:
    """What the worker is at, for its heartbeat: the number of the batch, and forwards finished of its current call."""

    batch: int | None = None
    forwards: int = 0


@dataclass(slots=True)
class Maker:
    """Makes batches of pictures, one batch at a time."""

    pipelines: Pipelines
    projection: Projection
    send: Callable[[Answer | Preview], None]
    cancelled: Callable[[str], bool]
    progress: Progress = field(default_factory=Progress)
    _again: set[str] = field(default_factory=set)
    """Pictures of this batch that are tried once more alone, since memory was found for them."""

    def make(self, batch: Batch) -> int | None:
        """Answer each picture of a batch; return `Free.fits`.

        Raises:
            DeviceLost: when only a new process can go on. Pictures that are not answered may be tried elsewhere.
        """
        self.progress.batch, self.progress.forwards = batch.id, 0
        self._again.clear()
        previews = Previews(self.projection, forwards_run(batch.shape), self.send)
        fits: int | None = None
        calls = deque([[picture for picture in batch.pictures if self._sound(batch.shape, picture)]])
        while calls:
            pictures = self._still_wanted(calls.popleft())
            if not pictures:
                continue
            left = self._call(batch.shape, pictures, previews)
            if not left.pictures:
                continue
            if left.out_of_memory:
                # All that is left of the batch: what comes after is as large as what did not fit.
                fits = (len(pictures) + 1) // 2
                rest = [*left.pictures, *(picture for call in calls for picture in call)]
                calls = deque(rest[at : at + fits] for at in range(0, len(rest), fits))
            else:
                calls.extendleft([picture] for picture in reversed(left.pictures))
        self.progress.batch = None
        return fits

    def _sound(self, shape: Shape, picture: Picture) -> bool:
        """Tell whether a picture can be made at all; answer it when not."""
        code, message = _find_flaw(shape, picture)
        if code:
            self.send(Failed(picture.id, code, message))
        return not code

    def _still_wanted(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Return the pictures that somebody waits for; answer the others."""
        gone = {picture.id for picture in pictures if self.cancelled(picture.id)}
        for picture_id in gone:
            self.send(Cancelled(picture_id))
        return [picture for picture in pictures if picture.id not in gone]

    def _call(self, shape: Shape, pictures: list[Picture], previews: Previews) -> "_Left":
        """Make pictures in one call; return those that have to be tried again, in smaller calls."""
        unanswered = list(pictures)
        try:
            self._make_together(shape, pictures, unanswered, previews)
        except Interrupted:
            self._still_wanted(unanswered)
        except Exception as error:
            out_of_memory = _is_out_of_memory(error)
            if not out_of_memory:
                traceback.print_exc()
                if _breaks_device(error, self._device_type):
                    raise DeviceLost from error
            error.__traceback__ = None  # its frames hold the tensors that filled the memory
            found = self._free_memory()
            if len(pictures) > 1 or (out_of_memory and found and unanswered[0].id not in self._again):
                self._again |= {picture.id for picture in pictures if len(pictures) == 1}
                return _Left(unanswered, out_of_memory)
            self.send(_failure(shape, unanswered[0].id, error, out_of_memory=out_of_memory))
        return _Left([], out_of_memory=False)

    def _make_together(
        self, shape: Shape, pictures: list[Picture], unanswered: list[Picture], previews: Previews
    ) -> None:
        """Make pictures in one call; take each from `unanswered` when it is answered."""
        previews.begin()

        def watch(step: Step) -> bool:
            self.progress.forwards = step.done
            gone = {picture.id for picture in pictures if self.cancelled(picture.id)}
            if len(gone) == len(pictures):
                return False
            previews.look(step, pictures, gone)
            return True

        began = time.monotonic()
        captions = encode_prompts(self.pipelines, shape, pictures)
        encoded = time.monotonic()
        latents = denoise(self.pipelines, shape, pictures, captions, watch)
        self._synchronise()  # else the decoder's time would have the forwards' in it; the decoder would wait anyway
        denoised = time.monotonic()
        for position, picture in enumerate(pictures):
            answer: Answer = Cancelled(picture.id)
            if not self.cancelled(picture.id):
                pixels = decode(self.pipelines, latents[position])
                times = {"text": encoded - began, "denoise": denoised - encoded}
                times["decode"] = time.monotonic() - denoised
                answer = self._judge(shape, picture, pixels, len(pictures), times)
            self.send(answer)
            unanswered.remove(picture)

    def _judge(self, shape: Shape, picture: Picture, pixels: Any, batch_size: int, seconds: dict[str, float]) -> Answer:
        # A user may ask for a black picture, so only what cannot be a picture at all is thrown away here.
        if not bool(pixels.isfinite().all()):
            message = f"the image of seed {picture.seed} has values that are no numbers"
            return Failed(picture.id, "image_invalid", message)
        tokens = count_tokens(self.pipelines.generate.tokenizer, picture.prompt)
        return Made(
            picture=picture.id,
            width=shape.width,
            height=shape.height,
            seed=picture.seed,
            rgb=to_rgb(pixels),
            prompt_tokens=tokens,
            truncated=tokens > MAX_PROMPT_TOKENS,
            forwards=forwards_run(shape),
            batch_size=batch_size,
            seconds=seconds,
        )

    @property
    def _device_type(self) -> str:
        return str(self.pipelines.device.type)

    def _synchronise(self) -> None:
        if self._device_type == "cuda":
            import torch  # noqa: PLC0415 - imported already

            torch.cuda.synchronize(self.pipelines.device)

    def _free_memory(self) -> bool:
        """Give back what only saves time; return whether that was more than the allocator's own leftovers."""
        import torch  # noqa: PLC0415 - imported already

        from zops.serving.accelerate.graphs import drop_all  # noqa: PLC0415 - brings torch

        dropped = drop_all()
        if self._device_type == "cuda":
            torch.cuda.empty_cache()
        return dropped


@dataclass(frozen=True, slots=True)
class _Left:
    """Pictures that a call left unanswered, and whether for lack of memory."""

    pictures: list[Picture]
    out_of_memory: bool


def _find_flaw(shape: Shape, picture: Picture) -> tuple[str, str]:
    """Return code and message of what the HTTP process should have refused; empty when the picture is sound."""
    if shape.mode == "edit" and forwards_run(shape) < 1:
        return "generation_failed", f"a strength of {shape.strength:g} would change nothing: no forward would be run"
    if shape.width % 16 or shape.height % 16:
        return "generation_failed", f"{shape.width}x{shape.height} is no multiple of 16 in both directions"
    if not 0 <= shape.strength <= 1:
        return "generation_failed", f"a strength of {shape.strength:g} is not between 0 and 1"
    if shape.mode == "edit" and len(picture.source or b"") != shape.width * shape.height * 3:
        return "generation_failed", f"the source is no RGB image of {shape.width}x{shape.height}"
    return "", ""


def _is_out_of_memory(error: Exception) -> bool:
    import torch  # noqa: PLC0415 - imported already

    # Where memory is the host's, torch says so in a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _breaks_device(error: Exception, device_type: str) -> bool:
    import torch  # noqa: PLC0415 - imported already

    from zops.serving.accelerate.lead import OutOfStep  # noqa: PLC0415 - as above

    # Libraries beneath torch (cuBLAS, cuDNN) report in a plain RuntimeError; better a start too many.
    return isinstance(error, torch.AcceleratorError | OutOfStep) or (
        device_type != "cpu" and isinstance(error, RuntimeError)
    )


def _failure(shape: Shape, picture: str, error: Exception, *, out_of_memory: bool) -> Failed:
    if out_of_memory:
        message = f"the device ran out of memory at {shape.width}x{shape.height}; ask for a smaller image"
        return Failed(picture, "out_of_memory", message)
    return Failed(picture, "generation_failed", f"the worker failed: {type(error).__name__}")

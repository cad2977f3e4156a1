"""One call of the pipeline, with its traps disarmed. Runs in the worker.

ZImagePipeline (diffusers 0.42) writes its chat template into the list of prompts that it is given, takes a single
generator for a whole batch without complaint, expects a dictionary back from its callback, and cuts prompts at 512
tokens silently. Each of these is handled here and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any

from zops.serving.messages import MAX_PROMPT_TOKENS

# Values are 0..1. A picture, of random weights too, is far above both; a broken one is exactly at zero.
BLACK_BELOW = 0.004
FLAT_BELOW = 0.002


class Interrupted(Exception):
    """Raised when a call was cancelled between two forwards."""


def count_tokens(pipeline: Any, prompt: str) -> int:
    """Return how many tokens the text encoder would get, chat template included."""
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return len(pipeline.tokenizer(text, truncation=False, padding=False)["input_ids"])


def make_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    forwards: int,
    guidance_scale: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> Any:
    """Make one image for each prompt and seed in one batch.

    Returns:
        A numpy array of shape (batch, height, width, 3), float32, 0..1 (or NaN, see `find_fault`).

    Raises:
        Interrupted: when `cancelled()` became true between two forwards.
    """
    import torch  # noqa: PLC0415 - only the worker may pay for it

    stopped = False

    def after_forward(running: Any, _index: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal stopped
        if cancelled():
            stopped = running._interrupt = True  # noqa: SLF001 - the pipeline's documented way to stop it
        return {}

    result = pipeline(
        prompt=list(prompts),
        width=width,
        height=height,
        num_inference_steps=forwards,
        guidance_scale=guidance_scale,
        # One generator an image, on the CPU: the noise depends on the seed alone, not on the batch or the device.
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        max_sequence_length=MAX_PROMPT_TOKENS,
        callback_on_step_end=after_forward,
        output_type="np",
    )
    if stopped:
        raise Interrupted
    return result.images


def find_fault(image: Any) -> str:
    """Return what makes an image no picture (not a number, black, flat); empty when it looks like one."""
    import numpy as np  # noqa: PLC0415 - only the worker may pay for it

    if not np.isfinite(image).all():
        return "not a number"
    if image.max() < BLACK_BELOW:
        return "black"
    if image.std() < FLAT_BELOW:
        return "flat"
    return ""


def to_rgb(image: Any) -> bytes:
    """Return an image of floats as 8-bit RGB, rounded as diffusers rounds."""
    return bytes((image * 255).round().astype("uint8").tobytes())

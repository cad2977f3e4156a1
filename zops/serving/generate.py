"""One call of the pipeline in its three phases, with its traps disarmed. Runs in the worker.

ZImagePipeline (diffusers 0.42) writes its chat template into the list of prompts that it is given, takes a single
generator for a whole batch without complaint, expects a dictionary back from its callback, and cuts prompts at 512
tokens silently. Each of these is handled here and nowhere else. The phases are the pipeline's own, called one by one,
so that each can be timed and pictures be decoded singly; a test holds that not one bit differs from a plain call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zops.serving.messages import MAX_PROMPT_TOKENS, Mode, Picture, Shape

# Values are 0..1. A picture, of random weights too, is far above both; a broken one is exactly at zero.
BLACK_BELOW = 0.004
FLAT_BELOW = 0.002


class Interrupted(Exception):
    """Raised when a call was given up between two forwards."""


@dataclass(frozen=True, slots=True)
class Pipelines:
    """The pipeline that makes pictures and, on the very same weights, the one that edits them."""

    generate: Any
    edit: Any

    def of(self, mode: Mode) -> Any:
        """Return the one for a mode."""
        return self.edit if mode == "edit" else self.generate


@dataclass(frozen=True, slots=True)
class Step:
    """Where a batch is after a forward: the noisy latents, and the share of noise before and after (tensors)."""

    done: int
    latents: Any
    sigma_before: Any
    sigma_after: Any


Watch = Callable[[Step], bool]
"""Called after each forward; returns whether anyone still waits for the batch."""


@dataclass(frozen=True, slots=True)
class Captions:
    """What the text encoder made of prompts: a tensor each; none of negative prompts where there is no guidance."""

    positive: list[Any]
    negative: list[Any]


def forwards_run(shape: Shape) -> int:
    """Return how many forwards a shape costs: all of them, or for an edit the last ones, rounded up.

    The sum is ZImageImg2ImgPipeline.get_timesteps', float for float; 0 means that the pipeline would refuse.
    """
    if shape.mode == "generate":
        return shape.forwards
    return shape.forwards - int(max(shape.forwards - min(shape.forwards * shape.strength, shape.forwards), 0))


def template_of(tokenizer: Any) -> tuple[str, str]:
    """Return what the model's chat template puts before and behind a prompt."""
    # Letters that no template has in this order; two, so that a template which changes its prompt would be noticed.
    halves = {tuple(_apply_template(tokenizer, mark).split(mark)) for mark in ("qzxj", "xjqz")}
    if len(halves) != 1 or len(only := halves.pop()) != 2:
        raise RuntimeError("the chat template does more to a prompt than to put text around it")
    return only[0], only[1]


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many tokens the text encoder would get of a prompt, chat template included."""
    return len(tokenizer(_apply_template(tokenizer, prompt), truncation=False, padding=False)["input_ids"])


def encode_prompts(pipelines: Pipelines, shape: Shape, pictures: Sequence[Picture]) -> Captions:
    """Run the text encoder over the prompts of a batch, over equal ones once."""
    negative = [picture.negative_prompt for picture in pictures] if shape.guidance_scale > 0 else []
    return Captions(
        _encode(pipelines.generate, [picture.prompt for picture in pictures]), _encode(pipelines.generate, negative)
    )


def denoise(pipelines: Pipelines, shape: Shape, pictures: Sequence[Picture], captions: Captions, watch: Watch) -> Any:
    """Run the forwards of a batch; return its latents, a float32 tensor of (batch, 16, height / 8, width / 8).

    Raises:
        Interrupted: when `watch` told that nobody waits any more.
    """
    import torch  # noqa: PLC0415 - only the worker may pay for it

    stopped = False

    def after_forward(running: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal stopped
        scheduler = running.scheduler
        at = scheduler.step_index
        if not watch(Step(index + 1, tensors["latents"], scheduler.sigmas[at - 1], scheduler.sigmas[at])):
            stopped = running._interrupt = True  # noqa: SLF001 - the pipeline's documented way to stop it
        return {}

    edit = {"image": _sources(shape, pictures), "strength": shape.strength} if shape.mode == "edit" else {}
    latents = pipelines.of(shape.mode)(
        prompt_embeds=list(captions.positive),
        negative_prompt_embeds=list(captions.negative),
        width=shape.width,
        height=shape.height,
        num_inference_steps=shape.forwards,
        guidance_scale=shape.guidance_scale,
        # One generator an image, on the CPU: the noise depends on the seed alone, not on the batch or the device.
        generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures],
        callback_on_step_end=after_forward,
        output_type="latent",
        **edit,
    ).images
    if stopped:
        raise Interrupted
    return latents


def decode(pipelines: Pipelines, latents: Any) -> Any:
    """Turn the latents of one picture (16, h / 8, w / 8) into pixels: float32 (3, h, w), 0..1 or NaN."""
    import torch  # noqa: PLC0415 - as above

    pipeline = pipelines.generate
    with torch.no_grad():
        scaled = latents[None].to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        image = pipeline.vae.decode(scaled + pipeline.vae.config.shift_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(image, output_type="pt")[0].float()


def find_fault(pixels: Any) -> str:
    """Return what makes pixels no picture (not a number, black, flat); empty when they look like one."""
    if not bool(pixels.isfinite().all()):
        return "not a number"
    if float(pixels.max()) < BLACK_BELOW:
        return "black"
    if float(pixels.std()) < FLAT_BELOW:
        return "flat"
    return ""


def to_rgb(pixels: Any) -> bytes:
    """Return pixels as 8-bit RGB row by row, rounded as diffusers rounds; not for those that are no numbers."""
    import torch  # noqa: PLC0415 - as above

    rows = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return bytes(rows.cpu().numpy().tobytes())


def _encode(pipeline: Any, prompts: Sequence[str]) -> list[Any]:
    import torch  # noqa: PLC0415 - as above

    if not prompts:
        return []
    unique = list(dict.fromkeys(prompts))
    with torch.no_grad():
        made, _ = pipeline.encode_prompt(
            list(unique), do_classifier_free_guidance=False, max_sequence_length=MAX_PROMPT_TOKENS
        )
    by_prompt = dict(zip(unique, made, strict=True))
    return [by_prompt[prompt] for prompt in prompts]


def _sources(shape: Shape, pictures: Sequence[Picture]) -> Any:
    import torch  # noqa: PLC0415 - as above

    flat = torch.frombuffer(bytearray(b"".join(picture.source or b"" for picture in pictures)), dtype=torch.uint8)
    return flat.view(len(pictures), shape.height, shape.width, 3).permute(0, 3, 1, 2).float() / 255


def _apply_template(tokenizer: Any, prompt: str) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    )

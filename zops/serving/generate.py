"""One batch through the three stages of a preset: encode, denoise, decode. Runs in the worker.

The stages are those of `accelerate.preset`. With `eager` they are the pipeline's own, called one by one so that each
can be timed and pictures be decoded singly; a test holds that not one bit differs from a plain call of diffusers'
pipelines, edits included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zops.serving.messages import Picture, Shape

if TYPE_CHECKING:
    from zops.serving.accelerate.preset import Applied

PIXELS_PER_TOKEN = 16 * 16
"""Of an image to the transformer: 8 x 8 pixels a latent, 2 x 2 latents a token."""
# Values are 0..1. A picture, of random weights too, is far above both; a broken one is exactly at zero.
BLACK_BELOW = 0.004
FLAT_BELOW = 0.002


class Interrupted(Exception):
    """Raised when a call was given up between two forwards."""


@dataclass(frozen=True, slots=True)
class Pipelines:
    """The pipeline, and the stages that its preset made of it."""

    generate: Any
    applied: "Applied"

    @property
    def device(self) -> Any:
        """The device it is on, by one of its tensors: diffusers walks through all modules whenever it is asked."""
        return self.generate.transformer.x_pad_token.device


@dataclass(frozen=True, slots=True)
class Step:
    """Where a batch is after a forward: the noisy latents, and the share of noise before and after it."""

    done: int
    latents: Callable[[], Any]
    """Returns the latents, to be called before the next forward: they cost a copy, which few ask for."""
    sigma_before: float
    sigma_after: float


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
    return Captions(_encode(pipelines, [picture.prompt for picture in pictures]), _encode(pipelines, negative))


def denoise(pipelines: Pipelines, shape: Shape, pictures: Sequence[Picture], captions: Captions, watch: Watch) -> Any:
    """Run the forwards of a batch; return its latents, a float32 tensor of (batch, 16, height / 8, width / 8).

    Raises:
        Interrupted: when `watch` told that nobody waits any more.
    """
    from zops.serving.accelerate.denoise import Stopped  # noqa: PLC0415 - only the worker may pay for torch
    from zops.serving.accelerate.schedule import make_schedule  # noqa: PLC0415 - as above

    skip = shape.forwards - forwards_run(shape)
    tokens = shape.width * shape.height // PIXELS_PER_TOKEN
    sigmas = make_schedule(pipelines.generate.scheduler, shape.forwards, tokens=tokens, skip=skip).sigmas

    def after_forward(index: int, latents: Callable[[], Any]) -> bool:
        return watch(Step(index + 1, latents, sigmas[index], sigmas[index + 1]))

    try:
        return pipelines.applied.denoise(
            captions.positive,
            _begin(pipelines, shape, pictures, sigmas[0]),
            forwards=shape.forwards,
            negative=captions.negative,
            guidance_scale=shape.guidance_scale,
            skip=skip,
            watch=after_forward,
        )
    except Stopped:
        raise Interrupted from None


def decode(pipelines: Pipelines, latents: Any) -> Any:
    """Turn the latents of one picture (16, h / 8, w / 8) into pixels: float32 (3, h, w), 0..1 or NaN."""
    return pipelines.applied.decode(latents[None])[0].float()


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


def _encode(pipelines: Pipelines, prompts: Sequence[str]) -> list[Any]:
    unique = list(dict.fromkeys(prompts))
    by_prompt = dict(zip(unique, pipelines.applied.encode(unique), strict=True)) if unique else {}
    return [by_prompt[prompt] for prompt in prompts]


def _begin(pipelines: Pipelines, shape: Shape, pictures: Sequence[Picture], sigma: float) -> Any:
    """Return the latents that the first forward gets: noise, or for an edit the source under its share of noise.

    One generator an image, on the CPU: the noise depends on the seed alone, not on the batch or the device.
    """
    import torch  # noqa: PLC0415 - as above

    generators = [torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures]
    sources = _encode_sources(pipelines, shape, pictures, generators) if shape.mode == "edit" else None
    size = (1, pipelines.generate.transformer.in_channels, shape.height // 8, shape.width // 8)
    noise = torch.cat([torch.randn(size, generator=generator) for generator in generators]).to(pipelines.device)
    return noise if sources is None else sigma * noise + (1.0 - sigma) * sources.to(noise.device)


def _encode_sources(pipelines: Pipelines, shape: Shape, pictures: Sequence[Picture], generators: list[Any]) -> Any:
    """Return the latents of the sources, one by one: an image of its own whatever its batch."""
    import torch  # noqa: PLC0415 - as above

    vae = pipelines.generate.vae
    with torch.inference_mode():
        pixels = pipelines.generate.image_processor.preprocess(
            _sources(shape, pictures), height=shape.height, width=shape.width
        ).to(vae.device, vae.dtype)
        drawn = [
            vae.encode(one).latent_dist.sample(generator)
            for one, generator in zip(pixels.split(1), generators, strict=True)
        ]
        return (torch.cat(drawn).float() - vae.config.shift_factor) * vae.config.scaling_factor


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

"""The first image of a worker, what is learned from it, and what can be made faster while nobody waits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from zops.serving.generate import Pipelines, Step, decode, denoise, encode_prompts, find_fault
from zops.serving.memory import Peak, count_free, give_back
from zops.serving.messages import Picture, Shape, WorkerSettings
from zops.serving.preview import Projection

PROMPT = "a lighthouse on a cliff at sunrise, photograph"
# With the template around them, captions of up to 32, 64, 96 and 128 tokens: nearly all that people write.
CAPTION_WORDS = (1, 10, 20, 30)


class WarmupFailed(Exception):
    """Raised when the first image is no picture: black, flat or not made of numbers."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the first image taught."""

    projection: Projection
    memory_free: int | None
    """Free bytes of the card that larger images exhaust first; None where that cannot be told."""
    pixel_bytes: float | None
    """Bytes that one more pixel takes there while an image is made."""


def warm_up(pipelines: Pipelines, settings: WorkerSettings, cards: Sequence[str]) -> WarmUp:
    """Make an image, look at it, and learn from it what it costs and how its latents become colours.

    Raises:
        WarmupFailed: when it is not a picture.
    """
    size = settings.warmup_size
    shape = Shape("generate", size, size, settings.forwards, settings.guidance_scale, bucket=0)
    pictures = [Picture("warmup", PROMPT, seed=0)]
    captions = encode_prompts(pipelines, shape, pictures)
    peak = Peak(cards)  # from here: the text encoder's share does not grow with the image
    latents = denoise(pipelines, shape, pictures, captions, _go_on)[0]
    pixels = decode(pipelines, latents)
    taken = peak.read()
    fault = find_fault(pixels)
    if fault:
        raise WarmupFailed(f"the warm-up image is {fault}: these weights, on this device, in this dtype, do not work")
    projection = Projection.fit(latents, pixels.to(latents.device))
    if taken:
        make_again(pipelines, shape)  # captures the graph, which the first request would wait for
    give_back(cards[0])
    costs = [(free, bytes_ / size**2) for card, bytes_ in taken.items() if bytes_ and (free := count_free(card))]
    free, pixel_bytes = min(costs, key=lambda cost: cost[0] / cost[1], default=(None, None))
    return WarmUp(projection, free, pixel_bytes)


def make_again(pipelines: Pipelines, shape: Shape) -> None:
    """Make the warm-up image once more, in any size."""
    pictures = [Picture("warmup", PROMPT, seed=0)]
    captions = encode_prompts(pipelines, shape, pictures)
    decode(pipelines, denoise(pipelines, shape, pictures, captions, _go_on)[0])


def chores(pipelines: Pipelines, settings: WorkerSettings) -> Iterator[None]:
    """Do, a step at a time, what later requests would wait a little for: graphs of other sizes and caption lengths.

    None of it compiles anything, so the server is ready before it; a graph is captured by the second call.
    """
    import torch  # noqa: PLC0415 - imported already

    shape = Shape("generate", 0, 0, settings.forwards, settings.guidance_scale, bucket=0)
    try:
        for size in settings.sizes if pipelines.applied.graphs else ():
            for _ in range(0 if size == settings.warmup_size else 2):
                make_again(pipelines, replace(shape, width=size, height=size))
                yield
        for words in CAPTION_WORDS:
            for turn in range(2):  # other words each time: a prompt that is known is not encoded
                pipelines.applied.encode([f"{PROMPT}{f', {turn}' * words}"])
                yield
    except torch.OutOfMemoryError:
        pass  # requests of these sizes will be told; this is no reason to fail
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _go_on(_step: Step) -> bool:
    return True

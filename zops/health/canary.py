"""The canary: one small image with a fixed seed, made through the instance's own HTTP door and looked at."""

from dataclasses import dataclass

from zops.health.client import Client, GeneratedImage
from zops.health.png import Look, look_at

PROMPT = "a lighthouse on a rocky coast at dawn, photograph"
SEED = 20251127


@dataclass(frozen=True, slots=True)
class Canary:
    """A canary image: what came back, what it looks like, and how many seconds it took."""

    edge: int
    image: GeneratedImage
    look: Look
    seconds: float

    @property
    def fault(self) -> str:
        """Why the image cannot be what the model makes; empty when it may be."""
        if (self.look.width, self.look.height) != (self.edge, self.edge):
            return (
                f"the image has {self.look.width} x {self.look.height} pixels, {self.edge} x {self.edge} were asked for"
            )
        return f"the image is {self.look.fault}" if self.look.fault else ""


def paint(url: str, *, edge: int, timeout_s: float) -> Canary:
    """Make the canary image.

    Args:
        url: address of the instance.
        edge: width and height in pixels.
        timeout_s: longest wait in seconds.

    Raises:
        ZopsError: when the instance does not answer, refuses, fails, or sends what is no image.
    """
    made = Client(url, timeout_s=timeout_s).generate(PROMPT, size=f"{edge}x{edge}", seed=SEED)
    image = made.images[0]
    return Canary(edge, image, look_at(image.data), made.seconds)

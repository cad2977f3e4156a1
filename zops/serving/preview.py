"""Views of unfinished pictures, from the latents alone: a few small matrix products, no decoder. Runs in the worker.

After a forward the scheduler has moved the latents by (sigma_after - sigma_before) times the predicted velocity. Two
latents in a row therefore give the velocity back, and with it the clean latents that the model has in mind right now.
Sixteen channels become RGB by a linear map which is fitted at the start to the warm-up image of the very model that is
served, so it holds for any weights.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from zops.serving.generate import Step, to_rgb
from zops.serving.messages import Picture, Preview

# Against the variance of the latents; enough to hold the fit still where channels move together.
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map from the channels of latents to RGB, on the device."""

    matrix: Any
    offset: Any

    @classmethod
    def fit(cls, latents: Any, pixels: Any) -> "Projection":
        """Fit the map by ridge regression to one picture: final latents (16, h, w), pixels (3, 8 h, 8 w)."""
        import torch  # noqa: PLC0415 - only the worker may pay for it

        channels, height, width = latents.shape
        seen = latents.reshape(channels, -1).T.double()
        wanted = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), (height, width)).reshape(3, -1).T.double()
        centre, mean = seen.mean(0), wanted.mean(0)
        scatter = (seen - centre).T @ (seen - centre)
        ridge = RIDGE * scatter.diagonal().mean() * torch.eye(channels, dtype=scatter.dtype, device=scatter.device)
        matrix = torch.linalg.solve(scatter + ridge, (seen - centre).T @ (wanted - mean))
        return cls(matrix.float(), (mean - centre @ matrix).float())

    def apply(self, latents: Any) -> Any:
        """Return pixels (3, h, w), 0..1, of latents (16, h, w)."""
        channels, height, width = latents.shape
        pixels = latents.reshape(channels, -1).T @ self.matrix + self.offset
        return pixels.T.reshape(3, height, width).clamp(0, 1)


class Previews:
    """Sends the previews of one batch, each once, also when the batch is begun again in smaller ones."""

    def __init__(self, projection: Projection, forwards: int, send: Callable[[Preview], None]) -> None:
        self._projection = projection
        self._forwards = forwards
        self._send = send
        self._sent: dict[str, int] = {}
        self._before: Any = None

    def begin(self) -> None:
        """Forget the latents of the call before."""
        self._before = None

    def look(self, step: Step, pictures: Sequence[Picture], skip: Collection[str]) -> None:
        """Send what is due after a forward. `skip` names pictures that nobody waits for."""
        if not any(picture.previews for picture in pictures):
            return
        now = step.latents()
        for position, picture in enumerate(pictures):
            due = preview_forwards(picture.previews, self._forwards)
            if step.done not in due or picture.id in skip or self._before is None:
                continue
            index = due.index(step.done)
            if index >= self._sent.get(picture.id, 0):
                self._sent[picture.id] = index + 1
                clean = predict_clean(self._before[position], now[position], step)
                height, width = clean.shape[1:]
                self._send(Preview(picture.id, index, width, height, to_rgb(self._projection.apply(clean))))
        self._before = now


def preview_forwards(previews: int, forwards: int) -> tuple[int, ...]:
    """Return after which forwards to send a preview, counted from 1: spread evenly, not the first, never the last."""
    possible = range(2, forwards)
    count = min(previews, len(possible))
    return tuple(possible[(2 * index + 1) * len(possible) // (2 * count)] for index in range(count))


def predict_clean(before: Any, after: Any, step: Step) -> Any:
    """Return the clean latents that a forward pointed to, from the latents before and after it."""
    velocity = (after - before) / (step.sigma_after - step.sigma_before)
    return after - step.sigma_after * velocity

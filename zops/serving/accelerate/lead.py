"""One call of a denoiser on several cards at once: the first card's process leads, the others do what it does.

What a call is about goes through a pipe, its tensors from card to card; after each forward the leader says whether to
go on. All else follows from both: every card computes the same loop on its share of the rows (see `cards`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from zops.serving.accelerate.denoise import Denoiser, Stopped, Watch

if TYPE_CHECKING:
    from zops.serving.accelerate.preset import Denoise


class OutOfStep(Exception):
    """Raised when a call failed on this card: the others wait in the midst of it, so only new processes can go on."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the other cards must know of a call before its tensors come."""

    embeds: tuple[torch.Size, ...]
    negative: tuple[torch.Size, ...]
    latents: torch.Size
    dtype: torch.dtype
    """Of the embeds; latents are float32."""
    forwards: int
    guidance_scale: float
    skip: int


class Lead:
    """A denoise stage that takes the other cards along; `tell` sends to all of them."""

    def __init__(self, denoise: "Denoise", tell: Callable[[Call | bool], None]) -> None:
        self._denoise = denoise
        self._tell = tell

    def __call__(
        self,
        embeds: Sequence[torch.Tensor],
        latents: torch.Tensor,
        *,
        forwards: int,
        negative: Sequence[torch.Tensor] = (),
        guidance_scale: float = 0.0,
        skip: int = 0,
        watch: Watch = lambda _index, _latents: True,
    ) -> torch.Tensor:
        """Return denoised latents; see `Denoiser.__call__`.

        Raises:
            Stopped: when `watch` said so; the other cards stopped too.
            OutOfStep: when anything else went wrong.
        """
        shapes = (tuple(each.shape for each in embeds), tuple(each.shape for each in negative), latents.shape)
        how: dict[str, Any] = {"forwards": forwards, "guidance_scale": guidance_scale, "skip": skip}

        def told(index: int, now: Callable[[], torch.Tensor]) -> bool:
            further = watch(index, now)
            self._tell(further)
            return further

        try:
            self._tell(Call(*shapes, embeds[0].dtype, **how))
            _send([*embeds, *negative, latents.float()])
            return self._denoise(embeds, latents, negative=negative, watch=told, **how)
        except Stopped:
            raise
        except Exception as error:
            raise OutOfStep("a call on several cards failed on the first one") from error


@torch.inference_mode()
def take_part(denoiser: Denoiser, call: Call, goes_on: Callable[[], bool]) -> None:
    """Do this card's share of a call.

    Args:
        denoiser: this card's.
        call: what the leader told of it.
        goes_on: waits for what the leader says after a forward.
    """
    device = denoiser.transformer.x_pad_token.device
    embeds = [torch.empty(shape, dtype=call.dtype, device=device) for shape in (*call.embeds, *call.negative)]
    latents = torch.empty(call.latents, device=device)
    for tensor in (*embeds, latents):
        distributed.broadcast(tensor, src=0)
    count = len(call.embeds)
    try:
        denoiser(
            embeds[:count],
            latents,
            forwards=call.forwards,
            negative=embeds[count:],
            guidance_scale=call.guidance_scale,
            skip=call.skip,
            watch=lambda _index, _latents: goes_on(),
        )
    except Stopped:
        return


@torch.inference_mode()
def _send(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        distributed.broadcast(tensor.contiguous(), src=0)

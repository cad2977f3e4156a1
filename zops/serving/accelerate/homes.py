"""The cards on which the components of one pipeline are, and the way of tensors between them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Homes:
    """The card of each component; the same for all unless they are split over several."""

    text_encoder: torch.device
    transformer: torch.device
    vae: torch.device

    @classmethod
    def of(cls, pipeline: Any) -> "Homes":
        """Look where a pipeline's components are, each by one of its tensors."""
        return cls(
            pipeline.text_encoder.get_input_embeddings().weight.device,
            pipeline.transformer.x_pad_token.device,
            pipeline.vae.decoder.conv_in.weight.device,
        )

    def __str__(self) -> str:
        """Return it in words."""
        return f"text encoder on {self.text_encoder}, transformer on {self.transformer}, VAE on {self.vae}"

    @property
    def several(self) -> bool:
        """Whether there are tensors to move."""
        return len({self.text_encoder, self.transformer, self.vae}) > 1


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a card the current one for a while: kernels of Triton, streams, events and graphs go to that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

"""The caption's way through the transformer, once a prompt; diffusers walks it again in every forward."""

from collections.abc import Sequence
from typing import Any

import torch

from zops.serving.accelerate.attention import runs
from zops.serving.accelerate.fused import Packed
from zops.serving.accelerate.rope import caption_table, padded


def refine(transformer: Any, embeds: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the refined rows of all captions, each with its padding, one after the other."""
    lengths = [padded(len(embed)) for embed in embeds]
    device = embeds[0].device
    filled = [
        torch.cat((embed, embed[-1:].expand(n - len(embed), -1))) for embed, n in zip(embeds, lengths, strict=True)
    ]
    x = transformer.cap_embedder(torch.cat(filled).to(transformer.dtype))
    is_padding = torch.cat([
        torch.arange(n, device=device) >= len(embed) for embed, n in zip(embeds, lengths, strict=True)
    ])  # fmt: skip
    rows: torch.Tensor = torch.where(is_padding[:, None], transformer.cap_pad_token, x)
    tables = {n: caption_table(transformer, n, device) for n in set(lengths)}
    packed = Packed(torch.cat([tables[n] for n in lengths]), runs(lengths))
    nothing = rows.new_zeros(1, 1)
    for block in transformer.context_refiner:
        rows = block.run(rows, block.gains(nothing)[0], packed)
    return rows

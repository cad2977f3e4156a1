"""A block of the transformer with q, k and v as one matrix product, gate and up as one, and fused steps between.

It takes the weights of a diffusers ZImageTransformerBlock and computes the same, on packed rows instead of padded
batches. It also answers diffusers' own call, so a pipeline (or a sibling of it) runs with these blocks in place.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from zops.serving.accelerate.attention import NATIVE, Attend, runs
from zops.serving.accelerate.cards import ALONE, Cards
from zops.serving.accelerate.fp8 import AnyLinear, stacked
from zops.serving.accelerate.rows import RowOperations, Rows
from zops.serving.memory import MOST_KEPT, give_back


@dataclass(frozen=True, slots=True)
class Packed:
    """What all blocks of one forward share: how rows fall into images, and the rotary table of every row.

    Where several cards work on them, the table is that of this card's rows, and `packing` that of all rows.
    """

    rope: torch.Tensor
    packing: tuple[tuple[int, int], ...]
    cards: Cards = ALONE


class FusedBlock(nn.Module):
    """One block; `rows` says how its steps are computed, `attend` its attention (set by the preset after probing)."""

    def __init__(self, block: Any, rows: RowOperations, *, fp8: bool) -> None:
        super().__init__()
        attention, feed = block.attention, block.feed_forward
        self.qkv = stacked(attention.to_q, attention.to_k, attention.to_v, fp8=fp8)
        self.out = stacked(attention.to_out[0], fp8=fp8)
        self.up = stacked(feed.w1, feed.w3, fp8=fp8)
        self.down = stacked(feed.w2, fp8=fp8)
        self.head: int = attention.norm_q.weight.shape[0]
        self.eps: float = block.attention_norm1.eps
        self.head_eps: float = attention.norm_q.eps
        self.modulation = block.adaLN_modulation if block.modulation else None
        norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
        self.register_buffer("norms", torch.stack([norm.weight.detach().float() for norm in norms]))
        self.register_buffer("norm_q", attention.norm_q.weight.detach().float())
        self.register_buffer("norm_k", attention.norm_k.weight.detach().float())
        self.rows = rows
        self.attend: Attend = NATIVE.attend

    def gains(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the vectors that a block multiplies with at each timestep, shape (timesteps, 4, width), float32.

        In order: norm before attention, gate after it, norm before the feed-forward, gate after it; the weights of the
        norms and the modulation in one factor. They depend on the timestep alone, so a schedule needs them once.
        """
        norms = cast("torch.Tensor", self.norms)
        if self.modulation is None:
            return norms.expand(len(timestep), -1, -1)
        modulated = self.modulation(timestep).float().unflatten(-1, (4, -1))
        scales, gates = 1 + modulated[:, 0::2], modulated[:, 1::2].tanh()
        return torch.stack((scales[:, 0], gates[:, 0], scales[:, 1], gates[:, 1]), dim=1) * norms

    def run(self, x: torch.Tensor, gains: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return the rows after this block; `gains` are those of one timestep, shape (4, width)."""
        rows = self.rows
        before, gate, middle, last = gains.unbind(0)
        entry = rows.norm(x, before, self.eps, fp8=self.qkv.takes_fp8)
        branch = self.out(self._input(self.attended(self.qkv(entry), packed), self.out))
        x, entry = rows.add_norm_norm(x, branch, gate, middle, self.eps, fp8=self.up.takes_fp8)
        branch = self.down(rows.gated(self.up(entry), fp8=self.down.takes_fp8))
        return rows.add_norm(x, branch, last, self.eps)

    def attended(self, qkv: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return the attention of rows of q, k and v."""
        norm_q, norm_k = cast("torch.Tensor", self.norm_q), cast("torch.Tensor", self.norm_k)
        qkv = self.rows.rotate(qkv, norm_q, norm_k, packed.rope, self.head_eps)
        return packed.cards.attend(qkv, self.head, packed.packing, self.attend)

    def _input(self, x: torch.Tensor, layer: AnyLinear) -> Rows:
        return self.rows.quantise(x) if layer.takes_fp8 else x

    def forward(  # noqa: PLR0917 - diffusers calls it so
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what diffusers' block returns (padding excepted, which nobody reads).

        Raises:
            NotImplementedError: for the call of the Omni model, whose tokens have two timesteps.
        """
        if noise_mask is not None or adaln_noisy is not None or adaln_clean is not None:
            raise NotImplementedError("the Omni model's call")
        count, longest, width = x.shape
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if attn_mask is None else attn_mask
        timesteps = x.new_zeros(count, 1) if adaln_input is None else adaln_input
        if len(timesteps.unique(dim=0)) > 1:  # the gains of a call are those of one timestep
            return torch.cat([
                self.forward(x[i : i + 1], inside[i : i + 1], freqs_cis[i : i + 1], timesteps[i : i + 1])
                for i in range(count)
            ])  # fmt: skip
        packed = Packed(real_table(freqs_cis[inside]), runs(inside.sum(dim=1).tolist()))
        out = torch.zeros_like(x)
        out[inside] = self.run(x[inside], self.gains(timesteps[:1])[0], packed)
        return out.view(count, longest, width)


def real_table(turns: torch.Tensor) -> torch.Tensor:
    """Return complex rotations as cosines and, right of them, sines: kernels and compilers know no complex numbers."""
    return torch.cat((turns.real, turns.imag), dim=-1).contiguous()


def fuse_blocks(transformer: Any, rows: RowOperations, *, fp8: bool, refiners_too: bool = True) -> int:
    """Put fused blocks in place of a transformer's own, one at a time so that memory holds few blocks twice.

    The caption's refiner stays in full precision: it runs once a prompt, and its error would reach every layer.

    Returns:
        How many blocks were replaced.
    """
    count = 0
    for name in ("layers", "noise_refiner", "context_refiner"):
        blocks = getattr(transformer, name)
        for i, block in enumerate(blocks):
            quantised = fp8 and (name == "layers" or (refiners_too and name == "noise_refiner"))
            blocks[i] = FusedBlock(block, rows, fp8=quantised)
            # Weights came on another stream than they are fused on, so fusing does not reuse what it frees.
            give_back(str(transformer.x_pad_token.device), above=MOST_KEPT)
            count += 1
    return count

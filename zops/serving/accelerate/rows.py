"""What a block does between its matrix products, row by row: its definition in plain torch, and the way to the fast.

`kernels` has the same functions as Triton kernels; tests hold the two to each other. A row is a token. Everything
between load and store is float32, so that nothing is rounded twice.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn import functional

from zops.serving.accelerate.choice import has_triton

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
# A row of zeros has no scale of its own; any positive one keeps it zero.
SMALLEST_PEAK = 1e-12


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rows in fp8 (e4m3) with one float32 scale a row, shape (rows, 1): value = fp8 * scale."""

    values: torch.Tensor
    scales: torch.Tensor

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory, once it is freed, until a stream is past what it now does with it; as a tensor does."""
        self.values.record_stream(stream)
        self.scales.record_stream(stream)


Rows = torch.Tensor | Quantised


class RowOperations(Protocol):
    """The operations that `rows` and `kernels` both have. `fp8=True` asks for rows in fp8 instead of `x`'s dtype."""

    def quantise(self, x: torch.Tensor) -> Quantised:
        """Return rows in fp8."""

    def norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool) -> Rows:
        """Return the root-mean-square norm of rows times a float32 gain a column."""

    def add_norm(self, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x + norm(branch) * gate."""

    def add_norm_norm(
        self, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool
    ) -> tuple[torch.Tensor, Rows]:
        """Return y = x + norm(branch) * gate, and norm(y) * gain."""

    def gated(self, both: torch.Tensor, *, fp8: bool) -> Rows:
        """Return silu(first half of the columns) * second half."""

    def rotate(
        self, qkv: torch.Tensor, gain_q: torch.Tensor, gain_k: torch.Tensor, rope: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Norm each head of q and k and turn its pairs of columns; `qkv` is changed in place and returned."""


def operations(device: torch.device) -> RowOperations:
    """Return the fast operations where there is a GPU and Triton, the plain ones elsewhere."""
    if device.type == "cuda" and has_triton():
        from zops.serving.accelerate import kernels  # noqa: PLC0415 - Triton is there with CUDA only

        return cast("RowOperations", kernels)
    return PLAIN


def quantise(x: torch.Tensor) -> Quantised:
    """Return rows in fp8; a row's largest value becomes fp8's largest."""
    wide = x.float()
    scales = wide.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_PEAK) / FP8_MAX
    return Quantised((wide / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales)


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool) -> Rows:
    return _stored(_normed(x.float(), eps) * gain, x.dtype, fp8=fp8)


def add_norm(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.float() + _normed(branch.float(), eps) * gate).to(x.dtype)


def add_norm_norm(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool
) -> tuple[torch.Tensor, Rows]:
    y = x.float() + _normed(branch.float(), eps) * gate
    return y.to(x.dtype), _stored(_normed(y, eps) * gain, x.dtype, fp8=fp8)


def gated(both: torch.Tensor, *, fp8: bool) -> Rows:
    gate, up = both.float().chunk(2, dim=-1)
    return _stored(functional.silu(gate) * up, both.dtype, fp8=fp8)


def rotate(
    qkv: torch.Tensor, gain_q: torch.Tensor, gain_k: torch.Tensor, rope: torch.Tensor, eps: float
) -> torch.Tensor:
    head = rope.shape[1]
    count = qkv.shape[0]
    cos, sin = rope[:, None].chunk(2, dim=-1)
    parts = qkv.view(count, 3, -1, head)
    for i, gain in enumerate((gain_q, gain_k)):
        even, odd = (_normed(parts[:, i].float(), eps) * gain).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        parts[:, i] = turned.to(qkv.dtype)
    return qkv


def _normed(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def _stored(wide: torch.Tensor, dtype: torch.dtype, *, fp8: bool) -> Rows:
    return quantise(wide) if fp8 else wide.to(dtype)


class _Plain:
    """This module's functions as an object, so that they can be passed like `kernels`."""

    quantise = staticmethod(quantise)
    norm = staticmethod(norm)
    add_norm = staticmethod(add_norm)
    add_norm_norm = staticmethod(add_norm_norm)
    gated = staticmethod(gated)
    rotate = staticmethod(rotate)


PLAIN: RowOperations = cast("Any", _Plain())

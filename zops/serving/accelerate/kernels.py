"""The operations of `rows` as Triton kernels: each reads its rows once and writes them once.

A program works on one row; the vectors that all rows share (norm weights and modulation) stay in the first-level cache.
Nothing here depends on the number of rows, so a new image size compiles nothing.
"""

import torch
import triton
import triton.language as tl

from zops.serving.accelerate.rows import FP8, Quantised, Rows

_FP8_MAX = tl.constexpr(448.0)
_SMALLEST_PEAK = tl.constexpr(1e-12)


def quantise(x: torch.Tensor) -> Quantised:
    """Return rows in fp8; see `rows.quantise`."""
    count, width = x.shape
    out, scales = _fp8_rows(x, count, width)
    block = triton.next_power_of_2(width)
    _quantise[(count,)](x, out, scales, width, block=block, num_warps=_warps(block))
    return Quantised(out, scales)


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool) -> Rows:
    """Return the norm of rows times a gain; see `rows.norm`."""
    count, width = x.shape
    out, scales = _rows(x, count, width, fp8=fp8)
    block = triton.next_power_of_2(width)
    _norm[(count,)](
        x, gain, out, scales, width, eps,
        fp8=fp8, block=block, num_warps=_warps(block),
    )  # fmt: skip
    return Quantised(out, scales) if fp8 else out


def add_norm(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x + norm(branch) * gate; see `rows.add_norm`."""
    count, width = x.shape
    summed = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm[(count,)](
        x, branch, gate, gate, summed, summed, summed, width, eps,
        again=False, fp8=False, block=block, num_warps=_warps(block),
    )  # fmt: skip
    return summed


def add_norm_norm(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, fp8: bool
) -> tuple[torch.Tensor, Rows]:
    """Return y = x + norm(branch) * gate, and norm(y) * gain; see `rows.add_norm_norm`."""
    count, width = x.shape
    summed = torch.empty_like(x)
    out, scales = _rows(x, count, width, fp8=fp8)
    block = triton.next_power_of_2(width)
    _add_norm[(count,)](
        x, branch, gate, gain, summed, out, scales, width, eps,
        again=True, fp8=fp8, block=block, num_warps=_warps(block),
    )  # fmt: skip
    return summed, Quantised(out, scales) if fp8 else out


def gated(both: torch.Tensor, *, fp8: bool) -> Rows:
    """Return silu(first half) * second half; see `rows.gated`."""
    count, width = both.shape[0], both.shape[1] // 2
    out, scales = _rows(both, count, width, fp8=fp8)
    block = min(1024, triton.next_power_of_2(width))
    _gated[(count,)](both, out, scales, width=width, fp8=fp8, block=block, num_warps=_warps(block))
    return Quantised(out, scales) if fp8 else out


def rotate(
    qkv: torch.Tensor, gain_q: torch.Tensor, gain_k: torch.Tensor, rope: torch.Tensor, eps: float
) -> torch.Tensor:
    """Norm and turn q and k in place; see `rows.rotate`."""
    count, head = qkv.shape[0], rope.shape[1]
    heads = qkv.shape[1] // 3 // head
    _rotate[(count, 2)](
        qkv, gain_q, gain_k, rope, heads, eps, block=triton.next_power_of_2(heads), head=head, num_warps=4
    )
    return qkv


def _rows(like: torch.Tensor, count: int, width: int, *, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensors to write to: rows, and their scales (which rows in full precision have none of)."""
    if fp8:
        return _fp8_rows(like, count, width)
    out = torch.empty((count, width), dtype=like.dtype, device=like.device)
    return out, out


def _fp8_rows(like: torch.Tensor, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty((count, width), dtype=FP8, device=like.device)
    return out, torch.empty((count, 1), dtype=torch.float32, device=like.device)


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


@triton.jit
def _store(values, out, scales, row, width, columns, inside, fp8: tl.constexpr):
    """Write one row, in fp8 with its scale or as it is."""
    if fp8:
        peak = tl.max(tl.where(inside, tl.abs(values), 0.0), axis=0)
        scale = tl.maximum(peak, _SMALLEST_PEAK) / _FP8_MAX
        tl.store(scales + row, scale)
        values = tl.minimum(tl.maximum(values / scale, -_FP8_MAX), _FP8_MAX)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(x, out, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    _store(values, out, scales, row, width, columns, inside, True)


@triton.jit
def _norm(x, gain, out, scales, width, eps, fp8: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gains = tl.load(gain + columns, mask=inside, other=0.0)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + eps) * gains
    _store(values, out, scales, row, width, columns, inside, fp8)


@triton.jit
def _add_norm(
    x, branch, gate, gain, summed, out, scales, width, eps,
    again: tl.constexpr, fp8: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    side = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + columns, mask=inside, other=0.0)
    values += side * tl.rsqrt(tl.sum(side * side, axis=0) / width + eps) * gates
    tl.store(summed + row * width + columns, values.to(summed.dtype.element_ty), mask=inside)
    if again:
        gains = tl.load(gain + columns, mask=inside, other=0.0)
        values = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + eps) * gains
        _store(values, out, scales, row, width, columns, inside, fp8)


@triton.jit
def _silu_times(start, width, inside):
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * tl.load(start + width, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gated(both, out, scales, width: tl.constexpr, fp8: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    start = both + row * 2 * width + columns
    scale = 1.0
    if fp8:  # The row is read a second time below, from the cache: to hold it would leave room for one program only.
        peaks = tl.zeros((block,), dtype=tl.float32)
        for first in range(0, width, block):
            peaks = tl.maximum(peaks, tl.abs(_silu_times(start + first, width, first + columns < width)))
        scale = tl.maximum(tl.max(peaks, axis=0), _SMALLEST_PEAK) / _FP8_MAX
        tl.store(scales + row, scale)
    for first in range(0, width, block):
        inside = first + columns < width
        values = _silu_times(start + first, width, inside)
        if fp8:
            values = tl.minimum(tl.maximum(values / scale, -_FP8_MAX), _FP8_MAX)
        tl.store(out + row * width + first + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(qkv, gain_q, gain_k, rope, heads, eps, block: tl.constexpr, head: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    is_k = tl.program_id(1)
    columns = tl.arange(0, head)
    rank = tl.arange(0, block)
    inside = (rank < heads)[:, None]
    start = qkv + (row * 3 + is_k) * heads * head + rank[:, None] * head + columns[None, :]
    gains = tl.load((gain_k if is_k else gain_q) + columns).to(tl.float32)
    values = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, axis=1) / head + eps)[:, None] * gains[None, :]
    half = tl.arange(0, head // 2)
    cos = tl.load(rope + row * head + half)[None, :]
    sin = tl.load(rope + row * head + head // 2 + half)[None, :]
    even, odd = tl.split(tl.reshape(values, (block, head // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(start, tl.reshape(turned, (block, head)).to(qkv.dtype.element_ty), mask=inside)

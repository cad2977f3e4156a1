"""The decoder's steps between convolutions as Triton kernels, on images with their channels last in memory.

A group's mean and variance are summed in a fixed order (pieces, then the pieces), so equal seeds give equal images.
"""

import torch
import triton
import triton.language as tl
from torch import nn

_TILE = 8192  # elements a program holds
_TILES_A_PIECE = 8
_LARGEST_PIECES = 2048


def norm(x: torch.Tensor, by: nn.GroupNorm, *, shift: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """Return silu(group norm of x + shift); see `decoder.norm`."""
    count, channels, height, width = x.shape
    groups = by.num_groups
    pixels = height * width
    rows = max(1, _TILE // channels)
    tiles = max(_TILES_A_PIECE, triton.cdiv(pixels, rows * _LARGEST_PIECES))
    pieces = triton.cdiv(pixels, rows * tiles)
    partial = torch.empty((count, 2, groups, pieces), dtype=torch.float32, device=x.device)
    stats = torch.empty((count, groups, 2), dtype=torch.float32, device=x.device)
    added = by.weight if shift is None else shift  # where there is none it is not read
    shape = {"channels": channels, "groups": groups, "rows": rows, "shifted": shift is not None, "num_warps": 8}
    _sum_pieces[(pieces, count)](x, added, partial, pixels, pieces, tiles, **shape)
    _sum_groups[(groups, count)](
        partial, stats, pixels, pieces, rows * tiles, by.eps,
        width=channels // groups, groups=groups, block=triton.next_power_of_2(pieces),
    )  # fmt: skip
    out = torch.empty_like(x)
    shape["rows"] = max(1, rows // 2)  # half the tile leaves room for twice the programs
    _apply[(triton.cdiv(pixels, shape["rows"]), count)](
        x, added, stats, by.weight, by.bias, out, pixels, silu=silu, **shape
    )
    return out


def add(x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x + branch + bias of the channel; see `decoder.add`."""
    out = torch.empty_like(x)
    block = 2048
    _add[(triton.cdiv(x.numel(), block),)](
        x, branch, bias, out, x.numel(), channels=x.shape[1], block=block, num_warps=4
    )
    return out


@triton.jit
def _tile(x, added, first, pixels, channels: tl.constexpr, rows: tl.constexpr, shifted: tl.constexpr):
    """Return a tile in float32, where its elements are, and which of its rows exist."""
    pixel = first + tl.arange(0, rows)
    column = tl.arange(0, channels)
    inside = (pixel < pixels)[:, None]
    place = pixel[:, None] * channels + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if shifted:
        values = values + tl.load(added + column).to(tl.float32)[None, :]
    return values, place, inside


@triton.jit
def _sum_pieces(
    x, added, partial, pixels, pieces, tiles,
    channels: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr, shifted: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    start = x + image * pixels * channels
    sums = tl.zeros((rows, channels), dtype=tl.float32)
    squares = tl.zeros((rows, channels), dtype=tl.float32)
    for tile in range(tiles):
        values, _, inside = _tile(start, added, (piece * tiles + tile) * rows, pixels, channels, rows, shifted)
        values = tl.where(inside, values, 0.0)
        sums += values
        squares += values * values
    group_sums = tl.sum(tl.reshape(tl.sum(sums, axis=0), (groups, channels // groups)), axis=1)
    group_squares = tl.sum(tl.reshape(tl.sum(squares, axis=0), (groups, channels // groups)), axis=1)
    count = tl.minimum(rows * tiles, pixels - piece * rows * tiles) * (channels // groups)
    mean = group_sums / count
    place = partial + (image * 2 * groups + tl.arange(0, groups)) * pieces + piece
    tl.store(place, mean)
    tl.store(place + groups * pieces, tl.maximum(group_squares - mean * group_sums, 0.0))


@triton.jit
def _sum_groups(
    partial, stats, pixels, pieces, piece_pixels, eps,
    width: tl.constexpr, groups: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    piece = tl.arange(0, block)
    inside = piece < pieces
    place = partial + (image * 2 * groups + group) * pieces + piece
    means = tl.load(place, mask=inside, other=0.0)
    spreads = tl.load(place + groups * pieces, mask=inside, other=0.0)
    counts = tl.where(inside, tl.minimum(piece_pixels, pixels - piece * piece_pixels) * width, 0).to(tl.float32)
    total = tl.sum(counts, axis=0)
    mean = tl.sum(means * counts, axis=0) / total
    away = tl.where(inside, means - mean, 0.0)
    variance = tl.sum(spreads + counts * away * away, axis=0) / total
    out = stats + (image * groups + group) * 2
    tl.store(out, mean)
    tl.store(out + 1, tl.rsqrt(variance + eps))


@triton.jit
def _apply(
    x, added, stats, weight, bias, out, pixels,
    silu: tl.constexpr, channels: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr, shifted: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    offset = image * pixels * channels
    values, place, inside = _tile(
        x + offset, added, tl.program_id(0).to(tl.int64) * rows, pixels, channels, rows, shifted
    )
    column = tl.arange(0, channels)
    own = stats + (image * groups + column // (channels // groups)) * 2
    factor = tl.load(own + 1) * tl.load(weight + column).to(tl.float32)
    values = (values - tl.load(own)[None, :]) * factor[None, :] + tl.load(bias + column).to(tl.float32)[None, :]
    if silu:
        values = values * tl.sigmoid(values)
    tl.store(out + offset + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(x, branch, bias, out, count, channels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + place % channels).to(tl.float32)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)

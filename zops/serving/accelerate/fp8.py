"""Matrix products in fp8 (e4m3): weights quantised once by output channel, activations by token as they come.

The product of the scales is applied to each element of the float32 sum, so one token or channel of large values
costs the others no precision. A GPU that has fp8 (compute capability 8.9 or newer) multiplies it directly;
elsewhere the same fp8 numbers are multiplied in float32, which is what tests compare with.
"""

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from zops.serving.accelerate.rows import Quantised, RowOperations, Rows, quantise
from zops.serving.memory import MOST_KEPT, give_back

# The matrix units take fp8 in pieces of 16 columns and rows.
_PIECE = 16
_ROWS_AT_ONCE = 1024
_LARGE = {
    "transformer": re.compile(
        r"(layers|noise_refiner)\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])\.weight"
    ),
    "text_encoder": re.compile(r"(model\.)?layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"),
}
"""The weights that presets put into fp8, by the folder of their file: see `fused.fuse_blocks`, `quantise_linears`."""


def has_fp8(device: torch.device) -> bool:
    """Return whether this device multiplies fp8 with a scale a row; newer GPUs than Ada and Hopper do, too."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Linear(nn.Module):
    """A linear layer without bias on rows, in the weight's dtype; `takes_fp8` tells what its input must be."""

    takes_fp8 = False

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return rows times the transposed weight."""
        return functional.linear(cast("torch.Tensor", rows), self.weight)


class Fp8Linear(nn.Module):
    """A linear layer without bias that takes rows in fp8 and returns them in `dtype`."""

    takes_fp8 = True

    def __init__(self, weight: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        quantised = weight if isinstance(weight, Quantised) else quantise_weight(weight.detach())
        self.register_buffer("weight", quantised.values)
        self.register_buffer("scales", quantised.scales.view(1, -1))
        self.direct = has_fp8(quantised.values.device)

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return rows times the transposed weight."""
        rows = cast("Quantised", rows)
        weight, scales = cast("torch.Tensor", self.weight), cast("torch.Tensor", self.scales)
        if self.direct:
            return torch._scaled_mm(  # noqa: SLF001 - the only way to fp8 products that torch has
                rows.values,
                weight.t(),
                scale_a=rows.scales,
                scale_b=scales,
                out_dtype=self.dtype,
                use_fast_accum=True,
            )
        return (functional.linear(rows.values.float(), weight.float()) * rows.scales * scales).to(self.dtype)


AnyLinear = Linear | Fp8Linear


def fits_fp8(weight: torch.Tensor) -> bool:
    """Return whether a weight has a shape that the matrix units take in fp8."""
    return weight.ndim == 2 and all(size % _PIECE == 0 for size in weight.shape)


def quantise_weight(weight: torch.Tensor) -> Quantised:
    """Return a weight in fp8, some rows after others: its float32 would take four times the memory of its bf16."""
    pieces = [quantise(rows) for rows in weight.split(_ROWS_AT_ONCE)]
    return Quantised(torch.cat([piece.values for piece in pieces]), torch.cat([piece.scales for piece in pieces]))


def stacked(*layers: Any, fp8: bool) -> AnyLinear:
    """Return one linear layer in place of several that have the same input, in fp8 if asked for and possible.

    A scale belongs to one row of a weight, so layers that are in fp8 already are put together as they are. A single one
    is copied, too: memory is given back by the page, and what stayed where it arrived would keep its neighbours' pages.
    """
    if any(isinstance(layer, Fp8Linear) for layer in layers):
        weights = [Quantised(layer.weight, layer.scales.view(-1, 1)) for layer in layers]
        values, scales = torch.cat([w.values for w in weights]), torch.cat([w.scales for w in weights])
        return Fp8Linear(Quantised(values, scales), layers[0].dtype)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return Fp8Linear(weight, weight.dtype) if fp8 and fits_fp8(weight) else Linear(weight)


class Fp8Drop(nn.Module):
    """An Fp8Linear where an nn.Linear was: quantises what it is given."""

    def __init__(self, linear: Fp8Linear, rows: RowOperations) -> None:
        super().__init__()
        self.linear = linear
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weight, of x's shape but for the last dimension."""
        flat = x.reshape(-1, x.shape[-1])
        return cast("torch.Tensor", self.linear(self.rows.quantise(flat))).view(*x.shape[:-1], -1)


def quantise_linears(module: nn.Module, rows: RowOperations) -> int:
    """Put fp8 in place of every linear layer without bias below a module; return how many."""
    count = 0
    for name, child in list(module.named_children()):
        plain = isinstance(child, nn.Linear) and getattr(child, "bias", None) is None and fits_fp8(child.weight)
        if plain or isinstance(child, Fp8Linear):
            setattr(module, name, Fp8Drop(cast("Fp8Linear", stacked(child, fp8=True)), rows))
            give_back(str(child.weight.device), above=MOST_KEPT)
            count += 1
        else:
            count += quantise_linears(child, rows)
    return count


def quantise_on_arrival(*, text: bool) -> Callable[[str, str, torch.Tensor], Rows]:
    """Return what puts a weight into fp8 as soon as it is whole: `WeightStream`'s `arrived`.

    So a GPU never holds more of the wide weights than are on their way, and a card of 16 GB loads what it can serve.

    Args:
        text: whether the text encoder's weights, too.
    """
    folders = ("transformer", "text_encoder") if text else ("transformer",)

    def arrived(path: str, name: str, weight: torch.Tensor) -> Rows:
        folder = path.partition("/")[0]
        large = folder in folders and _LARGE[folder].fullmatch(name) is not None and fits_fp8(weight)
        return quantise_weight(weight) if large else weight

    return arrived

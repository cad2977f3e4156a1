"""Matrix products in fp8 (e4m3): weights quantised once by output channel, activations by token as they come.

The product of the scales is applied to each element of the float32 sum, so one token or channel of large values
costs the others no precision. A GPU that has fp8 (compute capability 8.9 or newer) multiplies it directly;
elsewhere the same fp8 numbers are multiplied in float32, which is what tests compare with.
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from zops.serving.accelerate.rows import Quantised, RowOperations, Rows, quantise

# The matrix units take fp8 in pieces of 16 columns and rows.
_PIECE = 16


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

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.dtype = weight.dtype
        quantised = quantise(weight.detach())
        self.register_buffer("weight", quantised.values)
        self.register_buffer("scales", quantised.scales.view(1, -1))
        self.direct = has_fp8(weight.device)

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


def linear(weight: torch.Tensor, *, fp8: bool) -> AnyLinear:
    """Return a linear layer, in fp8 if that was asked for and the shape allows it."""
    fits = all(size % _PIECE == 0 for size in weight.shape)
    return Fp8Linear(weight) if fp8 and fits else Linear(weight)


class Fp8Drop(nn.Module):
    """An Fp8Linear where an nn.Linear was: quantises what it is given."""

    def __init__(self, weight: torch.Tensor, rows: RowOperations) -> None:
        super().__init__()
        self.linear = Fp8Linear(weight)
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weight, of x's shape but for the last dimension."""
        flat = x.reshape(-1, x.shape[-1])
        return cast("torch.Tensor", self.linear(self.rows.quantise(flat))).view(*x.shape[:-1], -1)


def quantise_linears(module: nn.Module, rows: RowOperations) -> int:
    """Put fp8 in place of every linear layer without bias below a module; return how many."""
    count = 0
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.Linear)
            and getattr(child, "bias", None) is None
            and all(s % _PIECE == 0 for s in child.weight.shape)
        ):
            setattr(module, name, Fp8Drop(child.weight, rows))
            count += 1
        else:
            count += quantise_linears(child, rows)
    return count

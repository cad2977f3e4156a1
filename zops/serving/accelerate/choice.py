"""Which preset a device gets: a rule over plain numbers, without torch.

`auto` puts quality first: bf16 wherever it fits, because it makes the same pictures as eager; fp8 only where bf16 does
not fit; eager where there is no GPU, or no Triton to compile the kernels with.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from zops.cache.safetensors import read_header
from zops.errors import ZopsError
from zops.serving.assemble import weight_files
from zops.serving.placement import Demand, place

Preset = Literal["eager", "bf16", "fp8"]
_BY_SPEED: tuple[Preset, ...] = ("fp8", "bf16", "eager")

FP8_SINCE = (8, 9)
"""First compute capability that multiplies fp8 (Ada); Hopper is 9.0, Blackwell 10.0 and 12.0."""
ROOM_BYTES = 3_000_000_000
"""Beside the weights: 1.4 GB for an image of 1024x1024 (measured on an H200), graphs, CUDA's own half gigabyte."""
_FP8_SHARE = 0.54
"""Bytes of a network in fp8 against bf16: its norms, embedders and refiner of captions stay what they are (measured:
the transformer 0.53, the text encoder 0.55)."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the rule must know of a device."""

    type: Literal["cuda", "cpu"]
    capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    triton: bool = False
    more_cards: tuple[int, ...] = ()
    """Bytes of the further cards that components may be spread over."""

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies fp8."""
        return self.type == "cuda" and self.capability >= FP8_SINCE


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the operator asks for; see the spec's `serve.preset`."""

    preset: str
    fp8_text: bool | None
    forced: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What is served."""

    preset: Preset
    fp8_text: bool
    eager_fits: bool
    """Whether the weights fit in bf16: only then can eager's images be made to compare with."""
    reason: str
    fallbacks: "tuple[Choice, ...]" = ()
    """What to serve instead, in this order, when the gate refuses this one; empty for one that was asked for."""


def choose(wanted: Wanted, device: Device, weights: Mapping[str, int]) -> Choice:
    """Choose a preset.

    Args:
        wanted: by the operator.
        device: what it is to run on.
        weights: parameters of each component of the pipeline.

    Raises:
        ZopsError: `preset-unusable` when the device cannot compute the preset that was asked for.
    """
    fits = device.type != "cuda" or has_room(device, weights)
    if wanted.preset != "auto":
        preset = _asked(wanted, device)
        return Choice(preset, preset == "fp8" and _takes_text(wanted, device, weights), fits, "asked for")
    preset, reason = _automatic(device, fits=fits)
    # Where bf16 does not fit and is tried all the same, eager takes no more.
    slower = _BY_SPEED[_BY_SPEED.index(preset) + 1 :] if fits or preset != "fp8" else ()
    instead = tuple(Choice(each, fp8_text=False, eager_fits=fits, reason="auto fell back") for each in slower)
    return Choice(preset, preset == "fp8" and _takes_text(wanted, device, weights), fits, reason, instead)


def demands(
    weights: Mapping[str, int], *, bytes_each: int = 2, fp8: bool = False, fp8_text: bool = False
) -> dict[str, Demand]:
    """Return what each component asks of its card.

    Args:
        weights: parameters of each component.
        bytes_each: of a parameter.
        fp8: whether the large layers of the transformer are in fp8.
        fp8_text: whether those of the text encoder are.
    """
    narrow = {"transformer": fp8, "text_encoder": fp8 and fp8_text}
    return {
        name: Demand(int(bytes_each * count * (_FP8_SHARE if narrow.get(name) else 1)), ROOM_BYTES)
        for name, count in weights.items()
    }


def has_room(device: Device, weights: Mapping[str, int], *, fp8: bool = False) -> bool:
    """Tell whether a device has room for weights in bf16, or for those of the transformer in fp8."""
    return place(demands(weights, fp8=fp8), (device.memory_bytes, *device.more_cards)) is not None


def _automatic(device: Device, *, fits: bool) -> tuple[Preset, str]:
    if device.type != "cuda":
        return "eager", "no GPU"
    if not device.triton:
        return "eager", "no Triton, or no C compiler for it"
    if fits or not device.has_fp8:
        return "bf16", "it fits" if fits else "this GPU has no fp8"
    return "fp8", "bf16 does not fit into this GPU's memory"


def _asked(wanted: Wanted, device: Device) -> Preset:
    preset: Preset = "fp8" if wanted.preset == "fp8" else "bf16" if wanted.preset == "bf16" else "eager"
    able = preset == "eager" or (device.type == "cuda" and (preset != "fp8" or device.has_fp8))
    if able or wanted.forced:
        return preset
    what = "a GPU" if device.type != "cuda" else f"compute capability {FP8_SINCE[0]}.{FP8_SINCE[1]} or newer"
    has = "there is none" if device.type != "cuda" else "this one has {}.{}".format(*device.capability)
    raise ZopsError(
        f"serve.preset {preset} needs {what}, and {has}",
        code="preset-unusable",
        hint="set serve.preset: auto; or serve.force_preset: true to have it computed by slow reference numbers",
    )


def _takes_text(wanted: Wanted, device: Device, weights: Mapping[str, int]) -> bool:
    if wanted.fp8_text is not None:
        return wanted.fp8_text
    return device.type == "cuda" and not has_room(device, weights, fp8=True)


def has_triton() -> bool:
    """Return whether Triton can compile kernels here: CUDA builds of torch bring it, the C compiler is the system's."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and importlib.util.find_spec("triton") is not None


def count_weights(snapshot: Path) -> dict[str, int]:
    """Return the parameters of each component of a snapshot, from the headers of its files."""
    return {
        component: sum(
            prod(tensor.shape) for path in paths for tensor in read_header(snapshot / path).tensors.values()
        )
        for component, paths in weight_files(snapshot).items()
    }  # fmt: skip

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

Preset = Literal["eager", "bf16", "fp8"]

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


def choose(wanted: Wanted, device: Device, weights: Mapping[str, int]) -> Choice:
    """Choose a preset.

    Args:
        wanted: by the operator.
        device: what it is to run on.
        weights: parameters of each component of the pipeline.

    Raises:
        ZopsError: `preset-unusable` when the device cannot compute the preset that was asked for.
    """
    on_gpu = device.type == "cuda"
    whole = 2 * sum(weights.values())
    fits = not on_gpu or device.memory_bytes >= whole + ROOM_BYTES
    if wanted.preset == "auto":
        preset, reason = _automatic(device, fits=fits)
    else:
        preset, reason = _asked(wanted, device), "asked for"
    return Choice(preset, preset == "fp8" and _takes_text(wanted, device, weights, whole), fits, reason)


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


def _takes_text(wanted: Wanted, device: Device, weights: Mapping[str, int], whole: int) -> bool:
    if wanted.fp8_text is not None:
        return wanted.fp8_text
    saved = 2 * weights.get("transformer", 0) * (1 - _FP8_SHARE)
    return device.type == "cuda" and device.memory_bytes < whole - saved + ROOM_BYTES


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

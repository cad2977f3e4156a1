"""What fits on a GPU, and how fast it is: arithmetic over a few measurements, each named where it stands.

Memory = weights + activations + reserve. Weights: the catalog's bytes in bfloat16, twice as many in float32.
Activations: transformer and VAE of Z-Image-Turbo peaked at 15.2 GB for one 1024 x 1024 image on an H200 (torch 2.11,
eager, bfloat16), of which 12.5 GB are their weights; other sizes are counted in proportion to their pixels, and float32
as twice that, which was not measured.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from zops.host.gpu import Gpu

ACTIVATION_BYTES_A_PIXEL = 2_700_000_000 / (1024 * 1024)
# What the driver keeps, CUDA's context, and gaps between allocations: an allowance, large enough that 1280 x 1280 does
# not fit into the 24 GB of an RTX 4090D, where it was tried and ran out of memory.
RESERVE_BYTES = 1_200_000_000
# The transformer works on patches of 16 x 16 pixels.
EDGE_STEP = 16

DTYPES = {"bfloat16": 1, "float32": 2}
EDGES = (512, 768, 1024, 1280, 1536, 2048)
# An estimate from one size should not be stretched further than this.
LARGEST_EDGE = EDGES[-1]

_EAGER = "preset eager, bfloat16, 9 forwards, one image at a time"
_FAST = "preset {}, 8 forwards, one image at a time from the prompt to pixels"
_HTTP = "; 8.0 to 8.2 at 512x512 with 32 clients through HTTP"
Speeds = tuple[str, dict[int, float]]
"""How it was measured, and seconds an image by its edge."""
# By a part of the GPU's name (the longest that matches counts) and preset; docs/how-to/speed.md has the conditions.
MEASURED: dict[str, dict[str, Speeds]] = {
    "H200": {
        "bf16": (_FAST.format("bf16"), {512: 0.194, 1024: 0.782}),
        "fp8": (_FAST.format("fp8") + _HTTP, {512: 0.141, 1024: 0.536}),
        "eager": (
            _EAGER + ", text encoder not counted",
            {512: 0.417, 768: 0.79, 1024: 1.40, 1280: 2.27, 1536: 3.45},
        ),
    },
    "RTX 4090 D": {"eager": (_EAGER, {512: 1.1, 768: 2.0, 1024: 3.2})},
}


@dataclass(frozen=True, slots=True)
class Demand:
    """GPU memory that one size in one precision takes."""

    dtype: str
    edge: int
    weights_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, with the reserve."""
        return self.weights_bytes + self.activation_bytes + RESERVE_BYTES

    def as_json(self) -> dict[str, Any]:
        """Return it as documented in docs/reference/json.md."""
        return {
            "dtype": self.dtype,
            "size": f"{self.edge}x{self.edge}",
            "weights_bytes": self.weights_bytes,
            "activation_bytes": self.activation_bytes,
            "reserve_bytes": RESERVE_BYTES,
            "total_bytes": self.total_bytes,
        }


@dataclass(frozen=True, slots=True)
class Room:
    """What a GPU has room for: a verdict a demand, and the largest square image in each precision.

    That is 0 where none fits, and at most `LARGEST_EDGE`.
    """

    gpu: Gpu
    fits: tuple[bool, ...]
    images_per_second: tuple[float | None, ...]
    largest_edges: tuple[int, ...]
    measured: str
    """How the speeds were measured, empty where this GPU was never measured."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Which precision and size fit where, and what the specification asks for."""

    model: str
    demands: tuple[Demand, ...]
    asked: Demand
    rooms: tuple[Room, ...]

    @property
    def sound(self) -> bool:
        """Whether the largest image that the specification allows fits on every GPU that was looked at."""
        return all(self.asked.total_bytes <= room.gpu.memory_total_bytes for room in self.rooms)

    def as_json(self) -> dict[str, Any]:
        """Return it as documented in docs/reference/json.md."""
        return {
            "model": self.model,
            "sound": self.sound,
            "asked": self.asked.as_json(),
            "demands": [demand.as_json() for demand in self.demands],
            "gpus": [self._room_json(room) for room in self.rooms],
        }

    def _room_json(self, room: Room) -> dict[str, Any]:
        rows = zip(self.demands, room.fits, room.images_per_second, strict=True)
        return {
            "index": room.gpu.index,
            "uuid": room.gpu.uuid,
            "name": room.gpu.name,
            "memory_total_bytes": room.gpu.memory_total_bytes,
            "measured": room.measured,
            "largest_pixels": {dtype: edge * edge for dtype, edge in zip(DTYPES, room.largest_edges, strict=True)},
            "rows": [
                {"dtype": demand.dtype, "size": f"{demand.edge}x{demand.edge}", "fits": fit, "images_per_second": speed}
                for demand, fit, speed in rows
            ],
        }


def judge_capacity(
    model: str, resident_bytes: int, dtype: str, max_pixels: int, gpus: Iterable[Gpu], *, preset: str = "auto"
) -> Capacity:
    """Return what fits on each GPU.

    Args:
        model: the model's name.
        resident_bytes: its weights in bfloat16.
        dtype: the precision that the specification asks for.
        max_pixels: the largest image that it allows.
        gpus: the GPUs that it wants.
        preset: whose speed is told; with auto that of bf16, which large GPUs get, or what was measured instead.
    """
    demands = tuple(_demand(resident_bytes, kind, edge * edge, edge) for kind in DTYPES for edge in EDGES)
    asked = _demand(resident_bytes, dtype, max_pixels, math.isqrt(max_pixels))
    return Capacity(model, demands, asked, tuple(_room(gpu, demands, resident_bytes, preset) for gpu in gpus))


def largest_edge(memory_bytes: int, weights_bytes: int, activation_bytes_a_pixel: float) -> int:
    """Return the edge of the largest square image for which memory suffices, 0 where not even the weights fit."""
    left = memory_bytes - weights_bytes - RESERVE_BYTES
    if left <= 0 or activation_bytes_a_pixel <= 0:
        return 0
    return math.isqrt(int(left / activation_bytes_a_pixel)) // EDGE_STEP * EDGE_STEP


def speed_of(name: str, preset: str = "auto") -> Speeds:
    """Return how a GPU of this name was measured with a preset, and how fast; both empty where it was not."""
    # NVML says "NVIDIA GeForce RTX 4090 D", "NVIDIA H200" or "NVIDIA H200 NVL".
    key = max((part for part in MEASURED if part in name), key=len, default="")
    measured = MEASURED.get(key, {})
    return next(
        (measured[each] for each in (("bf16", "eager") if preset == "auto" else (preset,)) if each in measured),
        ("", {}),
    )


def _demand(resident_bytes: int, dtype: str, pixels: int, edge: int) -> Demand:
    wide = DTYPES[dtype]
    return Demand(dtype, edge, resident_bytes * wide, int(pixels * ACTIVATION_BYTES_A_PIXEL * wide))


def _room(gpu: Gpu, demands: tuple[Demand, ...], resident_bytes: int, preset: str) -> Room:
    how, seconds = speed_of(gpu.name, preset)
    fits = tuple(demand.total_bytes <= gpu.memory_total_bytes for demand in demands)
    speeds = tuple(
        round(1 / seconds[demand.edge], 2) if fit and demand.dtype == "bfloat16" and demand.edge in seconds else None
        for demand, fit in zip(demands, fits, strict=True)
    )
    edges = tuple(
        min(LARGEST_EDGE, largest_edge(gpu.memory_total_bytes, resident_bytes * wide, ACTIVATION_BYTES_A_PIXEL * wide))
        for wide in DTYPES.values()
    )
    return Room(gpu, fits, speeds, edges, how)

"""What the tuning recipe claims that zops automates: five settings for one RTX 4090D, as published.

A yardstick on another machine, never a measurement: wherever one of these is shown, that is said beside it.
"""

from dataclasses import dataclass

SOURCE = "the five-settings recipe, one RTX 4090D, as claimed; not measured here"


@dataclass(frozen=True, slots=True)
class Claim:
    """Time in seconds and memory in GB: host memory for loads, GPU memory for images."""

    time_s: float
    memory_gb: float


LOAD = {"low_cpu_mem_usage=False": Claim(18.0, 90.0), "low_cpu_mem_usage=True": Claim(22.0, 35.0)}
BF16 = Claim(3.2, 17.8)
SIZES = {512: Claim(1.1, 10.2), 768: Claim(2.0, 14.6), 1024: Claim(3.2, 17.8)}
"""bf16, 9 steps, guidance 0. 1280 x 1280 runs out of its 24 GB."""
GUIDANCE_ADDS_S = 0.5
TWO_GPUS_SPEEDUP = 1.8

"""The schedule of a call: which timesteps, and how far each forward moves the latents. Plain numbers, no device.

FlowMatchEulerDiscreteScheduler keeps them on the GPU, counts its steps in itself and so serves one call at a time.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas


@dataclass(frozen=True, slots=True)
class Schedule:
    """Timesteps as the transformer takes them (0..1, noise first) and the change of sigma in each forward."""

    times: tuple[float, ...]
    changes: tuple[float, ...]
    sigmas: tuple[float, ...]
    """Share of noise before each forward, and after the last."""

    def __len__(self) -> int:
        """Return the number of forwards."""
        return len(self.times)


def make_schedule(scheduler: Any, forwards: int, *, tokens: int, skip: int = 0) -> Schedule:
    """Return the schedule that ZImagePipeline would use.

    Args:
        scheduler: the pipeline's; it is not changed.
        forwards: of the whole way from noise to image.
        tokens: of one image; only schedulers with dynamic shifting look at it.
        skip: leave out so many at the noisy end, as image-to-image does.
    """
    own = copy.deepcopy(scheduler)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = {name: own.config[name] for name in names if name in own.config}
    mu = calculate_shift(
        tokens,
        shift.get("base_image_seq_len", 256),
        shift.get("max_image_seq_len", 4096),
        shift.get("base_shift", 0.5),
        shift.get("max_shift", 1.15),
    )
    own.set_timesteps(sigmas=get_default_z_image_sigmas(forwards), mu=mu, device="cpu")
    times = (1000 - own.timesteps) / 1000
    changes = own.sigmas.to(torch.float32).diff()
    return Schedule(tuple(times[skip:].tolist()), tuple(changes[skip:].tolist()), tuple(own.sigmas[skip:].tolist()))

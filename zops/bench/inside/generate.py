"""Images under one preset in this fresh process: time of the whole call and of its stages, memory, quality."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zops.bench.inside.clock import GB, free, gpu_peak_gb, on_gpu, repeated, seconds, wait, watch_memory
from zops.bench.inside.ways import stream
from zops.serving.accelerate import gate, preset
from zops.serving.generate import find_fault

_NUMBERS = itertools.count(1000)
QUALITY_IMAGES = 2
ROOM_GB = 8
"""What a call needs beside the weights at most: fp32 activations and the VAE's of 1024 x 1024 are below."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def new_prompt() -> str:
    """Return a prompt that was never asked for, always of as many tokens: a server may remember the last ones."""
    return f"a lighthouse on a cliff at sunrise, photograph {next(_NUMBERS)}"


@dataclass(frozen=True)
class Call:
    """One way to ask for an image."""

    applied: preset.Applied
    size: int
    forwards: int
    guidance: float

    def noise(self, seed: int = 0) -> torch.Tensor:
        """Return the latents to begin with: of the seed alone, on any device."""
        generator = torch.Generator().manual_seed(seed)
        edge = self.size // 8
        return torch.randn(1, 16, edge, edge, generator=generator).to("cuda" if on_gpu() else "cpu")

    def latents(self, prompt: str = "", seed: int = 0) -> torch.Tensor:
        """Encode the prompt, a new one where none is given, and denoise."""
        negative = self.applied.encode([""]) if self.guidance > 0 else ()
        return self.applied.denoise(
            self.applied.encode([prompt or new_prompt()]),
            self.noise(seed),
            forwards=self.forwards,
            negative=negative,
            guidance_scale=self.guidance,
        )

    def __call__(self) -> torch.Tensor:
        """Make an image from prompt to 8-bit pixels on the host."""
        return preset.to_rgb(self.applied.decode(self.latents()))


def measure(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """Measure every case of the task, in its order; a case that does not fit is told and the next one tried."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # as the worker sets them
    dtype = DTYPES[task["dtype"]]
    shortage = _shortage(int(task["parameters"]) * dtype.itemsize / GB)
    if shortage:
        tell(skipped=list(range(len(task["cases"]))), reason=shortage)
        return
    pipeline = stream(Path(task["snapshot"]), dtype).pipeline
    applied = preset.apply(pipeline, task["preset"], fp8_text=task["preset"] == "fp8")
    wait()
    tell(notes=[f"{note.what}{': not, ' + note.left_out if note.left_out else ''}" for note in applied.notes])
    known: dict[Call, dict[str, list[float]]] = {}
    for index, each in enumerate(task["cases"]):
        call = Call(applied, each["size"], each["forwards"], each["guidance"])
        try:
            found = known.get(call) or _measure_case(call, task, each)
        except torch.OutOfMemoryError as error:
            free()
            tell(skipped=[index], reason=f"out of memory: {str(error).partition('. ')[0]}")
            continue
        tell(index=index, samples=found)
        # Two tables may want the same call: its time and memory are the same, the rest is the first one's.
        known[call] = {name: found[name] for name in ("time", "GPU memory", "host memory") if name in found}
        free()


def _measure_case(call: Call, task: dict[str, Any], each: dict[str, Any]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    if each["first"]:
        found["first call"] = [seconds(call)]
    call()  # CUDA graphs are captured by the second call with a shape
    taken: list[float] = []

    def work() -> None:
        taken.extend(repeated(call, least=task["least"], most=task["most"], budget_s=task["budget_s"]))

    if on_gpu():
        found["GPU memory"] = [gpu_peak_gb(work)]
    else:
        with watch_memory() as watched:
            work()
        found["host memory"] = [watched.peak / GB]
    found["time"] = taken
    if each["stages"]:
        found |= _stages(call, least=task["least"])
    if each["quality"]:
        found |= _quality(call, task)
    return found


def _stages(call: Call, *, least: int) -> dict[str, list[float]]:
    applied, noise = call.applied, call.noise()
    embeds = applied.encode([new_prompt()])
    latents = applied.denoise(embeds, noise, forwards=call.forwards)
    return {
        "encode": repeated(lambda: applied.encode([new_prompt()]), least=least, most=least, budget_s=0.0),
        "denoise": repeated(
            lambda: applied.denoise(embeds, noise, forwards=call.forwards), least=least, most=least, budget_s=0.0
        ),
        "decode": repeated(lambda: preset.to_rgb(applied.decode(latents)), least=least, most=least, budget_s=0.0),
    }


def _quality(call: Call, task: dict[str, Any]) -> dict[str, list[float]]:
    """Compare images with the references of eager, or write them where this is eager; one sample an image."""
    prompts = gate.PROMPTS[:QUALITY_IMAGES]
    images = [call.applied.decode(call.latents(text, seed))[0].float().cpu() for seed, text in enumerate(prompts)]
    for image in images:
        if fault := find_fault(image):
            raise RuntimeError(f"an image is {fault}: nothing that was measured with these weights counts")
    file = Path(task["references"])
    if task["is_reference"]:
        np.save(file, torch.stack(images).numpy())
        return {}
    if not file.exists():
        return {}
    references = list(torch.from_numpy(np.load(file)))
    pairs = list(zip(images, references, strict=True))
    return {
        "PSNR": [gate.psnr_db(image, reference) for image, reference in pairs],
        "SSIM": [gate.ssim(image, reference) for image, reference in pairs],
    }


def _shortage(weights_gb: float) -> str:
    """Return why the weights do not fit on the GPU, empty when they do."""
    if not on_gpu():
        return ""
    free_gb = torch.cuda.mem_get_info()[0] / GB
    if free_gb >= weights_gb + ROOM_GB:
        return ""
    return f"needs {weights_gb:.1f} GB for weights and {ROOM_GB} GB beside them; {free_gb:.1f} GB are free"

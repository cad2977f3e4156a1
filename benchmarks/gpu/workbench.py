"""A pipeline under measurement: how it is made, called, timed in parts, and compared with eager."""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.stages import Book, free, timed, wait
from zops.serving.accelerate import gate, preset

GB = 1e9
_NUMBERS = itertools.count(1000)


def new_prompt() -> str:
    """Return a prompt of always as many tokens that was never encoded before: the text encoder remembers the last."""
    return f"a lighthouse on a cliff at sunrise, photograph {next(_NUMBERS)}"


class Workbench:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.tiny = not torch.cuda.is_available()
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.big, self.small = (128, 64) if self.tiny else (1024, 512)
        self.book = Book(asked.out, asked.budget_s)
        self.references: list[torch.Tensor] = []
        self.latents: list[torch.Tensor] = []

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:
        if self.asked.snapshot:
            import diffusers

            pipeline = diffusers.ZImagePipeline.from_pretrained(
                str(self.asked.snapshot), dtype=dtype or self.dtype, local_files_only=True,
                **({} if self.tiny else {"device_map": "cuda"}),
            )  # fmt: skip
            pipeline.set_progress_bar_config(disable=True)
            return pipeline
        from benchmarks.gpu.synthetic import build

        return build("tiny" if self.tiny else "full", self.device, dtype or self.dtype)

    def call(self, applied: preset.Applied, size: int, *, batch: int = 1, forwards: int = 8) -> Callable[[], Any]:
        noise = self.noise(size, batch)

        def work() -> Any:
            embeds = applied.encode([new_prompt() for _ in range(batch)])
            return preset.to_rgb(applied.decode(applied.denoise(embeds, noise, forwards=forwards)))

        return work

    def latents_only(self, applied: preset.Applied, size: int, *, batch: int = 1) -> Callable[[], Any]:
        noise = self.noise(size, batch)
        embeds = applied.encode([new_prompt() for _ in range(batch)])
        return lambda: applied.denoise(embeds, noise, forwards=8)

    def noise(self, size: int, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 16, size // 8, size // 8, generator=generator).to(self.device)

    def parts(self, applied: preset.Applied, size: int, figures: dict[str, Any], *, runs: int = 5) -> None:
        """Measure the whole call and each stage of it."""
        figures["call"] = timed(self.call(applied, size), runs=runs)
        figures["denoise"] = timed(self.latents_only(applied, size), runs=runs)
        figures["encode"] = timed(lambda: applied.encode([new_prompt()]), runs=runs)
        latents = self.latents_only(applied, size)()
        figures["decode"] = timed(lambda: applied.decode(latents), runs=runs)
        pixels = applied.decode(latents)
        figures["to_rgb"] = timed(lambda: preset.to_rgb(pixels), runs=runs)

    def quality(self, applied: preset.Applied, figures: dict[str, Any], name: preset.Preset = "bf16") -> None:
        """Compare decoded images and latents with eager's."""
        images, latents = self.rendered(applied)
        verdict = gate.judge(name, images, self.references)
        figures["psnr_db"] = [round(gate.psnr_db(a, b), 2) for a, b in zip(images, self.references, strict=True)]
        figures["ssim"] = round(verdict.ssim, 4)
        figures["gate"] = verdict.trouble or "passed"
        figures["latents_relative_error"] = [
            round(float((a - b).norm() / b.norm()), 5) for a, b in zip(latents, self.latents, strict=True)
        ]

    def rendered(self, applied: preset.Applied) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        images, kept = [], []
        for seed, prompt in enumerate(gate.PROMPTS[:2]):
            noise = torch.randn(1, 16, self.big // 8, self.big // 8, generator=torch.Generator().manual_seed(seed))
            latents = applied.denoise(applied.encode([prompt]), noise.to(self.device), forwards=8)
            kept.append(latents.float().cpu())
            images.append(applied.decode(latents)[0].float().cpu())
        return images, kept

    def peak(self, figures: dict[str, Any], work: Callable[[], object]) -> None:
        if self.tiny:
            return
        free()
        figures["resident_gb"] = round(torch.cuda.memory_allocated() / GB, 2)
        torch.cuda.reset_peak_memory_stats()
        work()
        wait()
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
        figures["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / GB, 2)

    @staticmethod
    def without_graphs(applied: preset.Applied, pipeline: Any) -> preset.Applied:
        plain = preset.Denoiser(pipeline.transformer, pipeline.scheduler)
        return preset.replace(applied, denoise=plain, encode=preset.TextEncoder(pipeline))

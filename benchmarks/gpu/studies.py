"""Studies beside the presets: what the GPU can do at most, Inductor for our kernels, starts, quality by parts."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.stages import gpu_seconds, steady_seconds, timed, wait
from benchmarks.gpu.workbench import Workbench
from zops.serving.accelerate import gate, preset
from zops.serving.accelerate.attention import NATIVE, probe


class Studies(Workbench):
    def ceilings(self) -> None:
        with self.book.stage("ceilings", 60) as figures:
            if self.tiny:
                return
            from zops.serving.accelerate.kernels import quantise

            shapes = {"cube": (8192, 8192, 8192), "qkv": (4160, 3840, 11520), "out": (4160, 3840, 3840),
                      "up": (4160, 3840, 20480), "down": (4160, 10240, 3840)}  # fmt: skip
            for name, (m, k, n) in shapes.items():
                a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
                flops = 2 * m * k * n
                figures[f"bf16 {name} TFLOP/s"] = round(flops / gpu_seconds(lambda a=a, b=b: a @ b.t()) / 1e12)
                figures[f"steady bf16 {name} TFLOP/s"] = round(
                    flops / steady_seconds(lambda a=a, b=b: a @ b.t()) / 1e12
                )
                qa, qb = quantise(a), quantise(b)
                for fast in (True, False):
                    seconds = gpu_seconds(
                        lambda qa=qa, qb=qb, fast=fast: torch._scaled_mm(  # noqa: SLF001 - there is no other way
                            qa.values, qb.values.t(), scale_a=qa.scales, scale_b=qb.scales.view(1, -1),
                            out_dtype=torch.bfloat16, use_fast_accum=fast,
                        )
                    )  # fmt: skip
                    figures[f"fp8 {name}{'' if fast else ' exact sums'} TFLOP/s"] = round(flops / seconds / 1e12)
            flops = 4 * 4160**2 * 3840
            for backend in probe(self.device, self.dtype, heads=30, head=128, tokens=4160):
                figures[f"attention {backend.name}"] = backend.trouble or {
                    "ms": round(backend.seconds * 1e3, 4),
                    "TFLOP/s": round(flops / backend.seconds / 1e12),
                    "error": round(backend.error, 5),
                }
            qkv = torch.randn(1, 4160, 3, 30, 128, device="cuda", dtype=torch.bfloat16)
            seconds = gpu_seconds(lambda: NATIVE.attend(*qkv.unbind(2)))
            figures["attention native by events TFLOP/s"] = round(flops / seconds / 1e12)
            seconds = steady_seconds(lambda: NATIVE.attend(*qkv.unbind(2)))
            figures["steady attention native TFLOP/s"] = round(flops / seconds / 1e12)
            x = torch.empty(2**30, device="cuda", dtype=torch.int8)
            y = torch.empty_like(x)
            figures["copy TB/s"] = round(2 * x.numel() / gpu_seconds(lambda: y.copy_(x)) / 1e12, 2)

    def quality_of_parts(self) -> None:
        """Say which products cost fp8 its quality: each kept in bf16 in turn; and fp8 of the transformer alone."""
        for name, keep in (("all in fp8, text in bf16", ()), ("down in bf16", ("down",)), ("out in bf16", ("out",))):
            with self.book.stage(f"fp8 quality: {name}", 60) as figures:
                pipeline = self.pipeline()
                sources = (
                    [block.feed_forward.w2.weight for block in pipeline.transformer.layers]
                    if "down" in keep
                    else (
                        [block.attention.to_out[0].weight for block in pipeline.transformer.layers]
                        if "out" in keep
                        else []
                    )
                )
                applied = preset.apply(pipeline, "fp8", graphs=False)
                for block, weight in zip(pipeline.transformer.layers, sources, strict=False):
                    setattr(block, keep[0], preset_linear(weight))
                self.quality(applied, figures, "fp8")
                figures["denoise"] = timed(self.latents_only(applied, self.big), runs=3)
                del pipeline, applied

    def inductor(self) -> None:
        """Do the same by Inductor: regional compile of the fused blocks, and of the decoder."""
        pipeline = self.pipeline()
        from zops.serving.accelerate.compile import compile_blocks, compile_decoder

        with self.book.stage("bf16 by Inductor", 120) as figures:
            applied = preset.apply(pipeline, "bf16", graphs=False, fused_decoder=False, probe_attention=False)
            compile_blocks(pipeline.transformer)
            first = time.perf_counter()
            work = self.latents_only(applied, self.big)
            work()
            wait()
            figures["first_call_s"] = round(time.perf_counter() - first, 2)
            figures["denoise"] = timed(work)
        with self.book.stage("decoder by Inductor", 90) as figures:
            compile_decoder(pipeline.vae)
            latents = self.latents[0].to(self.device) if self.latents else self.noise(self.big, 1)
            decode = preset.apply(pipeline, "eager").decode
            first = time.perf_counter()
            decode(latents)
            wait()
            figures["first_call_s"] = round(time.perf_counter() - first, 2)
            figures["decode"] = timed(lambda: decode(latents))

    def truth(self) -> None:
        """Compare eager bf16 itself with float32, so that decibels between presets can be judged."""
        with self.book.stage("eager against float32", 60) as figures:
            applied = preset.apply(self.pipeline(torch.float32), "eager")
            images, latents = self.rendered(applied)
            figures["psnr_db"] = [round(gate.psnr_db(a, b), 2) for a, b in zip(self.references, images, strict=True)]
            figures["latents_relative_error"] = [
                round(float((a - b).norm() / b.norm()), 5) for a, b in zip(self.latents, latents, strict=True)
            ]

    def starts(self) -> None:
        """Time the first image of a fresh process with its kernels compiled by an earlier one, and without."""
        if self.tiny:
            return
        for name in ("cold", "warm"):
            with self.book.stage(f"first image, kernels {name}", 90) as figures:
                cache = self.asked.out.parent / "triton-cache"
                environment = os.environ | {
                    "TRITON_CACHE_DIR": str(cache),
                    "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                }
                ended = subprocess.run(
                    [sys.executable, "-m", "benchmarks.gpu.accelerate", "--first-image", "--out", str(self.asked.out)],
                    env=environment, capture_output=True, text=True, timeout=85, check=False,
                )  # fmt: skip
                figures.update(
                    json.loads(ended.stdout.splitlines()[-1])
                    if ended.returncode == 0
                    else {"trouble": ended.stderr[-800:]}
                )
        import shutil

        shutil.rmtree(self.asked.out.parent / "triton-cache", ignore_errors=True)

    def first_image(self) -> None:
        pipeline = self.pipeline()
        wait()
        figures = {}
        marks = [time.perf_counter()]
        applied = preset.apply(pipeline, "fp8", fp8_text=True)
        wait()
        marks.append(time.perf_counter())
        for name in ("first", "second", "third"):
            self.call(applied, self.big)()
            marks.append(time.perf_counter())
            figures[f"{name}_call_s"] = round(marks[-1] - marks[-2], 3)
        for name in ("first", "second"):
            began = time.perf_counter()
            self.call(applied, self.small)()
            figures[f"{name}_call_of_another_size_s"] = round(time.perf_counter() - began, 3)
        print(json.dumps({"apply_s": round(marks[1] - marks[0], 3), **figures}))


def preset_linear(weight: torch.Tensor) -> Any:
    from zops.serving.accelerate.fp8 import Linear

    return Linear(weight)

"""What each transformation of the presets gives, side by side in one run on one GPU.

    python -m benchmarks.gpu.accelerate --random --out FILE [--budget-s 540] [--quick]
    python -m benchmarks.gpu.accelerate --snapshot DIR --out FILE

`--random` makes the full-size model of random weights on the GPU; speeds do not depend on the values of weights.
Seconds are of whole calls, from prompts to 8-bit pixels on the host, text encoder included, unless a name says less.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stages import Book, clocks, free, gpu_seconds, profile, timed, wait
from zops.serving.accelerate import decoder, gate, preset
from zops.serving.accelerate.attention import NATIVE, probe
from zops.serving.accelerate.rows import PLAIN

PROMPT = "a lighthouse on a cliff at sunrise, photograph"
GB = 1e9


class Bench:
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
            embeds = applied.encode([PROMPT] * batch)
            return preset.to_rgb(applied.decode(applied.denoise(embeds, noise, forwards=forwards)))

        return work

    def latents_only(self, applied: preset.Applied, size: int, *, batch: int = 1) -> Callable[[], Any]:
        noise = self.noise(size, batch)
        embeds = applied.encode([PROMPT] * batch)
        return lambda: applied.denoise(embeds, noise, forwards=8)

    def noise(self, size: int, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 16, size // 8, size // 8, generator=generator).to(self.device)

    def parts(self, applied: preset.Applied, size: int, figures: dict[str, Any], *, runs: int = 5) -> None:
        """Measure the whole call and each stage of it."""
        figures["call"] = timed(self.call(applied, size), runs=runs)
        figures["denoise"] = timed(self.latents_only(applied, size), runs=runs)
        figures["encode"] = timed(lambda: applied.encode([PROMPT]), runs=runs)
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

    # --- stages, the most important first -------------------------------------------------------------------------

    def facts(self) -> None:
        with self.book.stage("facts", 60) as figures:
            import diffusers
            import transformers

            figures["versions"] = {
                "torch": torch.__version__, "diffusers": diffusers.__version__,
                "transformers": transformers.__version__, "python": sys.version.split()[0],
            }  # fmt: skip
            figures["gpu"] = clocks()
            if not self.tiny:
                import triton

                figures["versions"]["triton"] = triton.__version__
                figures["versions"]["cudnn"] = torch.backends.cudnn.version()

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
            x = torch.empty(2**30, device="cuda", dtype=torch.int8)
            y = torch.empty_like(x)
            figures["copy TB/s"] = round(2 * x.numel() / gpu_seconds(lambda: y.copy_(x)) / 1e12, 2)

    def kernels(self) -> None:
        """Hold the kernels to their definition on this GPU, and say how fast they move bytes."""
        with self.book.stage("kernels", 60) as figures:
            if self.tiny:
                return
            from benchmarks.gpu.kernels import check_and_time

            check_and_time(figures)
        wrong = [
            name
            for name, value in figures.items()
            if name != "took_s" and not (isinstance(value, dict) and value["error"] < 0.03)
        ]
        if wrong:  # measure the rest without them rather than nothing
            print(f"!! wrong kernels, plain torch instead of all: {wrong}", file=sys.stderr)
            preset.operations = lambda _device: PLAIN
            decoder.operations = lambda _decoder: decoder.PLAIN

    def eager(self) -> None:
        with self.book.stage("eager", 90) as figures:
            began = time.perf_counter()
            pipeline = self.pipeline()
            wait()
            figures["build_s"] = round(time.perf_counter() - began, 1)
            noise = self.noise(self.big, 1)

            def seeds_way(forwards: int) -> Callable[[], Any]:
                return lambda: pipeline(
                    prompt=[PROMPT], latents=noise, height=self.big, width=self.big,
                    num_inference_steps=forwards, guidance_scale=0.0, output_type="np",
                )  # fmt: skip

            figures["seed, 9 forwards"] = timed(seeds_way(9), warm=1)
            figures["pipeline, 8 forwards"] = timed(seeds_way(8), warm=1)
            applied = preset.apply(pipeline, "eager")
            self.parts(applied, self.big, figures, runs=3)
            self.peak(figures, self.call(applied, self.big))
            figures["512, 9 forwards"] = timed(self.call(applied, self.small, forwards=9), runs=3, warm=1)
            self.references, self.latents = self.rendered(applied)
            figures["image mean, deviation"] = [
                (round(float(image.mean()), 3), round(float(image.std()), 3)) for image in self.references
            ]

    def steps(self) -> None:
        """Add one transformation after the other to bf16."""
        pipeline = self.pipeline()
        added: dict[str, Any] = {"fused_text": False, "fused_decoder": False, "graphs": False, "probe_attention": False}
        before = preset.apply(pipeline, "eager")
        with self.book.stage("bf16 fused blocks and kernels", 60) as figures:
            first = time.perf_counter()
            applied = preset.apply(pipeline, "bf16", **added)
            figures["apply_s"] = round(time.perf_counter() - first, 2)
            first = time.perf_counter()
            self.call(applied, self.big)()
            wait()
            figures["first_call_s"] = round(time.perf_counter() - first, 2)
            self.parts(applied, self.big, figures)
            self.quality(applied, figures)
        # The blocks are fused now; what follows is put together by hand so that no weight is touched twice.
        with self.book.stage("+ text encoder without padding", 30) as figures:
            encode = preset.TextEncoder(pipeline)
            figures["tokens"] = len(encode([PROMPT])[0])
            old, new = before.encode([PROMPT])[0].float(), encode([PROMPT])[0].float()
            figures["relative_error"] = round(float((old - new).norm() / old.norm()), 5)
            applied = preset.replace(applied, encode=encode)
            figures["encode"] = timed(lambda: encode([PROMPT]))
            figures["call"] = timed(self.call(applied, self.big))
        applied = self.decoder_step(pipeline, before, applied)
        with self.book.stage("+ attention by probe", 30) as figures:
            figures["note"] = str(preset.choose_attention(pipeline.transformer, self.device)) if not self.tiny else ""
            figures["denoise"] = timed(self.latents_only(applied, self.big))
        with self.book.stage("+ CUDA graphs = bf16 preset", 60) as figures:
            if not self.tiny:
                denoise = preset.Denoiser(pipeline.transformer, pipeline.scheduler, graphs=True)
                applied = preset.replace(applied, denoise=denoise, encode=preset.TextEncoder(pipeline, graphs=True))
            self.parts(applied, self.big, figures, runs=10)
            self.quality(applied, figures)
            self.peak(figures, self.call(applied, self.big))
            self.share_of_floor(figures)
        if "trouble" in figures:
            applied = self.without_graphs(applied, pipeline)
        with self.book.stage("bf16 512", 60) as figures:
            self.batches(applied, figures)
        with self.book.stage("bf16 profile", 40) as figures:
            figures.update(profile(self.call(applied, self.big)))

    def decoder_step(self, pipeline: Any, before: preset.Applied, applied: preset.Applied) -> preset.Applied:
        with self.book.stage("+ fused decoder", 60) as figures:
            latents = self.latents[0].to(self.device)
            reference = before.decode(latents).float()
            decode = preset.fused_decode(pipeline)
            first = time.perf_counter()
            error = (decode(latents).float() - reference).square().mean()
            figures["first_call_s"] = round(time.perf_counter() - first, 2)
            figures["psnr_db"] = round(float(-10 * torch.log10(error)), 2)
            applied = preset.replace(applied, decode=decode)
            figures["decode"] = timed(lambda: decode(latents))
            torch.backends.cudnn.benchmark = True
            figures["decode, cudnn.benchmark"] = timed(lambda: decode(latents))
            torch.backends.cudnn.benchmark = False
            figures["call"] = timed(self.call(applied, self.big))
            figures["profile"] = profile(lambda: decode(latents))
        return applied

    @staticmethod
    def without_graphs(applied: preset.Applied, pipeline: Any) -> preset.Applied:
        plain = preset.Denoiser(pipeline.transformer, pipeline.scheduler)
        return preset.replace(applied, denoise=plain, encode=preset.TextEncoder(pipeline))

    def share_of_floor(self, figures: dict[str, Any]) -> None:
        ceilings = self.book.results.get("ceilings", {})
        rates = [rate for name, rate in ceilings.items() if name.startswith("bf16 ")]
        attention = [
            value["TFLOP/s"]
            for name, value in ceilings.items()
            if name.startswith("attention ") and isinstance(value, dict)
        ]
        if not rates or not attention:
            return
        # 34 blocks of 177 million weights: 30 on image and caption, 2 on the image alone; the caption's own 2 once.
        weights = 4 * 3840**2 + 3 * 3840 * 10240
        products = 2 * weights * (30 * 4160 + 2 * 4096)
        scores = 4 * 3840 * (30 * 4160**2 + 2 * 4096**2)
        floor = 8 * (products / max(rates) + scores / max(attention)) / 1e12
        figures["floor_s"] = round(floor, 4)
        figures["share_of_floor"] = round(floor / figures["denoise"]["s"], 3)

    def batches(self, applied: preset.Applied, figures: dict[str, Any]) -> None:
        for batch in (1, 4, 8):
            taken = timed(self.call(applied, self.small, batch=batch), runs=5)
            figures[f"batch {batch}"] = {**taken, "images_per_s": round(batch / taken["s"], 2)}

    def fp8(self) -> None:
        pipeline = self.pipeline()
        applied = None
        with self.book.stage("fp8 preset", 90) as figures:
            first = time.perf_counter()
            applied = preset.apply(pipeline, "fp8", fp8_text=True)
            figures["apply_s"] = round(time.perf_counter() - first, 2)
            figures["notes"] = [
                f"{note.what}{': not, ' + note.left_out if note.left_out else ''}" for note in applied.notes
            ]
            first = time.perf_counter()
            self.call(applied, self.big)()
            wait()
            figures["first_call_s"] = round(time.perf_counter() - first, 2)
            self.parts(applied, self.big, figures, runs=10)
            self.quality(applied, figures, "fp8")
            self.peak(figures, self.call(applied, self.big))
            figures["clocks"] = clocks()
        if applied is None:
            return
        if "trouble" in figures:
            applied = self.without_graphs(applied, pipeline)
        with self.book.stage("fp8 512", 60) as figures:
            self.batches(applied, figures)
        with self.book.stage("fp8 profile", 40) as figures:
            figures.update(profile(self.call(applied, self.big)))
        with self.book.stage("fp8 1024 batch 4", 40) as figures:
            taken = timed(self.call(applied, self.big, batch=4), runs=3)
            figures["call"] = {**taken, "images_per_s": round(4 / taken["s"], 3)}
        with self.book.stage("fp8 without graphs", 30) as figures:
            applied = self.without_graphs(applied, pipeline)
            self.parts(applied, self.big, figures)
            figures["512"] = timed(self.call(applied, self.small))

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

    def run(self) -> None:
        stages = [self.facts, self.kernels, self.ceilings, self.eager, self.fp8, self.steps]
        if not self.asked.quick:
            stages += [self.inductor, self.starts, self.truth, self.quality_of_parts]
        for stage in stages:
            try:
                stage()
            except Exception as trouble:  # noqa: BLE001 - what lies between stages, such as building the pipeline
                self.book.results[f"trouble in {stage.__name__}"] = repr(trouble)
                print(f"!! {stage.__name__}: {trouble!r}", file=sys.stderr)
            free()
        self.table()

    def table(self) -> None:
        print(f"\n{'stage':<36} {'call s':>8} {'denoise':>8} {'encode':>8} {'decode':>8}  more")
        for name, figures in self.book.results.items():
            cells = [
                figures[key]["s"] if isinstance(figures.get(key), dict) and "s" in figures[key] else ""
                for key in ("call", "denoise", "encode", "decode")
            ]
            more = {
                key: figures[key]
                for key in ("psnr_db", "gate", "share_of_floor", "peak_gb", "resident_gb", "first_call_s", "trouble")
                if key in figures
            }
            print(f"{name:<36} {cells[0]:>8} {cells[1]:>8} {cells[2]:>8} {cells[3]:>8}  {more or ''}")


def preset_linear(weight: torch.Tensor) -> Any:
    from zops.serving.accelerate.fp8 import Linear

    return Linear(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshot", type=Path)
    parser.add_argument("--random", action="store_true", help="make the model on the GPU (the default)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=540)
    parser.add_argument("--quick", action="store_true", help="two minutes: the presets and their profiles only")
    parser.add_argument("--first-image", action="store_true", help=argparse.SUPPRESS)
    # As the worker sets them: equal seeds must give equal images.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    bench = Bench(parser.parse_args())
    if bench.asked.first_image:
        bench.first_image()
    else:
        bench.run()


if __name__ == "__main__":
    main()

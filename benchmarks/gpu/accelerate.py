"""What each transformation of the presets gives, side by side in one run on one GPU.

    python -m benchmarks.gpu.accelerate --random --out FILE [--budget-s 540] [--quick]
    python -m benchmarks.gpu.accelerate --snapshot DIR --out FILE

`--random` makes the full-size model of random weights on the GPU; speeds do not depend on the values of weights.
Seconds are of whole calls, from prompts to 8-bit pixels on the host, text encoder included, unless a name says less.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stages import clocks, free, profile, timed, wait
from benchmarks.gpu.studies import Studies
from benchmarks.gpu.workbench import new_prompt
from zops.serving.accelerate import decoder, preset
from zops.serving.accelerate.rows import PLAIN


class Bench(Studies):
    # Stages, the most important first.

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
                    prompt=[new_prompt()], latents=noise, height=self.big, width=self.big,
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
            figures["tokens"] = len(encode([new_prompt()])[0])
            prompt = new_prompt()
            old, new = before.encode([prompt])[0].float(), encode([prompt])[0].float()
            figures["relative_error"] = round(float((old - new).norm() / old.norm()), 5)
            applied = preset.replace(applied, encode=encode)
            figures["encode"] = timed(lambda: encode([new_prompt()]))
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
        for kind, rate, seen in (
            ("", max(rates), max(attention)),
            ("steady_", max(v for k, v in ceilings.items() if k.startswith("steady bf16")),
             ceilings["steady attention native TFLOP/s"]),
        ):  # fmt: skip
            floor = 8 * (products / rate + scores / seen) / 1e12
            figures[f"{kind}floor_s"] = round(floor, 4)
            figures[f"share_of_{kind}floor"] = round(floor / figures["denoise"]["s"], 3)

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
                for key in (
                    "psnr_db",
                    "gate",
                    "share_of_floor",
                    "share_of_steady_floor",
                    "peak_gb",
                    "resident_gb",
                    "first_call_s",
                    "trouble",
                )
                if key in figures
            }
            print(f"{name:<36} {cells[0]:>8} {cells[1]:>8} {cells[2]:>8} {cells[3]:>8}  {more or ''}")


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

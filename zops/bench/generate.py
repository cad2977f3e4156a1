"""Rows 2 and 3: types and presets, and sizes, forwards and guidance, against time, memory and likeness.

Each preset runs in a process of its own; the first, eager, leaves the images that the others are compared with. What
this GPU can do at most is measured right before, so that every time stands beside its floor.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zops.bench.child import run_inside
from zops.bench.floor import floor_s, forward_work
from zops.bench.result import Better, Table
from zops.bench.run import Bench, Case
from zops.events import task

SIZES, TINY_SIZES = (512, 768, 1024, 1280), (64, 96, 128, 160)
MAIN = 2
"""Index of the size that the model is made for."""
FORWARDS, RECIPE_FORWARDS = 8, 9
GUIDANCE = 1.5
TIMEOUT_S = 900.0
CALLS = {"least": 3, "most": 20, "budget_s": 3.0}
QUICK_CALLS = {"least": 2, "most": 5, "budget_s": 1.0}
METHODS = {
    "first call": "the first call in the process: kernels are compiled or found compiled",
    "time": "wall clock from prompt to 8-bit pixels on the host, batch 1, text encoder included, after two calls",
    "encode": "the prompt's part of a call",
    "denoise": "the transformer's part of a call",
    "decode": "the VAE's part of a call, and the pixels' way to the host",
    "GPU memory": "most memory that torch's allocator held during the calls, everything resident",
    "host memory": "most anonymous memory above what there was before the call",
    "PSNR": "decoded images against those of eager in bfloat16 (float32 without a GPU), same prompts and seeds",
    "SSIM": "as PSNR; Gaussian window of 11",
}
UNITS = {"GPU memory": "GB", "host memory": "GB", "PSNR": "dB", "SSIM": ""}
RATE_METHOD = "20 single calls timed by GPU events after 3 others, in a process of its own"


@dataclass(frozen=True)
class Variant:
    """One process: a preset in a type."""

    name: str
    preset: str
    dtype: str


def measure(bench: Bench) -> None:
    """Measure the roofline, then every variant."""
    variants = _variants(bench)
    asked = {variant.name: _cases(bench, variant) for variant in variants}
    wanted = {name: cases for name, cases in asked.items() if cases}
    # A preset's time says little without its floor.
    if bench.wants("roofline", {}) or any(each["table"] == "precision" for cases in wanted.values() for each in cases):
        measure_roofline(bench)
    total = sum(len(cases) for cases in wanted.values())
    with (
        tempfile.TemporaryDirectory(prefix="zops-bench-") as scratch,
        task(bench.report, "generate", "measuring images", total=total, unit="cases") as counter,
    ):
        for variant in variants:
            if cases := wanted.get(variant.name):
                references = Path(scratch) / "references.npy"
                with bench.attempt("precision", {"preset": variant.name}, f"images by {variant.name}"):
                    _run_variant(bench, variant, cases, references)
                counter.advance(len(cases))


def _variants(bench: Bench) -> list[Variant]:
    base = "bfloat16" if bench.on_gpu else "float32"
    found = [Variant(name, name, base) for name in ("eager", "bf16", "fp8")]
    if not bench.on_gpu:
        return found  # eager is in float32 already
    fp32 = Variant("fp32", "eager", "float32")
    if bench.request.quick and bench.wants("precision", {"preset": "fp32"}):
        bench.skip("precision", {"preset": "fp32"}, "left out by --quick")
        return found
    return [found[0], fp32, *found[1:]]


def _cases(bench: Bench, variant: Variant) -> list[dict[str, Any]]:
    """Return the cases of a variant that are asked for, as the measuring process takes them."""
    sizes = TINY_SIZES if bench.small else SIZES
    main = sizes[MAIN]
    shown = (sizes[0], main) if bench.request.quick else sizes
    calls: list[tuple[Table, Case, int, int, float]] = [
        ("precision", {"preset": variant.name, "forwards": str(FORWARDS)}, main, FORWARDS, 0.0)
    ]
    if variant.name == "eager":
        calls.append(("precision", {"preset": "eager", "forwards": "9"}, main, RECIPE_FORWARDS, 0.0))
    if variant.name != "fp32":
        ways = [(FORWARDS, 0.0), (FORWARDS, GUIDANCE)]
        ways += [(RECIPE_FORWARDS, 0.0), (RECIPE_FORWARDS, GUIDANCE)] if variant.name == "eager" else []
        calls += [
            ("sizes", _size_case(variant.name, size, forwards, guidance), size, forwards, guidance)
            for size in shown
            for forwards, guidance in ways
            # Nine forwards with guidance say nothing new but at the size that everybody uses.
            if (forwards, guidance) != (RECIPE_FORWARDS, GUIDANCE) or size == main
        ]
    return [
        {
            "table": table, "case": dict(case), "size": size, "forwards": forwards, "guidance": guidance,
            "first": table == "precision" and forwards == FORWARDS,
            "stages": table == "precision" and forwards == FORWARDS,
            "quality": table == "precision" and forwards == FORWARDS,
        }
        for table, case, size, forwards, guidance in calls
        if bench.wants(table, case)
    ]  # fmt: skip


def _size_case(preset: str, size: int, forwards: int, guidance: float) -> Case:
    return {"preset": preset, "size": str(size), "forwards": str(forwards), "guidance": f"{guidance:g}"}


def _run_variant(bench: Bench, variant: Variant, cases: list[dict[str, Any]], references: Path) -> None:
    calls = QUICK_CALLS if bench.request.quick else CALLS
    order: dict[str, Any] = {
        # The same bits in half the time.
        "snapshot": str((variant.dtype == "bfloat16" and bench.request.slim) or bench.request.full),
        "preset": variant.preset,
        "dtype": variant.dtype,
        "parameters": bench.result.model["parameters"],
        "references": str(references),
        "is_reference": variant.name == "eager",
        "cases": cases,
        **calls,
    }  # fmt: skip
    for told in run_inside("generate", order, timeout_s=TIMEOUT_S):
        if told.get("notes"):
            bench.notes[variant.name] = "; ".join(told["notes"])
        for index in told.get("skipped", ()):
            bench.skip(cases[index]["table"], cases[index]["case"], told["reason"])
        if "samples" in told:
            _take(bench, variant, cases[told["index"]], told["samples"])


def _take(bench: Bench, variant: Variant, each: Mapping[str, Any], samples: Mapping[str, list[float]]) -> None:
    notes = bench.notes.get(variant.name)
    for quantity, taken in samples.items():
        better: Better = "more" if quantity in {"PSNR", "SSIM"} else "less"
        method = METHODS[quantity] + (f"; {notes}" if notes and quantity == "time" else "")
        unit = UNITS.get(quantity, "s")
        bench.add(each["table"], each["case"], quantity, taken, unit=unit, better=better, method=method)


def measure_roofline(bench: Bench) -> None:
    """Measure the rates of this device and, from them, the floor of one image of the main size."""
    with bench.attempt("roofline", {}, "measuring what this device can do at most"):
        for told in run_inside("roofline", {"snapshot": str(bench.request.full)}, timeout_s=TIMEOUT_S):
            if "part" in told:
                case = {"part": told["part"], "shape": told["shape"]}
                unit: str = told["unit"]
                bench.add("roofline", case, "rate", told["samples"], unit=unit, better="more", method=RATE_METHOD)
            if told.get("clocks"):
                bench.result.machine = {**bench.result.machine, "clocks": told["clocks"]}
        _add_floors(bench)


def _add_floors(bench: Bench) -> None:
    """Add how long the denoising of one image takes if nothing but products and attention takes time."""
    path = bench.request.full / "transformer" / "config.json"
    size = (TINY_SIZES if bench.small else SIZES)[MAIN]
    work = forward_work(json.loads(path.read_text(encoding="utf-8")), size, size)
    best: dict[str, float] = {}
    for figure in bench.result.of("roofline", "rate"):
        best[figure.case["part"]] = max(best.get(figure.case["part"], 0.0), figure.value)
    attention = best.get("attention")
    for part in [name for name in best if name.endswith(" products")]:
        if attention:
            seconds = floor_s(work, FORWARDS, best[part] * 1e12, attention * 1e12)
            case = {"part": f"floor with {part}", "shape": f"{size} x {size}, {FORWARDS} forwards"}
            text = f"{work.products:.3g} FLOP of products, {work.scores:.3g} of attention a forward, at the best rates"
            bench.add("roofline", case, "floor", [seconds], unit="s", better="neither", method=text)

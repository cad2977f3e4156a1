"""The section on what this device can do at most, and how near the presets come."""

from zops.bench.report.parts import kind_of, measured, paragraph, plot, plots, section, with_unit
from zops.bench.report.svg import Bar, bars
from zops.bench.result import Figure, Result

PRESETS = ("fp32", "eager", "bf16", "fp8")


def roofline(result: Result) -> str:
    """Return the section, nothing where no rates were measured."""
    found = result.of("roofline", "rate")
    if not found:
        return ""
    best: dict[str, Figure] = {}
    for figure in sorted((f for f in found if f.unit == "TFLOP/s"), key=lambda f: f.value):
        best[figure.case["part"]] = figure
    rows = [measured(f, f"{part}, {f.case['shape']}") for part, f in best.items()]
    shown = [
        plot(
            "What this device computes at most",
            "TFLOP a second, more is better",
            bars(rows, "TFLOP/s", "rates"),
            "Best of the model's own shapes; all of them are in the list of figures.",
        ),
        _shares(result),
    ]
    copies = [f for f in found if f.unit == "GB/s"]
    moves = " ".join(
        f"{f.case['part'].capitalize()} ({f.case['shape']}): {with_unit(f.value, f.unit)}." for f in copies
    )
    text = "The least time that the denoising can take on this device, from rates measured in the same run."
    return section("Floor", text, plots(shown) + paragraph(moves, "soft"))


def floor_of(result: Result, preset: str) -> float | None:
    """Return the least seconds that the denoising of an image by a preset can take, None where no rates tell."""
    floors = {
        f.case["part"].removeprefix("floor with ").removesuffix(" products"): f.value
        for f in result.of("roofline", "floor")
    }
    if preset == "fp32":
        return None
    # Without a GPU everything is computed in float32.
    return floors.get("fp8" if preset == "fp8" else "bf16", floors.get("float32"))


def _shares(result: Result) -> str:
    rows = []
    for preset in PRESETS:
        spent, floor = result.find("precision", "denoise", preset=preset), floor_of(result, preset)
        if spent and floor:
            share = 100 * floor / spent.value
            name = f"{preset}: floor {with_unit(floor, 's')} of {with_unit(spent.value, 's')}"
            rows.append(Bar(name, share, f"{share:.0f} %", kind_of(preset)))
    if not rows:
        return ""
    return plot(
        "Share of the floor",
        "percent of the denoising time that products and attention need at best; 100 is perfect",
        bars(rows, "%", "share of the floor"),
        "Transformer only, 8 forwards; fp8 is held to a floor with fp8 products and attention in bf16.",
    )

"""The sections on images: types and presets, and sizes."""

from collections.abc import Sequence

from zops.bench import recipe
from zops.bench.report.floors import PRESETS, floor_of
from zops.bench.report.parts import (
    claims_note,
    is_small,
    kind_of,
    measured,
    memory_of,
    paragraph,
    plot,
    plots,
    runs_of,
    section,
    table,
    times,
    with_unit,
)
from zops.bench.report.svg import Bar, Kind, Line, bars, lines, number
from zops.bench.result import Figure, Result

_SHOWN: tuple[tuple[str, str, str, str, Kind], ...] = (
    ("eager", "9", "0", "eager, 9 fwd", "other"),
    ("eager", "8", "1.5", "eager guided", "other"),
    ("bf16", "8", "0", "bf16", "own2"),
    ("fp8", "8", "0", "fp8", "own"),
)
"""Lines of the plots by size: preset, forwards, guidance, name, kind. The rest is in the table."""


def precision(result: Result) -> str:
    """Return the section on types and presets."""
    found = [f for f in result.of("precision", "time") if f.case.get("forwards")]
    if not found:
        return ""
    memory = memory_of(result, "precision")
    rows = [measured(f, _preset(f), kind_of(f.case["preset"]), floor=_floor(result, f)) for f in found]
    spaces = [measured(f, _preset(f), kind_of(f.case["preset"])) for f in result.of("precision", memory)]
    if not is_small(result):
        time, space = recipe.BF16.time_s, recipe.BF16.memory_gb
        rows.append(Bar("bfloat16, recipe", time, f"{number(time)} s", "claim"))
        spaces.append(Bar("bfloat16, recipe", space, f"{number(space)} GB", "claim"))
    note = runs_of(found)
    if any(row.floor for row in rows):
        note += " Upright mark: the denoising alone, if nothing but matrix products and attention took time."
    shown = [
        plot(
            "Time of one image",
            "seconds from prompt to pixels, less is better",
            bars(rows, "s", "time by preset"),
            f"{note} {claims_note(result)}",
        ),
        plot(
            memory[0].upper() + memory[1:],
            "GB at most during a call, all weights resident, less is better",
            bars(spaces, "GB", "memory by preset"),
            claims_note(result),
        ),
        _stages(result),
    ]
    return section("Types and presets", _precision_text(result, found), plots(shown) + _quality(result))


def _precision_text(result: Result, found: Sequence[Figure]) -> str:
    edge = 128 if is_small(result) else 1024
    usual = result.find("precision", "time", preset="eager", forwards="9")
    best = min(found, key=lambda figure: figure.value)
    text = f"One image of {edge} x {edge}, batch 1, text encoder included. "
    if usual and best is not usual:
        text += (
            f"{best.case['preset']} with {best.case['forwards']} forwards is {times(usual.value, best.value)} as fast "
            "as the usual way, eager with 9 forwards (the ninth changes nothing). "
        )
    return text + "float16 is never offered: it overflows in this model and gives black images."


def _stages(result: Result) -> str:
    rows = []
    for preset in PRESETS:
        parts = [result.find("precision", stage, preset=preset) for stage in ("encode", "denoise", "decode")]
        values = tuple(part.value for part in parts if part)
        if len(values) == 3:
            name = f"{preset}: {' + '.join(with_unit(value, 's') for value in values)}"
            rows.append(Bar(name, sum(values), with_unit(sum(values), "s"), kind_of(preset), parts=values))
    if not rows:
        return ""
    return plot(
        "Where the time goes",
        "seconds: text encoder (light), transformer (full), VAE (medium)",
        bars(rows, "s", "stages by preset"),
        "Each stage timed alone; their sum can differ from a whole call.",
    )


def _quality(result: Result) -> str:
    rows = []
    eager = result.find("precision", "time", preset="eager", forwards="8")
    for figure in result.of("precision", "PSNR"):
        preset = figure.case["preset"]
        own = result.find("precision", "time", preset=preset, forwards="8")
        likeness = result.find("precision", "SSIM", preset=preset)
        speed_up = times(eager.value, own.value) if eager and own else "-"
        ssim = number(min(likeness.samples)) if likeness else "-"
        rows.append((preset, speed_up, f"{number(min(figure.samples))} dB", ssim))
    if not rows:
        return ""
    base = "bfloat16" if result.machine.get("gpus") else "float32"
    note = f"Against eager in {base}, same prompts and seeds; the worst of the images."
    if result.model.get("synthetic"):
        note += " Random weights amplify rounding and show no picture: judge a preset by the real ones."
    heads = ("preset", "speed-up over eager, 8 forwards", "PSNR", "SSIM")
    return table(heads, rows, (1, 2, 3)) + paragraph(note, "soft")


def sizes(result: Result) -> str:
    """Return the section on sizes, forwards and guidance."""
    found = result.of("sizes", "time")
    if not found:
        return ""
    memory = memory_of(result, "sizes")
    edges = sorted({int(figure.case["size"]) for figure in found})
    places = [(edge**2 / edges[-1] ** 2, f"{edge}²") for edge in edges]
    seconds, spaces = _size_lines(result, "time", edges[-1]), _size_lines(result, memory, edges[-1])
    if not is_small(result):
        claims = [(edge**2 / edges[-1] ** 2, claim) for edge, claim in recipe.SIZES.items() if edge in edges]
        name = "recipe, 4090D"
        seconds.append(Line(name, tuple((place, claim.time_s) for place, claim in claims), "claim"))
        spaces.append(Line(name, tuple((place, claim.memory_gb) for place, claim in claims), "claim"))
    across = "edge of the image in pixels, spaced by its area"
    shown = [
        plot(
            "Time by size",
            f"seconds an image; {across}",
            lines(seconds, places, "s", "time by size"),
            f"A straight line through zero costs the same a pixel at every size. {claims_note(result)}",
        ),
        plot(
            f"{memory[0].upper()}{memory[1:]} by size",
            f"GB at most; {across}",
            lines(spaces, places, "GB", "memory by size"),
            claims_note(result),
        ),
    ]
    text = (
        "What an image costs by its size. 8 forwards are the model's number, "
        "and any guidance above 0 doubles the transformer's work."
    )
    return section("Sizes, forwards and guidance", text, plots(shown) + _size_table(result, memory))


def _size_lines(result: Result, quantity: str, widest: int) -> list[Line]:
    drawn = []
    for preset, forwards, guidance, name, kind in _SHOWN:
        wanted = {"preset": preset, "forwards": forwards, "guidance": guidance}
        figures = [f for f in result.of("sizes", quantity) if wanted.items() <= f.case.items()]
        points = tuple((int(f.case["size"]) ** 2 / widest**2, f.value) for f in figures)
        if points:
            drawn.append(Line(f"{name} {number(points[-1][1])}", points, kind))
    return drawn


def _size_table(result: Result, memory: str) -> str:
    rows = []
    spaces = {tuple(f.case.values()): f for f in result.of("sizes", memory)}
    for figure in result.of("sizes", "time"):
        case, found = figure.case, figure.summary
        space = spaces.get(tuple(case.values()))
        measures = (with_unit(found.median, "s"), with_unit(found.p99, "s"), str(found.n))
        used = with_unit(space.value, "GB") if space else "-"
        size = f"{case['size']} x {case['size']}"
        rows.append((case["preset"], size, case["forwards"], case["guidance"], *measures, used))
    heads = ("preset", "size", "forwards", "guidance", "p50", "p99", "n", memory)
    listed = table(heads, rows, (2, 3, 4, 5, 6, 7))
    return f"<details><summary>All sizes, forwards and guidance</summary>{listed}</details>"


def _floor(result: Result, figure: Figure) -> float | None:
    return floor_of(result, figure.case["preset"]) if figure.case["forwards"] == "8" else None


def _preset(figure: Figure) -> str:
    name = {"fp32": "eager, float32"}.get(figure.case["preset"], figure.case["preset"])
    return f"{name}, {figure.case['forwards']} forwards"

"""The whole page: what matters first, then each table, earlier runs, every figure, and what it was measured on."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from zops.bench import recipe
from zops.bench.compare import RULE, compare
from zops.bench.machine import differences, title
from zops.bench.report.floors import roofline
from zops.bench.report.images import precision, sizes
from zops.bench.report.loading import load
from zops.bench.report.parts import Tile, measured, paragraph, plot, plots, table, times, with_unit
from zops.bench.report.running import cache, serve
from zops.bench.report.svg import Kind, bars, number
from zops.bench.result import Figure, Result, write_file

SECTIONS = (load, precision, sizes, serve, cache, roofline)
_USUAL = 'Usual: low_cpu_mem_usage=True and .to("cuda"); eager with 9 forwards. Measured here, in the same run.'
# A browser that opens the file loads and runs nothing, whatever a result says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: Path, result: Result, earlier: Sequence[Result] = ()) -> None:
    """Write the report of a result, beside those of earlier runs.

    Raises:
        ZopsError: when the file cannot be written.
    """
    write_file(path, page(result, earlier))


def page(result: Result, earlier: Sequence[Result] = ()) -> str:
    """Return the report as one HTML document."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = "".join((
        f"<h1>{escape(title(result.machine))}</h1>{paragraph(_subtitle(result), 'soft')}{_notices(result)}",
        f'<div class="tiles">{"".join(tile.as_html() for tile in tiles(result))}</div>',
        paragraph(_USUAL if any(usual for *_, usual in headline(result)) else "", "soft"),
        *(section(result) for section in SECTIONS),
        _earlier(result, earlier),
        _skipped(result),
        _figures(result),
        _machine(result),
        f'<footer class="soft">zops bench {escape(result.zops)}. Claims: {escape(recipe.SOURCE)}.</footer>',
    ))  # fmt: skip
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>zops bench: {escape(title(result.machine))}</title><style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def headline(result: Result) -> list[tuple[str, Figure, Figure | None]]:
    """Return the figures that matter: what it is, the best one, and the usual way's where that was measured too."""
    found: list[tuple[str, Figure, Figure | None]] = []
    loads = [f for f in result.of("load", "time") if f.case["way"] == "zops"]
    if loads:
        best = min(loads, key=lambda figure: figure.value)
        usual = result.find("load", "time", way="low_cpu_mem_usage=True", page_cache=best.case["page cache"])
        found.append((f"weights on the device, {best.case['page cache']} page cache", best, usual))
        memory = [f for f in result.of("load", "host memory") if f.case == best.case]
        usual = result.find("load", "host memory", way="low_cpu_mem_usage=True", page_cache=best.case["page cache"])
        found += [("host memory to load", each, usual) for each in memory]
    images = [f for f in result.of("precision", "time") if f.case["forwards"] == "8"]
    if images:
        best = min(images, key=lambda figure: figure.value)
        name = best.case["preset"]
        found.append((f"one image, {name}", best, result.find("precision", "time", preset="eager", forwards="9")))
        for quantity in ("GPU memory", "host memory"):
            memory = [f for f in result.of("precision", quantity) if f.case == best.case]
            usual = result.find("precision", quantity, preset="eager", forwards="9")
            found += [(f"{quantity} of an image, {name}", each, usual) for each in memory]
    rates = result.of("serve", "images/s")
    if rates:
        best = max(rates, key=lambda figure: figure.value)
        found.append((f"through HTTP, clients: {best.case['clients']}, {best.case['size']}²", best, None))
    return found


def tiles(result: Result) -> list[Tile]:
    """Return the headline as tiles."""
    found = []
    for label, figure, usual in headline(result):
        value, _, unit = with_unit(figure.value, figure.unit).partition(" ")
        beside = ""
        if usual and usual is not figure:
            before = with_unit(usual.value, usual.unit)
            faster = f"{times(usual.value, figure.value)} as fast as the usual {before}"
            beside = faster if figure.unit == "s" else f"the usual way takes {before}"
        found.append(Tile(value, unit, label, beside))
    return found


def _subtitle(result: Result) -> str:
    model = result.model
    weights = f"{with_unit(float(model.get('weight_bytes', 0)) / 1e9, 'GB')} of weights"
    when = result.created_at.replace("T", " ").replace("+00:00", " UTC")
    name = model.get("model") or "a model without a name"
    return f"{name}, {weights}; {when}; measured in {result.seconds / 60:.1f} min"


def _notices(result: Result) -> str:
    notices = []
    if not result.complete:
        notices.append("The run was ended early; what is here was measured, the rest was not.")
    if result.quick:
        notices.append("A quick run: few repetitions, so small differences mean nothing.")
    if result.model.get("synthetic"):
        notices.append("Synthetic weights: speeds are those of the real ones, pictures are not.")
    return "".join(paragraph(text, "notice") for text in notices)


def _earlier(result: Result, earlier: Sequence[Result]) -> str:
    """Return how the figures that matter went over time, and every figure that changed since the last run."""
    if not earlier:
        return ""
    runs = [*sorted(earlier, key=lambda run: run.created_at), result]
    last = runs[-2]
    found = compare(last, result)
    differ = [
        paragraph(f"Not the same machine or model: {each}", "notice") for each in (*found.machines, *found.models)
    ]
    changed = [
        (pair.id, _cell(pair.before), _cell(pair.after), number(pair.ratio) if pair.ratio else "-", pair.verdict)
        for pair in found.pairs
        if pair.verdict in {"worse", "better", "unclear"}
    ]
    heads = ("figure", _moment(last), "now", "ratio", "verdict")
    listed = table(heads, changed, (1, 2, 3)) if changed else paragraph("No figure changed by more than the tolerance.")
    text = f"{len(found.regressions)} of {len(found.pairs)} figures became worse since the last run."
    over_time = plots(_over_time(label, figure, runs) for label, figure, _ in headline(result))
    body = "".join((paragraph(text), *differ, over_time, listed, paragraph(RULE, "soft")))
    return f"<section><h2>Earlier runs</h2>{body}</section>"


def _over_time(label: str, figure: Figure, runs: Sequence[Result]) -> str:
    """Return a figure in every run that has it, oldest first; dashed where the machine was another."""
    rows = []
    for run in runs:
        same = next((each for each in run.figures if each.id == figure.id), None)
        if same:
            stranger = bool(differences(run.machine, runs[-1].machine))
            name = f"{_moment(run)}, zops {run.zops}{f', {title(run.machine)}' if stranger else ''}"
            kind: Kind = "own" if run is runs[-1] else "claim" if stranger else "other"
            rows.append(measured(same, name, kind))
    if len(rows) < 2:
        return ""
    unit = f"{figure.unit}, {figure.better} is better"
    note = "Dashed: another machine." if any(row.kind == "claim" for row in rows) else ""
    return plot(label[0].upper() + label[1:], unit, bars(rows, figure.unit, label), note)


def _moment(run: Result) -> str:
    return run.created_at[:16].replace("T", " ")


def _cell(figure: Figure | None) -> str:
    return with_unit(figure.value, figure.unit) if figure else "-"


def _skipped(result: Result) -> str:
    if not result.skipped:
        return ""
    rows = [(each.id, each.reason) for each in result.skipped]
    return f"<section><h2>Not measured</h2>{table(('case', 'why'), rows)}</section>"


def _figures(result: Result) -> str:
    rows = []
    for figure in result.figures:
        found = figure.summary
        numbers = (found.median, found.least, found.most, found.p99)
        rows.append((figure.id, *(number(value) for value in numbers), figure.unit, str(found.n), figure.method))
    heads = ("figure", "median", "least", "most", "p99", "unit", "n", "how it was measured")
    listed = table(heads, rows, (1, 2, 3, 4, 6))
    summary = f"{len(rows)} figures, each with how it was measured"
    return f"<section><h2>Every figure</h2><details><summary>{summary}</summary>{listed}</details></section>"


def _machine(result: Result) -> str:
    machine, model = result.machine, result.model
    clocks = [
        f"{c.get('sm_mhz')} of {c.get('sm_max_mhz')} MHz, {c.get('power_w')} W, {c.get('temperature_c')} °C"
        for c in machine.get("clocks") or []
    ]
    facts = {
        "GPU": title(machine) if machine.get("gpus") else f"none: {machine.get('no_gpu_because', '')}",
        "driver": f"{machine.get('driver') or 'none'}, CUDA up to {machine.get('cuda') or '-'}",
        "clocks": "; ".join(clocks) or "not told",
        "processor": f"{machine.get('cores')} cores of {machine.get('cpu')}",
        "memory": f"{number(float(machine.get('memory_bytes', 0)) / 1e9)} GB",
        "kernel": machine.get("kernel", ""),
        "disk": machine.get("disk", ""),
        "software": ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items()),
        "model": f"{model.get('model')} {model.get('revision')}, {model.get('parameters', 0):,} parameters",
        "types": ", ".join(f"{name} {'/'.join(types)}" for name, types in (model.get("dtypes") or {}).items()),
        "manifest": model.get("manifest_digest") or "none",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items())
    return f"<section><h2>Measured on</h2><dl>{listed}</dl></section>"

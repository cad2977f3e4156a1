"""The section on load settings."""

from zops.bench import recipe
from zops.bench.report.parts import claims_note, is_small, measured, plot, plots, runs_of, section, times, with_unit
from zops.bench.report.svg import Bar, Kind, bars, number
from zops.bench.result import Figure, Result

_PROOF = {"warm": "every file is in memory before", "cold": "no file is in memory before"}


def load(result: Result) -> str:
    """Return the section."""
    found = result.of("load", "time")
    if not found:
        return ""
    fastest = min(found, key=lambda figure: figure.value)
    state = fastest.case["page cache"]
    text = "How the weights get onto the device: time, and the host memory that it takes meanwhile."
    usual = result.find("load", "time", way="low_cpu_mem_usage=True", page_cache=state)
    if usual and usual is not fastest:
        text += (
            f" {_way(fastest)} took {with_unit(fastest.value, 's')} where low_cpu_mem_usage=True took "
            f"{with_unit(usual.value, 's')}: {times(usual.value, fastest.value)}."
        )
    shown = [_times(result, "warm"), _times(result, "cold"), _memory(result, state)]
    return section("Loading", text, plots(shown))


def _times(result: Result, state: str) -> str:
    found = [f for f in result.of("load", "time") if f.case["page cache"] == state]
    if not found:
        return ""
    rows = [measured(figure, _way(figure), _whose(figure)) for figure in sorted(found, key=lambda f: f.value)]
    caption = f"{runs_of(found)} Proven by residency: {_PROOF[state]}."
    # The recipe does not say in which state its page cache was; 33 GB in 18 s were not read from a disk of its time.
    if state == "warm" and not is_small(result):
        rows += [Bar(f"{w}, recipe", c.time_s, f"{number(c.time_s)} s", "claim") for w, c in recipe.LOAD.items()]
        caption += f" {claims_note(result)}"
    unit = "seconds from the call to the pipeline on the device, less is better"
    return plot(f"Load time, {state} page cache", unit, bars(rows, "s", f"load time, {state}"), caption)


def _memory(result: Result, state: str) -> str:
    found = [f for f in result.of("load", "host memory") if f.case["page cache"] == state]
    rows = [measured(figure, _way(figure), _whose(figure)) for figure in sorted(found, key=lambda f: f.value)]
    if not is_small(result):
        rows += [Bar(f"{w}, recipe", c.memory_gb, f"{number(c.memory_gb)} GB", "claim") for w, c in recipe.LOAD.items()]
    return plot(
        "Host memory during the load",
        "GB of anonymous memory above what the process had before, less is better",
        bars(rows, "GB", "host memory by way of loading"),
        f"Largest of a sample each 10 ms. {claims_note(result)}",
    )


def _way(figure: Figure) -> str:
    return f"{figure.case['way']}{', slim weights' if figure.case['weights'] == 'slim' else ''}"


def _whose(figure: Figure) -> Kind:
    return "own" if figure.case["way"].startswith("zops") else "other"

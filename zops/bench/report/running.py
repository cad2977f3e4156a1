"""The sections on serving and on the cache."""

from zops.bench import recipe
from zops.bench.report.parts import measured, paragraph, plot, plots, runs_of, section, table, with_unit
from zops.bench.report.svg import Bar, Line, bars, lines, number
from zops.bench.result import Figure, Result

# What the name says already: their state of the page cache is a part of what they are.
_OF_ONE_STATE = frozenset({"disk", "page cache", "zops cache warm", "verify quick"})


def serve(result: Result) -> str:
    """Return the section on serving."""
    found = result.of("serve", "images/s")
    if not found:
        return _gpus(result) + _ways(result)
    size = found[0].case["size"]
    best = max(found, key=lambda figure: figure.value)
    text = (
        f"Through HTTP at {size} x {size}: at most {number(best.value)} images a second, with {best.case['clients']} "
        f"client{'' if best.case['clients'] == '1' else 's'}, each asking again as soon as it is answered."
    )
    started = result.find("serve", "start")
    if started:
        text += f" The instance was ready {with_unit(started.value, 's')} after its start."
    return section(
        "Serving", text, plots(_curves(result, found)) + _levels(result, found) + _gpus(result) + _ways(result)
    )


def _curves(result: Result, found: list[Figure]) -> list[str]:
    last = max(1, len(found) - 1)
    places = {figure.case["clients"]: index / last for index, figure in enumerate(found)}
    across = [(place, name) for name, place in places.items()]
    delays = [f for f in result.of("serve", "latency") if f.case["clients"] in places]
    rate = tuple((places[f.case["clients"]], f.value) for f in found)
    p50 = tuple((places[f.case["clients"]], f.value) for f in delays)
    p99 = tuple((places[f.case["clients"]], f.summary.p99) for f in delays)
    written = tuple(number(figure.value) for figure in found)
    return [
        plot(
            "Throughput",
            "images a second, by clients at once; more is better",
            lines([Line("images/s", rate, "own", written)], across, "/s", "throughput by clients"),
            "Images that were answered within the window.",
        ),
        plot(
            "Latency",
            "seconds from request to decoded answer, by clients at once; less is better",
            lines([Line("p99", p99, "other"), Line("p50", p50, "own")], across, "s", "latency by clients"),
            "Waiting in the queue included.",
        ),
    ]


def _levels(result: Result, found: list[Figure]) -> str:
    rows = []
    for figure in found:
        clients = figure.case["clients"]
        delay, batch = (result.find("serve", name, clients=clients) for name in ("latency", "batch size"))
        counts = [result.find("serve", name, clients=clients) for name in ("refused", "failed")]
        rows.append(
            (
                clients,
                number(figure.value),
                *(
                    (with_unit(delay.value, "s"), with_unit(delay.summary.p99, "s"), str(delay.summary.n))
                    if delay
                    else "--0"
                ),
                f"{number(batch.value)} (most {number(batch.summary.most)})" if batch else "-",
                *(number(count.value) if count else "-" for count in counts),
            )
        )
    return table(("clients", "images/s", "p50", "p99", "n", "batch size", "refused", "failed"), rows, range(8))


def _gpus(result: Result) -> str:
    found = result.of("gpus", "images/s")
    if not found:
        reason = next((each.reason for each in result.skipped if each.table == "gpus"), "")
        return paragraph(f"One GPU against several was not measured: {reason}." if reason else "", "soft")
    rows = [measured(figure, f"GPUs: {figure.case['gpus']}", "own") for figure in found]
    unit = f"images a second with {found[0].case['clients']} clients, more is better"
    caption = f"One worker a GPU behind one queue. The recipe claims {recipe.TWO_GPUS_SPEEDUP} for two cards."
    return plots([plot("One GPU against all", unit, bars(rows, "/s", "throughput by GPUs"), caption)])


def _ways(result: Result) -> str:
    """Return how replicas, split and context compare, a row a size and number of clients."""
    found = result.of("parallel", "images/s")
    if not found:
        return ""
    rows = []
    for figure in found:
        case = figure.case
        delay, gain = (result.find("parallel", name, **case) for name in ("latency", "against replicas"))
        rows.append((
            case["parallel"],
            case["size"],
            case["clients"],
            number(figure.value),
            with_unit(delay.value, "s") if delay else "-",
            number(gain.value) if gain else "-",
        ))  # fmt: skip
    head = ("two GPUs as", "size", "clients", "images/s", "p50", "against replicas")
    return paragraph("Two GPUs used in three ways (serve.parallel).") + table(head, rows, range(1, 6))


def cache(result: Result) -> str:
    """Return the section on the cache."""
    found = result.of("cache", "time")
    if not found:
        return ""
    weights = with_unit(float(result.model.get("weight_bytes", 0)) / 1e9, "GB")
    shown = [
        plot(
            "How long each step takes",
            "seconds, less is better",
            bars(_steps(result, "time"), "s", "time by step"),
            runs_of(found),
        ),
        plot(
            "How fast it reads",
            "GB a second, more is better",
            bars(_steps(result, "rate"), "GB/s", "rate by step"),
            "Bytes on disk by seconds; the disk's own rate is one reader past the page cache.",
        ),
    ]
    text = f"What lies in the cache ({weights} of weights): how fast it is read, verified and brought to the device."
    return section("Cache", text, plots(shown))


def _steps(result: Result, quantity: str) -> list[Bar]:
    """Return the bars of a quantity, full and slim of the same step one below the other."""
    steps = list(dict.fromkeys((f.case["step"], f.case["page cache"]) for f in result.of("cache")))
    found = sorted(result.of("cache", quantity), key=lambda f: steps.index((f.case["step"], f.case["page cache"])))
    return [measured(f, _step(f), "own" if f.case["weights"] == "slim" else "own2") for f in found]


def _step(figure: Figure) -> str:
    case = figure.case
    state = "" if case["step"] in _OF_ONE_STATE else f", {case['page cache']}"
    return f"{case['step']}{state}{', slim' if case['weights'] == 'slim' else ''}"

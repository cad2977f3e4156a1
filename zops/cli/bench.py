"""`zops bench`: measure this host, show what came of it, compare it with another time."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zops.cli.main import INTERRUPTED
from zops.cli.options import Loaded, with_output, with_spec
from zops.cli.output import Output
from zops.cli.quantities import share

if TYPE_CHECKING:
    from zops.bench.compare import Comparison
    from zops.bench.result import Result
    from zops.bench.run import Request

FILE = click.Path(path_type=Path, dir_okay=False)
HTML = click.option("--html", "html_file", type=FILE, help="Also write a report that a browser shows and prints.")
AGAINST = click.option("--against", type=FILE, multiple=True, help="Result of an earlier run, for --html; repeatable.")


@click.group()
def bench() -> None:
    """Measure loading, images, serving and the cache on this host."""


def _measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all measurements share, and run it on what they say."""

    @functools.wraps(command)
    def wrapped(
        *,
        snapshot: Path | None,
        slim: Path | None,
        only: tuple[str, ...],
        quick: bool,
        json_file: Path | None,
        html_file: Path | None,
        against: tuple[Path, ...],
        loaded: Loaded,
        out: Output,
        **kwargs: Any,
    ) -> int:
        from zops.bench.result import read_result  # noqa: PLC0415 - only this command needs the bench
        from zops.bench.run import Request, find_snapshots  # noqa: PLC0415 - as above

        earlier = [read_result(path) for path in against]  # before minutes of work
        url: str | None = kwargs.pop("url", None)
        # A running instance may be on another host, with its snapshot.
        chosen, slimmed = (None, None) if url and not snapshot else find_snapshots(loaded.spec, snapshot, slim)
        request = Request(loaded.spec, chosen, slimmed, only, quick, url)
        return _run(command.__name__, request, out, json_file=json_file, html_file=html_file, earlier=earlier)

    for option in (
        AGAINST,
        HTML,
        click.option("--json", "json_file", type=FILE, help="Also write the result to this file, while it grows."),
        click.option("--quick", is_flag=True, help="Fewer cases and runs: minutes become one, and noise more."),
        click.option("--only", metavar="TEXT", multiple=True, help="Only cases with this in their name; repeatable."),
        click.option(
            "--slim", type=click.Path(path_type=Path), metavar="DIR", help="The slim snapshot (default: found)."
        ),
        click.option("--snapshot", type=click.Path(path_type=Path), metavar="DIR", help="Default: the cache's best."),
    ):
        wrapped = option(wrapped)
    return with_spec(wrapped)


@bench.command()
@_measuring
def load() -> None:
    """Measure load settings against time and host memory, with warm and with cold page cache.

    Each way loads in a fresh process; the state of the page cache is proven by residency. Ctrl-C ends a measurement
    early and keeps what was measured.

    \b
    Examples:
      zops bench load
      zops bench load --snapshot /mnt/nvme/full --only warm --json load.json
    """


@bench.command()
@_measuring
def generate() -> None:
    """Measure presets, sizes, forwards and guidance against time, memory and likeness to eager.

    The rates of this GPU are measured in the same run, so that each time stands beside its floor.

    \b
    Examples:
      zops bench generate --json speed.json --html speed.html
      zops bench generate --only precision --quick
    """


@bench.command()
@click.argument("url", required=False)
@_measuring
def serve() -> None:
    """Measure images a second through HTTP, by number of clients; one GPU against several.

    URL is a running instance; without it one is started as a process of this host and removed at the end.

    \b
    Examples:
      zops bench serve http://127.0.0.1:8000
      zops bench serve --snapshot /mnt/nvme/full --only clients
    """


@bench.command()
@_measuring
def cache() -> None:
    """Measure the cache: cold, warm and slim, verified, and as tensors on the device.

    \b
    Examples:
      zops bench cache
      zops bench cache --only slim --json cache.json
    """


@bench.command("all")
@_measuring
def everything() -> None:
    """Measure everything into one result: load, generate, serve, cache.

    \b
    Examples:
      zops bench all --json host.json --html host.html
      zops bench all --quick --snapshot /mnt/nvme/full --html host.html --against last-month.json
    """


@bench.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--html", "html_file", type=FILE, required=True, help="File to write.")
@AGAINST
@with_output
def report(*, files: tuple[Path, ...], html_file: Path, against: tuple[Path, ...], out: Output) -> None:
    """Make a report of results that were measured before.

    Several FILES of one host become one report: of each table, the newest one that has it.

    \b
    Examples:
      zops bench report host.json --html host.html
      zops bench report load.json speed.json --against january.json --html host.html
    """
    from zops.bench.report.page import write_page  # noqa: PLC0415 - only this command needs the bench
    from zops.bench.result import merged, read_result  # noqa: PLC0415 - as above

    result = merged([read_result(path) for path in files])
    write_page(html_file, result, [read_result(path) for path in against])
    out.data({"html": str(html_file), "figures": len(result.figures)}, str(html_file))


@bench.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option("--tolerance", type=share, default="5%", show_default=True, metavar="SHARE", help="What counts as equal.")
@with_output
def compare(*, before: Path, after: Path, tolerance: float, out: Output) -> int:
    """Compare two results figure by figure; exit status 1 when one became worse.

    A figure is worse when its median is, by more than the tolerance and by more than both runs' spreads together;
    within the spreads it is unclear. Figures that only one result has are listed and no regression. Another machine or
    model is said: its figures are no regression of anything, whatever the status.

    \b
    Examples:
      zops bench compare january.json today.json
      zops bench compare a.json b.json --tolerance 10%
    """
    from zops.bench.compare import compare as hold  # noqa: PLC0415 - only this command needs the bench
    from zops.bench.result import read_result  # noqa: PLC0415 - as above

    found = hold(read_result(before), read_result(after), tolerance)
    for difference in found.machines:
        out.warn(f"not the same machine: {difference}")
    for difference in found.models:
        out.warn(f"not the same model: {difference}")
    rows = [
        (pair.id, _number(body["before"]), _number(body["after"]), body["unit"], _number(body["ratio"]), pair.verdict)
        for pair, body in ((pair, pair.as_json()) for pair in found.pairs)
    ]
    out.table(("FIGURE", "BEFORE", "AFTER", "UNIT", "RATIO", "VERDICT"), rows, found.as_json())
    out.note(_conclusion(found))
    return 1 if found.regressions else 0


def _run(
    name: str,
    request: "Request",
    out: Output,
    *,
    json_file: Path | None,
    html_file: Path | None,
    earlier: "Sequence[Result]",
) -> int:
    from zops.bench.result import write_result  # noqa: PLC0415 - only this command needs the bench
    from zops.bench.run import PARTS, measure  # noqa: PLC0415 - as above

    def save(result: "Result") -> None:
        if json_file:
            write_result(json_file, result)

    with out.progress() as report:
        result = measure(request, PARTS if name == "everything" else (name,), report, save)  # type: ignore[arg-type] # the commands are named as the parts
    if html_file:
        from zops.bench.report.page import write_page  # noqa: PLC0415 - only when asked for

        write_page(html_file, result, earlier)
    rows = [
        (f.id, _number(f.value), f.unit, _number(f.summary.least), _number(f.summary.p99), str(f.summary.n))
        for f in result.figures
    ]
    out.table(("FIGURE", "MEDIAN", "UNIT", "LEAST", "P99", "N"), rows, result.as_json())
    if not result.complete:
        out.note("interrupted; what was measured until then is kept")
        return INTERRUPTED
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _conclusion(found: "Comparison") -> str:
    count = len(found.regressions)
    return f"{count} of {len(found.pairs)} figures became worse by more than {found.tolerance:.0%} and the spread"

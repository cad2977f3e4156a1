"""`zops watch`: probe, decide and heal, for as long as it runs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output

if TYPE_CHECKING:
    from zops.watch.events import Occurrence


@click.command()
@click.option("--once", is_flag=True, help="End when every verdict stands and was acted upon (for cron).")
@click.option("--dry-run", is_flag=True, help="Only say what would be done; touch nothing.")
@click.option("--heal/--no-heal", default=True, help="Heal what is unhealthy (default), or only report.")
@click.option("--interval", type=click.FloatRange(0.2, 3600), metavar="S", help="Instead of watch.interval_s.")
@click.option("--listen", metavar="HOST:PORT", help="Instead of watch.listen; '' for no page.")
@click.option("--events", type=click.Path(path_type=Path), help="Also append every event to this file.")
@click.option("--unfence", metavar="GPU", help="Only lift the fence of a GPU (UUID, PCI address or index).")
@with_spec
def watch(
    *,
    once: bool,
    dry_run: bool,
    heal: bool,
    interval: float | None,
    listen: str | None,
    events: Path | None,
    unfence: str | None,
    loaded: Loaded,
    out: Output,
) -> int:
    """Watch the instances of this host and heal them.

    Every instance of the engine and every process that zops started is probed again and again. Where the verdict
    stands, a hung one is restarted and one that lost its GPU is made anew, with growing pauses and a budget; a GPU
    that fails is fenced. Nothing else is ever touched. Each event is a line on stdout (JSON with --output json).
    SIGTERM ends it. With --once the exit status is 1 where something is not well.

    \b
    Examples:
      zops watch --dry-run
      zops watch --interval 5 --listen 127.0.0.1:9465
      zops watch --once --output json
      zops watch --unfence GPU-8f6e1c2a-0b7d-4a53-9d1e-5c3f2b1a0d9e
    """
    if unfence is not None:
        return _unfence(unfence, out)
    from zops.watch.run import watch as run  # noqa: PLC0415 - probes, runtimes and a server, for this command only
    from zops.watch.station import orders_of  # noqa: PLC0415

    spec = loaded.spec
    well = run(
        spec,
        orders_of(spec, interval_s=interval, heal=heal, dry_run=dry_run),
        lambda occurrence: _tell(out, occurrence),
        once=once,
        listen=(spec.watch.listen if not once else "") if listen is None else listen,
        events=events,
        said=lambda url: out.note(f"metrics: {url}/metrics"),
    )
    return 0 if well or not once else 1


def _unfence(gpu: str, out: Output) -> int:
    from zops.host.fences import as_json  # noqa: PLC0415 - as above
    from zops.watch.guard import lift  # noqa: PLC0415

    fence = lift(gpu)
    out.data(as_json(fence), f"GPU {fence.name} may be used again; start what ran there with: zops up")
    return 0


def _tell(out: Output, occurrence: "Occurrence") -> None:
    from zops.watch.events import LOUD  # noqa: PLC0415 - as above

    out.raw_line(occurrence.as_line() if out.mode == "json" else occurrence.as_text())
    if occurrence.kind in LOUD and out.mode == "json":
        # Whoever pipes the events into a program still has it in the log.
        out.warn(occurrence.as_text())

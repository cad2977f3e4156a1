"""`zops cache scrub`: deep verification in the background."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli import quantities
from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration, size

if TYPE_CHECKING:
    from zops.cache.scrub import Scrub


@click.command()
@click.argument("snapshot", required=False, type=click.Path(path_type=Path))
@click.option(
    "--rate",
    type=quantities.rate,
    metavar="RATE",
    default="200MB/s",
    show_default=True,
    help="Bytes a second to read, on average.",
)
@click.option(
    "--limit",
    type=quantities.time,
    metavar="TIME",
    help="Begin no file after this time; the next run goes on (default: no limit).",
)
@click.option("--metrics", type=click.Path(path_type=Path), help="Write the outcome for node_exporter's textfiles.")
@with_spec
def scrub(
    *, snapshot: Path | None, rate: float, limit: float | None, metrics: Path | None, loaded: Loaded, out: Output
) -> None:
    """Read a snapshot from the disk in the background and compare every SHA-256.

    At idle priority and no faster than --rate, past the page cache, a part at a time: each run goes on where the last
    one stopped. A round that ends well renews the marker. A bad file removes it at once, and the exit status is 4.

    \b
    Examples:
      zops cache scrub
      zops cache scrub --rate 50MB/s --limit 30m
      zops cache scrub --metrics /var/lib/prometheus/node-exporter/zops_scrub.prom
    """
    from zops.cache.layout import choose  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.cache.scrub import scrub as read_again  # noqa: PLC0415
    from zops.cache.scrub import write_metrics  # noqa: PLC0415

    spec = loaded.spec
    path = snapshot.absolute() if snapshot else choose(spec.cache.dir, spec.model, spec.source.revision).path
    with out.progress() as report:
        result = read_again(path, report, rate=rate, limit_s=limit)
    if metrics:
        write_metrics(metrics, result)
    out.data(_json(result), _text(result))
    result.require()


def _json(result: "Scrub") -> dict[str, object]:
    return {
        "path": str(result.path),
        "model": result.manifest.model,
        "revision": result.manifest.revision,
        "manifest_digest": result.manifest.digest,
        "read_files": result.read_files,
        "read_bytes": result.read_bytes,
        "left_files": result.left_files,
        "finished": result.finished,
        "scrub_result": result.result,
        "scrubbed_at": result.scrubbed_at,
        "seconds": round(result.seconds, 3),
        "findings": [{"path": f.path, "status": f.status, "detail": f.detail} for f in result.findings],
    }


def _text(result: "Scrub") -> str:
    lines = [str(result.path)]
    lines += [f"{f.status:<11}{f.path}  {f.detail}".rstrip() for f in result.findings if f.status != "ok"]
    where = "the round is complete" if result.finished else f"{result.left_files} files left in this round"
    lines.append(f"{result.read_files} files read ({size(result.read_bytes)}, {duration(result.seconds)}); {where}")
    return "\n".join(lines)

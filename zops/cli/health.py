"""`zops health`: judge running instances and say which layer fails."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration
from zops.errors import ZopsError

if TYPE_CHECKING:
    from zops.health.verdict import Health


@click.command()
@click.option("--deep", is_flag=True, help="Also make a real image and look at it.")
@click.option("--wait", "waiting", is_flag=True, help="First wait until the instance is ready.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Longest wait (default: startup_timeout_s).")
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
@with_spec
def health(
    *,
    deep: bool,
    waiting: bool,
    timeout_s: float | None,
    report_file: Path | None,
    loaded: Loaded,
    out: Output,
) -> int:
    """Judge running instances, layer by layer.

    Layers, outermost first: running, live, ready, gpu, cache, and with --deep canary. What lies behind a failed layer
    is not asked. All instances of the runtime are judged, or the one of --name. Exit status 0 only when there is at
    least one and every layer of each is ok.

    \b
    Examples:
      zops health
      zops health --wait --timeout 600
      zops health --deep --report /var/lib/zops/health.json
    """
    from zops.health.survey import Survey, survey  # noqa: PLC0415 - urllib3 and the runtime, for this command only
    from zops.runtime.select import open_runtime  # noqa: PLC0415

    name = loaded.spec.name if loaded.origins["name"].kind == "flag" else None
    with out.progress() as report:
        found: Survey = survey(
            open_runtime(loaded.spec),
            loaded.spec,
            name=name,
            deep=deep,
            wait_s=(timeout_s or loaded.spec.serve.startup_timeout_s) if waiting else None,
            report=report,
        )
    if report_file:
        found.write(report_file)
    out.data(found.as_json(), _render(found.healths))
    if not found.healths:
        out.error(
            ZopsError(
                f"there is no instance{f' {name}' if name else ''} to judge",
                code="instance-missing",
                hint="start it with: zops up",
            )
        )
    return 0 if found.verdict == "ok" else 1


def _render(healths: "tuple[Health, ...]") -> str:
    lines = []
    for one in healths:
        lines.append(f"{one.name} ({one.runtime}): {one.verdict}")
        for probe in one.probes:
            lines.append(f"  {probe.verdict:<9} {probe.layer:<8} {probe.reason} ({duration(probe.seconds)})")
            if probe.remedy:
                lines.append(f"{'':<21}fix: {probe.remedy}")
    return "\n".join(lines)

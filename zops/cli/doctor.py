"""`zops doctor`: judge this host before anything is deployed on it."""

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output
from zops.errors import ZopsError

if TYPE_CHECKING:
    from zops.host.doctor import Diagnosis


@click.command()
@click.option("--only", metavar="ID", multiple=True, help="Run this check only; repeatable.")
@with_spec
def doctor(*, only: tuple[str, ...], loaded: Loaded, out: Output) -> int:
    """Check this host and say what to do about what is wrong.

    Changes nothing and needs no GPU, no engine and no root; what it cannot see it says. Exit status 1 when a check
    failed; warnings are allowed.

    \b
    Examples:
      zops doctor
      zops doctor --only gpu-driver --only engine-gpu
      zops doctor --output json
    """
    from zops.health.examine import examine_host  # noqa: PLC0415 - brings in the engine's and the GPU's libraries
    from zops.runtime.select import open_runtime  # noqa: PLC0415

    runtime = None
    # An engine that cannot be reached is what a check of its own is about.
    with suppress(ZopsError):
        runtime = open_runtime(loaded.spec)
    with out.progress() as report:
        diagnosis = examine_host(loaded, runtime=runtime, only=only, report=report)
    out.data(diagnosis.as_json(), _render(diagnosis))
    return 0 if diagnosis.sound else 1


def _render(diagnosis: "Diagnosis") -> str:
    """Lay the checks out for people: verdict, id, reason, and under what is wrong how to mend it."""
    width = max((len(result.id) for result in diagnosis.results), default=0)
    lines = []
    for result in diagnosis.results:
        lines.append(f"{result.verdict:<8}{result.id:<{width}}  {result.finding.reason}")
        if result.finding.remedy:
            lines.append(f"{'':<8}{'':<{width}}    fix: {result.finding.remedy}")
    return "\n".join([*lines, "", diagnosis.summary])

"""`zops provision`: the plan from a bare host to a serving one, shown or run."""

import shlex
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from zops.cache.redact import redacted
from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration

if TYPE_CHECKING:
    from zops.provision.plan import Outcome


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be done and why; touch nothing.")
@with_spec
def provision(*, dry_run: bool, loaded: Loaded, out: Output) -> None:
    """Take this host from bare to serving, step by step.

    Checks the host, restores or pulls the model cache, verifies and warms it, builds the image, starts the instance,
    waits until it is ready and makes an image with it. Each step looks first whether it is done: run it again at any
    time, it does what is left.

    \b
    Examples:
      zops provision --dry-run
      zops provision
      zops provision --runtime process --gpus none --model zops/synthetic-tiny
    """
    from zops.provision.plan import run  # noqa: PLC0415 - brings in every room of the house
    from zops.provision.steps import plan  # noqa: PLC0415

    outcomes: list[Outcome] = []
    go_on = redacted(shlex.join(["zops", *sys.argv[1:]]))
    planned = plan(loaded, dry_run=dry_run)
    with out.progress() as report:

        def claim() -> AbstractContextManager[None]:
            return planned.runtime.claim(loaded.spec.name, report)

        for outcome in run(planned.steps(), report, dry_run=dry_run, go_on=go_on, claim=claim):
            outcomes.append(outcome)
            if out.mode != "json":
                out.data(None, _line(outcome))
    if out.mode == "json":
        out.data({"dry_run": dry_run, "steps": [outcome.as_json() for outcome in outcomes]})
    else:
        out.note(_closing(outcomes, dry_run=dry_run))


def _line(outcome: "Outcome") -> str:
    return f"{outcome.step:<9} {outcome.state:<6} {duration(outcome.seconds):>10}  {outcome.text}"


def _closing(outcomes: "list[Outcome]", *, dry_run: bool) -> str:
    left = [outcome for outcome in outcomes if outcome.state == "would"]
    if dry_run:
        return (
            f"{len(left)} of {len(outcomes)} steps are left; nothing was touched" if left else "nothing is left to do"
        )
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    seconds = duration(sum(outcome.seconds for outcome in outcomes))
    return f"serving; {len(done)} steps done, {len(outcomes) - len(done)} found done, in {seconds}"

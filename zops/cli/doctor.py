"""`zops doctor`: judge this host before anything is deployed on it."""

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from zops.cli import diagnosis as report_of
from zops.cli.options import Loaded, confirm, with_spec
from zops.cli.output import Output
from zops.errors import UsageError, ZopsError

if TYPE_CHECKING:
    from zops.host.doctor import CheckResult, Diagnosis

# With --strict, when nothing failed and something is to be looked at; docs/reference/exit-codes.md.
WARNED = 10


@click.command()
@click.option("--only", metavar="ID", multiple=True, help="Run this check only; repeatable.")
@click.option("--fix", is_flag=True, help="Run the fixes that lose nothing and stop nobody, asking before each.")
@click.option("--yes", is_flag=True, help="With --fix: do not ask.")
@click.option("--strict", is_flag=True, help=f"Exit with status {WARNED} when something is to be looked at.")
@click.option("--verbose", "-v", is_flag=True, help="Show every check, and what was seen where it is not ok.")
@click.option("--capacity", is_flag=True, help="Tell which precision and size fit on the GPUs, and how fast.")
@with_spec
def doctor(
    *,
    only: tuple[str, ...],
    fix: bool,
    yes: bool,
    strict: bool,
    verbose: bool,
    capacity: bool,
    loaded: Loaded,
    out: Output,
) -> int:
    """Check this host and say what to do about what is wrong.

    Needs no GPU, no engine and no root; what it cannot see it says. Changes nothing without --fix. Takes two seconds,
    three where a hub does not answer; one second of it reads a file of the cache to measure the disk. Exit status 1
    when a check failed; warnings are allowed unless --strict is given.

    \b
    Examples:
      zops doctor
      zops doctor --only gpu-driver --only engine-gpu -v
      zops doctor --fix
      zops doctor --capacity --set serve.max_pixels=1048576
      zops doctor --output json
    """
    if capacity:
        from zops.health.examine import capacity as judge  # noqa: PLC0415 - as in _examine

        judged = judge(loaded.spec)
        out.data(judged.as_json(), report_of.render_capacity(judged))
        return 0 if judged.sound else 1
    found = _examine(loaded, out, only)
    if fix:
        found = _fix(found, loaded, out, yes=yes)
    colours = report_of.Colours.of(out)
    out.data(found.as_json(), report_of.render(found, colours, verbose=verbose))
    if not found.sound:
        return 1
    return WARNED if strict and found.having("warn") else 0


def _examine(loaded: Loaded, out: Output, only: tuple[str, ...]) -> "Diagnosis":
    from zops.health.examine import examine_host  # noqa: PLC0415 - brings in the engine's and the GPU's libraries
    from zops.runtime.select import open_runtime  # noqa: PLC0415

    runtime = None
    # An engine that cannot be reached is what a check of its own is about.
    with suppress(ZopsError):
        runtime = open_runtime(loaded.spec)
    with out.progress() as report:
        return examine_host(loaded, runtime=runtime, only=only, report=report)


def _fix(found: "Diagnosis", loaded: Loaded, out: Output, *, yes: bool) -> "Diagnosis":
    """Run the fixes that may be run, and judge again what they were to mend."""
    if not found.fixable:
        out.note("there is nothing here that --fix could mend")
        return found
    fixed = tuple(result.id for result in found.fixable if _fix_one(result, out, yes=yes))
    if not fixed:
        return found
    again = _examine(loaded, out, fixed)
    return found.with_results([result.after_fix() for result in again.results])


def _fix_one(result: "CheckResult", out: Output, *, yes: bool) -> bool:
    from zops.host.mending import command, mend  # noqa: PLC0415 - as in _examine

    argv = command(result.finding.fix, can_ask=out.interactive)
    try:
        confirm(out, f"{result.id}: {result.finding.reason}. Run {shlex.join(argv)}?", yes=yes)
    except click.Abort:
        out.note(f"{result.id}: left as it is")
        return False
    except UsageError as error:
        raise UsageError(error.message, code=error.code, hint="add --yes, or run without --fix") from error
    mended = mend(argv)
    if mended.reason:
        out.warn(f"{result.id}: {shlex.join(argv)} did not work: {mended.reason}")
        return False
    out.note(f"{result.id}: ran {shlex.join(argv)}")
    return True

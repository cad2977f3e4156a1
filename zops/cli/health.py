"""`zops health`: judge running instances and say which layer fails."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output
from zops.errors import RuntimeUnreachable, UsageError, ZopsError
from zops.events import silent

if TYPE_CHECKING:
    from zops.health.survey import Survey


def _as_plugin(command: Callable[..., int]) -> Callable[..., int]:
    """Turn every error into what a monitoring system expects of its plugin, where one asked for that."""

    @functools.wraps(command)
    def wrapped(*, form: str | None, **kwargs: Any) -> int:
        try:
            return command(form=form, **kwargs)
        except ZopsError as error:
            if form != "nagios":
                raise
            from zops.health.formats import nagios_unknown  # noqa: PLC0415 - an error is no reason to load them

            status, line = nagios_unknown(error)
            click.echo(line)
            return status

    return wrapped


@click.command()
@click.option("--deep", is_flag=True, help="Also make a real image and compare it with the first ones.")
@click.option("--record", is_flag=True, help="Take the image of now as the one to compare with (implies --deep).")
@click.option("--wait", "waiting", is_flag=True, help="First wait until all is well, or cannot become well.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="S", help="Longest wait (default: "
              "startup_timeout_s).")  # fmt: skip
@click.option("--all", "everywhere", is_flag=True, help="Judge all hosts that zops.yaml lists.")
@click.option("--host-timeout", "host_timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="Longest time for one of them (default: 15, and the image's own on top).")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["nagios", "prometheus"]), help="Print for a monitoring system.")
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Also write the JSON to this file; with "
              "--format prometheus, the metrics instead of printing them.")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show every layer that was asked.")
@_as_plugin
@with_spec
def health(
    *,
    deep: bool,
    record: bool,
    waiting: bool,
    timeout_s: float | None,
    everywhere: bool,
    host_timeout_s: float | None,
    form: str | None,
    report_file: Path | None,
    verbose: bool,
    loaded: Loaded,
    out: Output,
) -> int:
    """Judge running instances, layer by layer.

    Layers, outermost first: running, live, gpu, cache, ready, queue, and with --deep canary. What lies behind a failed
    layer is not asked. All instances of the runtime are judged, or the one of --name. Exit status 0 only when there is
    at least one and every layer of each is ok; with --format nagios 0, 1, 2 or 3 as plugins have it.

    \b
    Examples:
      zops health
      zops health --wait --timeout 600
      zops health --deep --report /var/lib/zops/health.json
      zops health --all --format nagios
      zops health --format prometheus --report /var/lib/node_exporter/textfile/zops_health.prom
    """
    from zops.health.survey import Manner, unasked, wait_healthy  # noqa: PLC0415 - urllib3 and the runtime, for this only

    if host_timeout_s is not None and not everywhere:
        raise UsageError("--host-timeout goes with --all", hint="for one instance's image: serve.request_timeout_s")
    spec = loaded.spec
    name = spec.name if loaded.origins["name"].kind == "flag" else None
    look = _looker(loaded, name, everywhere=everywhere, host_timeout_s=host_timeout_s)
    # What takes milliseconds needs no bars, which would cost more than that to load.
    with out.progress() if deep or record or waiting or everywhere else nullcontext(silent) as report:
        if waiting:
            limit_s = spec.serve.startup_timeout_s if timeout_s is None else timeout_s
            wait_healthy(look, timeout_s=limit_s, report=report)
        try:
            found = look(manner=Manner(deep=deep or record, record=record), report=report)
        except RuntimeUnreachable as error:
            if form == "prometheus":
                _tell_prometheus(unasked(error), report_file)
            raise
    return _tell(found, out, name=name, form=form, report_file=report_file, verbose=verbose)


def _looker(
    loaded: Loaded, name: str | None, *, everywhere: bool, host_timeout_s: float | None
) -> "Callable[..., Survey]":
    """Return what judges all that was asked for; it may be called again and again."""
    if everywhere:
        from zops.health.fleet import survey_fleet  # noqa: PLC0415 - for those who have a fleet

        return functools.partial(survey_fleet, loaded.spec, name=name, host_timeout_s=host_timeout_s)
    from zops.health.survey import survey  # noqa: PLC0415 - as above
    from zops.runtime.select import is_remote, open_runtime  # noqa: PLC0415

    runtime = open_runtime(loaded.spec)
    return functools.partial(survey, runtime, loaded.spec, name=name, is_remote=is_remote(loaded.spec))


def _tell(
    found: "Survey", out: Output, *, name: str | None, form: str | None, report_file: Path | None, verbose: bool
) -> int:
    """Print and write the survey in the form that was asked for; return the exit status."""
    status = 0 if found.verdict == "ok" else 1
    if form == "prometheus":
        _tell_prometheus(found, report_file)
        return status
    if report_file:
        found.write(report_file)
    if form == "nagios":
        from zops.health.formats import nagios  # noqa: PLC0415 - for those who ask for it

        status, line = nagios(found)
        click.echo(line)
        return status
    from zops.cli.diagnosis import Colours  # noqa: PLC0415 - not for programs
    from zops.cli.verdicts import render_verdicts  # noqa: PLC0415

    shown = render_verdicts(found.healths, Colours.of(out), verbose=verbose) if found.healths else None
    out.data(found.as_json(), shown)
    if not found.healths:
        text = f"there is no instance{f' {name}' if name else ''} to judge"
        out.error(ZopsError(text, code="instance-missing", hint="start it with: zops up"))
    return status


def _tell_prometheus(found: "Survey", file: Path | None) -> None:
    from zops.cache.textfile import write_metrics  # noqa: PLC0415 - for those who ask for it
    from zops.health.formats import prometheus  # noqa: PLC0415

    text = prometheus(found)
    if file:
        write_metrics(file, text)
    else:
        click.echo(text, nl=False)

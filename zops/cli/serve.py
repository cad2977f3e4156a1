"""`zops serve`: what runs inside an instance."""

from pathlib import Path

import click

from zops.cache.manifest import read_manifest
from zops.cli.options import with_spec
from zops.cli.output import Output
from zops.spec import Loaded, Spec


@click.command()
@click.option(
    "--snapshot",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="ZOPS_SNAPSHOT",
    metavar="DIR",
    help="Directory of the snapshot; the cache's newest verified one by default.",
)
@with_spec
def serve(*, out: Output, loaded: Loaded, snapshot: Path | None) -> None:
    """Serve a snapshot over HTTP (what runs inside an instance).

    Runs in the foreground until SIGTERM or Ctrl-C, finishes what it works on, and exits. The API is OpenAI's Images
    API; see docs/reference/http-api.md.

    \b
    Examples:
      zops serve --snapshot ./tiny --model zops/synthetic-tiny --gpus none
      zops serve --port 8001 --output json
    """
    from zops.serving import server  # noqa: PLC0415 - the container side, only for this command

    server.require_extra()
    chosen = snapshot or _from_cache(loaded.spec)
    spec = _with_kernels(_named_by(chosen, loaded))
    # A server's log is read by programs and in files: lines, never bars.
    log = Output("json" if out.mode == "json" else "plain")
    with log.progress() as report:
        server.serve(spec, chosen, report, log_json=log.mode == "json")


def _with_kernels(spec: Spec) -> Spec:
    """Name a place for compiled kernels where nobody chose one."""
    from zops.host.paths import state_dir  # noqa: PLC0415 - only for this command

    kernels = spec.cache.kernels or state_dir() / "kernels"
    return spec.model_copy(update={"cache": spec.cache.model_copy(update={"kernels": kernels})})


def _from_cache(spec: Spec) -> Path:
    from zops.cache import layout  # noqa: PLC0415

    return layout.meant(spec).path


def _named_by(snapshot: Path, loaded: Loaded) -> Spec:
    """Take the model's name from the snapshot where nobody chose one."""
    manifest = read_manifest(snapshot)
    if manifest is None or loaded.origins["model"].kind != "default":
        return loaded.spec
    return loaded.spec.model_copy(update={"model": manifest.model})

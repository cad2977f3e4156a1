"""`zops image`: the container image that instances run."""

import click

from zops.cli.options import with_spec
from zops.cli.output import Output, duration, size
from zops.spec import Loaded


@click.group(short_help="Build the container image.")
def image() -> None:
    """Build the container image.

    `zops provision` builds it by itself where it is missing; this does it at a time of your choosing.
    """


@image.command()
@click.option("--tag", metavar="NAME[:TAG]", help="Name of the image, instead of image.name.")
@with_spec
def build(loaded: Loaded, out: Output, tag: str | None) -> None:
    """Build the inference image on the engine.

    \b
    Examples:
      zops image build
      zops image build --engine ssh://ops@gpu-7
      zops image build --set image.wheels=/srv/wheels --set image.ca=/etc/ssl/certs/ca-certificates.crt
    """
    from zops.runtime.image import build_image  # noqa: PLC0415 - only what runs is loaded

    with out.progress() as report:
        built = build_image(loaded.spec.engine, loaded.spec.image, report, tag=tag)
    out.data(
        {
            "name": built.name,
            "id": built.id,
            "size_bytes": built.size_bytes,
            "seconds": round(built.seconds, 3),
            "log": str(built.log),
        },
        f"{built.name}  {built.id[:19]}  {size(built.size_bytes)}  {duration(built.seconds)}",
    )

"""`zops model`: the catalog, and synthetic models."""

from pathlib import Path
from typing import Any, Literal

import click

from zops.catalog import MODELS, Model
from zops.cli.options import with_output
from zops.cli.output import Output
from zops.cli.output import size as render_size


@click.group(short_help="List the models that zops knows, or make a synthetic one.")
def model() -> None:
    """List the models that zops knows, or make a synthetic one."""


@model.command("list")
@with_output
def list_models(out: Output) -> None:
    """List the models that zops knows.

    Any other model laid out like Z-Image-Turbo can be served too, without a pinned manifest to check it against.
    """
    entries = [_describe(entry) for entry in MODELS.values()]
    rows = [(e["model"], _size_cell(e["size_bytes"]), str(e["forwards"]), e["text"]) for e in entries]
    out.table(("MODEL", "SIZE", "FORWARDS", "WHAT IT IS"), rows, entries)


@model.command("synthesize")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(["tiny", "full"]), required=True, help="4 MB, or the real 32.8 GB.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides every weight.")
@with_output
def synthesize(directory: Path, size: Literal["tiny", "full"], seed: int, out: Output) -> None:
    r"""Make a model of random weights in DIRECTORY, in the real layout and verified at once.

    \b
    Examples:
      zops model synthesize /srv/models/tiny --size tiny
      zops model synthesize /mnt/nvme/full --size full --seed 7
    """
    from zops.cache.synthetic import synthesize_snapshot  # noqa: PLC0415 - `model list` needs none of it

    with out.progress() as report:
        made = synthesize_snapshot(directory, size, seed=seed, report=report)
    manifest = made.manifest
    body = {
        "path": str(made.path),
        "model": manifest.model,
        "revision": manifest.revision,
        "files": len(manifest.files),
        "size_bytes": manifest.size,
        "manifest_digest": manifest.digest,
        "changed": made.changed,
    }
    found = "" if made.changed else "is already there: "
    out.data(
        body,
        f"{made.path}: {found}{manifest.model} {manifest.revision}, {len(manifest.files)} files, "
        f"{render_size(manifest.size)}",
    )


def _describe(entry: Model) -> dict[str, Any]:
    pinned = entry.pinned()
    return {
        "model": entry.id,
        "text": entry.text,
        "size_bytes": sum(file["size"] for file in pinned["files"]) if pinned else None,
        "commit": entry.commit or None,
        "forwards": entry.defaults.forwards,
        "guidance_scale": entry.defaults.guidance_scale,
        "image_size": entry.defaults.size,
    }


def _size_cell(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else render_size(size_bytes)

"""`zops generate`: one image from the running instance, as a file."""

import hashlib
import os
from pathlib import Path
from typing import Any

import click

from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration
from zops.errors import UsageError, ZopsError

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@click.command()
@click.argument("prompt")
@click.option("-o", "--to", "target", type=click.Path(path_type=Path), required=True, help="File: .png, .jpg or .webp.")
@click.option("--size", metavar="WxH", help="Width and height in pixels (default: the model's).")
@click.option("--seed", type=int, help="Same seed, same image (default: the server picks and tells).")
@click.option("--forwards", type=int, help="Passes of the transformer (default: the model's).")
@click.option("-n", "count", type=click.IntRange(1, 10), default=1, help="Number of images.")
@click.option("--url", help="Instance to ask (default: the one of zops.yaml).")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@with_spec
def generate(
    *,
    prompt: str,
    target: Path,
    size: str | None,
    seed: int | None,
    forwards: int | None,
    count: int,
    url: str | None,
    force: bool,
    loaded: Loaded,
    out: Output,
) -> None:
    """Make an image with the running instance.

    With -n, a number goes before the ending: out-1.png, out-2.png.

    \b
    Examples:
      zops generate "a lighthouse at dawn" -o lighthouse.png
      zops generate "a red fox in snow" -o fox.png --size 1280x720 --seed 7
      zops generate "a harbour" -o harbour.png -n 4 --url http://gpu-host:8000
    """
    from zops.events import task  # noqa: PLC0415 - with urllib3, only needed once the arguments are right
    from zops.health.client import Client  # noqa: PLC0415
    from zops.runtime.base import address  # noqa: PLC0415

    files = plan_files(target, count, force=force)
    client = Client(url or address(loaded.spec), timeout_s=loaded.spec.serve.request_timeout_s + 5)
    with out.progress() as report, task(report, "generate", f"making {count} image(s)", unit="images"):
        made = client.generate(
            prompt, size=size, seed=seed, n=count, forwards=forwards, output_format=FORMATS[target.suffix.lower()]
        )
    body, lines = [], []
    for file, image in zip(files, made.images, strict=True):
        write_file(file, image.data, force=force)
        body.append(describe(file, image.data, image.receipt))
        lines.append(f"{file}  seed {image.receipt.get('seed', '?')}  {duration(made.seconds)}")
    out.data({"seconds": round(made.seconds, 3), "images": body}, "\n".join(lines))


def plan_files(target: Path, count: int, *, force: bool) -> list[Path]:
    """Return the files to write, having looked before any work is done that they can be.

    Raises:
        UsageError: when the ending names no image format, the directory is missing, or a file exists.
    """
    if target.suffix.lower() not in FORMATS:
        raise UsageError(f"{target} names no image format", hint=f"end it in one of {', '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise UsageError(f"the directory {target.parent} does not exist", hint=f"mkdir -p {target.parent}")
    numbered = [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(1, count + 1)]
    files = [target] if count == 1 else numbered
    for file in files:
        if file.exists() and not force:
            raise UsageError(f"{file} exists already", code="file-exists", hint="add --force to overwrite it")
    return files


def write_file(file: Path, data: bytes, *, force: bool) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: when it came to exist meanwhile and `force` is not given.
        ZopsError: when it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if force:
            part.replace(file)
        else:
            # A link, unlike a rename, never replaces what another program wrote in the meantime.
            file.hardlink_to(part)
    except FileExistsError:
        raise UsageError(f"{file} exists already", code="file-exists", hint="add --force to overwrite it") from None
    except OSError as error:
        raise ZopsError(f"{file} cannot be written: {error.strerror}", code="file-not-written") from error
    finally:
        part.unlink(missing_ok=True)


def describe(file: Path, data: bytes, receipt: Any) -> dict[str, Any]:
    """Return what JSON says of one image."""
    return {
        "path": str(file),
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "receipt": dict(receipt),
    }

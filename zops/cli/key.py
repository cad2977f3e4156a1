"""`zops key`: the API keys of a server, of which its file knows only the hashes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from zops.cli.options import with_output
from zops.cli.output import Output
from zops.errors import UsageError
from zops.spec.keys import ApiKey, add_key, read_keys, remove_key

LOCK_TIMEOUT_S = 10.0

_file = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ZOPS_SERVE_API_KEYS",
    required=True,
    help="File of keys, the one in serve.api_keys.",
)


@click.group(short_help="Make, list and remove the API keys of a server.")
def key() -> None:
    """Make, list and remove the API keys of a server.

    A server with `serve.api_keys` answers nobody else, and sees a change of the file within a second. Keep the file in
    a directory of its own: it is the directory that containers are given.
    """


@key.command()
@click.argument("name")
@_file
@click.option("--rate", type=click.IntRange(1, 1_000_000), help="Image requests a minute (default: no limit).")
@click.option("--images", type=click.IntRange(1, 1_000_000), help="Images a minute (default: no limit).")
@click.option("--max-waiting", type=click.IntRange(1, 4096), help="Requests at the same time (default: no limit).")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]), help="When it ends, in UTC.")
@with_output
def new(
    *,
    name: str,
    file: Path,
    rate: int | None,
    images: int | None,
    max_waiting: int | None,
    expires: datetime | None,
    out: Output,
) -> None:
    """Make a key and print it, this one time.

    \b
    Examples:
      zops key new webshop --file /etc/zops/keys/keys.yaml
      zops key new intern --file keys/keys.yaml --rate 10 --expires 2027-03-31
      ZOPS_API_KEY=$(zops key new ops --file keys/keys.yaml) zops generate "a kite" -o kite.png
    """
    with _alone(file, out):
        made = add_key(
            file,
            name,
            requests_per_minute=rate,
            images_per_minute=images,
            max_waiting=max_waiting,
            expires=expires,
        )
    out.data({"name": name, "key": made, "path": str(file)}, made)
    out.note(f"{name} is in {file} now; keep the key, it is shown only this time")


@key.command(name="list")
@_file
@with_output
def list_keys(*, file: Path, out: Output) -> None:
    """List the keys of a file and what each may do.

    \b
    Examples:
      zops key list --file /etc/zops/keys/keys.yaml
    """
    keys = read_keys(file)
    now = datetime.now(UTC)
    rows = [
        (
            name,
            _moment(entry.created),
            _moment(entry.expires) + (" (expired)" if entry.expired(now) else ""),
            _limit(entry.requests_per_minute),
            _limit(entry.images_per_minute),
            _limit(entry.max_waiting),
        )
        for name, entry in keys.items()
    ]
    body = [_json(name, entry, now) for name, entry in keys.items()]
    out.table(
        ("NAME", "CREATED", "EXPIRES", "REQUESTS/MIN", "IMAGES/MIN", "WAITING"),
        rows,
        body,
        empty=f"{file} has no keys: nobody gets in",
    )


@key.command()
@click.argument("name")
@_file
@with_output
def remove(*, name: str, file: Path, out: Output) -> None:
    """Remove a key; servers refuse it within a second.

    \b
    Examples:
      zops key remove intern --file /etc/zops/keys/keys.yaml
    """
    with _alone(file, out):
        remove_key(file, name)
        left = len(read_keys(file))
    out.data({"name": name, "path": str(file), "left": left}, f"removed {name}")
    if not left:
        out.warn(f"{file} has no keys any more: nobody gets in")


@contextmanager
def _alone(file: Path, out: Output) -> Iterator[None]:
    """Keep other zops from changing the file meanwhile."""
    from zops.cache.lock import hold  # noqa: PLC0415 - only for those that write

    if not file.parent.is_dir():
        raise UsageError(f"the directory {file.parent} does not exist", hint=f"mkdir -p {file.parent}")
    with out.progress() as report, hold(file.with_name(f".{file.name}.lock"), report, timeout_s=LOCK_TIMEOUT_S):
        yield


def _moment(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%d %H:%M") if moment else "-"


def _limit(number: int | None) -> str:
    return "-" if number is None else str(number)


def _json(name: str, entry: ApiKey, now: datetime) -> dict[str, Any]:
    return {
        "name": name,
        "created": entry.created and entry.created.isoformat(),
        "expires": entry.expires and entry.expires.isoformat(),
        "expired": entry.expired(now),
        "requests_per_minute": entry.requests_per_minute,
        "images_per_minute": entry.images_per_minute,
        "max_waiting": entry.max_waiting,
    }

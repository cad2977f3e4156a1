"""The note on an archive, kept beside it in the store: how long it took to make, and whether it was proven by a drill.

It is true where the archive is, for every host that uses the store, and goes with it. What it says is no secret and
proves nothing to a restore; a note that cannot be read counts as none.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from zops.archive.store import Store
from zops.errors import ZopsError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Drilled:
    """A drill of an archive: when it ended, whether every byte was right, bytes that were restored, and seconds."""

    at: datetime
    ok: bool
    size: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of an archive beyond its name. Sizes in bytes; None where nobody noted it."""

    seconds: float | None = None
    files: int | None = None
    content_size: int | None = None
    drilled: Drilled | None = None


EMPTY = Note()


def read_note(store: Store, name: str) -> Note:
    """Return the note on an archive, an empty one when there is none that can be read."""
    text = store.read_note(name)
    try:
        body = json.loads(text) if text else {}
        return _parse(body) if body.get("format") == FORMAT else EMPTY
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return EMPTY


def write_note(store: Store, name: str, note: Note) -> None:
    """Write the note on an archive.

    Raises:
        SourceFailed, HostShort: when the store refuses.
    """
    body: dict[str, Any] = {"format": FORMAT} | {k: v for k, v in asdict(note).items() if v is not None}
    if note.drilled:
        body["drilled"] = asdict(note.drilled) | {"at": note.drilled.at.astimezone(UTC).isoformat()}
    store.write_note(name, json.dumps(body, indent=1).encode() + b"\n")


def note_drill(store: Store, name: str, drilled: Drilled) -> ZopsError | None:
    """Add a drill to the note on an archive; return why that failed, for who may only read can drill too."""
    try:
        write_note(store, name, replace(read_note(store, name), drilled=drilled))
    except ZopsError as error:
        return error
    return None


def _parse(body: Mapping[str, Any]) -> Note:
    drilled = body.get("drilled")
    return Note(
        seconds=_number(body.get("seconds")),
        files=_count(body.get("files")),
        content_size=_count(body.get("content_size")),
        drilled=Drilled(
            _moment(drilled["at"]),
            drilled["ok"] is True,
            _count(drilled.get("size")) or 0,
            _number(drilled.get("seconds")) or 0.0,
        )
        if drilled
        else None,
    )


def _moment(value: object) -> datetime:
    at = datetime.fromisoformat(str(value))
    if at.tzinfo is None:
        raise ValueError(f"{value!r} has no offset")
    return at.astimezone(UTC)


def _number(value: object) -> float | None:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    return number if math.isfinite(number) and number >= 0 else None


def _count(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


__all__ = ["EMPTY", "Drilled", "Note", "note_drill", "read_note", "write_note"]

"""What is kept of the scrubs of a snapshot: how far the round came, and how the last one ended.

It lies beside the manifest or, where the snapshot is read-only, in the host's state directory.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zops.cache.hashing import Stat
from zops.cache.manifest import FORMAT, Status, read_json, sidecar, stat_key, write_json
from zops.errors import SnapshotDamaged
from zops.host.paths import state_dir

Result = Literal["ok", "damaged", ""]

NO_STAT: Stat = (0, 0, 0)
"""The `stat_key` of a file that is not there or cannot be opened."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a round found of one file, and how the file looked then."""

    status: Status
    detail: str
    stat: Stat


@dataclass(frozen=True)
class Record:
    """What is kept between runs: when this round began and which files it has seen, and how the last scrub ended.

    `ended_at` is when the last round ended or, if that was later, a bad file was found; None when neither happened.
    """

    manifest_digest: str
    began_at: float
    seen: Mapping[str, Seen] = field(default_factory=dict)
    result: Result = ""
    ended_at: float | None = None


def read_record(snapshot: Path) -> Record | None:
    """Return what is known of the scrubs of a snapshot, None when it never had one (or none that can be read)."""
    for place in (_beside(snapshot), _elsewhere(snapshot)):
        try:
            body = read_json(place)
            if body is None or body["format"] != FORMAT:
                continue
            seen = {
                str(path): Seen(
                    each["status"], str(each["detail"]), (each["stat"][0], each["stat"][1], each["stat"][2])
                )
                for path, each in body["seen"].items()
            }
            return Record(str(body["manifest_digest"]), float(body["began_at"]), seen, body["result"], body["ended_at"])
        except (SnapshotDamaged, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue
    return None


def write_record(snapshot: Path, record: Record) -> None:
    """Write the record durably.

    Raises:
        OSError: when it cannot be written.
    """
    body = {
        "format": FORMAT,
        "manifest_digest": record.manifest_digest,
        "began_at": record.began_at,
        "result": record.result,
        "ended_at": record.ended_at,
        "seen": {
            path: {"status": seen.status, "detail": seen.detail, "stat": list(seen.stat)}
            for path, seen in record.seen.items()
        },
    }
    write_json(_beside(snapshot) if is_writable(snapshot) else _elsewhere(snapshot), body)


def is_writable(snapshot: Path) -> bool:
    """Tell whether this process may write beside the manifest."""
    return os.access(sidecar(snapshot), os.W_OK)


def look(path: Path) -> Stat:
    """Return the `stat_key` of a file, `NO_STAT` when there is none."""
    try:
        return stat_key(path)
    except OSError:
        return NO_STAT


def _beside(snapshot: Path) -> Path:
    return sidecar(snapshot) / "scrub.json"


def _elsewhere(snapshot: Path) -> Path:
    """Return where the record of a snapshot lies that cannot be written."""
    name = hashlib.sha256(os.fsencode(snapshot.absolute())).hexdigest()[:16]
    return state_dir() / "scrub" / f"{name}.json"

"""When models were last backed up, and whether that was proven: a listing, a few notes, and no waiting in vain."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zops.archive.names import ArchiveInfo, names_revision
from zops.archive.notes import EMPTY, Drilled, Note, read_note
from zops.archive.store import Store, open_store
from zops.cache.manifest import Manifest
from zops.cache.status import BackedUp
from zops.cache.textfile import Metric, render, write_metrics
from zops.errors import ZopsError

Value = TypeVar("Value")

# A listing takes tenths of a second; whoever asks for a status does not wait for a store that does not answer.
LIMIT_S = 5.0
_NOTES = 20
"""How many archives of a model, from the youngest on, are asked for the last drill."""


@dataclass(frozen=True, slots=True)
class History:
    """The archives of one model in a store, oldest first, the note on the youngest, and the last drill of any."""

    archives: tuple[ArchiveInfo, ...] = ()
    note: Note = EMPTY
    drilled: Drilled | None = None
    drilled_name: str = ""

    @property
    def newest(self) -> ArchiveInfo | None:
        """The youngest archive."""
        return self.archives[-1] if self.archives else None


def read_history(store: Store, model: str) -> History:
    """Return what a store tells of the backups of a model.

    Raises:
        SourceFailed: when the store does not answer.
    """
    return _history(store, [info for info in store.list() if model in {m for m, _ in info.snapshots}])


def read_history_in_time(location: str | Path, model: str, *, limit_s: float = LIMIT_S) -> History | None:
    """Return what a store tells of the backups of a model, None when it fails or takes longer than that."""
    return _in_time(lambda: read_history(open_store(location), model), time.monotonic() + limit_s)


def bad_archives(store: Store, archives: Sequence[ArchiveInfo]) -> frozenset[str]:
    """Return the names of those archives whose last drill found them damaged."""
    notes = ((info.name, read_note(store, info.name).drilled) for info in archives)
    return frozenset(name for name, drilled in notes if drilled and not drilled.ok)


def last_backups(location: str | Path | None, *, limit_s: float = LIMIT_S) -> Callable[[Manifest], BackedUp | None]:
    """Return what tells when a snapshot was last backed up into a store; never raises for a store that is unreachable.

    Args:
        location: a directory or s3://bucket/prefix, None for no store.
        limit_s: seconds that the store is given to answer, for everything together.

    Returns:
        A function of a snapshot's manifest. For a slim snapshot an archive of its parent counts, since it can be made
        from that; not the other way round. It gives None when there is none, or when the store did not answer.
    """
    deadline = time.monotonic() + limit_s
    store, archives = _in_time(lambda: _list(location), deadline) or (None, [])

    def last(manifest: Manifest) -> BackedUp | None:
        holding = [
            archive
            for archive in archives
            if any(
                model == manifest.model and names_revision(named, manifest.base_revision, full=not manifest.derived)
                for model, named in archive.snapshots
            )
        ]
        if store is None or not holding:
            return None
        newest = holding[-1]
        history = _in_time(lambda: _history(store, holding), deadline) or History(tuple(holding))
        drilled = history.drilled
        return BackedUp(
            at=newest.created,
            archive=newest.location,
            size_bytes=newest.size,
            seconds=history.note.seconds,
            drilled_at=drilled.at if drilled else None,
            drill_ok=drilled.ok if drilled else None,
        )

    return last


def write_history(path: Path, store: str, histories: Mapping[str, History], *, ok: bool | None = None) -> None:
    """Write the backups of models for node_exporter's textfile collector, which never sees half of it.

    Args:
        path: the file.
        store: the store's location.
        histories: of each model, owner/name, what the store tells.
        ok: whether the run that has just ended did what it should; None when it is not to be mentioned.

    Raises:
        HostShort: when the file cannot be written.
    """
    groups = (({"model": model, "store": store}, _metrics(history, ok=ok)) for model, history in histories.items())
    write_metrics(path, render("zops_backup_", *groups))


def _metrics(history: History, *, ok: bool | None) -> list[Metric]:
    metrics = [Metric("archives", "Archives of the model in the store.", len(history.archives))]
    if ok is not None:
        metrics += [
            Metric("run_ok", "1 when the last run did what it should, 0 when it failed.", ok),
            Metric("run_timestamp_seconds", "When the last run ended.", time.time()),
        ]
    if history.newest:
        metrics += [
            Metric("last_timestamp_seconds", "When the youngest archive was made.", history.newest.created.timestamp()),
            Metric("last_size_bytes", "Size of the youngest archive.", history.newest.size),
        ]
    if history.note.seconds is not None:
        metrics.append(Metric("last_duration_seconds", "How long the youngest archive took.", history.note.seconds))
    # Without a drill the moment is 0, so that one rule finds both an old one and none at all.
    drilled = history.drilled
    moment = drilled.at.timestamp() if drilled else 0
    metrics.append(Metric("drill_timestamp_seconds", "When the last drill ended; 0 without one.", moment))
    if drilled:
        metrics += [
            Metric("drill_ok", "1 when the last drill proved the archive, 0 when it found it damaged.", drilled.ok),
            Metric("drill_duration_seconds", "How long the last drill took.", drilled.seconds),
            Metric("drill_bytes", "What the last drill restored and compared.", drilled.size),
        ]
    return metrics


def _history(store: Store, archives: Sequence[ArchiveInfo]) -> History:
    if not archives:
        return History()
    youngest = list(reversed(archives))[:_NOTES]
    notes = [read_note(store, info.name) for info in youngest]
    drills = [(note.drilled, info.name) for note, info in zip(notes, youngest, strict=True) if note.drilled]
    drilled, name = max(drills, key=lambda each: each[0].at, default=(None, ""))
    return History(tuple(archives), notes[0], drilled, name)


def _list(location: str | Path | None) -> tuple[Store | None, list[ArchiveInfo]]:
    store = open_store(location) if location is not None else None
    return store, store.list() if store else []


def _in_time(function: Callable[[], Value], deadline: float) -> Value | None:
    """Return what a function of a store returns, None when it fails or does not come in time."""
    found: list[Value] = []

    def look() -> None:
        with suppress(ZopsError, OSError):
            found.append(function())

    # A daemon, so that one that goes on waiting does not keep the command from ending.
    thread = threading.Thread(target=look, name="last-backup", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    return found[0] if found else None


__all__ = [
    "LIMIT_S",
    "History",
    "bad_archives",
    "last_backups",
    "read_history",
    "read_history_in_time",
    "write_history",
]

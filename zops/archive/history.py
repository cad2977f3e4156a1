"""When snapshots were last backed up, as the names in a store tell: one listing, and no waiting for a store in vain."""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from zops.archive.store import ArchiveInfo, names_revision, open_store
from zops.cache.manifest import Manifest
from zops.errors import ZopsError

# A listing takes tenths of a second; whoever asks for a status does not wait for a store that does not answer.
LIMIT_S = 5.0


def last_backups(location: str | Path | None, *, limit_s: float = LIMIT_S) -> Callable[[Manifest], datetime | None]:
    """Return what tells when a snapshot was last backed up into a store; never raises for a store that is unreachable.

    Args:
        location: a directory or s3://bucket/prefix, None for no store.
        limit_s: seconds that the store is given to answer.

    Returns:
        A function of a snapshot's manifest. For a slim snapshot an archive of its parent counts, since it can be made
        from that; not the other way round. It gives None when there is none, or when the store did not answer.
    """
    archives = _list(location, limit_s) if location is not None else []

    def last(manifest: Manifest) -> datetime | None:
        holding = (
            archive.created
            for archive in archives
            if any(
                model == manifest.model and names_revision(named, manifest.base_revision, full=not manifest.derived)
                for model, named in archive.snapshots
            )
        )
        return max(holding, default=None)

    return last


def _list(location: str | Path, limit_s: float) -> list[ArchiveInfo]:
    found: list[ArchiveInfo] = []

    def look() -> None:
        with suppress(ZopsError, OSError):
            found.extend(open_store(location).list())

    # A daemon, so that one that goes on waiting does not keep the command from ending.
    thread = threading.Thread(target=look, name="last-backup", daemon=True)
    thread.start()
    thread.join(limit_s)
    return [] if thread.is_alive() else found

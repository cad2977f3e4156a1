"""Removing a snapshot: only when nobody uses it, all at once for everybody who looks, and never half."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from zops.cache.lock import hold
from zops.cache.manifest import sidecar, sync_directory
from zops.cache.room import shortage_told
from zops.errors import UsageError, ZopsError
from zops.events import Report

Used = Mapping[Path, tuple[str, ...]]
"""Snapshot, as a resolved path -> the names of the instances that have it mounted or serve it, stopped ones too."""
AskUsed = Callable[[], Used]

# A hidden name beside the snapshot; what is found under one was left by a removal that was killed.
PREFIX, SUFFIX = ".removed-", ".part"


def users_of(path: Path, used: Used) -> tuple[str, ...]:
    """Return the names of the instances that use a path, anything below it, or anything above it."""
    path = path.resolve()
    return tuple(
        name
        for place, names in sorted(used.items())
        if place.is_relative_to(path) or path.is_relative_to(place)
        for name in names
    )


def require_unused(path: Path, used: Used) -> None:
    """Refuse to remove what an instance uses.

    Raises:
        ZopsError: naming the instances.
    """
    users = users_of(path, used)
    if users:
        raise ZopsError(
            f"{path} is used by {', '.join(users)}, so it is not removed",
            code="snapshot-in-use",
            hint=f"remove that instance with: zops down --name {users[0].partition(' ')[0]}",
            instances=list(users),
        )


def require_removable(path: Path) -> None:
    """Refuse to remove a directory that is not a snapshot's own.

    Raises:
        UsageError: for a link, a mount point, and the layout whose snapshots share their files.
    """
    if path.is_symlink() or path.is_mount():
        raise UsageError(
            f"{path} is a {'link' if path.is_symlink() else 'mount point'}, so it is not removed",
            code="snapshot-not-removable",
            hint="remove by hand what is behind it",
        )
    if len(path.parents) > 1 and path.parents[1].name.startswith("models--"):
        raise UsageError(
            f"{path} is in huggingface_hub's layout, where snapshots share their files, so it is not removed",
            code="snapshot-not-removable",
            hint="remove it with: hf cache delete",
        )


def remove_snapshot(path: Path, ask_used: AskUsed, report: Report, *, lock_timeout_s: float = 0.0) -> None:
    """Remove a snapshot that no instance uses; it disappears under its name in one step, then its files go.

    Args:
        path: the snapshot's directory.
        ask_used: asked right before, so that an instance that was started meanwhile counts.
        report: warned when the lock has to be waited for.
        lock_timeout_s: how long another zops that works on the snapshot is waited for.

    Raises:
        ZopsError: when an instance uses it (snapshot-in-use).
        UsageError: when it is not a snapshot's own directory.
        LockHeld: when another zops works on it.
        HostShort: when it may not be removed.
    """
    require_removable(path)
    hidden = path.with_name(f"{PREFIX}{path.name}{SUFFIX}")
    with shortage_told():
        if hidden.exists():
            shutil.rmtree(hidden)
        with hold(sidecar(path) / "lock", report, timeout_s=lock_timeout_s):
            require_unused(path, ask_used())
            path.rename(hidden)
            sync_directory(path.parent)
        shutil.rmtree(hidden)
    with suppress(OSError):
        path.parent.rmdir()

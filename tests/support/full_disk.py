"""A small disk that fills up at any moment, with a count of what became of it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.archives import MODEL, REVISION, make_snapshot, tree
from zops.archive.backup import backup
from zops.archive.format import Compression
from zops.archive.restore import restore, verify_archive
from zops.archive.store import DirectoryStore
from zops.cache.layout import place
from zops.errors import HostShort
from zops.events import Event, Report, Started

OLD = {"model_index.json": b"[1]"}


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Give a file system of 16 MB with few inodes; needs root."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=60", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@dataclass
class Filled:
    """How often it was tried, how often the disk was too full, and what was not as promised, in words."""

    tried: int = 0
    full: int = 0
    wrong: list[str] = field(default_factory=list)


def _filling(disk: Path, task: str, left: int) -> Report:
    """Return what leaves so many bytes free once a task began: behind its back, when room was checked."""
    stat = os.statvfs(disk)

    def fill(event: Event) -> None:
        if isinstance(event, Started) and event.task == task and not (disk / "ballast").exists():
            (disk / "ballast").write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - left)))

    return fill


def _attempt(filled: Filled, what: str, work: Callable[[], object]) -> bool:
    """Count an attempt; tell whether it succeeded."""
    filled.tried += 1
    try:
        work()
    except HostShort as error:
        filled.full += 1
        if error.code != "disk-full":
            filled.wrong.append(f"{what}: {error.code} instead of disk-full")
        return False
    return True


def fill_restores(archive: Path, disk: Path, snapshot: Path, sizes: list[int]) -> Filled:
    """Restore over another snapshot while so many bytes are left: all is restored, or all stays as it was.

    Args:
        archive: what is restored, on another disk.
        disk: of `small_disk`.
        snapshot: what the archive was made of.
        sizes: what is left, for one attempt each.
    """
    filled = Filled()
    cache = disk / "back"
    for left in sizes:
        what = f"restore with {left} bytes left"
        make_snapshot(cache, OLD)
        before = tree(cache)
        report = _filling(disk, "restore", left)
        if _attempt(filled, what, lambda report=report: restore(archive, cache, report=report)):  # type: ignore[misc]
            if tree(place(cache, MODEL, REVISION)) != tree(snapshot):
                filled.wrong.append(f"{what}: other files than were backed up")
        elif tree(cache) != before:
            filled.wrong.append(f"{what}: refused, but something changed")
        (disk / "ballast").unlink(missing_ok=True)
        shutil.rmtree(cache)
    return filled


def fill_backups(snapshot: Path, disk: Path, compression: Compression, sizes: list[int]) -> Filled:
    """Back up while so many bytes are left: there is a whole archive, or nothing.

    Args:
        snapshot: on another disk.
        disk: of `small_disk`.
        compression: of the archive.
        sizes: what is left, for one attempt each.
    """
    filled = Filled()
    store = DirectoryStore(disk / "store")
    for left in sizes:
        what = f"backup ({compression}) with {left} bytes left"
        report = _filling(disk, "backup", left)
        if _attempt(
            filled, what, lambda report=report: backup([snapshot], store, compression=compression, report=report)
        ):  # type: ignore[misc]
            verify_archive(store.list()[0].location)
        elif list(store.directory.glob("*")) + list(store.directory.glob(".*")):
            filled.wrong.append(f"{what}: refused, but something was left")
        (disk / "ballast").unlink(missing_ok=True)
        shutil.rmtree(store.directory, ignore_errors=True)
    return filled

"""A directory beside the one that it will become: filled out of sight, then put in place by a rename, or removed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zops.archive.journal import forget, has_progress
from zops.cache.manifest import sync_directory
from zops.errors import HostShort, SourceFailed


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.restoring")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Make the directory beside `target` that shall become it, or take up the one that a killed run left.

    Whoever calls holds the target's lock and has called `recover`. The directory stays for the next run when this one
    was interrupted, or its source broke off, and something in it is complete. When anything else is wrong it goes,
    and so do directories that had to be made above it.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    directory = _staged(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not directory.is_dir() or directory.is_symlink():
            remove(directory)
            directory.mkdir()
        yield directory
    except BaseException as error:
        resumable = isinstance(error, SourceFailed) or not isinstance(error, Exception)
        if not (resumable and has_progress(directory)):
            remove(directory)
        raise
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def recover(target: Path) -> None:
    """Undo what a killed run left half-done: put back what it had moved aside, or remove that when it was replaced."""
    aside = _aside(target)
    if os.path.lexists(aside) and not os.path.lexists(target):
        aside.rename(target)
        sync_directory(target.parent)
    remove(aside)


def discard(target: Path) -> None:
    """Remove what a killed run had staged for a target that needs nothing any more."""
    remove(_staged(target))


def put_in_place(target: Path) -> None:
    """Let the staged directory take the target's name, durably; what was there goes aside first and is removed last."""
    aside = _aside(target)
    forget(_staged(target))
    if os.path.lexists(target):
        target.rename(aside)
    _staged(target).rename(target)
    sync_directory(target.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, or a link or file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_room(directory: Path, size: int, files: int) -> None:
    """Check that a file system has room.

    Args:
        directory: where it will be needed; it need not exist yet.
        size: bytes.
        files: files and directories, each of which takes an inode.

    Raises:
        HostShort: naming what is short and how much.
    """
    free = room(directory)
    if size > free:
        raise HostShort(
            f"{size} bytes do not fit into {directory}, where {free} are free",
            code="disk-full",
            hint="free space, or use another cache.dir",
            needed=size,
            free=free,
        )
    stat = os.statvfs(_existing(directory))
    # File systems that make inodes as they need them report none at all.
    if stat.f_files and files > stat.f_favail:
        raise HostShort(
            f"{files} files do not fit into {directory}, where {stat.f_favail} inodes are free",
            code="disk-full",
            hint="remove files, or use another cache.dir",
        )


def room(directory: Path) -> int:
    """Return the bytes that are free for this user on the file system of a directory that need not exist yet."""
    stat = os.statvfs(_existing(directory))
    return stat.f_bavail * stat.f_frsize


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if path.exists())


@contextmanager
def shortage(directory: Path) -> Iterator[None]:
    """Say it in our words when the file system under `directory` is full, read-only, or closed to this user.

    Raises:
        HostShort: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise HostShort(f"the disk is full at {directory}", code="disk-full", hint="free space there") from None
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise HostShort(
                f"cannot write in {directory}: {error.strerror}",
                code="directory-not-writable",
                hint="give this user write access, or use another directory",
            ) from None
        raise

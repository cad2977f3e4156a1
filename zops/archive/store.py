"""Where archives live: a directory, or a bucket that speaks S3 (bucket.py, the only place that knows obstore)."""

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from zops.archive.encryption import NO_KEYS, Keys
from zops.archive.names import ENCRYPTED, ArchiveInfo, archive_name, listed, located, names_revision
from zops.archive.resume import Leftover as Resumable
from zops.archive.resume import leftovers
from zops.archive.staging import shortage
from zops.cache.lock import hold
from zops.cache.manifest import sync_directory, write_text
from zops.errors import SourceFailed, UsageError
from zops.events import silent

NOTE = ".note.json"
"""What is behind an archive's name in that of the note on it: how it was made, and how it was proven."""
NOTE_LIMIT = 64 << 10


class Writer(Protocol):
    """Takes the bytes of an archive in order."""

    def write(self, data: bytes) -> object:
        """Take more bytes."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a killed backup left: the archive it was to become, and its bytes, 0 where the store does not tell."""

    name: str
    size: int
    began: datetime


class Store(Protocol):
    """A place for archives; each is there whole or not at all.

    Whatever fails in a store is a `SourceFailed` or `HostShort` of one line.
    """

    location: str

    def list(self) -> "list[ArchiveInfo]":
        """Return the archives that zops named, oldest first, without reading any."""

    def open_writer(
        self, name: str, *, size: int = 0, plan: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Writer]:
        """Return a context in which an archive is written: it appears at the end, or never when an error leaves it.

        Args:
            name: of the archive; one of that name is never replaced.
            size: bytes that it will have at most, as far as that is known.
            plan: what two runs must have in common to write the same bytes; a store may keep it beside what it has
                got, for `resumable`.
        """

    def resumable(self) -> "Iterator[Resumable]":
        """Yield what killed backups of this host left here and can be gone on with; nobody works on it now."""

    def open_reader(self, name: str) -> BinaryIO:
        """Open an archive for reading at any place.

        Raises:
            SourceFailed: when it is not there or cannot be had.
        """

    def size(self, name: str) -> int:
        """Return an archive's size in bytes; raises as `open_reader` does."""

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of an archive from `start` to `end`, all of them; may be called from several threads.

        Raises:
            SourceFailed: when they cannot be had, or the archive ends before.
        """

    def delete(self, name: str) -> None:
        """Remove an archive and the note on it; one that is not there is fine."""

    def exists(self, name: str) -> bool:
        """Tell whether an archive is there."""

    def read_note(self, name: str) -> bytes | None:
        """Return the note on an archive, None when there is none of a sensible size."""

    def write_note(self, name: str, text: bytes) -> None:
        """Replace the note on an archive."""

    def clean(self, *, dry_run: bool = False) -> tuple[Leftover, ...]:
        """Remove what killed backups left, and return it; never what a running one is at work on."""


@dataclass(frozen=True, slots=True)
class StoredArchive:
    """An archive by its store and name, and what opens it where it is encrypted; nothing is opened yet."""

    store: Store
    name: str
    keys: Keys = field(default=NO_KEYS, repr=False)

    @property
    def location(self) -> str:
        """Where it is, as a path or URL."""
        return join(self.store, self.name)

    @property
    def encrypted(self) -> bool:
        """Whether its name says that it is encrypted."""
        return self.name.endswith(ENCRYPTED)

    def open(self) -> BinaryIO:
        """Open what is in it for reading at any place, decrypted where need be; see `Store.open_reader`.

        Raises:
            SourceFailed: when it is not there or cannot be had.
            UsageError: when it is encrypted and the keys do not fit.
            ArchiveDamaged: when it is encrypted, and cut or changed.
        """
        stream = self.store.open_reader(self.name)
        return self.keys.open(stream, self.location) if self.encrypted else stream


def open_store(location: str | Path) -> Store:
    """Return the store in a directory (made when the first archive is written) or at `s3://bucket/prefix`.

    Raises:
        UsageError: when the location is neither.
    """
    text = str(location)
    if text.startswith("s3://"):
        from zops.archive.bucket import S3Store  # noqa: PLC0415 - only those who have a bucket pay for its client

        return S3Store(text)
    if "://" in text:
        raise UsageError(
            f"{text} is no store: it must be a directory or s3://bucket/prefix", hint="set backup.to or give --to"
        )
    return DirectoryStore(Path(text).expanduser())


def open_archive(location: str | Path, keys: Keys = NO_KEYS) -> StoredArchive:
    """Return the archive at a path or at `s3://bucket/prefix/name`; whether it is there shows when it is opened."""
    if str(location).startswith("s3://"):
        address, mark, options = str(location).partition("?")
        parent, _, name = address.rpartition("/")
        return StoredArchive(open_store(f"{parent}{mark}{options}"), name, keys)
    path = Path(location).expanduser()
    return StoredArchive(DirectoryStore(path.parent), path.name, keys)


def newest(store: Store, model: str) -> ArchiveInfo | None:
    """Return the youngest archive with a snapshot of a model, None when the store has none."""
    return next((i for i in reversed(store.list()) if model in {m for m, _ in i.snapshots}), None)


def join(store: Store, name: str) -> str:
    """Return the location of an archive in a store."""
    return located(store.location, name)


def not_found(location: str) -> SourceFailed:
    """Build the error for an archive that is not there."""
    return SourceFailed(
        f"there is no archive {location}", code="archive-not-found", hint="look at what the store holds, or at its name"
    )


class DirectoryStore:
    """Archives in a directory, local or mounted."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow the operator's links
        self.location = str(self.directory)

    def list(self) -> "list[ArchiveInfo]":
        """See `Store`."""
        found = []
        with self._reading(self.directory), suppress(FileNotFoundError, NotADirectoryError):
            for path in self.directory.iterdir():
                # Another zops may remove one while we look.
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found += [(path.name, status.st_size)] if stat.S_ISREG(status.st_mode) else []
        return listed(self.location, found)

    @contextmanager
    def open_writer(
        self,
        name: str,
        *,
        size: int = 0,  # noqa: ARG002 - a disk asks for no sizes
        plan: Mapping[str, str] | None = None,  # noqa: ARG002 - the journal beside the archive has it
        resume: bool = False,
    ) -> Iterator[Writer]:
        """See `Store`: written beside its name, made durable, and renamed.

        Args:
            name: see `Store`.
            size: see `Store`.
            plan: see `Store`.
            resume: go on with what a killed run left of it, every byte of which stays; the file begins at its start.
        """
        part = self.directory / f".{name}.part"
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"{self.directory} is no directory, so no archive can be put there", hint="choose another")
        with shortage(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            # The lock on the file tells others that somebody is at work on it; the kernel drops it with the process.
            with self._locked():
                self._clean(dry_run=False, spared=part if resume else None)
                self._refuse_to_replace(name)
                try:
                    stream = part.open("r+b" if resume else "x+b")
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (FileExistsError, BlockingIOError):
                    raise _taken(join(self, name)) from None
            try:
                with stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                    with self._locked():
                        self._refuse_to_replace(name)
                        part.rename(self.directory / name)
                sync_directory(self.directory)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def resumable(self) -> "Iterator[Resumable]":
        """See `Store`."""
        return leftovers(self.directory)

    def open_reader(self, name: str) -> BinaryIO:
        """See `Store`."""
        path = self.directory / name
        with self._reading(path):
            return path.open("rb")

    def size(self, name: str) -> int:
        """See `Store`."""
        path = self.directory / name
        with self._reading(path):
            return path.stat().st_size

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """See `Store`."""
        path = self.directory / name
        with self._reading(path), path.open("rb", buffering=0) as stream:
            data = bytearray()
            while len(data) < end - start and (
                more := os.pread(stream.fileno(), end - start - len(data), start + len(data))
            ):
                data += more
        if len(data) < end - start:
            raise cut_off(str(path), start + len(data))
        return bytes(data)

    def delete(self, name: str) -> None:
        """See `Store`."""
        with shortage(self.directory):
            (self.directory / name).unlink(missing_ok=True)
            (self.directory / f"{name}{NOTE}").unlink(missing_ok=True)
            if self.directory.is_dir():
                sync_directory(self.directory)

    def exists(self, name: str) -> bool:
        """See `Store`."""
        with self._reading(self.directory):
            return (self.directory / name).is_file()

    def read_note(self, name: str) -> bytes | None:
        """See `Store`."""
        path = self.directory / f"{name}{NOTE}"
        try:
            return path.read_bytes() if path.stat().st_size <= NOTE_LIMIT else None
        except OSError:
            return None

    def write_note(self, name: str, text: bytes) -> None:
        """See `Store`."""
        with shortage(self.directory):
            write_text(self.directory / f"{name}{NOTE}", text.decode())

    def clean(self, *, dry_run: bool = False) -> tuple[Leftover, ...]:
        """See `Store`: parts that nobody has locked."""
        if not self.directory.is_dir():
            return ()
        with shortage(self.directory), nullcontext() if dry_run else self._locked():
            return self._clean(dry_run=dry_run)

    def _locked(self) -> AbstractContextManager[None]:
        return hold(self.directory / ".zops.lock", silent)

    def _clean(self, *, dry_run: bool, spared: Path | None = None) -> tuple[Leftover, ...]:
        found = []
        for part in sorted(self.directory.glob(".*.tar*.part")):
            if part == spared:
                continue
            with suppress(FileNotFoundError, BlockingIOError), part.open("rb") as stream:
                fcntl.flock(stream, (fcntl.LOCK_SH if dry_run else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                status = os.fstat(stream.fileno())
                began = datetime.fromtimestamp(status.st_mtime, UTC)
                found.append(Leftover(part.name[1 : -len(".part")], status.st_size, began))
                if not dry_run:
                    part.with_name(f"{part.name}.plan").unlink(missing_ok=True)
                    part.unlink()
        return tuple(found)

    def _refuse_to_replace(self, name: str) -> None:
        if os.path.lexists(self.directory / name):
            raise _taken(join(self, name))

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise not_found(str(path)) from None
        except PermissionError:
            raise SourceFailed(
                f"{path} cannot be read: permission denied",
                code="archive-not-readable",
                hint="run zops as the user who owns the store",
            ) from None
        except OSError as error:
            raise SourceFailed(
                f"{path} cannot be read: {error.strerror}", code="store-failed", hint="look at the disk or the mount"
            ) from None


def cut_off(location: str, size: int) -> SourceFailed:
    """Build the error for an archive that ends where more of it was asked for."""
    return SourceFailed(
        f"{location} ends at {size} bytes, before what was asked for", code="store-failed", hint="has it been replaced?"
    )


def _taken(location: str) -> SourceFailed:
    return SourceFailed(
        f"{location} exists already and is not replaced", code="archive-exists", hint="run the backup again"
    )


__all__ = [
    "ArchiveInfo",
    "DirectoryStore",
    "Leftover",
    "Store",
    "StoredArchive",
    "Writer",
    "archive_name",
    "names_revision",
    "newest",
    "open_archive",
    "open_store",
]

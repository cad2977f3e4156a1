"""Where archives live: a directory, or a bucket that speaks S3 (bucket.py, the only place that knows obstore).

An archive's name tells model, revision and date, so that listing reads no archive:
`{owner}--{name}-{revision, 12 characters}-{UTC time}.tar.zst`; several snapshots in one are joined by `+`.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from zops.archive.staging import shortage
from zops.cache.lock import hold
from zops.cache.manifest import Manifest, sync_directory
from zops.errors import SourceFailed, UsageError
from zops.events import silent

_TIME = "%Y%m%dT%H%M%SZ"
_NAME = re.compile(r"(?P<snapshots>.+)-(?P<created>\d{8}T\d{6}Z)\.tar(\.zst)?")
_SNAPSHOT = re.compile(r"(?P<owner>.+?)--(?P<name>.+)-(?P<revision>[^-]+)")
# Longest name that common file systems take is 255 bytes; ours gets a dot in front and .part behind while written.
_NAME_LIMIT = 240


@dataclass(frozen=True, slots=True)
class ArchiveInfo:
    """An archive as a store lists it: what its name tells, its size in bytes, and where `open_archive` finds it."""

    name: str
    snapshots: tuple[tuple[str, str], ...]
    """Model, and the first characters of the revision."""
    created: datetime
    size: int
    location: str

    @property
    def model(self) -> str:
        """The (first) model in it."""
        return self.snapshots[0][0]


class Writer(Protocol):
    """Takes the bytes of an archive in order."""

    def write(self, data: bytes) -> object:
        """Take more bytes."""


class Store(Protocol):
    """A place for archives; each is there whole or not at all."""

    location: str

    def list(self) -> "list[ArchiveInfo]":
        """Return the archives that zops named, oldest first, without reading any."""

    def open_writer(self, name: str) -> AbstractContextManager[Writer]:
        """Return a context in which an archive is written: it appears at the end, or never when an error leaves it."""

    def open_reader(self, name: str) -> BinaryIO:
        """Open an archive for reading at any place.

        Raises:
            SourceFailed: when it is not there or cannot be had.
        """

    def delete(self, name: str) -> None:
        """Remove an archive; one that is not there is fine."""

    def exists(self, name: str) -> bool:
        """Tell whether an archive is there."""


@dataclass(frozen=True, slots=True)
class StoredArchive:
    """An archive by its store and name; nothing is opened yet."""

    store: Store
    name: str

    @property
    def location(self) -> str:
        """Where it is, as a path or URL."""
        return join(self.store, self.name)

    def open(self) -> BinaryIO:
        """Open it for reading; see `Store.open_reader`."""
        return self.store.open_reader(self.name)


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


def open_archive(location: str | Path) -> StoredArchive:
    """Return the archive at a path or at `s3://bucket/prefix/name`; whether it is there shows when it is opened."""
    parent, _, name = str(location).rpartition("/")
    if str(location).startswith("s3://"):
        return StoredArchive(open_store(parent), name)
    path = Path(location).expanduser()
    return StoredArchive(DirectoryStore(path.parent), path.name)


def newest(store: Store, model: str) -> ArchiveInfo | None:
    """Return the youngest archive with a snapshot of a model, None when the store has none."""
    return next((i for i in reversed(store.list()) if model in {m for m, _ in i.snapshots}), None)


def join(store: Store, name: str) -> str:
    """Return the location of an archive in a store."""
    return f"{store.location.rstrip('/')}/{name}"


def archive_name(manifests: Sequence[Manifest], created: datetime, *, compressed: bool) -> str:
    """Return the name under which an archive of these snapshots is stored.

    Raises:
        UsageError: when they are too many for one name.
    """
    parts = [f"{_plain(m.model.replace('/', '--', 1))}-{_name_revision(m)}" for m in manifests]
    name = f"{'+'.join(parts)}-{created.astimezone(UTC).strftime(_TIME)}.tar{'.zst' if compressed else ''}"
    if len(name.encode()) > _NAME_LIMIT:
        raise UsageError(
            f"{len(manifests)} snapshots are too many for the name of one archive", hint="back them up apart"
        )
    return name


def _name_revision(manifest: Manifest) -> str:
    """Return a revision as it stands in a name: twelve characters, and how it was derived where it was."""
    derived = f"_{manifest.derived}" if manifest.derived else ""
    return _shortened(manifest.base_revision) + _plain(derived)


def _shortened(revision: str) -> str:
    return _plain(revision[:12]).replace("-", "_")


def names_revision(named: str, revision: str, *, full: bool = False) -> bool:
    """Tell whether what stands in an archive's name is a revision or, unless `full`, what was derived from it."""
    return (named if full else named.removesuffix("_bf16")) == _shortened(revision)


def read_name(name: str, size: int, store: Store) -> ArchiveInfo | None:
    """Return what an archive's name tells, None for a name that zops did not give."""
    match = _NAME.fullmatch(name)
    parts = [_SNAPSHOT.fullmatch(part) for part in match["snapshots"].split("+")] if match else []
    if match is None or None in parts:
        return None
    with suppress(ValueError):
        created = datetime.strptime(match["created"], _TIME).replace(tzinfo=UTC)
        snapshots = tuple((f"{part['owner']}/{part['name']}", part["revision"]) for part in parts if part)
        return ArchiveInfo(name, snapshots, created, size, join(store, name))
    return None


def listed(store: Store, sizes: Iterable[tuple[str, int]]) -> "list[ArchiveInfo]":
    """Return what the names in a store tell, oldest first."""
    infos = (read_name(name, size, store) for name, size in sizes)
    return sorted((info for info in infos if info), key=lambda info: (info.created, info.name))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


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
        try:
            files = [path for path in self.directory.iterdir() if path.is_file()]
        except FileNotFoundError:
            return []
        return listed(self, ((path.name, path.stat().st_size) for path in files))

    @contextmanager
    def open_writer(self, name: str) -> Iterator[Writer]:
        """See `Store`: written beside its name, made durable, and renamed."""
        part = self.directory / f".{name}.part"
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"{self.directory} is no directory, so no archive can be put there", hint="choose another")
        with shortage(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            # The lock on the file tells others that somebody is at work on it; the kernel drops it with the process.
            with hold(self.directory / ".zops.lock", silent):
                self._remove_leftovers()
                stream = part.open("xb")
                fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                with stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                    part.rename(self.directory / name)
                sync_directory(self.directory)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def open_reader(self, name: str) -> BinaryIO:
        """See `Store`."""
        path = self.directory / name
        try:
            return path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise not_found(str(path)) from None
        except PermissionError:
            raise SourceFailed(f"{path} cannot be read: permission denied", code="archive-not-readable") from None

    def delete(self, name: str) -> None:
        """See `Store`."""
        (self.directory / name).unlink(missing_ok=True)
        sync_directory(self.directory)

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return (self.directory / name).is_file()

    def _remove_leftovers(self) -> None:
        """Remove what killed backups left: parts that nobody has locked."""
        for part in self.directory.glob(".*.tar*.part"):
            with suppress(FileNotFoundError, BlockingIOError), part.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


__all__ = [
    "ArchiveInfo",
    "DirectoryStore",
    "Store",
    "StoredArchive",
    "Writer",
    "archive_name",
    "names_revision",
    "newest",
    "open_archive",
    "open_store",
]

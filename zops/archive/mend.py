"""Single files out of an archive, to mend a snapshot with."""

import posixpath
from pathlib import Path

from zops.archive.contents import Contained
from zops.archive.encryption import NO_KEYS, Keys
from zops.archive.reader import open_stream
from zops.archive.store import StoredArchive, newest, open_archive, open_store
from zops.cache.fetch import Delivery
from zops.cache.hubs import Advance, HubFailure, Listed
from zops.cache.manifest import Manifest
from zops.cache.repair import Spring
from zops.cache.room import shortage
from zops.errors import ArchiveDamaged, SourceFailed
from zops.events import Report


def spring_of_archive(location: str, keys: Keys = NO_KEYS) -> Spring:
    """Return what opens the archive at a path or at `s3://bucket/prefix/name`."""
    return Spring(f"archive {location}", lambda manifest, _: delivery_from(open_archive(location, keys), manifest))


def spring_of_store(location: str, model: str, keys: Keys = NO_KEYS) -> Spring:
    """Return what opens the newest archive of a model in a store."""

    def open_newest(manifest: Manifest, _report: Report) -> Delivery:
        found = newest(open_store(location), model)
        if found is None:
            raise SourceFailed(f"there is no archive of {model} in {location}", code="archive-not-found")
        return delivery_from(open_archive(found.location, keys), manifest)

    return Spring(f"archives in {location}", open_newest)


def delivery_from(archive: StoredArchive, manifest: Manifest) -> Delivery:
    """Return what brings single files of a manifest out of an archive.

    Of an archive that zops made, only what holds the file is read. The archive may hold another revision of the model:
    files that did not change since can be had from it all the same.

    Raises:
        SourceFailed: when the archive is not there or cannot be read.
        ArchiveDamaged: when it is cut, damaged or hostile.
        SnapshotMissing: when it holds no snapshot of the model.
    """
    with archive.open() as stream:
        opened = open_stream(stream)
        held = _closest(opened.snapshots(manifest.model), manifest)

    def deliver(file: Listed, target: Path, advance: Advance) -> None:
        member = _member(held, file)
        try:
            with archive.open() as again, target.open("wb") as writer:
                for block in opened.read_file(again, member):
                    writer.write(block)
                    advance(len(block))
        except (ArchiveDamaged, SourceFailed) as error:
            raise HubFailure(error.message, final=isinstance(error, ArchiveDamaged)) from error
        except OSError as error:
            raise shortage(error) or HubFailure(f"cannot be read from {archive.location}: {error}") from error

    return Delivery(deliver, fickle=False)


def _closest(held: tuple[Contained, ...], manifest: Manifest) -> Contained:
    """Return the snapshot that shares the most files with a manifest."""
    wanted = set(manifest.files)
    return max(held, key=lambda contained: len(wanted & set(contained.manifest.files)) if contained.manifest else 0)


def _member(held: Contained, file: Listed) -> str:
    """Return the member with a file's content.

    Raises:
        HubFailure: when there is none, as far as the archive tells.
    """
    known = {entry.path: entry.sha256 for entry in held.manifest.files} if held.manifest else {}
    path = file.path
    if path in held.links:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), held.links[path]))
    if path not in held.files:
        raise HubFailure("is not in the archive", final=True)
    if known.get(file.path, file.sha256) != file.sha256:
        raise HubFailure("the archive holds another file of that name", final=True)
    return held.files[path]

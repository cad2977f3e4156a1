"""Incremental archives: which archive builds on which, as their names tell, and what a new one may leave out."""

from collections.abc import Collection, Iterable, Sequence

from zops.archive.encryption import NO_KEYS, Keys
from zops.archive.format import Base
from zops.archive.names import ArchiveInfo
from zops.archive.plan import Earlier
from zops.archive.reader import open_stream
from zops.archive.store import Store, StoredArchive, join
from zops.errors import SourceFailed, UsageError

AUTO = "auto"
CHAIN_LIMIT = 30
"""An archive that stands alone is made after so many: a restore reads every archive of a chain, and needs every one."""


def bases(info: ArchiveInfo, listed: Iterable[ArchiveInfo]) -> tuple[ArchiveInfo, ...]:
    """Return the archives that may be the one on which an archive builds; none for one that stands alone.

    There is more than one only where several were made of a model in the same second; then none of them is dispensable.
    """
    models = {model for model, _ in info.snapshots}
    return tuple(
        other for other in listed
        if other.created == info.base and other.name != info.name and models & {model for model, _ in other.snapshots}
    )  # fmt: skip


def chain(listed: Collection[ArchiveInfo], name: str) -> tuple[ArchiveInfo, ...]:
    """Return an archive and all that it builds on, the youngest first.

    Raises:
        SourceFailed: when the archive, or one that it builds on, is not there.
    """
    found = [info for info in listed if info.name == name]
    if not found:
        raise SourceFailed(f"there is no archive {name}", code="archive-not-found")
    for info in found:
        below = [base for base in bases(info, listed) if base not in found]
        if info.base and not bases(info, listed):
            raise SourceFailed(
                f"{info.name} builds on an archive of {info.base:%Y-%m-%d %H:%M:%S} UTC, which is not there",
                code="archive-base-missing",
                hint="bring it back into the store, or restore an archive that stands alone",
            )
        found += below
    return tuple(found)


def is_complete(info: ArchiveInfo, listed: Collection[ArchiveInfo]) -> bool:
    """Tell whether all that an archive builds on is there."""
    try:
        return bool(chain(listed, info.name))
    except SourceFailed:
        return False


def choose_base(store: Store, models: Sequence[str], asked: str, *, bad: Collection[str] = ()) -> ArchiveInfo | None:
    """Return the archive on which a new one of these models shall build, None when it should stand alone.

    Args:
        store: where both are.
        models: what the new one will hold.
        asked: the name of the base, or `auto`: the newest complete one of the first model.
        bad: names of archives that are known to be damaged.

    Raises:
        SourceFailed: when the one that was named, or one below it, is not there.
        UsageError: when the one that was named is not of these models.
    """
    listed = store.list()
    if asked != AUTO:
        found = chain(listed, asked.rpartition("/")[2])[0]
        if not {model for model, _ in found.snapshots} & set(models):
            raise UsageError(
                f"{found.name} holds nothing of {', '.join(models)}", hint="name an archive of the same model"
            )
        return found
    for info in reversed(listed):
        wanted = models[0] in {model for model, _ in info.snapshots}
        if wanted and is_complete(info, listed):
            whole = chain(listed, info.name)
            if len(whole) < CHAIN_LIMIT and not {each.name for each in whole} & set(bad):
                return info
            return None
    return None


def read_earlier(store: Store, info: ArchiveInfo, keys: Keys = NO_KEYS) -> Earlier:
    """Return what a new archive may leave out because this one, or one below it, has it.

    Raises:
        SourceFailed, ArchiveDamaged: when it cannot be read.
        UsageError: when it is encrypted and the keys do not fit, or zops did not make it.
    """
    with StoredArchive(store, info.name, keys).open() as stream:
        archive = open_stream(stream)
        if archive.manifest is None:
            raise UsageError(f"{join(store, info.name)} tells nothing of its files, so nothing can build on it")
        # What does not match its manifest is there with other bytes, or not at all.
        files = {
            (entry.sha256, entry.size)
            for contained in archive.snapshots()
            for entry in (contained.manifest.files if contained.manifest else ())
            if entry.path not in contained.mismatched
        }
        return Earlier(Base(archive.manifest.id, info.name), files)


__all__ = ["AUTO", "CHAIN_LIMIT", "bases", "chain", "choose_base", "is_complete", "read_earlier"]

"""The names of archives: they tell model, revision and date, so that listing reads no archive.

`{owner}--{name}-{revision, 12 characters}-{UTC time}.tar.zst`; several snapshots in one are joined by `+`. An
incremental one names the time of its base, as in `-{UTC time}-from-{UTC time}.tar`, an encrypted one ends with `.age`.
A listing is foreign input: what is not such a name is passed over.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from zops.archive.format import SUFFIXES, Compression
from zops.cache.manifest import Manifest
from zops.errors import UsageError

_TIME = "%Y%m%dT%H%M%SZ"
_NAME = re.compile(
    r"(?P<snapshots>[\w.+-]+?)-(?P<created>[0-9]{8}T[0-9]{6}Z)(-from-(?P<base>[0-9]{8}T[0-9]{6}Z))?"
    r"\.tar(\.zst|\.gz)?(?P<encrypted>\.age)?"
)
_SNAPSHOT = re.compile(r"(?P<owner>[^.].*?)--(?P<name>[^.].*)-(?P<revision>[^-]+)")
ENCRYPTED = ".age"
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
    base: datetime | None = None
    """When the archive was made that this one builds on; None for one that stands alone."""
    encrypted: bool = False

    @property
    def model(self) -> str:
        """The (first) model in it."""
        return self.snapshots[0][0]


def archive_name(
    manifests: Sequence[Manifest],
    created: datetime,
    *,
    compression: Compression = "zstd",
    base: datetime | None = None,
) -> str:
    """Return the name under which an archive of these snapshots is stored.

    Args:
        manifests: of the snapshots.
        created: when it was made; names tell seconds.
        compression: of the archive.
        base: when the archive was made that this one builds on.

    Raises:
        UsageError: when they are too many for one name.
    """
    parts = [f"{_plain(m.model.replace('/', '--', 1))}-{_name_revision(m)}" for m in manifests]
    origin = f"-from-{base.astimezone(UTC).strftime(_TIME)}" if base else ""
    name = f"{'+'.join(parts)}-{created.astimezone(UTC).strftime(_TIME)}{origin}{SUFFIXES[compression]}"
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


def read_name(name: str, size: int, location: str) -> ArchiveInfo | None:
    """Return what an archive's name tells, None for a name that zops did not give."""
    match = _NAME.fullmatch(name)
    parts = [_SNAPSHOT.fullmatch(part) for part in match["snapshots"].split("+")] if match else []
    if match is None or None in parts:
        return None
    with suppress(ValueError):
        created = datetime.strptime(match["created"], _TIME).replace(tzinfo=UTC)
        base = datetime.strptime(match["base"], _TIME).replace(tzinfo=UTC) if match["base"] else None
        snapshots = tuple((f"{part['owner']}/{part['name']}", part["revision"]) for part in parts if part)
        if base is None or base < created:
            return ArchiveInfo(name, snapshots, created, size, located(location, name), base, bool(match["encrypted"]))
    return None


def listed(location: str, sizes: Iterable[tuple[str, int]]) -> list[ArchiveInfo]:
    """Return what the names in a store tell, oldest first."""
    infos = (read_name(name, size, location) for name, size in sizes)
    return sorted((info for info in infos if info), key=lambda info: (info.created, info.name))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def located(location: str, name: str) -> str:
    """Return where an archive of a store is, a bucket's options kept behind its name."""
    address, mark, options = location.partition("?") if location.startswith("s3://") else (location, "", "")
    return f"{address.rstrip('/')}/{name}{mark}{options}"


__all__ = ["ENCRYPTED", "ArchiveInfo", "archive_name", "listed", "located", "names_revision", "read_name"]

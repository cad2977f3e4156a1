"""Archives of other programs, such as `tar -czf x.tar.gz -C /root/workspace model_cache`: what can be known of them.

They say neither what they should hold nor that they are whole, so each is read once to learn its members, and its
snapshots are recognised by their model_index.json and by the caches' layouts.
"""

import fnmatch
import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from zops.archive.contents import MEMBER_LIMIT, Contained
from zops.archive.format import SIDECAR_MANIFEST, check_identity, check_names
from zops.archive.stream import TarStream
from zops.archive.tar import Member
from zops.cache.layout import INDEX
from zops.cache.manifest import SIDECAR, Manifest
from zops.catalog import MODELS, lookup
from zops.errors import ArchiveDamaged, HostShort, SnapshotDamaged, SnapshotMissing

_SIDECAR_LIMIT = 16 << 20
_LINK_HOPS = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")
# ModelScope's SDKs before 1.38 kept half-finished downloads there.
_TEMPORARY = "._____temp"


@dataclass(frozen=True)
class Scanned:
    """What reading a foreign archive once told: its members, and the sidecar manifests by the snapshot's directory."""

    members: tuple[Member, ...]
    sidecars: Mapping[str, Manifest]


@dataclass(frozen=True)
class _Identity:
    model: str
    revision: str
    sure: bool


def cleaned(member: Member) -> Member:
    """Return the member with `./` and doubled slashes taken out of its name, as tar programs understand it."""
    return replace(member, name=str(PurePosixPath(member.name)))


def scan(stream: TarStream, room: int) -> Scanned:
    """Read an archive to its end without keeping its data.

    Raises:
        ArchiveDamaged: when it is cut, damaged or hostile.
        HostShort: as soon as its members claim more than `room` bytes, before they are read.
    """
    members: list[Member] = []
    sidecars: dict[str, Manifest] = {}
    total = 0
    while raw := stream.member():
        member = cleaned(raw)
        members.append(member)
        total += member.size
        if total > room:
            raise HostShort(
                f"the archive holds more than the {room} bytes for which there is room",
                code="disk-full",
                hint="free space, or restore into another cache.dir",
            )
        if len(members) > MEMBER_LIMIT:
            raise ArchiveDamaged(f"the archive has more than {MEMBER_LIMIT} members", code="archive-hostile")
        blocks = stream.data(raw)
        root, found, _ = f"/{member.name}".rpartition(f"/{SIDECAR_MANIFEST}")
        if found and member.name.endswith(SIDECAR_MANIFEST) and member.size <= _SIDECAR_LIMIT:
            sidecars |= _sidecar(root.removeprefix("/"), b"".join(blocks))
        else:
            for _ in blocks:
                pass
    stream.finish()
    check_names(member for member in members if member.name != ".")
    return Scanned(tuple(members), sidecars)


def _sidecar(root: str, data: bytes) -> dict[str, Manifest]:
    try:
        manifest = Manifest.from_json(json.loads(data))
    except (ValueError, RecursionError, AttributeError, TypeError, SnapshotDamaged) as error:
        raise ArchiveDamaged(f"{root}/{SIDECAR_MANIFEST} in the archive is no manifest: {error}") from None
    return {root: manifest}


def contained(scanned: Scanned, model: str | None, manifest: Manifest | None) -> tuple[Contained, ...]:
    """Return the snapshots of a foreign archive, or those of one model; see `Archive.snapshots` for what is raised."""
    members = {member.name: member for member in scanned.members}
    roots = _roots(members)
    found: dict[tuple[str, str], Contained] = {}
    others = []
    for root in roots:
        files = _files_below(root, members)
        identity = _identify(root, files, members, scanned.sidecars.get(root))
        if model and len(roots) == 1 and not (identity and identity.sure):
            identity = _Identity(model, identity.revision if identity else "", sure=True)
        if identity is None or (model and identity.model != model):
            others.append(identity.model if identity else root or ".")
            continue
        given = manifest if manifest and manifest.model == identity.model else None
        expected = given or _expected(identity, scanned.sidecars.get(root))
        snapshot = _contained(root, identity, expected, files, members)
        found.setdefault((snapshot.model, snapshot.revision), snapshot)
    if not found:
        raise no_snapshot(model, others)
    return tuple(found.values())


def no_snapshot(model: str | None, others: Iterable[str]) -> SnapshotMissing:
    """Build the error for an archive in which there is nothing to restore."""
    others = sorted(set(others))
    if not others:
        return SnapshotMissing(f"the archive holds no snapshot (no {INDEX})", code="archive-without-snapshot")
    what = f"no snapshot of {model}" if model else "a snapshot that does not tell its model"
    return SnapshotMissing(
        f"the archive holds {what}, but: {', '.join(others)}",
        code="archive-without-snapshot",
        hint="name the model with: --model OWNER/NAME",
    )


def _roots(members: Mapping[str, Member]) -> list[str]:
    """Return the directories that hold a model_index.json, outermost ones only; the archive's own top is ''."""
    candidates = {
        posixpath.dirname(name)
        for name, member in members.items()
        if posixpath.basename(name) == INDEX and member.kind != "directory"
    }
    return sorted(
        root
        for root in candidates
        if _TEMPORARY not in root.split("/")
        and not any(root != other and (not other or root.startswith(f"{other}/")) for other in candidates)
    )


def _files_below(root: str, members: Mapping[str, Member]) -> dict[str, str]:
    """Return path in the snapshot -> member with its content, links resolved; what zops keeps for itself left out."""
    prefix = f"{root}/" if root else ""
    files = {}
    for name, member in members.items():
        path = name.removeprefix(prefix)
        if not name.startswith(prefix) or member.kind == "directory" or path.split("/")[0] == SIDECAR:
            continue
        target = _resolve(member, members)
        if target:
            files[path] = target.name
    return files


def _resolve(member: Member, members: Mapping[str, Member]) -> Member | None:
    """Return the file to which a member leads, None for a link to a directory."""
    name = member.name
    for _ in range(_LINK_HOPS):
        if member.kind in {"file", "directory"}:
            return member if member.kind == "file" else None
        base = posixpath.dirname(member.name) if member.kind == "symlink" else ""
        target = posixpath.normpath(posixpath.join(base, member.link))
        if target.startswith(("/", "../")) or target == "..":
            raise ArchiveDamaged(
                f"the link {name!r} leads out of the archive, to {member.link!r}", code="archive-hostile", member=name
            )
        if target not in members:
            raise ArchiveDamaged(f"the link {name!r} leads to {target!r}, which is not in the archive", member=name)
        member = members[target]
    raise ArchiveDamaged(f"the link {name!r} leads from link to link", code="archive-hostile", member=name)


def _identify(
    root: str, files: Mapping[str, str], members: Mapping[str, Member], sidecar: Manifest | None
) -> _Identity | None:
    """Tell of which model a snapshot is: by its own manifest, the cache's layout, its sizes, or the names above it."""
    if sidecar:
        return _Identity(sidecar.model, sidecar.revision, sure=True)
    *_, above, repository, parent, name = ["", "", "", *root.split("/")]
    short = repository.removeprefix("models--")
    hub = short != repository or above == "models"
    if parent == "snapshots" and hub and "--" in short:
        return _Identity(short.replace("--", "/", 1), name, sure=True)
    for model in MODELS.values():
        pinned = model.pinned()
        if pinned and all(f["path"] in files and members[files[f["path"]]].size == f["size"] for f in pinned["files"]):
            return _Identity(model.id, "", sure=True)
    if parent:
        # SDKs before 1.38: owner/name, with a dot of the name written as three underscores.
        return _Identity(f"{parent}/{name.replace('___', '.')}", "", sure=False)
    return None


def _expected(identity: _Identity, sidecar: Manifest | None) -> Manifest | None:
    """Return the manifest that a snapshot must match: the catalog's where it knows this revision, else its own."""
    body = lookup(identity.model).pinned()
    pinned = Manifest.from_json(body) if body else None
    if sidecar and (pinned is None or sidecar.origin == "local" or sidecar.revision != pinned.revision):
        return sidecar
    if pinned and (identity.revision == pinned.revision or not _COMMIT.fullmatch(identity.revision)):
        return pinned
    return None


def _contained(
    root: str,
    identity: _Identity,
    manifest: Manifest | None,
    files: Mapping[str, str],
    members: Mapping[str, Member],
) -> Contained:
    if manifest:
        bad = [f.path for f in manifest.files if f.path not in files or members[files[f.path]].size != f.size]
        if bad:
            raise ArchiveDamaged(
                f"{len(bad)} file(s) of {manifest.model} are missing in the archive or have another size: "
                + ", ".join(repr(path) for path in bad[:3]),
                hint="the archive was made of an incomplete cache, or of another revision; fetch with: zops cache pull",
                files=bad,
            )
        wanted = {file.path: files[file.path] for file in manifest.files}
    else:
        wanted = {path: name for path, name in files.items() if _belongs(path, lookup(identity.model).patterns)}
    revision = manifest.revision if manifest else identity.revision or "local"
    check_identity(identity.model, revision)
    left_out = sorted(files.keys() - wanted.keys())
    return Contained(root, identity.model, revision, manifest, wanted, left_out=left_out)


def _belongs(path: str, patterns: Iterable[str]) -> bool:
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

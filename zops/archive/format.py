"""Version 1 of the archive format: its manifest and its index (docs/reference/archive-format.md)."""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from zops.archive.tar import BLOCK, Member
from zops.cache.manifest import SIDECAR, Manifest
from zops.errors import ArchiveDamaged, ZopsError

FORMAT = 1
Compression = Literal["zstd", "gzip", "none"]
SUFFIXES: Mapping[Compression, str] = {"zstd": ".tar.zst", "gzip": ".tar.gz", "none": ".tar"}
MANIFEST_NAME = ".zops-archive.json"
INDEX_NAME = ".zops-index"
SIDECAR_MANIFEST = f"{SIDECAR}/manifest.json"
CHUNK = 4 << 20
"""Largest piece of the tar that is compressed as one frame."""
ALIGNMENT = 4096
"""Member data of an uncompressed archive starts at a multiple of this: the page and block size of common file systems,
so that they can share blocks instead of copying them."""
INDEX_LIMIT = 64 << 20
"""Largest index or manifest that is read: about 400,000 files, where a snapshot has twenty."""

# zstd's own container for what decompressors skip (RFC 8878, 3.1.2), and its seekable format
# (facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md, 0.1.0).
INDEX_MAGIC = 0x184D2A5D
SEEK_TABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1
SKIPPABLE_HEADER = struct.Struct("<II")
SEEK_ENTRY = struct.Struct("<II")
SEEK_FOOTER = struct.Struct("<IBI")

# The last member (RFC 1952) of a .tar.gz is empty and has one extra field, "zo", that tells where the members with the
# index begin, and the CRC-32 of their compressed bytes. What surrounds these two never differs.
_LOCATOR = struct.Struct("<QI")
_LOCATOR_HEAD = bytes.fromhex("1f8b08040000000000ff") + struct.pack("<H2sH", 4 + _LOCATOR.size, b"zo", _LOCATOR.size)
_LOCATOR_END = bytes.fromhex("0300") + bytes(8)
LOCATOR_SIZE = len(_LOCATOR_HEAD) + _LOCATOR.size + len(_LOCATOR_END)

_TRAILER = "{sha256} {length:020d} zops-index-1\n"
TRAILER_SIZE = len(_TRAILER.format(sha256="0" * 64, length=0))


@dataclass(frozen=True, slots=True)
class Entry:
    """A member in the index: what its header says, where its data starts in the tar, the SHA-256 of its data in hex."""

    member: Member
    offset: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """A zstd frame, or a member of a gzip file: its size in bytes in the archive, and in the tar.

    `crc32` is that of its compressed bytes: the frame's own checksum covers its content only, and a few flipped bits
    still decode to the same content.
    """

    compressed: int
    size: int
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """The archive that another one builds on: its id, and its name in the same store."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArchiveManifest:
    """Who made an archive, when (ISO 8601, UTC), and of which snapshots: path in the archive -> manifest.

    Attributes:
        base: the archive that holds, itself or through its own base, the files that are stored elsewhere.
        trusted: whether the files' SHA-256 were taken from the record of a verification, not from the bytes stored.
    """

    id: str
    created: str
    zops: str
    snapshots: Mapping[str, Manifest]
    base: Base | None = None
    trusted: bool = False

    def as_bytes(self) -> bytes:
        """Return the text of the archive's first member."""
        body = {
            "format": FORMAT,
            "id": self.id,
            "created": self.created,
            "zops": self.zops,
            **({"base": {"id": self.base.id, "name": self.base.name}} if self.base else {}),
            **({"trusted": True} if self.trusted else {}),
            "snapshots": [{"path": path, "manifest": m.as_json()} for path, m in self.snapshots.items()],
        }
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "ArchiveManifest":
        """Parse the first member of an archive.

        Raises:
            ArchiveDamaged: when it is no such text, or of another format.
        """
        body = _parse(data, "the archive's manifest")
        try:
            snapshots = {str(s["path"]): Manifest.from_json(s["manifest"]) for s in body["snapshots"]}
            if len(snapshots) != len(body["snapshots"]) or not snapshots:
                raise ArchiveDamaged("the archive's manifest names no snapshot, or one twice")
            base = Base(str(body["base"]["id"]), str(body["base"]["name"])) if "base" in body else None
            manifest = cls(
                str(body["id"]), str(body["created"]), str(body["zops"]), snapshots, base, body.get("trusted") is True
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveDamaged(f"the archive's manifest is none: {error!r}") from None
        except ZopsError as error:
            raise ArchiveDamaged(f"the archive's manifest is none: {error.message}") from None
        if base:
            check_name(base.name)
            if "/" in base.name:
                raise ArchiveDamaged(f"the archive builds on {base.name!r}, no name in a store", code="archive-hostile")
        for path, snapshot in snapshots.items():
            check_name(path)
            check_identity(snapshot.model, snapshot.revision)
        return manifest


@dataclass(frozen=True, slots=True)
class Index:
    """What an archive holds and where.

    Attributes:
        archive: the id in the archive's manifest.
        end: bytes of the tar up to the end of the last member.
        structure_sha256: SHA-256 of the bytes up to `end` that are no member's data: headers and padding.
        entries: every member, in the order of the tar.
        frames: every zstd frame or gzip member with a part of it, in order; empty in an uncompressed archive.
        compression: what the frames are.
        elsewhere: files of the snapshots that an earlier archive of the chain holds; their offset is 0.
        mismatched: names of members that are not what their snapshot's manifest says, or that are missing. What the
            index says of them is true of the archive.
    """

    archive: str
    end: int
    structure_sha256: str
    entries: tuple[Entry, ...]
    frames: tuple[Frame, ...] = ()
    compression: Compression = "none"
    elsewhere: tuple[Entry, ...] = ()
    mismatched: tuple[str, ...] = ()

    def as_text(self) -> bytes:
        """Return the index as one line of JSON."""
        body = {
            "format": FORMAT,
            "archive": self.archive,
            "compression": self.compression,
            "end": self.end,
            "structure_sha256": self.structure_sha256,
            "members": [_entry_as_json(entry) for entry in self.entries],
            **({"elsewhere": [_entry_as_json(entry) for entry in self.elsewhere]} if self.elsewhere else {}),
            **({"mismatched": list(self.mismatched)} if self.mismatched else {}),
            "frames": [[frame.compressed, frame.size, frame.crc32] for frame in self.frames],
        }
        return json.dumps(body, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_text(cls, text: bytes) -> "Index":
        """Parse an index whose SHA-256 was checked; it may still be hostile.

        Raises:
            ArchiveDamaged: when it is none, or of another format.
        """
        body = _parse(text, "the archive's index")
        try:
            return cls(
                archive=str(body["archive"]),
                end=_count(body["end"]),
                structure_sha256=str(body["structure_sha256"]),
                entries=tuple(_entry_from_json(entry) for entry in body["members"]),
                frames=tuple(Frame(_count(packed), _count(size), _count(crc)) for packed, size, crc in body["frames"]),
                compression=_compression(body["compression"]),
                elsewhere=tuple(_elsewhere_from_json(entry) for entry in body.get("elsewhere", ())),
                mismatched=tuple(str(name) for name in body.get("mismatched", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveDamaged(f"the archive's index is none: {error!r}") from None


def _entry_as_json(entry: Entry) -> dict[str, object]:
    member = entry.member
    body: dict[str, object] = {"name": member.name, "kind": member.kind, "mode": member.mode, "mtime": member.mtime}
    if member.kind == "file":
        body |= {"size": member.size, "offset": entry.offset, "sha256": entry.sha256}
    if member.link:
        body["link"] = member.link
    return body


def _entry_from_json(body: Mapping[str, Any]) -> Entry:
    kind = body["kind"]
    if kind not in {"file", "directory", "symlink", "hardlink"}:
        raise ArchiveDamaged(f"the archive's index has a member of kind {kind!r}")
    member = Member(
        str(body["name"]),
        kind,
        _count(body["size"]) if kind == "file" else 0,
        _count(body["mode"]) & 0o777,
        _count(body["mtime"]),
        str(body["link"]) if kind in {"symlink", "hardlink"} else "",
    )
    return Entry(member, _count(body.get("offset", 0)), str(body.get("sha256", "")))


def _elsewhere_from_json(body: Mapping[str, Any]) -> Entry:
    entry = _entry_from_json(body)
    if entry.member.kind != "file" or entry.offset:
        raise ArchiveDamaged(f"the archive's index has {entry.member.name!r} elsewhere, which is no file")
    return entry


def _compression(value: object) -> Compression:
    for name in SUFFIXES:
        if name == value:
            return name
    raise ArchiveDamaged(f"the archive's index names compression {value!r}")


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _parse(data: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArchiveDamaged(f"{what} cannot be read: {error}") from None
    if not isinstance(body, dict) or "format" not in body:
        raise ArchiveDamaged(f"{what} is none")
    if body["format"] != FORMAT:
        raise ArchiveDamaged(
            f"{what} has format {body['format']!r}, this zops reads format {FORMAT}",
            code="archive-format",
            hint="use the zops that wrote it, or a newer one; tar extracts it all the same",
        )
    return body


def trailer(covered: bytes) -> bytes:
    """Return the line that closes an index: the SHA-256 and the length of everything from its header on."""
    return _TRAILER.format(sha256=hashlib.sha256(covered).hexdigest(), length=len(covered)).encode()


def trailer_length(line: bytes) -> int:
    """Return how many bytes before a trailer it covers.

    Raises:
        ArchiveDamaged: when the line is no trailer.
    """
    parts = line.split(b" ")
    plain = len(parts) == 3 and parts[2] == b"zops-index-1\n" and len(parts[1]) == 20 and parts[1].isdigit()
    if not plain or not 0 < int(parts[1]) <= INDEX_LIMIT:
        raise ArchiveDamaged("the archive's index does not end as an index does: the archive is cut or changed")
    return int(parts[1])


def locator(offset: int, crc32: int) -> bytes:
    """Return the empty gzip member that ends a `.tar.gz`.

    Args:
        offset: where the gzip members with the index begin.
        crc32: of their compressed bytes.
    """
    return _LOCATOR_HEAD + _LOCATOR.pack(offset, crc32) + _LOCATOR_END


def parse_locator(data: bytes) -> tuple[int, int] | None:
    """Return what `locator` was given; None when the data is none."""
    if len(data) != LOCATOR_SIZE:
        return None
    offset, crc32 = _LOCATOR.unpack_from(data, len(_LOCATOR_HEAD))
    return (offset, crc32) if data == locator(offset, crc32) else None


def seek_table(frames: Iterable[Frame]) -> bytes:
    """Return the skippable frame that ends an archive, as zstd's seekable format wants it (without checksums)."""
    entries = b"".join(SEEK_ENTRY.pack(frame.compressed, frame.size) for frame in frames)
    footer = SEEK_FOOTER.pack(len(entries) // SEEK_ENTRY.size, 0, SEEKABLE_MAGIC)
    return SKIPPABLE_HEADER.pack(SEEK_TABLE_MAGIC, len(entries) + len(footer)) + entries + footer


def parse_seek_table(data: bytes) -> list[Frame]:
    """Parse a seek table frame.

    Raises:
        ArchiveDamaged: when it is none, or not exactly one.
    """
    frames = [Frame(*pair) for pair in SEEK_ENTRY.iter_unpack(data[SKIPPABLE_HEADER.size : -SEEK_FOOTER.size])]
    if seek_table(frames) != data:
        raise ArchiveDamaged("the archive's seek table contradicts itself: the archive is cut or changed")
    return frames


def check_name(name: str) -> None:
    """Refuse a member's name that does not lie below the directory in which the archive is extracted.

    Raises:
        ArchiveDamaged: naming it.
    """
    path = PurePosixPath(name)
    inside = name == str(path) and name != "." and not path.is_absolute() and ".." not in path.parts
    encodable = name.isprintable() and all(len(part.encode()) <= 255 for part in path.parts) if inside else False
    if not encodable or len(name) > 4096:
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise ArchiveDamaged(f"the archive names {shown!r}, no path inside it", code="archive-hostile", member=name)


def check_names(members: Iterable[Member]) -> None:
    """Refuse names outside the archive, names that come twice, and members below something that is no directory.

    Raises:
        ArchiveDamaged: naming the first offender.
    """
    kinds: dict[str, str] = {}
    for member in members:
        check_name(member.name)
        if kinds.get(member.name, "directory") != "directory" or (member.name in kinds and member.kind != "directory"):
            raise ArchiveDamaged(f"the archive holds {member.name!r} twice", code="archive-hostile", member=member.name)
        kinds[member.name] = member.kind
    for name in kinds:
        for parent in PurePosixPath(name).parents:
            if kinds.get(str(parent), "directory") != "directory":
                raise ArchiveDamaged(
                    f"the archive holds {name!r} below {str(parent)!r}, which is no directory",
                    code="archive-hostile",
                    member=name,
                )


def check_identity(model: str, revision: str) -> None:
    """Refuse a model or a revision that could not be one name of a directory each.

    Raises:
        ArchiveDamaged: naming them.
    """
    parts = [*model.split("/"), revision]
    if model.count("/") != 1 or any(part.startswith(".") or not part or "/" in part for part in parts):
        raise ArchiveDamaged(f"{model!r} at {revision!r} is no model and revision", code="archive-hostile")
    check_name("/".join(parts))


def blocks(size: int) -> int:
    """Return the bytes that `size` bytes of data take in a tar."""
    return -(-size // BLOCK) * BLOCK

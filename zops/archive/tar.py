"""Tar headers: the few kinds of member that an archive of snapshots may hold, written and read strictly.

Python's `tarfile` takes a damaged header in the middle of an archive for its end and keeps quiet; here anything that is
not a whole, plain header raises. Blocks are built and parsed by `tarfile.TarInfo`, so there is no second codec.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from zops.errors import ArchiveDamaged

BLOCK = 512
END = bytes(2 * BLOCK)
"""Two zero blocks close a tar (POSIX.1-2017, pax, "ustar Interchange Format")."""
LATEST_S = 9_999_999_999
"""Latest modification time that is written or read, in seconds: the year 2286."""
METADATA_LIMIT = 1 << 20
"""Largest extended header that is read: a path has 4 KiB at most, so more is an attack."""

Kind = Literal["file", "directory", "symlink", "hardlink"]
_TYPES: dict[Kind, bytes] = {
    "file": tarfile.REGTYPE,
    "directory": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
}
_KINDS: dict[bytes, Kind] = {flag: kind for kind, flag in _TYPES.items()} | {tarfile.AREGTYPE: "file"}
_STRANGERS = {
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file, which only GNU tar can read",
}
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}


@dataclass(frozen=True, slots=True)
class Member:
    """What a header says: name without a trailing slash, kind, size in bytes, permission bits, mtime in seconds."""

    name: str
    kind: Kind = "file"
    size: int = 0
    mode: int = 0o644
    mtime: int = 0
    link: str = ""


def padding(size: int) -> int:
    """Return how many zero bytes follow `size` bytes of data."""
    return -size % BLOCK


def encode_header(member: Member, offset: int = 0, alignment: int = BLOCK) -> bytes:
    """Return the header blocks of a member.

    Args:
        member: what to describe; owner and group are always 0, without names.
        offset: where in the tar the header begins; counts only with an alignment.
        alignment: the data that follows starts at a multiple of this; reached by a PAX `comment` that readers skip.
    """
    info = tarfile.TarInfo(member.name)
    info.type, info.size, info.mode = _TYPES[member.kind], member.size, member.mode
    info.mtime, info.linkname = member.mtime, member.link
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    length = 1
    while (offset + len(header)) % alignment:
        # Each step makes the header one block longer, so a multiple is hit after alignment / BLOCK + 1 of them.
        info.pax_headers = {"comment": " " * length}
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        length += BLOCK
    return header


def read_member(read: Callable[[int], bytes]) -> Member | None:
    """Read the headers of the next member with `read`, which returns exactly as many bytes as asked or raises.

    Returns:
        The member, or None at the first block of the end.

    Raises:
        ArchiveDamaged: when the bytes are no header, or one of a kind that has no place in an archive of snapshots.
    """
    extended: dict[str, str] = {}
    while True:
        block = read(BLOCK)
        if not any(block):
            if extended:
                raise ArchiveDamaged("the tar ends where a member should follow its extended header")
            return None
        info = _parse_block(block)
        if info.type in _EXTENDED:
            extended |= dict(_records(_metadata(info, read)))
        elif info.type == tarfile.XGLTYPE:
            _check_global(dict(_records(_metadata(info, read))))
        elif info.type in _LONG:
            extended[_LONG[info.type]] = _text(_metadata(info, read).rstrip(b"\0"))
        else:
            return _member(info, extended)


def _parse_block(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ArchiveDamaged(f"a header of the tar is damaged ({error})") from None
    except UnicodeDecodeError:
        raise ArchiveDamaged("a name in the tar is not UTF-8", code="archive-hostile") from None


def _metadata(info: tarfile.TarInfo, read: Callable[[int], bytes]) -> bytes:
    if not 0 <= info.size <= METADATA_LIMIT:
        raise ArchiveDamaged(f"an extended header claims {info.size} bytes", code="archive-hostile")
    return read(info.size + padding(info.size))[: info.size]


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    """Split an extended header into its `LENGTH KEY=VALUE` records."""
    while data:
        digits, blank, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not blank or not equals or not record.endswith(b"\n") or length > len(data):
            raise ArchiveDamaged("an extended header of the tar is damaged")
        name = _text(key)
        if name.startswith("GNU.sparse."):
            raise ArchiveDamaged(
                "the tar holds a sparse file, which only GNU tar can read",
                code="archive-hostile",
                hint="make it again without --sparse",
            )
        # Attributes and comments of other programs may hold any bytes; only these are ours to understand.
        if name in {"path", "linkpath", "size", "mtime"}:
            yield name, _text(value[:-1])
        data = data[length:]


def _check_global(records: dict[str, str]) -> None:
    if records.keys() - {"mtime"}:
        raise ArchiveDamaged("the tar sets the name or size of all members at once", code="archive-hostile")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ArchiveDamaged("a name in the tar is not UTF-8", code="archive-hostile") from None


def _member(info: tarfile.TarInfo, extended: dict[str, str]) -> Member:
    name = extended.get("path", info.name)
    kind = _KINDS.get(info.type)
    if kind is None:
        what = _STRANGERS.get(info.type, f"a member of type {info.type!r}")
        raise ArchiveDamaged(f"{name!r} is {what}, no part of a snapshot", code="archive-hostile", member=name)
    size_text = extended.get("size", str(info.size))
    if not size_text.isascii() or not size_text.isdigit() or len(size_text) > 18:
        raise ArchiveDamaged(f"{name!r} claims a size of {size_text!r}", code="archive-hostile", member=name)
    size = int(size_text)
    if kind != "file" and size:
        raise ArchiveDamaged(f"{name!r} is a {kind} and claims {size} bytes", code="archive-hostile", member=name)
    link = extended.get("linkpath", info.linkname) if kind in {"symlink", "hardlink"} else ""
    # PAX paths of directories end in a slash; frombuf has stripped it from short ones only.
    name = name.rstrip("/") if kind == "directory" else name
    # Whole seconds are enough, and a time that is no plausible one of a file is none.
    seconds = extended.get("mtime", str(int(info.mtime))).partition(".")[0]
    mtime = int(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) <= len(str(LATEST_S)) else 0
    return Member(name, kind, size, info.mode & 0o777, mtime, link)

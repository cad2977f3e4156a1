"""Hostile archives: forgeries of our own format, which lie in one thing each, and foreign ones that try to get out."""

import gzip
import hashlib
import io
import json
import random
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import zstandard

from tests.support.archives import FILES, MODEL, REVISION, foreign_tar, make_snapshot, member, tree
from zops.archive.format import (
    CHUNK,
    INDEX_MAGIC,
    MANIFEST_NAME,
    SEEK_FOOTER,
    SEEKABLE_MAGIC,
    SKIPPABLE_HEADER,
    TRAILER_SIZE,
    ArchiveManifest,
    Entry,
    Frame,
    Index,
    locator,
    seek_table,
    trailer,
)
from zops.archive.frames import compress_frame
from zops.archive.restore import restore
from zops.archive.tar import END, Member, encode_header, padding
from zops.cache.manifest import FileEntry, Manifest
from zops.errors import ArchiveDamaged, HostShort

ROOT = f"models/acme--painter/snapshots/{REVISION}"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entries_of(files: dict[str, bytes]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path, len(content), sha(content)) for path, content in files.items())


@dataclass
class Forgery:
    """An archive whose every part may lie; as it is, it is a true one. Written by the specification, not by zops."""

    manifest: Manifest = field(default_factory=lambda: Manifest(MODEL, REVISION, entries_of(FILES)))
    root: str = ROOT
    more: list[tuple[Member, bytes]] = field(default_factory=list)
    drop: str = ""
    contents: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    header: Callable[[Member], bytes] = encode_header
    manifest_text: Callable[[bytes], bytes] = lambda text: text
    index: Callable[[Index], Index] = lambda index: index
    frame: Callable[[bytes], bytes] = compress_frame
    pad: bytes = b"\0"

    def write(self, path: Path) -> Path:
        text = self.manifest_text(
            ArchiveManifest("forged", "2026-01-01T00:00:00+00:00", "1", {self.root: self.manifest}).as_bytes()
        )
        side = json.dumps(self.manifest.as_json()).encode()
        members = [(Member(MANIFEST_NAME, size=len(text)), text)]
        members += [(Member(f"{self.root}/.zops/manifest.json", size=len(side)), side)]
        members += [
            (Member(f"{self.root}/{name}", size=len(data)), data)
            for name, data in self.contents.items()
            if name != self.drop
        ]
        members += self.more
        tar, structure, entries = b"", b"", []
        for item, data in members:
            header = self.header(item)
            fill = self.pad * padding(len(data))
            tar, structure = tar + header, structure + header + fill
            entries.append(
                Entry(item, len(tar) if item.kind == "file" else 0, sha(data) if item.kind == "file" else "")
            )
            tar += data + fill
        blob = self.frame(tar + END)
        index = self.index(
            Index(
                "forged",
                len(tar),
                sha(structure),
                tuple(entries),
                (Frame(len(blob), len(tar) + len(END), zlib.crc32(blob)),),
                compression="zstd",
            )
        )
        body = index.as_text()
        body = SKIPPABLE_HEADER.pack(INDEX_MAGIC, len(body) + TRAILER_SIZE) + body
        body += trailer(body)
        path.write_bytes(blob + body + seek_table([*index.frames, Frame(len(body), 0)]))
        return path


def changed_entry(number: int, **changes: object) -> Callable[[Index], Index]:
    def change(index: Index) -> Index:
        entries = list(index.entries)
        fields = {key: changes[key] for key in ("offset", "sha256") if key in changes}
        inner = {key: value for key, value in changes.items() if key not in fields}
        entries[number] = replace(entries[number], member=replace(entries[number].member, **inner), **fields)
        return replace(index, entries=tuple(entries))

    return change


def device(item: Member) -> bytes:
    info = tarfile.TarInfo(item.name)
    info.type, info.devmajor, info.devminor = tarfile.BLKTYPE, 8, 0
    return info.tobuf(tarfile.USTAR_FORMAT) if item.name.endswith("vae/config.json") else encode_header(item)


def bomb(data: bytes) -> bytes:
    """A frame that claims an exbibyte."""
    frame = bytearray(compress_frame(data))
    return bytes(frame[:4]) + b"\xe4" + (1 << 60).to_bytes(8, "little") + bytes(frame[9:])


LINK = Member(f"{ROOT}/vae/link.json", "symlink", link="/etc/passwd")
LINKED = Manifest(MODEL, REVISION, (*entries_of(FILES), FileEntry("vae/link.json", 33, sha(FILES["model_index.json"]))))


def hard(link: str) -> Member:
    return Member(f"{ROOT}/vae/link.json", "hardlink", link=link)


def skippable(size: int) -> bytes:
    return SKIPPABLE_HEADER.pack(0x184D2A50, size) + bytes(size)


def elsewhere(path: str) -> Callable[[Index], Index]:
    entry = Entry(Member(f"{ROOT}/{path}", size=len(FILES[path])), 0, sha(FILES[path]))
    return lambda index: replace(index, elsewhere=(entry,))


def based(name: str) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | {"base": {"id": "x", "name": name}}).encode()


def overlapping(index: Index) -> Index:
    first = next(n for n, e in enumerate(index.entries) if e.member.name.endswith("model_index.json"))
    return changed_entry(first + 1, offset=index.entries[first].offset)(index)


OWN: dict[str, Forgery] = {
    "a file outside every snapshot": Forgery(more=[(Member("etc/cron.d/x", size=1), b"x")]),
    "a name with ..": Forgery(more=[(Member(f"{ROOT}/../../../../x", size=1), b"x")]),
    "an absolute name": Forgery(more=[(Member("/tmp/x", size=1), b"x")]),
    "a directory above the cache": Forgery(more=[(Member(f"{ROOT}/../../../../../evil", "directory"), b"")]),
    "a link beside the snapshot": Forgery(more=[(Member("models/link", "symlink", link="/etc"), b"")]),
    "a link that leaves": Forgery(manifest=LINKED, more=[(LINK, b"")]),
    "a link that leaves by ..": Forgery(manifest=LINKED, more=[(replace(LINK, link="../../x"), b"")]),
    "a link to another content": Forgery(manifest=LINKED, more=[(replace(LINK, link="config.json"), b"")]),
    "a link to itself": Forgery(manifest=LINKED, more=[(replace(LINK, link="link.json"), b"")]),
    "a link as a directory": Forgery(
        more=[(Member(f"{ROOT}/sub", "symlink", link="/etc"), b""), (Member(f"{ROOT}/sub/x", size=1), b"x")]
    ),
    "a member twice": Forgery(more=[(Member(f"{ROOT}/vae/config.json", size=1), b"x")]),
    "a device": Forgery(header=device),
    "a marker of its own": Forgery(more=[(Member(f"{ROOT}/.zops/verified.json", size=2), b"{}")]),
    "a file less than its manifest": Forgery(drop="vae/config.json"),
    "a file more than its manifest": Forgery(contents=FILES | {"run.py": b"import os"}),
    "other content than its manifest": Forgery(contents=FILES | {"vae/config.json": b"{]\n" * 300}),
    "a snapshot above the cache": Forgery(root="../../x"),
    "a model above the cache": Forgery(manifest=replace(Manifest("../..", REVISION, entries_of(FILES)))),
    "a revision above the cache": Forgery(manifest=Manifest(MODEL, "..", entries_of(FILES))),
    "a manifest that names the sidecar": Forgery(
        manifest_text=lambda text: text.replace(b'"model_index.json"', b'".zops/verified.json"')
    ),
    "a manifest of another format": Forgery(manifest_text=lambda text: text.replace(b'"format": 1', b'"format": 2', 1)),
    "an index of another archive": Forgery(index=lambda index: replace(index, archive="other")),
    "a size in the index that is too small": Forgery(index=changed_entry(4, size=1)),
    "a size in the index that is too large": Forgery(index=changed_entry(4, size=1 << 50)),
    "an offset in the index that lies": Forgery(index=changed_entry(2, offset=512)),
    "a SHA-256 in the index that lies": Forgery(index=changed_entry(2, sha256="0" * 64)),
    "a mode in the index that lies": Forgery(index=changed_entry(2, mode=0o777)),
    "a structure that lies": Forgery(index=lambda index: replace(index, structure_sha256="0" * 64)),
    "something between the members": Forgery(pad=b"x", index=lambda index: replace(index, structure_sha256="0" * 64)),
    "an end that lies": Forgery(index=lambda index: replace(index, end=index.end - 512)),
    "a frame that is too large": Forgery(index=lambda i: replace(i, frames=(replace(i.frames[0], size=CHUNK + 512),))),
    "a frame that claims an exbibyte": Forgery(frame=bomb),
    "a frame without a checksum": Forgery(frame=zstandard.ZstdCompressor().compress),
    "a hidden second frame": Forgery(frame=lambda data: compress_frame(data) + compress_frame(b"hidden")),
    "bytes behind a frame": Forgery(frame=lambda data: compress_frame(data) + b"hidden"),
    "padding behind a frame": Forgery(frame=lambda data: compress_frame(data) + skippable(1 << 20)),
    "no frame for the end": Forgery(index=lambda i: replace(i, frames=())),
    "another compression": Forgery(index=lambda i: replace(i, compression="gzip")),
    "a hard link to a file outside": Forgery(manifest=LINKED, more=[(hard("/etc/passwd"), b"")]),
    "a hard link that climbs out": Forgery(manifest=LINKED, more=[(hard(f"{ROOT}/../../../../../victim"), b"")]),
    "a hard link to another content": Forgery(manifest=LINKED, more=[(hard(f"{ROOT}/vae/config.json"), b"")]),
    "a hard link to itself": Forgery(manifest=LINKED, more=[(hard(f"{ROOT}/vae/link.json"), b"")]),
    "a hard link to the archive's manifest": Forgery(manifest=LINKED, more=[(hard(MANIFEST_NAME), b"")]),
    "a hard link outside every snapshot": Forgery(
        more=[(Member("passwd", "hardlink", link=f"{ROOT}/model_index.json"), b"")]
    ),
    "a file elsewhere without a base": Forgery(drop="vae/config.json", index=elsewhere("vae/config.json")),
    "a file here and elsewhere": Forgery(index=elsewhere("vae/config.json")),
    "a base outside the store": Forgery(manifest_text=based("../evil.tar")),
    "a base by an absolute name": Forgery(manifest_text=based("/etc/passwd")),
    "a mismatched file that no manifest names": Forgery(index=lambda i: replace(i, mismatched=(f"{ROOT}/run.py",))),
    "a mismatched file outside": Forgery(index=lambda i: replace(i, mismatched=("/etc/passwd",))),
    "a mismatched link": Forgery(
        manifest=LINKED,
        more=[(replace(LINK, link="../model_index.json"), b"")],
        index=lambda i: replace(i, mismatched=(f"{ROOT}/vae/link.json",)),
    ),
    "a name with NUL": Forgery(more=[(Member(f"{ROOT}/vae/\0x", size=1), b"x")]),
    "a name of 300 bytes": Forgery(more=[(Member(f"{ROOT}/{'n' * 300}", size=1), b"x")]),
    "a path of 8,000 bytes": Forgery(more=[(Member(f"{ROOT}/{'n/' * 4000}x", size=1), b"x")]),
    "a name with a line feed": Forgery(more=[(Member(f"{ROOT}/vae/a\nb", size=1), b"x")]),
    "a name that runs backwards on a screen": Forgery(more=[(Member(f"{ROOT}/vae/\u202egpj.exe", size=1), b"x")]),
    "members that overlap": Forgery(index=overlapping),
}


def plain(*members: tuple[tarfile.TarInfo, bytes]) -> Callable[[Path], Path]:
    good = [(member(f"c/models/acme/painter/{path}"), content) for path, content in FILES.items()]
    return lambda path: foreign_tar(path, [*good, *members])


def raw(build: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(build())
        return path

    return write


def in_snapshot(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    return member(f"c/models/acme/painter/{name}", kind, link), b""


def lying(size: int) -> bytes:
    info = member("c/models/acme/painter/model_index.json")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: dict[str, str]) -> bytes:
    info = member("x")
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT) + END


def of_bytes(name: bytes) -> bytes:
    info = member("@" * len(name))
    header = info.tobuf(tarfile.USTAR_FORMAT).replace(b"@" * len(name), name)
    checksum = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    return header[:148] + b"%06o\0 " % checksum + header[156:] + END


def sparse() -> bytes:
    info = member("x")
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT) + END


def huge_extension() -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    return info.tobuf(tarfile.USTAR_FORMAT) + END


def located(index: bytes) -> bytes:
    """A gzip file that ends as one of ours, with this for its index."""
    head = gzip.compress(tar_of_good())
    return head + index + locator(len(head), zlib.crc32(index))


def tar_of_good() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(member("c/models/acme/painter/model_index.json"), io.BytesIO())
    return stream.getvalue()


FOREIGN: dict[str, Callable[[Path], Path]] = {
    "an absolute name": plain((member("/tmp/evil"), b"x")),
    "a name with ..": plain((member("c/../../evil"), b"x")),
    "a link to a file outside": plain(in_snapshot("vae/x.json", tarfile.SYMTYPE, "/etc/passwd")),
    "a link that climbs out": plain(in_snapshot("vae/x.json", tarfile.SYMTYPE, "../" * 9 + "etc/passwd")),
    "a link to nothing": plain(in_snapshot("vae/x.json", tarfile.SYMTYPE, "nothing")),
    "a link to itself": plain(in_snapshot("vae/x.json", tarfile.SYMTYPE, "x.json")),
    "a hard link to a file outside": plain(in_snapshot("vae/x.json", tarfile.LNKTYPE, "/etc/passwd")),
    "a file below a link": plain(in_snapshot("d", tarfile.SYMTYPE, "/tmp"), in_snapshot("d/evil")),
    "a device": plain(in_snapshot("vae/x.json", tarfile.CHRTYPE)),
    "a pipe": plain(in_snapshot("vae/x.json", tarfile.FIFOTYPE)),
    "a file twice": plain(in_snapshot("vae/config.json")),
    "a file that is a directory too": plain(in_snapshot("vae/config.json/x.json")),
    "a terminal's escape in a name": plain((member("c/\x1b]0;evil\x07"), b"x")),
    "a sparse file": raw(sparse),
    "a sparse file in PAX": raw(lambda: pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 15})),
    "a negative size": raw(lambda: pax({"size": "-1"})),
    "a name that is not UTF-8": raw(lambda: of_bytes(b"\xff\xfe")),
    "a petabyte that is not there": raw(lambda: lying(1 << 50)),
    "a petabyte in gzip": raw(lambda: gzip.compress(lying(1 << 50) + bytes(1 << 20))),
    "a size beyond the end": raw(lambda: lying(1 << 20) + END),
    "zeros without end": raw(lambda: gzip.compress(tar_of_good() + bytes(20 << 20))),
    "something behind the end": raw(lambda: tar_of_good() + b"evil"),
    "no end": raw(lambda: tar_of_good()[:512]),
    "no tar": raw(lambda: random.Random(3).randbytes(3000)),
    "nothing": raw(lambda: b""),
    "zeros": raw(lambda: bytes(100)),
    "half a gzip": raw(lambda: gzip.compress(random.Random(3).randbytes(3000))[:1500]),
    "a zstd window of gigabytes": raw(lambda: b"\x28\xb5\x2f\xfd\x00\xb8" + bytes(20)),
    "a manifest that is none": plain((member("c/models/acme/painter/.zops/manifest.json"), b"[]")),
    "a PAX name that climbs out": raw(lambda: pax({"path": "../../evil"})),
    "a PAX name that is absolute": raw(lambda: pax({"path": "/etc/cron.d/evil"})),
    "a PAX name with NUL": raw(lambda: pax({"path": "c/a\0b"})),
    "a PAX size that is no number": raw(lambda: pax({"size": "1e9"})),
    "a PAX size of twenty digits": raw(lambda: pax({"size": "9" * 20})),
    "a global PAX name": raw(lambda: tarfile.TarInfo.create_pax_global_header({"path": "/etc/passwd"}) + tar_of_good()),
    "an extended header of a gigabyte": raw(huge_extension),
    "an extended header without a member": raw(lambda: pax({"path": "c/x"})[:1024] + END),
    "a name of 300 bytes": plain((member("c/" + "n" * 300), b"x")),
    "a name of 8,000 bytes": plain((member("c/" + "n/" * 4000), b"x")),
    "a link and then a file through it": plain(
        in_snapshot("out", tarfile.SYMTYPE, "../../../.."), in_snapshot("out/x")
    ),
    "a hard link that climbs out": plain(in_snapshot("vae/x.json", tarfile.LNKTYPE, "../../victim")),
    "a hard link to what is not there": plain(in_snapshot("vae/x.json", tarfile.LNKTYPE, "c/later")),
    "links in a circle": plain(
        in_snapshot("vae/a.json", tarfile.SYMTYPE, "b.json"), in_snapshot("vae/b.json", tarfile.SYMTYPE, "a.json")
    ),
    "a socket or whatever type 9 is": plain(in_snapshot("vae/x.json", b"9")),
    "a contiguous file that is a device": plain(in_snapshot("vae/x.json", tarfile.BLKTYPE)),
    "a zstd bomb": raw(lambda: zstandard.ZstdCompressor().compress(lying(1 << 50) + bytes(64 << 20))),
    "zeros without end in zstd": raw(lambda: zstandard.ZstdCompressor().compress(tar_of_good() + bytes(20 << 20))),
    "half a zstd frame": raw(lambda: zstandard.ZstdCompressor().compress(random.Random(3).randbytes(3000))[:1500]),
    "gzip in which something follows": raw(lambda: gzip.compress(tar_of_good()) + b"evil"),
    "a locator that leads out": raw(lambda: gzip.compress(tar_of_good()) + locator(1 << 40, 0)),
    "a locator that leads to itself": raw(lambda: located(b"")),
    "an index that expands without end": raw(lambda: located(gzip.compress(bytes(80 << 20), 9))),
    "an index in gzip that is none": raw(lambda: located(gzip.compress(b"x" * 4000))),
    "a seek table of four billion frames": raw(
        lambda: compress_frame(tar_of_good()) + SEEK_FOOTER.pack((1 << 32) - 1, 0, SEEKABLE_MAGIC)
    ),
    "our manifest without an index": raw(lambda: encode_header(Member(MANIFEST_NAME)) + END),
}


def make_world(directory: Path) -> Path:
    """Make a directory with a cache, a file beside it that nobody may touch, and nothing else."""
    make_snapshot(directory / "cache", {"model_index.json": b"[1]"})
    (directory / "victim").write_text("untouched")
    return directory


def harm(archive: Path, world: Path) -> list[str]:
    """Restore a hostile archive into a world, and return what it did that it must not: nothing, if it was refused."""
    before = tree(world)
    wrong = []
    try:
        restore(archive, world / "cache", model=MODEL)
        wrong.append("it was restored")
    except (ArchiveDamaged, HostShort) as error:
        if "\n" in error.message:
            wrong.append("its error has several lines")
    if tree(world) != before:
        wrong.append("something changed")
    return wrong

"""The archive format's small parts: headers, names, index, trailer, seek table."""

import gzip
import io
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.archive.contents import check_index
from zops.archive.decode import decode
from zops.archive.format import (
    ALIGNMENT,
    CHUNK,
    LOCATOR_SIZE,
    MANIFEST_NAME,
    SEEK_FOOTER,
    TRAILER_SIZE,
    ArchiveManifest,
    Entry,
    Frame,
    Index,
    check_identity,
    check_name,
    check_names,
    locator,
    parse_locator,
    parse_seek_table,
    seek_table,
    trailer,
    trailer_length,
)
from zops.archive.frames import compress_frame, compress_member, crc32
from zops.archive.pieces import cut, lay_out
from zops.archive.plan import Planned, Source
from zops.archive.tar import BLOCK, END, LATEST_S, METADATA_LIMIT, Member, encode_header, read_member
from zops.cache.manifest import FileEntry, Manifest
from zops.errors import ArchiveDamaged

NAMES = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cc", "Cs")), min_size=1, max_size=60
    ),
    min_size=1,
    max_size=5,
).map("/".join)


def read(data: bytes) -> Member | None:
    stream = io.BytesIO(data)
    return read_member(stream.read)


@given(NAMES, st.integers(0, 1 << 45), st.integers(0, 0o777), st.integers(0, LATEST_S), st.integers(0, 50))
def test_a_header_must_read_back_as_written_and_end_where_it_was_asked_to(name, size, mode, mtime, blocks):
    member = Member(name, "file", size, mode, mtime)
    offset = blocks * BLOCK
    header = encode_header(member, offset, ALIGNMENT)
    assert (offset + len(header)) % ALIGNMENT == 0
    assert read(header) == member


@given(NAMES, NAMES)
def test_python_must_read_the_names_that_we_write(name, link):
    blob = encode_header(Member(name, "directory")) + encode_header(Member("x", "symlink", link=link)) + END
    with tarfile.open(fileobj=io.BytesIO(blob), mode="r:") as archive:
        first, second = archive.getmembers()
    assert (first.name, first.isdir()) == (name.rstrip("/"), True)
    assert (second.linkname, second.issym()) == (link, True)


@given(st.integers(0, BLOCK * 8 - 1))
def test_any_flipped_bit_of_a_header_must_be_refused_or_change_nothing_that_we_use(position):
    member = Member("models/a--b/snapshots/r/model.safetensors", "file", 4242, 0o644, 1_700_000_000)
    header = bytearray(encode_header(member))
    header[position // 8] ^= 1 << position % 8
    # Only the blank that ends the checksum field may differ unseen; the structure's SHA-256 in the index covers it.
    try:
        assert read(bytes(header)) == member
    except ArchiveDamaged:
        return
    assert position // 8 in range(148, 156)


@pytest.mark.parametrize(
    "kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
)
def test_a_member_that_is_no_part_of_a_snapshot_must_be_refused(kind):
    info = tarfile.TarInfo("thing")
    info.type = kind
    with pytest.raises(ArchiveDamaged) as caught:
        read(info.tobuf(tarfile.GNU_FORMAT))
    assert caught.value.code == "archive-hostile"


@pytest.mark.parametrize(
    "records",
    [
        {"size": "-5"},
        {"size": "9" * 30},
        {"size": "1e3"},
        {"size": "\u0663"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    ],
)
def test_a_lying_extended_header_must_be_refused(records):
    info = tarfile.TarInfo("thing")
    info.pax_headers = records
    with pytest.raises(ArchiveDamaged):
        read(info.tobuf(tarfile.PAX_FORMAT))


def test_an_extended_header_of_gigabytes_must_be_refused_unread():
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, METADATA_LIMIT + 1
    asked = []

    def reader(size: int) -> bytes:
        asked.append(size)
        return info.tobuf(tarfile.USTAR_FORMAT)

    with pytest.raises(ArchiveDamaged, match="extended header claims"):
        read_member(reader)
    assert asked == [BLOCK]


def test_a_directory_that_claims_data_must_be_refused():
    info = tarfile.TarInfo("d")
    info.type, info.size = tarfile.DIRTYPE, 512
    with pytest.raises(ArchiveDamaged, match="claims 512 bytes"):
        read(info.tobuf(tarfile.USTAR_FORMAT))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/etc/passwd", "../x", "a/../../x", "a/..", "./a", "a//b", "a/"),
        *("a\0b", "a\nb", "\x1b[2J", "a" * 256, "b/" * 2100 + "c", "\ud800"),
    ],
)
def test_a_name_that_leaves_the_archive_must_be_refused(name):
    with pytest.raises(ArchiveDamaged) as caught:
        check_name(name)
    assert caught.value.code == "archive-hostile"


@pytest.mark.parametrize("name", ["a", "a/b.c", ".zops-archive.json", "a/..b/c", "日本/é x.json", "a" * 255])
def test_a_plain_name_must_be_accepted(name):
    check_name(name)


@pytest.mark.parametrize(
    "members",
    [
        [Member("a"), Member("a")],
        [Member("a"), Member("a", "directory")],
        [Member("a", "directory"), Member("a")],
        [Member("a"), Member("a/b")],
        [Member("a/b"), Member("a")],
        [Member("a", "symlink", link="x"), Member("a/b")],
        [Member("a/b/c"), Member("a", "symlink", link="/etc")],
    ],
)
def test_names_that_hide_each_other_must_be_refused(members):
    with pytest.raises(ArchiveDamaged):
        check_names(members)


def test_a_directory_may_come_twice():
    check_names([Member("a", "directory"), Member("a/b"), Member("a", "directory")])


@pytest.mark.parametrize(
    ("model", "revision"),
    [
        *(("a", "r"), ("a/b/c", "r"), ("../b", "r"), ("a/..", "r"), ("/b", "r")),
        *(("a/b", ".."), ("a/b", ""), ("a/b", "x/y"), ("a/b", ".hidden")),
    ],
)
def test_a_model_or_revision_that_is_no_name_must_be_refused(model, revision):
    with pytest.raises(ArchiveDamaged):
        check_identity(model, revision)


FRAMES = st.lists(st.builds(Frame, st.integers(1, 1 << 31), st.integers(0, CHUNK)), max_size=20)


@given(FRAMES)
def test_a_seek_table_must_read_back_as_written(frames):
    assert parse_seek_table(seek_table(frames)) == frames


def test_a_seek_table_must_be_laid_out_as_zstd_specifies_it():
    table = seek_table([Frame(7, 9)])
    assert table.hex() == "5e2a4d18" + "11000000" + "07000000" + "09000000" + "01000000" + "00" + "b1ea928f"
    assert SEEK_FOOTER.size == 9


@given(FRAMES.filter(bool), st.data())
def test_a_flipped_bit_of_a_seek_table_must_change_it_or_be_refused(frames, data):
    table = bytearray(seek_table(frames))
    position = data.draw(st.integers(0, len(table) * 8 - 1))
    table[position // 8] ^= 1 << position % 8
    with suppress(ArchiveDamaged):
        assert parse_seek_table(bytes(table)) != frames


def test_a_trailer_must_say_what_it_covers_and_refuse_anything_else():
    line = trailer(b"covered")
    assert len(line) == TRAILER_SIZE
    assert trailer_length(line) == 7
    for bad in (line[:-1] + b" ", b"x" * TRAILER_SIZE, line.replace(b" 0", b" -", 1), trailer(b"")):
        with pytest.raises(ArchiveDamaged):
            trailer_length(bad)


MANIFEST = Manifest("acme/painter", "main", (FileEntry("model_index.json", 2, "0" * 64),))


def test_an_archive_manifest_must_read_back_as_written():
    manifest = ArchiveManifest("id", "2026-01-02T03:04:05+00:00", "0.1", {"models/x": MANIFEST})
    assert ArchiveManifest.from_bytes(manifest.as_bytes()) == manifest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"format": 1,\n "id"', b'"format": 2,\n "id"'),
        (b'"id"', b'"di"'),
        (b'"models/x"', b'"../x"'),
        (b'"acme/painter"', b'"acme/.."'),
        (b'"model_index.json"', b'"../model_index.json"'),
        (b'"digest": "', b'"digest": "f'),
        (b'"revision": "main"', b'"revision": "/etc"'),
    ],
)
def test_a_wrong_archive_manifest_must_be_refused(old, new):
    text = ArchiveManifest("id", "2026-01-02T03:04:05+00:00", "0.1", {"models/x": MANIFEST}).as_bytes()
    assert old in text
    with pytest.raises(ArchiveDamaged):
        ArchiveManifest.from_bytes(text.replace(old, new))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b'{"format": 1}', b"\xff"])
def test_what_is_no_index_must_be_refused(text):
    with pytest.raises(ArchiveDamaged):
        Index.from_text(text)


def index(*members: tuple[str, int, int], end: int = 10_000, frames: tuple[Frame, ...] = ()) -> Index:
    entries = tuple(Entry(Member(name, "file", size), offset, "0" * 64) for name, size, offset in members)
    return Index("id", end, "0" * 64, entries, frames, "zstd" if frames else "none")


FIRST = (MANIFEST_NAME, 10, 512)


def test_a_true_index_must_be_accepted_and_read_back():
    true = index(FIRST, ("a", 600, 1536), end=2560, frames=(Frame(5, 3584),))
    check_index(true)
    assert Index.from_text(true.as_text()) == true


@pytest.mark.parametrize(
    "wrong",
    [
        index(("a", 1, 512)),
        index(),
        index(FIRST, ("a", 1, 512)),
        index(FIRST, ("a", 1, 1000)),
        index(FIRST, ("a", 1 << 60, 1536)),
        index(FIRST, ("../a", 1, 1536)),
        index(FIRST, ("a", 1, 1536), ("a", 1, 2560)),
        index(FIRST, end=1024, frames=(Frame(1, 2049),)),
        index(FIRST, end=CHUNK, frames=(Frame(1, CHUNK + 1024),)),
        index(FIRST, end=1024, frames=(Frame(1, 0), Frame(1, 2048))),
    ],
)
def test_an_index_that_cannot_be_true_must_be_refused(wrong):
    with pytest.raises(ArchiveDamaged):
        check_index(wrong)


def decompress_frame(packed: bytes, size: int) -> bytes:
    """Decode without the help of the CRC-32 in the index."""
    frame = Frame(len(packed), size, crc32(packed))
    return bytes(decode(memoryview(packed), frame, "zstd", memoryview(bytearray(CHUNK))))


@given(st.binary(min_size=1, max_size=5000), st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_of_a_frame_must_be_refused_or_change_nothing(data, position, bit):
    frame = bytearray(compress_frame(data))
    assert decompress_frame(bytes(frame), len(data)) == data
    frame[position % len(frame)] ^= 1 << bit
    # A run of one byte has several codes; the CRC-32 in the index tells them apart.
    with suppress(ArchiveDamaged):
        assert decompress_frame(bytes(frame), len(data)) == data


def test_a_frame_that_claims_another_size_must_be_refused_before_it_is_unpacked():
    frame = compress_frame(bytes(CHUNK))
    assert len(frame) < 1000
    with pytest.raises(ArchiveDamaged, match="claims"):
        decompress_frame(frame, CHUNK - 1)
    for wrong in (b"", frame[:5], frame[:-9], frame + b"x"):
        with pytest.raises(ArchiveDamaged):
            decompress_frame(wrong, CHUNK)
    # Of a checksum that is cut, only the CRC-32 in the index tells.
    with pytest.raises(ArchiveDamaged, match="CRC-32"):
        decode(memoryview(frame)[:-1], Frame(len(frame), CHUNK, crc32(frame)), "zstd", memoryview(bytearray(CHUNK)))


ZEROS = bytes(CHUNK)
WEIGHTS = np.random.default_rng(5).standard_normal(CHUNK // 4, dtype=np.float32) * np.float32(0.02)


@pytest.mark.parametrize(
    ("content", "least", "most"),
    [
        (np.random.default_rng(6).bytes(CHUNK), 1.0, 1.001),
        (WEIGHTS.tobytes(), 0.9, 0.95),
        ((WEIGHTS.view(np.uint32) & 0xFFFF0000).tobytes(), 0.45, 0.6),
        (bytes(CHUNK), 0, 0.001),
        (b'{"token": 1, "text": "the"}\n' * 100_000, 0, 0.01),
    ],
)
@pytest.mark.parametrize(("compress", "how"), [(compress_frame, "zstd"), (compress_member, "gzip")])
def test_a_piece_must_be_compressed_as_far_as_its_content_allows_and_read_back(content, least, most, compress, how):
    packed = compress(memoryview(content))
    assert least <= len(packed) / len(content) <= most
    frame = Frame(len(packed), len(content), crc32(packed))
    assert decode(memoryview(packed), frame, how, memoryview(bytearray(CHUNK))) == content


@given(st.integers(1, CHUNK))
def test_a_frame_must_be_a_single_segment_with_a_checksum_whatever_its_size(size):
    frame = compress_frame(memoryview(ZEROS)[:size])
    # RFC 8878, 3.1.1.1.1: all bits but the width of the content size.
    assert frame[4] & 0x3F == 0b100100


@given(st.integers(1, CHUNK))
def test_a_gzip_member_must_have_no_flags_and_no_time(size):
    assert compress_member(memoryview(ZEROS)[:size])[:8].hex() == "1f8b080000000000"


@given(st.integers(0, 1 << 60), st.integers(0, (1 << 32) - 1), st.integers(0, LOCATOR_SIZE * 8 - 1))
def test_a_locator_must_read_back_be_empty_to_gzip_and_show_a_flipped_bit(offset, crc, position):
    line = locator(offset, crc)
    assert len(line) == LOCATOR_SIZE
    assert parse_locator(line) == (offset, crc)
    assert gzip.decompress(line) == b""
    flipped = bytearray(line)
    flipped[position // 8] ^= 1 << position % 8
    assert parse_locator(bytes(flipped)) != (offset, crc)
    assert parse_locator(line[1:]) is None


SIZES = st.one_of(
    st.integers(0, 3000), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 512, 3 * CHUNK, 5 * CHUNK + 7])
)


@given(st.lists(SIZES, max_size=6), st.sampled_from([BLOCK, ALIGNMENT]))
def test_the_pieces_must_be_the_tar_and_begin_with_the_data_of_a_file(sizes, alignment):
    items = [
        Planned(Member(f"f{n}", "file", size), source=Source(Path("s"), f"f{n}", size, "0" * 64, (size, 0, n)))
        for n, size in enumerate(sizes)
    ]
    layout = lay_out([Planned(Member("m", "file", 3), b"abc"), *items, Planned(Member("d", "directory"))], alignment)
    pieces = list(cut(layout, END))
    assert all(0 < piece.size <= CHUNK for piece in pieces)
    assert sum(piece.size for piece in pieces) == layout.end + len(END)
    position, begins, read = 0, {}, {}
    for piece in pieces:
        if piece.source:
            begins.setdefault(piece.source.path, position - piece.start)
            assert piece.start == read.get(piece.source.path, 0)
            read[piece.source.path] = piece.start + piece.count
            assert piece.last == (read[piece.source.path] == piece.source.size)
        position += piece.size
    places = {entry.member.name: entry.offset for entry in layout.entries}
    assert all(places[name] == begin and begin % alignment == 0 for name, begin in begins.items())
    assert read == {f"f{n}": size for n, size in enumerate(sizes) if size}

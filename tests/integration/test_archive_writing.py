"""Writing archives: what is in them by the testimony of other programs, and that nothing else is changed or left."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.archives import FILES, MODEL, REVISION, make_snapshot, tree, vouch
from tests.support.waiting import eventually
from zops.archive import resume
from zops.archive.backup import Earlier, backup
from zops.archive.format import ALIGNMENT, CHUNK, SUFFIXES, Base, Index
from zops.archive.frames import compress_frame
from zops.archive.pieces import cut, lay_out
from zops.archive.pipeline import Pace, stream
from zops.archive.plan import Planned, Source
from zops.archive.restore import verify_archive
from zops.archive.sinks import FileSink
from zops.archive.store import DirectoryStore
from zops.archive.tar import Member
from zops.cache.layout import place
from zops.cache.lock import hold
from zops.cache.manifest import FileEntry, Manifest, sidecar, stat_key, write_manifest, write_marker
from zops.cache.pages import resident_bytes
from zops.cache.reading import OpenFile, new_buffer
from zops.errors import HostShort, LockHeld, SnapshotDamaged, SourceFailed
from zops.events import Event, Progressed, Warned, silent

COMPRESSIONS = sorted(SUFFIXES)
NOISE = random.Random(3).randbytes(9 * CHUNK + 12345)
OWN = {".zops-archive.json", ".zops-index"}
PARTS = st.text(st.sampled_from("abcXYZ019._-é日 "), min_size=1, max_size=40).filter(
    lambda part: part.strip(".") and part[0] != "." and part not in {"model_index.json", "CACHEDIR.TAG"}
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
CONTENTS = st.one_of(
    st.binary(max_size=3000),
    st.builds(lambda size: NOISE[:size], st.sampled_from([4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1])),
    st.builds(bytes, st.integers(0, 200_000)),
)


def snapshot_of(cache: Path) -> Path:
    return place(cache, MODEL, REVISION)


def back_up(snapshot: Path, store: Path, compression: str = "zstd", **options) -> Path:
    return Path(backup([snapshot], DirectoryStore(store), compression=compression, **options).location)


def extracted(archive: Path, target: Path) -> Path:
    """Extract by GNU tar, as its reader would."""
    target.mkdir()
    how = {".zst": "--zstd", ".gz": "--gzip"}.get(archive.suffix, "--no-auto-compress")
    subprocess.run(["tar", how, "-xpf", archive, "-C", target], check=True)
    return target


def plain_tar(archive: Path) -> bytes:
    program = {".zst": ["zstd", "-dc"], ".gz": ["gzip", "-dc"]}.get(archive.suffix, ["cat"])
    return subprocess.run([*program, archive], check=True, stdout=subprocess.PIPE).stdout


def without_ours(found: dict) -> dict:
    return {path: what for path, what in found.items() if path not in OWN}


def inside(parts: set[str]) -> bool:
    """Tell whether no path lies below another one."""
    return not any(other.startswith(f"{path}/") for path in parts for other in parts)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(PATHS, st.tuples(CONTENTS, st.sampled_from([0o644, 0o600, 0o755, 0o444])), max_size=6),
    compression=st.sampled_from(COMPRESSIONS),
)
def test_gnu_tar_and_python_must_find_every_byte_mode_and_link(tmp_path_factory, files, compression):
    files = {"model_index.json": (b"{}", 0o644), **files}
    folded = {path.casefold() for path in files}
    if not inside(set(files)) or len(folded) < len(files):
        return
    tmp = tmp_path_factory.mktemp("tree")
    snapshot = make_snapshot(tmp / "cache", {path: content for path, (content, _) in files.items()})
    for path, (_, mode) in files.items():
        (snapshot / path).chmod(mode)
    (snapshot / "hollow" / "nothing").mkdir(parents=True)
    first = max(files)
    (snapshot / "Link.json").symlink_to(first)
    (snapshot / "Twin.json").hardlink_to(snapshot / first)
    vouch(snapshot, [*files, "Link.json", "Twin.json"])
    archive = back_up(snapshot, tmp / "store", compression)
    want = tree(tmp / "cache")
    by_tar = extracted(archive, tmp / "by-tar")
    assert without_ours(tree(by_tar)) == want
    assert (snapshot_of(by_tar) / "Twin.json").samefile(snapshot_of(by_tar) / first)
    (tmp / "x.tar").write_bytes(plain_tar(archive))
    with tarfile.open(tmp / "x.tar") as opened:
        opened.extractall(tmp / "by-python", filter="data")
    # The filter takes away the group's write permission, as it should; the rest is equal.
    assert {p: w[1:] for p, w in without_ours(tree(tmp / "by-python")).items()} == {p: w[1:] for p, w in want.items()}
    verify_archive(archive)
    shutil.rmtree(tmp)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_piece_must_begin_where_the_data_of_a_file_does_and_plain_data_on_a_page(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "a.bin": NOISE, "b.bin": NOISE[:CHUNK], "c.bin": NOISE[:1]})
    archive = back_up(snapshot, tmp_path / "store", compression)
    tar = plain_tar(archive)
    text = tar if compression != "zstd" else archive.read_bytes()
    line = next(line for line in text[text.rindex(b'{"format":1,"archive"') :].splitlines())
    index = Index.from_text(line)
    begins, position = set(), 0
    for frame in index.frames:
        begins.add(position)
        position += frame.size
    for entry in index.entries:
        if entry.member.size:
            assert tar[entry.offset : entry.offset + entry.member.size] or entry.member.size == 0
            data = tar[entry.offset : entry.offset + entry.member.size]
            assert hashlib.sha256(data).hexdigest() == entry.sha256
            assert entry.offset % ALIGNMENT == 0 if compression == "none" else entry.offset in begins
    assert index.compression == compression


def test_files_of_hugging_face_that_are_one_blob_must_be_stored_once(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {"model_index.json": b"{}"})
    blob = tmp_path / "cache/blobs/abc"
    blob.parent.mkdir()
    blob.write_bytes(NOISE[:100_000])
    for name in ("a.safetensors", "b.safetensors"):
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    vouch(snapshot, ["a.safetensors", "b.safetensors", "model_index.json"])
    archive = back_up(snapshot, tmp_path / "store", "none")
    assert archive.stat().st_size < 150_000
    back = snapshot_of(extracted(archive, tmp_path / "back"))
    assert (back / "b.safetensors").read_bytes() == blob.read_bytes()
    assert not (back / "a.safetensors").is_symlink()
    assert (back / "a.safetensors").samefile(back / "b.safetensors")


def test_a_tag_that_tells_others_to_skip_a_cache_must_not_make_us_skip_it(tmp_path):
    snapshot = make_snapshot(
        tmp_path / "cache", {**FILES, "CACHEDIR.TAG": b"Signature: 8a477f597d28d172789f06886806bc55"}
    )
    for parent in (tmp_path / "cache", snapshot.parent):
        (parent / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    back = snapshot_of(extracted(back_up(snapshot, tmp_path / "store"), tmp_path / "back"))
    assert (back / "vae/model.safetensors").read_bytes() == FILES["vae/model.safetensors"]
    assert (back / "CACHEDIR.TAG").exists()


class Stream:
    """A store that takes a stream, as buckets do."""

    location = "stream://"

    def __init__(self, fails_after: int = 1 << 62) -> None:
        self.written: dict[str, bytearray] = {}
        self._left = fails_after

    def exists(self, name: str) -> bool:
        return name in self.written

    def resumable(self):
        return iter(())

    @contextlib.contextmanager
    def open_writer(self, name, *, size=0, plan=None):
        assert plan["id"]
        taken = bytearray()

        class Taking:
            @staticmethod
            def write(data) -> None:
                self._left -= len(data)
                if self._left < 0:
                    raise SourceFailed("the bucket is gone")
                taken.extend(data)

        yield Taking()
        assert len(taken) <= size
        self.written[name] = taken


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_stream_must_get_an_archive_as_a_directory_does(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "big.bin": NOISE})
    store = Stream()
    result = backup([snapshot], store, compression=compression)
    archive = tmp_path / result.name
    archive.write_bytes(store.written[result.name])
    assert archive.stat().st_size == result.size
    verify_archive(archive)
    assert without_ours(tree(extracted(archive, tmp_path / "back"))) == tree(tmp_path / "cache")


# --- what is refused


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("archive-")}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "grown"])
def test_what_does_not_match_must_be_refused_and_nothing_left(tmp_path, compression, damage):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "big.bin": NOISE, "more.bin": NOISE})
    file = snapshot / "big.bin"
    times = file.stat().st_mtime_ns

    match damage:
        case "gone":
            file.unlink()
        case "cut":
            os.truncate(file, len(NOISE) - 1)
        case "grown":
            os.truncate(file, len(NOISE) + 1)
        case "flipped":
            with file.open("r+b") as stream:
                stream.seek(8 * CHUNK + 77)
                stream.write(b"?")
            # The marker has nothing to say of it: only reading tells.
            os.utime(file, ns=(times, times))
    with pytest.raises(SnapshotDamaged) as caught:
        back_up(snapshot, tmp_path / "store", compression)
    assert "big.bin" in caught.value.message
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())
    assert not threads()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_that_is_cut_while_it_is_read_must_end_the_backup(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "big.bin": NOISE * 3})

    def cut(event: Event) -> None:
        if isinstance(event, Progressed) and event.done < CHUNK * 3:
            os.truncate(snapshot / "big.bin", CHUNK * 5)

    with pytest.raises(SnapshotDamaged, match=r"big\.bin"):
        back_up(snapshot, tmp_path / "store", compression, report=cut)
    assert not list((tmp_path / "store").iterdir())
    assert not threads()


@pytest.mark.parametrize("pack", [None, compress_frame])
def test_a_file_that_cannot_be_read_must_end_every_thread(tmp_path, pack):
    (tmp_path / "bad").mkdir()
    size = (tmp_path / "bad").stat().st_size
    (tmp_path / "good").write_bytes(NOISE)
    pieces = []
    # A directory can be opened and not read, as a file on a failing disk.
    for name, length in (("good", len(NOISE)), ("bad", size), ("good", len(NOISE))):
        source = Source(tmp_path, name, length, "0" * 64, (0, 0, 0))
        layout = lay_out([Planned(Member(name, "file", length), source=source)])
        pieces += list(cut(layout))
    with (tmp_path / "out").open("w+b") as out:
        sink = FileSink(out.fileno())
        with pytest.raises(SnapshotDamaged, match="bad"), contextlib.closing(sink):
            list(stream(pieces, pack, sink, Pace(None)))
    assert not threads()


def test_a_bucket_that_fails_must_end_the_backup(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "big.bin": NOISE})
    for after in (0, 10_000, 3 * CHUNK, 9 * CHUNK):
        with pytest.raises(SourceFailed, match="gone"):
            backup([snapshot], Stream(after))
        assert not threads()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_does_not_match_must_be_written_by_order_and_recorded(tmp_path, compression):
    files = {**FILES, "big.bin": NOISE[:100_000], "gone.json": b"gone", "cut.json": b"cut", "ok.json": b"ok"}
    snapshot = make_snapshot(tmp_path / "cache", files)
    (snapshot / "big.bin").write_bytes(NOISE[1:100_001])
    (snapshot / "gone.json").unlink()
    (snapshot / "cut.json").write_bytes(b"")
    with pytest.raises(SnapshotDamaged):
        back_up(snapshot, tmp_path / "store", compression)
    result = backup([snapshot], DirectoryStore(tmp_path / "store"), compression=compression, allow_mismatch=True)
    root = f"models/acme--painter/snapshots/{REVISION}"
    assert result.mismatched == (f"{root}/big.bin", f"{root}/cut.json", f"{root}/gone.json")
    text = Path(result.location).read_bytes() if compression == "zstd" else plain_tar(Path(result.location))
    index = Index.from_text(text[text.rindex(b'{"format":1,"archive"') :].splitlines()[0])
    assert index.mismatched == result.mismatched
    stored = {entry.member.name: entry.sha256 for entry in index.entries}
    assert stored[f"{root}/big.bin"] == hashlib.sha256(NOISE[1:100_001]).hexdigest()
    back = snapshot_of(extracted(Path(result.location), tmp_path / "back"))
    assert (back / "ok.json").read_bytes() == b"ok"
    assert (back / "big.bin").read_bytes() == NOISE[1:100_001]


def test_an_incremental_archive_must_hold_only_what_the_earlier_one_lacks(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "big.bin": NOISE[:50_000]})
    first = back_up(snapshot, tmp_path / "store")
    known = frozenset((hashlib.sha256(content).hexdigest(), len(content)) for content in FILES.values())
    earlier = Earlier(Base("first", first.name), known)
    result = backup([snapshot], DirectoryStore(tmp_path / "store"), earlier=earlier)
    assert result.stored_size == 50_000
    text = Path(result.location).read_bytes()
    index = Index.from_text(text[text.rindex(b'{"format":1,"archive"') :].splitlines()[0])
    root = f"models/acme--painter/snapshots/{REVISION}"
    assert {entry.member.name.removeprefix(f"{root}/") for entry in index.elsewhere} == set(FILES)
    assert "-from-" in result.name


# --- killed, full, busy

SCRIPT = """
import sys
from pathlib import Path
from zops.archive import resume
from zops.archive.backup import backup
from zops.archive.store import DirectoryStore
snapshot, store, compression, interval, limit = sys.argv[1:]
resume.INTERVAL_S = float(interval)
sys.stdout.write("ready\\n")
sys.stdout.flush()
backup([Path(snapshot)], DirectoryStore(Path(store)), compression=compression, limit=float(limit))
"""


@contextlib.contextmanager
def backing_up(snapshot: Path, store: Path, compression: str, interval: float, limit: float):
    command = [sys.executable, "-c", SCRIPT, snapshot, store, compression, str(interval), str(limit)]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_killed_backup_must_be_gone_on_with_where_it_was_durable(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "a.bin": NOISE[: CHUNK + 5], "b.bin": NOISE, "z.bin": NOISE})
    chance = random.Random(compression)
    killed = resumed = 0
    for number in range(6):
        store = tmp_path / f"store-{number}"
        with backing_up(snapshot, store, compression, 0, 120e6) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.05, 0.7))
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        for info in DirectoryStore(store).list():
            verify_archive(info.location)
        result = backup([snapshot], DirectoryStore(store), compression=compression)
        resumed += result.resumed_size > 0
        verify_archive(result.location)
        found = without_ours(tree(extracted(Path(result.location), tmp_path / f"back-{number}")))
        assert found == tree(tmp_path / "cache")
        # Nothing but archives, not even a lock or a journal.
        assert {p.name for p in store.iterdir()} == {info.name for info in DirectoryStore(store).list()}
    assert killed >= 3
    assert resumed >= 2


def test_a_leftover_of_something_else_must_be_removed_and_not_gone_on_with(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "b.bin": NOISE})
    store = tmp_path / "store"
    with backing_up(snapshot, store, "none", 0, 40e6) as process:
        deadline = time.monotonic() + 30
        while not list(store.glob(".*.plan")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert len(list(store.glob(".*.plan"))) == 1
    (snapshot / "b.bin").write_bytes(NOISE[::-1])
    vouch(snapshot, [*FILES, "b.bin"])
    result = backup([snapshot], DirectoryStore(store), compression="none")
    assert result.resumed_size == 0
    assert [path.name for path in store.iterdir()] == [result.name]
    verify_archive(result.location)


def test_a_leftover_must_not_be_gone_on_with_in_another_compression(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "b.bin": NOISE})
    store = tmp_path / "store"
    with backing_up(snapshot, store, "zstd", 0, 40e6) as process:
        eventually(lambda: list(store.glob(".*.plan")) or process.poll() is not None, "the progress is noted")
        process.kill()
    assert len(list(store.glob(".*.plan"))) == 1
    result = backup([snapshot], DirectoryStore(store), compression="gzip")
    assert result.resumed_size == 0
    assert [path.name for path in store.iterdir()] == [result.name]
    verify_archive(result.location)
    assert without_ours(tree(extracted(Path(result.location), tmp_path / "back"))) == tree(tmp_path / "cache")


def test_a_journal_that_was_cut_must_count_as_far_as_it_goes(tmp_path):
    part = tmp_path / ".x.tar.zst.part"
    part.write_bytes(bytes(5000))
    header = {"format": 1, "id": "i", "created": "2026-01-01T00:00:00+00:00", "fingerprint": "f"}
    lines = [json.dumps(header), "[2, 4000, [[1000, 4194304, 7], [3000, 9, 8]]]", "[3, 4500, [[500, 1, 9]]"]
    (tmp_path / ".x.tar.zst.part.plan").write_text("\n".join(lines))
    (found,) = resume.leftovers(tmp_path)
    assert (found.pieces, found.size, len(found.frames)) == (2, 4000, 2)
    part.write_bytes(bytes(3999))
    assert not list(resume.leftovers(tmp_path))
    part.unlink()
    assert not list(resume.leftovers(tmp_path))
    assert not list(tmp_path.glob(".x*"))


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of a few megabytes."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("small_disk", [8, 2000, 9000, 30_000, 36_880], indirect=True)
def test_a_disk_that_is_full_at_any_stage_must_be_said_and_left_empty(tmp_path, small_disk, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": NOISE})
    with pytest.raises(HostShort) as caught:
        back_up(snapshot, small_disk / "store", compression)
    assert caught.value.code == "disk-full"
    assert not list((small_disk / "store").iterdir())
    assert not threads()


def test_a_backup_must_wait_for_who_changes_the_snapshot_and_keep_others_from_it(tmp_path, monkeypatch):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "b.bin": NOISE})
    monkeypatch.setattr("zops.cache.lock.TIMEOUT_S", 0.0)
    seen = []

    def look(event: Event) -> None:
        if isinstance(event, Progressed) and not seen:
            with hold(sidecar(snapshot) / "lock", silent, shared=True, timeout_s=0):
                seen.append("shared")
            with pytest.raises(LockHeld), hold(sidecar(snapshot) / "lock", silent, timeout_s=0):
                pass

    back_up(snapshot, tmp_path / "store", report=look)
    assert seen
    waited = []
    with hold(sidecar(snapshot) / "lock", silent):
        thread = threading.Thread(target=lambda: back_up(snapshot, tmp_path / "other", report=waited.append))
        thread.start()
        deadline = time.monotonic() + 20
        while not any(isinstance(event, Warned) for event in waited) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not (tmp_path / "other").exists()
    thread.join()
    assert list((tmp_path / "other").iterdir())
    assert not (sidecar(snapshot) / "lock").exists()


def test_a_limit_must_be_kept(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "b.bin": NOISE[: 2 * CHUNK]})
    began = time.monotonic()
    back_up(snapshot, tmp_path / "store", "none", limit=12e6)
    # The last piece need not wait for itself.
    assert time.monotonic() - began >= CHUNK / 12e6


# --- what is left as it was


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_page_cache_must_stay_as_it_was(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "warm.bin": NOISE, "cold.bin": NOISE, "half.bin": NOISE})
    os.sync()
    for name in ("warm.bin", "cold.bin", "half.bin"):
        with (snapshot / name).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            stream.read({"warm.bin": -1, "cold.bin": 0, "half.bin": len(NOISE) // 2}[name])
    before = {name: resident_bytes(snapshot / name) for name in ("warm.bin", "cold.bin", "half.bin")}
    if before["cold.bin"]:
        pytest.skip("a file system that lives in the page cache")
    archive = back_up(snapshot, tmp_path / "store", compression)
    for name, was in before.items():
        assert abs(resident_bytes(snapshot / name) - was) <= 0.02 * len(NOISE), name
    assert resident_bytes(archive) <= 0.05 * archive.stat().st_size


def test_where_the_page_cache_cannot_be_passed_only_what_was_not_in_it_must_be_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(NOISE)
    os.sync()
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        if resident_bytes(path):
            pytest.skip("a file system that lives in the page cache")
        os.pread(stream.fileno(), 300_000, CHUNK + 40_960)
    before = resident_bytes(path)
    assert before
    buffer, read = new_buffer(CHUNK), bytearray()
    file = OpenFile(path)
    file._refused = True
    for start in range(0, len(NOISE), CHUNK):
        count = file.unobtrusively(buffer, start, min(CHUNK, len(NOISE) - start))
        read += buffer[:count]
    file.close()
    assert read == NOISE
    assert abs(resident_bytes(path) - before) <= 0.02 * len(NOISE)


PEAK = """
import sys
from pathlib import Path
from zops.archive.backup import backup
from zops.archive.store import DirectoryStore
backup([Path(sys.argv[1])], DirectoryStore(Path(sys.argv[2])), compression=sys.argv[3])
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.parametrize(("compression", "limit_mb"), [("zstd", 160), ("gzip", 160), ("none", 70)])
def test_memory_must_stay_bounded(tmp_path, compression, limit_mb):
    snapshot = place(tmp_path / "cache", MODEL, REVISION)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_bytes(b"{}")
    digest = hashlib.sha256()
    with (snapshot / "big.bin").open("wb") as stream:
        for _ in range(8):
            stream.write(NOISE)
            digest.update(NOISE)
    size = 8 * len(NOISE)
    entries = (
        FileEntry("big.bin", size, digest.hexdigest()),
        FileEntry("model_index.json", 2, hashlib.sha256(b"{}").hexdigest()),
    )
    manifest = Manifest(MODEL, REVISION, entries)
    write_manifest(snapshot, manifest)
    write_marker(snapshot, manifest, {entry.path: stat_key(snapshot / entry.path) for entry in entries})
    command = [sys.executable, "-c", PEAK, snapshot, tmp_path / "store", compression]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
    assert int(done.stdout) <= limit_mb * 1_000_000


# --- shared blocks


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(tmp_path, request):
    """A file system whose files can share blocks."""
    program = shutil.which(f"mkfs.{request.param}")
    if os.geteuid() != 0 or program is None:
        pytest.skip(f"needs root and mkfs.{request.param}")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as stream:
        stream.truncate(400 << 20)
    subprocess.run([program, "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"{request.param} cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_plain_archive_must_share_the_blocks_of_the_snapshot(sharing_disk):
    files = {**FILES, "a.bin": NOISE, "b.bin": NOISE[::-1], "c.bin": NOISE[: CHUNK + 4096]}
    snapshot = make_snapshot(sharing_disk / "cache", files)
    os.sync()
    before = shutil.disk_usage(sharing_disk).free
    result = backup([snapshot], DirectoryStore(sharing_disk / "store"), compression="none")
    os.sync()
    assert result.cloned
    assert before - shutil.disk_usage(sharing_disk).free < len(NOISE) / 4
    verify_archive(result.location)
    found = without_ours(tree(extracted(Path(result.location), sharing_disk / "back")))
    assert found == tree(sharing_disk / "cache")
    with (snapshot / "b.bin").open("r+b") as stream:
        times = os.fstat(stream.fileno()).st_mtime_ns
        stream.seek(5000)
        stream.write(b"?")
    os.utime(snapshot / "b.bin", ns=(times, times))
    with pytest.raises(SnapshotDamaged, match=r"b\.bin"):
        back_up(snapshot, sharing_disk / "store", "none")
    assert [path.name for path in (sharing_disk / "store").iterdir()] == [result.name]
    trusting = backup([snapshot], DirectoryStore(sharing_disk / "store"), compression="none", trust_marker=True)
    assert b'"trusted": true' in Path(trusting.location).read_bytes()[:20_000]


def test_trust_without_shared_blocks_must_be_refused_aloud(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    told = []
    result = backup(
        [snapshot], DirectoryStore(tmp_path / "store"), compression="zstd", trust_marker=True, report=told.append
    )
    assert any(isinstance(event, Warned) and "read all the same" in event.text for event in told)
    assert b'"trusted"' not in plain_tar(Path(result.location))

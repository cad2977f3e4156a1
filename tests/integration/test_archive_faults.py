"""What may go wrong with archives: flipped, cut, killed, full. Nothing wrong is restored, nothing left behind."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.archives import FILES, MODEL, REVISION, back_up, make_snapshot, tree
from zops.archive.restore import restore, verify_archive
from zops.archive.store import DirectoryStore
from zops.cache.layout import is_verified, place
from zops.cache.manifest import require_verified
from zops.errors import ArchiveDamaged, HostShort, ZopsError
from zops.events import Event, Progressed, Started

FLIPS = 150
CUTS = 60


def flipped(data: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_every_flipped_bit_and_every_cut_must_be_found_and_nothing_restored(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache")
    archive, _ = back_up(snapshot, tmp_path / "store", compression)
    whole = archive.read_bytes()
    chance = random.Random(7)
    damaged = [flipped(whole, chance) for _ in range(FLIPS)]
    damaged += [whole[: chance.randrange(len(whole))] for _ in range(CUTS)]
    damaged += [whole[:-n] for n in (1, 9, 512, 1024)] + [whole + b"\0" * 512, whole + whole]
    for content in damaged:
        archive.write_bytes(content)
        with pytest.raises(ArchiveDamaged):
            restore(archive, tmp_path / "back")
        with pytest.raises(ArchiveDamaged):
            verify_archive(archive)
        assert not (tmp_path / "back").exists()
    archive.write_bytes(whole)
    assert restore(archive, tmp_path / "back").changed


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.zst", "tar"])
def test_a_damaged_archive_of_another_program_must_not_pass_a_given_manifest(tmp_path, suffix):
    snapshot = make_snapshot(tmp_path / "cache")
    manifest = require_verified(snapshot)
    archive = tmp_path / f"backup.{suffix}"
    command = ["tar", "-caf", archive, "--exclude", ".zops", "-C", tmp_path, "cache"]
    subprocess.run(command, check=True)
    whole = archive.read_bytes()
    chance = random.Random(8)
    survived = 0
    for number in range(120):
        archive.write_bytes(flipped(whole, chance) if number % 2 else whole[: chance.randrange(len(whole))])
        try:
            restored = restore(archive, tmp_path / "back", manifest=manifest).snapshots[0].path
        except ZopsError:
            assert not (tmp_path / "back").exists()
            continue
        # Bits that mean nothing to what is restored (a time stamp, an owner, padding) may differ; content may not.
        assert {p: c for p, (_, _, c) in tree(restored).items() if p in FILES} == FILES
        survived += 1
        shutil.rmtree(tmp_path / "back")
    assert survived < 60


def test_a_damaged_archive_must_leave_what_was_in_the_cache(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    old = make_snapshot(tmp_path / "back", {"model_index.json": b"[1]"})
    before = tree(tmp_path / "back")
    content = bytearray(archive.read_bytes())
    content[len(content) // 3] ^= 16
    archive.write_bytes(content)
    with pytest.raises(ArchiveDamaged):
        restore(archive, tmp_path / "back")
    assert tree(tmp_path / "back") == before
    assert is_verified(old)


# --- killed

BIG = {**FILES, "transformer/weights.safetensors": b"0123456789abcdef" * 1_500_000}
SCRIPT = """
import sys
from pathlib import Path
from zops.archive.backup import backup
from zops.archive.restore import restore
from zops.archive.store import DirectoryStore
what, source, target, compression = sys.argv[1:]
sys.stdout.write("ready\\n")
sys.stdout.flush()
if what == "backup":
    backup([Path(source)], DirectoryStore(Path(target)), compression=compression)
else:
    restore(source, Path(target))
"""


def killed_after(seconds: float, *arguments: object) -> int:
    """Run the script and kill it that long after it began to work; return its exit status."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(signal.SIGKILL)
    return process.returncode


def moments(count: int, longest: float) -> list[float]:
    chance = random.Random(9)
    return [chance.uniform(0, longest) for _ in range(count)]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_killed_backup_must_leave_no_archive_and_no_orphan_after_the_next(tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", BIG)
    killed = 0
    for number, moment in enumerate(moments(8, 0.15)):
        store = tmp_path / f"store-{number}"
        status = killed_after(moment, "backup", snapshot, store, compression)
        killed += status == -signal.SIGKILL
        for info in DirectoryStore(store).list():
            verify_archive(info.location)
        archive, _ = back_up(snapshot, store, compression)
        verify_archive(archive)
        names = {path.name for path in store.iterdir()}
        assert names == {info.name for info in DirectoryStore(store).list()}
    assert killed >= 3


@pytest.mark.parametrize("before", ["nothing", "another snapshot"])
def test_a_killed_restore_must_leave_the_old_or_the_new_and_no_orphan_after_the_next(tmp_path, before):
    snapshot = make_snapshot(tmp_path / "cache", BIG)
    archive, _ = back_up(snapshot, tmp_path / "store")
    old = {"model_index.json": b"[1]", "old.json": b"old"}
    killed = 0
    for number, moment in enumerate(moments(8, 0.2)):
        cache = tmp_path / f"back-{number}"
        if before != "nothing":
            make_snapshot(cache, old)
        status = killed_after(moment, "restore", archive, cache, "-")
        killed += status == -signal.SIGKILL
        target = place(cache, MODEL, REVISION)
        aside = target.with_name(f".{REVISION}.replaced")
        if target.exists():
            assert is_verified(target)
            assert (target / "old.json").exists() or tree(target) == tree(snapshot)
        else:
            assert before == "nothing" or is_verified(aside)
        restore(archive, cache)
        assert tree(cache) == tree(tmp_path / "cache")
        assert is_verified(target)
    assert killed >= 3


def test_what_a_restore_killed_between_its_two_renames_had_moved_aside_must_be_put_back(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    target = make_snapshot(tmp_path / "back", {"model_index.json": b"[1]"})
    before = tree(tmp_path / "back")
    target.rename(target.with_name(f".{REVISION}.replaced"))
    target.with_name(f".{REVISION}.restoring").mkdir()
    with pytest.raises(Stop):
        restore(archive, tmp_path / "back", report=stop_at_first_progress)
    shutil.rmtree(target.with_name(f".{REVISION}.restoring"), ignore_errors=True)
    assert tree(tmp_path / "back") == before
    assert is_verified(target)
    assert restore(archive, tmp_path / "back").changed
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")


# --- interrupted, full, forbidden


class Stop(BaseException):
    """As an interrupt from the keyboard: no error that anybody handles."""


def stop_at_first_progress(event: Event) -> None:
    if isinstance(event, Progressed):
        raise Stop


def test_an_interrupted_backup_must_leave_nothing(tmp_path):
    from zops.archive.backup import backup

    snapshot = make_snapshot(tmp_path / "cache", BIG)
    with pytest.raises(Stop):
        backup([snapshot], DirectoryStore(tmp_path / "store"), report=stop_at_first_progress)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_restore_that_was_interrupted_before_a_file_was_complete_must_leave_nothing(tmp_path):
    archive, _ = back_up(
        make_snapshot(tmp_path / "cache", {"model_index.json": NOISE[:12_000_000]}), tmp_path / "store"
    )
    with pytest.raises(Stop):
        restore(archive, tmp_path / "back", report=stop_at_first_progress)
    assert not (tmp_path / "back").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=60", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


NOISE = random.Random(1).randbytes(20_000_000)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_full_store_must_be_said_and_left_empty(tmp_path, small_disk, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": NOISE})
    with pytest.raises(HostShort) as caught:
        back_up(snapshot, small_disk / "store", compression)
    assert caught.value.code == "disk-full"
    assert list((small_disk / "store").iterdir()) == []


def test_a_cache_without_room_must_be_said_before_anything_is_written(tmp_path, small_disk):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": NOISE}), tmp_path / "store")
    with pytest.raises(HostShort, match="do not fit"):
        restore(archive, small_disk / "back")
    many = {f"{n}.json": b"" for n in range(70)} | {"model_index.json": b"{}"}
    archive, _ = back_up(make_snapshot(tmp_path / "many", many), tmp_path / "store-2")
    with pytest.raises(HostShort, match="inodes"):
        restore(archive, small_disk / "back")
    assert list(small_disk.iterdir()) == []


def test_a_foreign_archive_without_room_must_be_refused_while_it_is_looked_at(tmp_path, small_disk):
    make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": NOISE})
    subprocess.run(["tar", "-caf", tmp_path / "x.tar.gz", "-C", tmp_path, "cache"], check=True)
    with pytest.raises(HostShort, match="more than"):
        restore(tmp_path / "x.tar.gz", small_disk / "back")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_must_be_said_and_left_as_it_was(tmp_path, small_disk):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": NOISE[:9_000_000]})
    archive, _ = back_up(snapshot, tmp_path / "store")

    def fill(event: Event) -> None:
        if isinstance(event, Progressed) and not (small_disk / "ballast").exists():
            (small_disk / "ballast").write_bytes(bytes(12_000_000))

    with pytest.raises(HostShort) as caught:
        restore(archive, small_disk / "back", report=fill)
    assert caught.value.code == "disk-full"
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    assert tree(restore(archive, small_disk / "back").snapshots[0].path) == tree(snapshot)


def test_the_record_of_a_snapshot_must_not_travel(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store", "none")
    assert b"verified.json" not in archive.read_bytes()
    restored = restore(archive, tmp_path / "back").snapshots[0].path
    stats = json.loads((restored / ".zops/verified.json").read_text())["stats"]
    assert stats["model_index.json"][2] == (Path(restored) / "model_index.json").stat().st_ino


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_disk_that_fills_up_at_any_moment_must_leave_what_was_there(tmp_path, small_disk, compression):
    files = {**FILES, "a/one.bin": NOISE[:5_000_000], "b/two.bin": NOISE[5_000_000:9_000_000]}
    snapshot = make_snapshot(tmp_path / "cache", files)
    archive, _ = back_up(snapshot, tmp_path / "store", compression)
    cache = small_disk / "back"
    make_snapshot(cache, {"model_index.json": b"[1]"})
    before = tree(cache)
    full = 0
    for left in [*range(0, 9_400_000, 600_000), 9_100_000]:
        ballast = small_disk / "ballast"
        stat = os.statvfs(small_disk)

        def fill(event: Event, size: int = stat.f_bavail * stat.f_frsize - left, path: Path = ballast) -> None:
            # Once room was checked: the disk fills up behind the restore's back.
            if isinstance(event, Started) and event.task == "restore":
                path.write_bytes(bytes(size))

        try:
            restore(archive, cache, report=fill)
        except HostShort as error:
            assert error.code == "disk-full"
            assert tree(cache) == before
            full += 1
        else:
            assert tree(place(cache, MODEL, REVISION)) == tree(snapshot)
            shutil.rmtree(cache)
            make_snapshot(cache, {"model_index.json": b"[1]"})
        ballast.unlink()
    assert full >= 14

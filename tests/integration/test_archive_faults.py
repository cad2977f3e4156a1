"""What may go wrong with archives: flipped, cut, killed, full. Nothing wrong is restored, nothing left behind."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import full_disk
from tests.support.archives import FILES, REVISION, back_up, make_snapshot, tree
from tests.support.kills import kill_backups, kill_restores
from zops.archive.restore import restore, verify_archive
from zops.archive.store import DirectoryStore
from zops.cache.layout import is_verified
from zops.cache.manifest import require_verified
from zops.errors import ArchiveDamaged, HostShort, ZopsError
from zops.events import Event, Progressed

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


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_killed_backup_must_leave_no_archive_and_no_orphan_after_the_next(tmp_path, compression):
    kills = kill_backups(make_snapshot(tmp_path / "cache", BIG), tmp_path, 8, compression=compression)
    assert kills.wrong == []
    assert kills.killed >= 2


@pytest.mark.parametrize("over_another", [False, True])
def test_a_killed_restore_must_leave_the_old_or_the_new_and_no_orphan_after_the_next(tmp_path, over_another):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", BIG), tmp_path / "store")
    kills = kill_restores(archive, tmp_path / "killed", 8, over_another=over_another)
    assert kills.wrong == []
    assert kills.killed >= 2


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
    with full_disk.small_disk(tmp_path / "disk") as disk:
        yield disk


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


SIZES = [*range(0, 9_400_000, 600_000), 9_100_000]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_disk_that_fills_up_at_any_moment_must_leave_what_was_there(tmp_path, small_disk, compression):
    files = {**FILES, "a/one.bin": NOISE[:5_000_000], "b/two.bin": NOISE[5_000_000:9_000_000]}
    snapshot = make_snapshot(tmp_path / "cache", files)
    archive, _ = back_up(snapshot, tmp_path / "store", compression)
    filled = full_disk.fill_restores(archive, small_disk, snapshot, SIZES)
    assert filled.wrong == []
    assert filled.full >= 14
    filled = full_disk.fill_backups(snapshot, small_disk, compression, SIZES)
    assert filled.wrong == []
    assert filled.full >= 14

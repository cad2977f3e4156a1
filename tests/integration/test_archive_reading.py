"""Reading archives: resuming, reusing, sharing blocks, picking files, chains, and looking without touching."""

import gzip
import io
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.archives import FILES, MODEL, REVISION, back_up, make_snapshot, tree, vouch
from tests.support.damage import try_damages
from tests.support.kills import kill_restores
from zops.archive import staged, unpack
from zops.archive.access import access_to
from zops.archive.backup import backup
from zops.archive.chain import read_earlier
from zops.archive.compare import compare
from zops.archive.describe import describe
from zops.archive.format import CHUNK
from zops.archive.pick import pick
from zops.archive.reader import OwnArchive, open_stream
from zops.archive.restore import restore, verify_archive
from zops.archive.store import DirectoryStore
from zops.cache.layout import is_verified, place
from zops.cache.manifest import read_marker, require_verified
from zops.cache.reading import SMALL
from zops.cli.main import run
from zops.errors import ArchiveDamaged, SnapshotMissing, SourceFailed, UsageError
from zops.events import Event, Progressed

KINDS = ["zstd", "gzip", "none"]
CHANCE = random.Random(5)
LARGE = {
    **FILES,
    "transformer/one.safetensors": CHANCE.randbytes(2 * CHUNK + 4097),
    "transformer/two.safetensors": CHANCE.randbytes(CHUNK),
    "vae/three.safetensors": CHANCE.randbytes(SMALL + 1),
    "vae/four.safetensors": bytes(SMALL),
}


class Stop(BaseException):
    """As an interrupt from the keyboard."""


def stop_after(size: int):
    def report(event: Event) -> None:
        if isinstance(event, Progressed) and event.done >= size:
            raise Stop

    return report


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_files_must_come_back_equal_whatever_the_compression(tmp_path, kind):
    snapshot = make_snapshot(tmp_path / "cache", LARGE)
    archive, _ = back_up(snapshot, tmp_path / "store", kind)
    assert verify_archive(archive).verified
    restored = restore(archive, tmp_path / "back").snapshots[0]
    assert tree(restored.path) == tree(snapshot)
    assert is_verified(restored.path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_offers_ranges_must_be_read_by_them(tmp_path, kind):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store", kind)
    content = archive.read_bytes()
    asked: list[tuple[int, int]] = []

    def read_range(start: int, end: int) -> bytes:
        asked.append((start, end))
        return content[start:end]

    opened = open_stream(io.BytesIO(content), read_range=read_range)
    names = [member.name for member in opened.members if member.kind == "file"]
    opened.unpack(names, lambda _: unpack.Nowhere(), unpack.ignored)
    assert sum(end - start for start, end in asked) > len(content) * 0.9

    def failing(start: int, end: int) -> bytes:
        raise SourceFailed("the store broke off")

    with pytest.raises(SourceFailed):
        open_stream(io.BytesIO(content), read_range=failing).unpack(names, lambda _: unpack.Nowhere(), unpack.ignored)


# --- damaged


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_to_our_archives_must_be_found_and_restore_nothing(tmp_path, kind):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store", kind)
    outcome = try_damages(archive, tmp_path / "back", 60)
    assert (outcome.refused, outcome.wrong) == (60, [])


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.zst", "tar"])
def test_random_damage_to_archives_of_other_programs_must_never_bring_wrong_files(tmp_path, suffix):
    manifest = require_verified(make_snapshot(tmp_path / "cache"))
    archive = tmp_path / f"backup.{suffix}"
    subprocess.run(["tar", "-caf", archive, "--exclude", ".zops", "-C", tmp_path, "cache"], check=True)
    outcome = try_damages(archive, tmp_path / "back", 60, manifest=manifest, verify=False)
    assert outcome.wrong == []
    # Bits that mean nothing (a time stamp, an owner, padding) may differ.
    assert outcome.refused > 20


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_several_members_must_be_told_of_each(tmp_path, kind):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store", kind)
    with archive.open("rb") as stream:
        opened = open_stream(stream)
        assert isinstance(opened, OwnArchive)
        index = opened.index
    content = bytearray(archive.read_bytes())
    bad = {"one.safetensors", "two.safetensors", "config.json"}
    for entry in index.entries:
        if Path(entry.member.name).name in bad:
            start, packed = 0, 0
            for frame in index.frames:
                if start + frame.size > entry.offset:
                    break
                start, packed = start + frame.size, packed + frame.compressed
            content[(packed if index.frames else entry.offset) + 20] ^= 4
    archive.write_bytes(content)
    with pytest.raises(ArchiveDamaged) as caught:
        verify_archive(archive)
    assert {Path(name).name for name in caught.value.details["members"]} == bad
    threads = set(threading.enumerate())
    with pytest.raises(ArchiveDamaged):
        restore(archive, tmp_path / "back")
    assert set(threading.enumerate()) <= threads
    assert not (tmp_path / "back").exists()


def test_a_target_that_fails_must_end_every_thread(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store")
    threads = set(threading.enumerate())

    def broken(entry):
        raise OSError(5, "broken")

    with archive.open("rb") as stream:
        opened = open_stream(stream)
        names = [member.name for member in opened.members if member.kind == "file"]
        with pytest.raises(OSError, match="broken"):
            opened.unpack(names, broken, unpack.ignored)
    assert set(threading.enumerate()) <= threads


# --- killed and resumed


@pytest.mark.parametrize("kind", ["zstd", "none"])
def test_a_killed_restore_must_always_complete_and_leave_no_orphan(tmp_path, kind):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store", kind)
    kills = kill_restores(archive, tmp_path / "caches", 8, longest=0.3)
    assert kills.wrong == []
    assert kills.killed >= 2


def test_a_resumed_restore_must_keep_what_was_complete_and_read_only_the_rest(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", LARGE)
    archive, _ = back_up(snapshot, tmp_path / "store")
    with pytest.raises(Stop):
        restore(archive, tmp_path / "back", report=stop_after(2 * CHUNK))
    left = next((tmp_path / "back").glob("models/*/snapshots/.*.restoring"))
    lines = (left / ".zops/restoring.jsonl").read_text().splitlines()
    inodes = {json.loads(line)["path"]: json.loads(line)["stat"][2] for line in lines[1:]}
    assert inodes
    progress: list[Event] = []
    result = restore(archive, tmp_path / "back", report=progress.append).snapshots[0]
    assert result.kept == len(inodes)
    assert {path: (result.path / path).stat().st_ino for path in inodes} == inodes
    read = max(event.done for event in progress if isinstance(event, Progressed))
    assert read == sum(len(content) for path, content in LARGE.items() if path not in inodes)
    assert tree(result.path) == tree(snapshot)
    assert [path.name for path in result.path.parent.iterdir()] == [REVISION]


@pytest.mark.parametrize("change", ["touched", "replaced", "unrecorded", "other archive", "torn record", "a link"])
def test_what_the_record_does_not_prove_must_be_restored_anew(tmp_path, change):
    snapshot = make_snapshot(tmp_path / "cache", LARGE)
    archive, _ = back_up(snapshot, tmp_path / "store")
    with pytest.raises(Stop):
        restore(archive, tmp_path / "back", report=stop_after(CHUNK))
    left = next((tmp_path / "back").glob("models/*/snapshots/.*.restoring"))
    record = left / ".zops/restoring.jsonl"
    lines = record.read_text().splitlines()
    victim = left / json.loads(lines[-1])["path"]
    wrong = victim.read_bytes()[:-1] + b"!"
    if change == "touched":
        victim.write_bytes(wrong)
    elif change == "replaced":
        # Made beside it: once the old one is gone, the file system may give its inode to the new one.
        other = victim.with_name("other")
        other.write_bytes(wrong)
        os.utime(other, ns=(0, json.loads(lines[-1])["stat"][1]))
        other.rename(victim)
    elif change == "unrecorded":
        record.write_text("\n".join(lines[:-1]) + "\n")
        victim.write_bytes(wrong)
    elif change == "torn record":
        record.write_text("\n".join([*lines[:-1], lines[-1][:30]]))
        victim.write_bytes(wrong)
    elif change == "a link":
        victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "store")
        other = make_snapshot(tmp_path / "other", {**LARGE, "more.json": b"1"})
        archive, snapshot = back_up(other, tmp_path / "store")[0], other
    (left / "stray").write_text("from nowhere")
    result = restore(archive, tmp_path / "back").snapshots[0]
    assert tree(result.path) == tree(snapshot)
    assert is_verified(result.path)


def test_a_restore_killed_between_its_marker_and_its_rename_must_read_no_large_file_again(tmp_path, monkeypatch):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store")

    def killed(_target: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(staged, "put_in_place", killed)
        with pytest.raises(Stop):
            restore(archive, tmp_path / "back")
    assert restore(archive, tmp_path / "back").snapshots[0].kept == len(LARGE)
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")


# --- over what is there


@pytest.mark.parametrize("vouched", [True, False])
def test_only_what_differs_must_be_written_over_a_snapshot(tmp_path, vouched):
    snapshot = make_snapshot(tmp_path / "cache", LARGE)
    archive, _ = back_up(snapshot, tmp_path / "store")
    target = restore(archive, tmp_path / "back").snapshots[0].path
    before = tmp_path / "before"
    shutil.copytree(target, before, copy_function=os.link)  # so that no file gets the inode of one that is gone
    changed = {"transformer/two.safetensors": os.urandom(CHUNK), "vae/config.json": b"{}"}
    for path, content in changed.items():
        (target / path).unlink()
        (target / path).write_bytes(content)
    (target / "extra.json").write_text("[]")
    if not vouched:
        (target / ".zops/verified.json").unlink()
    result = restore(archive, tmp_path / "back").snapshots[0]
    assert result.kept == len(LARGE) - len(changed)
    assert tree(target) == tree(snapshot)
    assert {path for path in LARGE if not (target / path).samefile(before / path)} == changed.keys()
    assert read_marker(target).stats.keys() == LARGE.keys()


def test_a_file_behind_a_link_must_not_be_reused(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    archive, _ = back_up(snapshot, tmp_path / "store")
    target = place(tmp_path / "back", MODEL, REVISION)
    shutil.copytree(snapshot, target)
    shutil.move(target / "vae", tmp_path / "vae")
    (target / "vae").symlink_to(tmp_path / "vae")
    (target / "model_index.json").unlink()
    (target / "model_index.json").symlink_to(snapshot / "model_index.json")
    result = restore(archive, tmp_path / "back").snapshots[0]
    assert tree(target) == tree(snapshot)
    assert not (target / "vae").is_symlink()
    assert result.kept == 1  # the empty file


def test_hard_links_must_come_back_as_such(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {"model_index.json": b"{}", "a.bin": b"same" * 50_000})
    os.link(snapshot / "a.bin", snapshot / "b.bin")
    vouch(snapshot, ["model_index.json", "a.bin", "b.bin"])
    archive, _ = back_up(snapshot, tmp_path / "store")
    assert "hardlink" in {member.kind for member in describe(archive).members}
    target = restore(archive, tmp_path / "back").snapshots[0].path
    assert tree(target) == tree(snapshot)
    assert (target / "a.bin").stat().st_ino == (target / "b.bin").stat().st_ino
    assert is_verified(target)


# --- chains


@pytest.fixture
def chain(tmp_path):
    """Three archives, each building on the one before; the snapshot as it was at the last."""
    store = DirectoryStore(tmp_path / "store")
    paths, earlier = [], None
    for number in range(3):
        files = LARGE | {f"text_encoder/{n}.bin": bytes([n]) * 100_000 for n in range(number)}
        snapshot = make_snapshot(tmp_path / f"cache-{number}", files, revision=f"{number}" * 40)
        result = backup([snapshot], store, compression=KINDS[number], earlier=earlier)
        paths.append(Path(result.location))
        info = next(info for info in store.list() if info.location == result.location)
        earlier = read_earlier(store, info)
    return paths, snapshot


def test_an_incremental_archive_must_be_restored_through_its_chain(tmp_path, chain):
    paths, snapshot = chain
    restored = restore(paths[-1], tmp_path / "back").snapshots[0].path
    assert tree(restored) == tree(snapshot)
    shown = describe(paths[-1])
    assert len(shown.chain) == 2
    assert verify_archive(paths[-1]).verified
    pick(paths[-1], ["transformer/one.safetensors"], tmp_path / "one")
    assert (tmp_path / "one/transformer/one.safetensors").read_bytes() == LARGE["transformer/one.safetensors"]


@pytest.mark.parametrize("what", ["missing", "damaged", "another"])
def test_a_chain_that_is_not_whole_must_be_refused_before_anything_is_written(tmp_path, chain, what):
    first = chain[0][0]
    if what == "missing":
        first.unlink()
    elif what == "another":
        # All that is looked for is in it, but it is not the archive that was built on.
        other = back_up(make_snapshot(tmp_path / "other", LARGE), tmp_path / "store-2")[0]
        shutil.copy(other, first)
    else:
        content = bytearray(first.read_bytes())
        content[5000] ^= 1
        first.write_bytes(content)
    with pytest.raises(SourceFailed if what == "missing" else ArchiveDamaged):
        restore(chain[0][-1], tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- what did not match when it was backed up


def test_a_mismatched_snapshot_must_be_restored_only_when_told_and_count_as_unverified(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    (snapshot / "vae/config.json").write_bytes(b"edited by hand")
    (snapshot / "tokenizer/empty.txt").unlink()
    archive = Path(backup([snapshot], DirectoryStore(tmp_path / "store"), allow_mismatch=True).location)
    with pytest.raises(ArchiveDamaged) as caught:
        restore(archive, tmp_path / "back")
    assert caught.value.code == "archive-mismatched"
    assert not (tmp_path / "back").exists()
    restored = restore(archive, tmp_path / "back", allow_mismatch=True).snapshots[0]
    assert not restored.verified
    assert not is_verified(restored.path)
    assert (restored.path / "vae/config.json").read_bytes() == b"edited by hand"
    assert not (restored.path / "tokenizer/empty.txt").exists()


# --- single files and other places


def test_single_files_must_come_out_verified_and_replace_what_was_there(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store")
    (tmp_path / "out/vae").mkdir(parents=True)
    (tmp_path / "out/vae/config.json").write_text("old")
    picked = pick(archive, ["vae/config.json", "transformer/one.safetensors"], tmp_path / "out")
    assert picked.verified
    contents = {path: content for path, (_, _, content) in tree(tmp_path / "out").items() if content}
    assert contents == {path: LARGE[path] for path in ("vae/config.json", "transformer/one.safetensors")}
    with pytest.raises(SnapshotMissing) as caught:
        pick(archive, ["no/such"], tmp_path / "other")
    assert caught.value.code == "archive-without-file"
    assert not (tmp_path / "other").exists()


def test_a_damaged_file_must_not_replace_what_was_there(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache", LARGE), tmp_path / "store", "none")
    content = archive.read_bytes()
    place_of = content.index(LARGE["transformer/two.safetensors"][:64])
    archive.write_bytes(content[:place_of] + b"!" + content[place_of + 1 :])
    (tmp_path / "out/transformer").mkdir(parents=True)
    (tmp_path / "out/transformer/two.safetensors").write_text("old")
    before = tree(tmp_path / "out")
    with pytest.raises(ArchiveDamaged):
        pick(archive, ["transformer/two.safetensors"], tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_snapshot_must_become_the_directory_that_was_named_unless_that_holds_something(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    archive, _ = back_up(snapshot, tmp_path / "store")
    into = tmp_path / "new/place"
    assert restore(archive, tmp_path / "unused", into=into).snapshots[0].path == into
    assert tree(into) == tree(snapshot)
    assert not restore(archive, tmp_path / "unused", into=into).changed
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/letter").write_text("mine")
    with pytest.raises(UsageError, match="no snapshot of zops"):
        restore(archive, tmp_path / "unused", into=tmp_path / "letters")
    assert (tmp_path / "letters/letter").read_text() == "mine"
    assert not (tmp_path / "unused").exists()


# --- shared blocks


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(tmp_path, request):
    """A file system of 400 MB that can share blocks, in a file."""
    make = shutil.which(f"mkfs.{request.param}")
    if make is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{request.param} to make a file system in a file")
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(400 << 20)
    disk.mkdir()
    subprocess.run([make, "-q", image], check=True, stdout=subprocess.DEVNULL)
    mounted = subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system in a file here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_plain_tar_must_be_restored_by_sharing_its_blocks(sharing_disk):
    snapshot = make_snapshot(sharing_disk / "cache", LARGE)
    archive, _ = back_up(snapshot, sharing_disk / "store", "none")
    os.sync()
    before = shutil.disk_usage(sharing_disk).used
    restored = restore(archive, sharing_disk / "back").snapshots[0].path
    os.sync()
    assert shutil.disk_usage(sharing_disk).used - before < (2 << 20)
    assert tree(restored) == tree(snapshot)
    content = bytearray(archive.read_bytes())
    content[content.index(LARGE["transformer/two.safetensors"][:64])] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ArchiveDamaged):
        restore(archive, sharing_disk / "bad")
    assert not (sharing_disk / "bad").exists()


# --- looking


def test_showing_and_comparing_must_read_no_data(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", LARGE)
    archive, result = back_up(snapshot, tmp_path / "store")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1  # data: whoever reads it complains
    archive.write_bytes(content)
    shown = describe(archive)
    assert shown.size == result.size
    assert [s.manifest.digest for s in shown.snapshots] == list(result.digests)
    assert compare(str(archive), str(snapshot), MODEL).equal
    (snapshot / "vae/config.json").write_bytes(b"other")
    (snapshot / "model_index.json").unlink()
    found = compare(str(archive), str(snapshot), MODEL)
    assert (found.added, found.removed, found.changed) == ((), ("model_index.json",), ("vae/config.json",))
    other, _ = back_up(make_snapshot(tmp_path / "other", {**FILES, "new.json": b"1"}), tmp_path / "store-2")
    found = compare(str(archive), str(other), MODEL)
    assert found.added == ("new.json",)
    assert set(found.removed) == LARGE.keys() - FILES.keys()


def test_an_archive_of_another_program_must_be_shown_and_compared(tmp_path):
    make_snapshot(tmp_path / "cache")
    shutil.rmtree(place(tmp_path / "cache", MODEL, REVISION) / ".zops")
    archive = tmp_path / "x.tar.gz"
    subprocess.run(["tar", "-caf", archive, "-C", tmp_path, "cache"], check=True)
    assert describe(archive).compression == "unknown"
    assert compare(str(archive), str(place(tmp_path / "cache", MODEL, REVISION)), MODEL).equal


def test_our_archive_compressed_once_more_must_be_refused_with_the_way_out(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store", "none")
    again = tmp_path / "again.tar.gz"
    again.write_bytes(gzip.compress(archive.read_bytes()))
    with pytest.raises(ArchiveDamaged) as caught:
        restore(again, tmp_path / "back")
    assert "gunzip" in caught.value.hint


def test_access_to_a_file_must_give_the_same_bytes_as_a_stream(tmp_path):
    from zops.cache.reading import new_buffer

    content = os.urandom(300_001)
    (tmp_path / "x").write_bytes(content)
    with (tmp_path / "x").open("rb") as stream, access_to(stream) as access:
        for start, count in ((0, 4096), (1, 5), (4096, 8192), (299_990, 11), (123_457, 100_000)):
            assert bytes(access.read(new_buffer(1 << 20), (start, count))) == content[start : start + count]
        with pytest.raises(ArchiveDamaged):
            access.read(new_buffer(1 << 20), (299_990, 12))


# --- the command line


def test_the_commands_must_answer_in_documented_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOPS_OUTPUT", "json")
    snapshot = make_snapshot(tmp_path / "cache")
    archive, _ = back_up(snapshot, tmp_path / "store")
    Path("zops.yaml").write_text(
        f"model: {MODEL}\ncache: {{dir: {tmp_path}/cache}}\nbackup: {{to: {tmp_path}/store}}\nruntime: process\n"
    )

    def answer(*arguments: str, status: int = 0):
        assert run(list(arguments)) == status
        return json.loads(capsys.readouterr().out or "null")

    listed = answer("archive", "list")
    assert [each["archive"] for each in listed] == [str(archive)]
    shown = answer("archive", "show")
    assert shown["compression"] == "zstd"
    assert {each["kind"] for each in shown["members"]} == {"file", "directory"}
    assert answer("archive", "verify")["verified"] is True
    assert answer("cache", "restore", "--verify-only")["verified"] is True
    assert answer("archive", "diff", str(archive))["equal"] is True
    assert answer("cache", "restore", "--only", "vae/config.json", "--to", "out")["verified"] is True
    assert Path("out/vae/config.json").read_bytes() == FILES["vae/config.json"]
    assert answer("cache", "restore", "--to", "whole")["snapshots"][0]["changed"] is True
    answer("cache", "restore", "--only", "x", status=2)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    answer("archive", "verify", status=4)
    page = (Path(__file__).parents[2] / "docs/reference/json.md").read_text()
    for body, heading in ((listed[0], "archive list"), (shown, "archive show")):
        section = page.split(f"### zops {heading}\n")[1].split("\n### ")[0]
        assert all(f"`{key}`" in section or f"`[].{key}`" in section for key in body)

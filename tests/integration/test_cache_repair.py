"""A bad file must be mended from the source or from an archive, and nothing be replaced by what was not verified."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.archives import back_up, foreign_tar, member
from tests.support.hub import Hub, Status
from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from zops.archive.mend import spring_of_archive, spring_of_store
from zops.cache import fetch, pull, room
from zops.cache.layout import is_verified
from zops.cache.manifest import read_manifest, require_verified, write_manifest
from zops.cache.repair import repair
from zops.cache.verify import pin, verify
from zops.errors import HostShort, SourceFailed, UsageError
from zops.events import Event, Warned, silent
from zops.spec import Source, Spec

MODEL = "owner/name"
SHARD = "transformer/shard-1-of-2.safetensors"
OTHER = "transformer/shard-2-of-2.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=900_000)


@pytest.fixture
def snapshot(tmp_path: Path, origin: Path) -> Path:
    source = {"kind": "directory", "path": str(origin), "revision": "r1"}
    spec = Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": tmp_path / "cache"}})
    return pull.pull(spec, silent).snapshot.path


@pytest.fixture
def hub(origin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    with Hub(origin, MODEL) as running:
        yield running


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def assert_mended(snapshot: Path, origin: Path) -> None:
    require_verified(snapshot)
    assert verify(snapshot, deep=True, report=silent).ok
    for name in RUNTIME_FILES:
        assert (snapshot / name).read_bytes() == (origin / name).read_bytes(), name


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_an_archive_of_ours_must_mend_each_bad_file(
    tmp_path: Path, snapshot: Path, origin: Path, compression: str
) -> None:
    archive, _ = back_up(snapshot, tmp_path / "store", compression)
    for name in RUNTIME_FILES:
        untouched = {each: (snapshot / each).stat().st_ino for each in RUNTIME_FILES if each != name}
        flip(snapshot / name) if (snapshot / name).stat().st_size > 7 else (snapshot / name).unlink()
        result = repair(snapshot, None, silent, archive=spring_of_archive(str(archive)))
        assert result.fetched == (name,)
        assert_mended(snapshot, origin)
        assert {each: (snapshot / each).stat().st_ino for each in untouched} == untouched


def test_only_the_frames_with_the_bad_file_must_be_read(tmp_path: Path, snapshot: Path, origin: Path) -> None:
    archive, _ = back_up(snapshot, tmp_path / "store", "none")
    content = bytearray(archive.read_bytes())
    # Everything that is neither the index nor the shard is made unreadable: it must not matter.
    at = content.index((origin / "vae/model.safetensors").read_bytes()[:200])
    content[at : at + 200] = bytes(200)
    archive.write_bytes(content)
    flip(snapshot / SHARD)
    assert repair(snapshot, None, silent, archive=spring_of_archive(str(archive))).fetched == (SHARD,)
    assert_mended(snapshot, origin)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_of_another_program_must_mend_too(tmp_path: Path, snapshot: Path, origin: Path, mode: str) -> None:
    members = [(member(f"cache/models/owner--name/snapshots/r1/{n}"), (origin / n).read_bytes()) for n in RUNTIME_FILES]
    archive = foreign_tar(tmp_path / "foreign.tar", members, mode)
    flip(snapshot / SHARD)
    (snapshot / "vae/config.json").unlink()
    result = repair(snapshot, None, silent, archive=spring_of_archive(str(archive)))
    assert set(result.fetched) == {SHARD, "vae/config.json"}
    assert_mended(snapshot, origin)


def test_a_damaged_archive_must_not_mend_and_change_nothing(tmp_path: Path, snapshot: Path, origin: Path) -> None:
    archive, _ = back_up(snapshot, tmp_path / "store", "none")
    content = bytearray(archive.read_bytes())
    content[content.index((origin / SHARD).read_bytes()[-100:]) + 50] ^= 1
    archive.write_bytes(content)
    flip(snapshot / SHARD)
    before = (snapshot / SHARD).read_bytes()
    with pytest.raises(SourceFailed, match=SHARD) as caught:
        repair(snapshot, None, silent, archive=spring_of_archive(str(archive)))
    assert "--from ARCHIVE" in caught.value.hint
    assert (snapshot / SHARD).read_bytes() == before
    assert not is_verified(snapshot)


def test_an_archive_of_another_revision_must_mend_what_it_shares_and_name_what_it_does_not(
    tmp_path: Path, snapshot: Path, origin: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(origin, other)
    flip(other / OTHER)
    source = {"kind": "directory", "path": str(other), "revision": "r2"}
    spec = Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": tmp_path / "second"}})
    archive, _ = back_up(pull.pull(spec, silent).snapshot.path, tmp_path / "store")
    flip(snapshot / SHARD)
    repair(snapshot, None, silent, archive=spring_of_archive(str(archive)))
    assert_mended(snapshot, origin)
    flip(snapshot / OTHER)
    with pytest.raises(SourceFailed, match=f"{OTHER}: the archive holds another file of that name"):
        repair(snapshot, None, silent, archive=spring_of_archive(str(archive)))


def as_of_the_hub(snapshot: Path, hub: Hub) -> None:
    manifest = read_manifest(snapshot)
    write_manifest(snapshot, replace(manifest, revision=hub.commit))


def test_what_the_hub_does_not_deliver_must_be_had_from_the_newest_backup(
    tmp_path: Path, snapshot: Path, origin: Path, hub: Hub
) -> None:
    back_up(snapshot, tmp_path / "store")
    as_of_the_hub(snapshot, hub)
    flip(snapshot / SHARD)
    flip(snapshot / OTHER)
    hub.misbehave(SHARD, Status(404))
    events: list[Event] = []
    source = Source(kind="huggingface", endpoint=hub.url)
    result = repair(snapshot, source, events.append, archive=spring_of_store(str(tmp_path / "store"), MODEL))
    assert set(result.fetched) == {SHARD, OTHER}
    assert sorted(hub.fetched()) == [SHARD, OTHER]
    assert any(isinstance(event, Warned) and "going on with archives" in event.text for event in events)
    assert_mended(snapshot, origin)


def test_a_source_that_delivers_must_leave_the_archive_unopened(tmp_path: Path, snapshot: Path, hub: Hub) -> None:
    as_of_the_hub(snapshot, hub)
    flip(snapshot / SHARD)
    source = Source(kind="modelscope", endpoint=hub.url)
    nowhere = spring_of_archive(str(tmp_path / "no-such.tar"))
    assert repair(snapshot, source, silent, archive=nowhere).fetched == (SHARD,)


def test_when_nobody_delivers_both_reasons_must_be_told_and_nothing_changed(
    tmp_path: Path, snapshot: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    with Hub(origin, MODEL) as hub:
        pass
    flip(snapshot / SHARD)
    before = {name: (snapshot / name).read_bytes() for name in RUNTIME_FILES}
    with pytest.raises(SourceFailed, match=r"cannot list owner/name.*there is no archive") as caught:
        repair(
            snapshot,
            Source(kind="modelscope", endpoint=hub.url),
            silent,
            archive=spring_of_archive(str(tmp_path / "no-such.tar")),
        )
    assert caught.value.code == "repair-sources-failed"
    assert list(caught.value.details["files"]) == [SHARD]
    assert {name: (snapshot / name).read_bytes() for name in RUNTIME_FILES} == before


def test_an_archive_as_source_without_one_must_be_refused_with_the_remedy(snapshot: Path) -> None:
    with pytest.raises(UsageError, match="nothing to repair") as caught:
        repair(snapshot, None, silent)
    assert "--from" in caught.value.hint


@pytest.mark.parametrize(("size", "left"), [("nr_inodes=50,size=12m", 1), ("size=6m", 0), ("size=6m", 8)])
def test_a_disk_that_fills_up_in_a_repair_must_leave_the_snapshot_as_it_was(
    tmp_path: Path, origin: Path, size: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RESERVE_BYTES", -(1 << 40))
    monkeypatch.setattr(room, "RESERVE_INODES", -(1 << 40))
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        root = place / "snapshot"
        shutil.copytree(origin, root)
        pin(root, MODEL, "r1", silent)
        flip(root / SHARD)
        flip(root / OTHER)
        before = {name: (root / name).read_bytes() for name in RUNTIME_FILES}
        number = 0
        try:
            while True:
                # Bytes or inodes, whichever the disk has fewer of.
                (place / f"filler-{number}").write_bytes(bytes(1 << 16))
                number += 1
        except OSError:
            pass
        for filler in sorted(place.glob("filler-*"))[:left]:
            filler.unlink()
        with pytest.raises(HostShort, match="full") as caught:
            repair(root, Source(kind="directory", path=str(origin)), silent)
        assert caught.value.code == "disk-full"
        assert {name: (root / name).read_bytes() for name in RUNTIME_FILES} == before
        assert not is_verified(root)
        for filler in place.glob("filler-*"):
            filler.unlink()
        monkeypatch.undo()
        monkeypatch.setattr(room, "RESERVE_BYTES", 0)
        monkeypatch.setattr(room, "RESERVE_INODES", 0)
        assert repair(root, Source(kind="directory", path=str(origin)), silent).verification.ok
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)

"""A manifest may come from anywhere, and must be refused unless it is sound; a marker must never outlive a change."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from zops.cache.manifest import (
    FileEntry,
    Manifest,
    quick_check,
    read_manifest,
    read_marker,
    require_verified,
    sidecar,
    write_manifest,
)
from zops.cache.verify import pin
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import silent

HASH = "0" * 64


def body(path: str = "a.json", size: int = 1, sha256: str = HASH) -> dict:
    files = [{"path": path, "size": size, "sha256": sha256}]
    return {"format": 1, "model": "o/n", "revision": "r", "origin": "upstream", "files": files}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a", "a/../../b", "", ".", "a//b", "./a", ".zops/verified.json", "a\0b", "a/"]
)
def test_a_path_that_is_not_inside_a_snapshot_must_be_refused(path: str) -> None:
    with pytest.raises(SnapshotDamaged):
        Manifest.from_json(body(path))


@pytest.mark.parametrize("change", [{"size": -1}, {"sha256": "0" * 63}, {"sha256": "G" * 64}, {"size": "many"}])
def test_a_size_or_hash_that_is_none_must_be_refused(change: dict) -> None:
    with pytest.raises(SnapshotDamaged):
        Manifest.from_json(body(**change))


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"files": None}, {"digest": "1" * 64}, {"files": body()["files"] * 2}]
)
def test_a_manifest_that_contradicts_itself_must_be_refused(change: dict) -> None:
    with pytest.raises(SnapshotDamaged):
        Manifest.from_json(body() | change)


names = st.from_regex(r"[a-z]{1,8}(/[a-z.]{2,8}[a-z])?", fullmatch=True)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.dictionaries(names, st.tuples(st.integers(0, 1 << 40), hashes), max_size=6))
def test_a_manifest_must_survive_being_written_and_read(files: dict) -> None:
    entries = tuple(FileEntry(path, size, sha256) for path, (size, sha256) in files.items())
    manifest = Manifest("o/n", "r", entries)
    again = Manifest.from_json(json.loads(json.dumps(manifest.as_json())))
    assert again.digest == manifest.digest
    assert set(again.files) == set(entries)


@given(st.text() | st.dictionaries(st.text(), st.integers()), st.sampled_from(["files", "model", "format"]))
def test_no_body_may_end_in_anything_but_a_manifest_or_an_error(value: object, key: str) -> None:
    with suppress(SnapshotDamaged):
        Manifest.from_json(body() | {key: value})


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    pin(write_pipeline(tmp_path / "snapshot", shard_bytes=100), "o/n", "r", silent)
    return tmp_path / "snapshot"


def test_a_verified_snapshot_must_pass_the_quick_check(snapshot: Path) -> None:
    assert [entry.path for entry in require_verified(snapshot).files] == list(RUNTIME_FILES)


def test_a_file_that_was_touched_must_fail_the_quick_check(snapshot: Path) -> None:
    os.utime(snapshot / "vae/config.json", (1, 1))
    with pytest.raises(SnapshotDamaged, match=r"vae/config.json \(changed\)"):
        require_verified(snapshot)


def test_a_file_replaced_under_the_same_size_and_time_must_fail_the_quick_check(snapshot: Path) -> None:
    target = snapshot / "vae/config.json"
    stat = target.stat()
    (snapshot / "other").write_bytes(b"[]")
    os.utime(snapshot / "other", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (snapshot / "other").replace(target)
    with pytest.raises(SnapshotDamaged):
        require_verified(snapshot)


def test_a_file_that_is_gone_must_be_named_missing(snapshot: Path) -> None:
    (snapshot / "vae/model.safetensors").unlink()
    findings = quick_check(snapshot, read_manifest(snapshot), read_marker(snapshot))
    assert [f.path for f in findings if f.status == "missing"] == ["vae/model.safetensors"]


def test_another_manifest_must_end_the_old_verification(snapshot: Path) -> None:
    manifest = read_manifest(snapshot)
    write_manifest(snapshot, Manifest("o/n", "r2", manifest.files[:-1]))
    with pytest.raises(SnapshotMissing, match="never verified"):
        require_verified(snapshot)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "stats": {"a": []}}', '{"format": 1, "stats": 3}'])
def test_a_marker_that_cannot_be_read_must_be_none(snapshot: Path, text: str) -> None:
    (sidecar(snapshot) / "verified.json").write_text(text)
    assert read_marker(snapshot) is None

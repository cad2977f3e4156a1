"""Residency must be told alike by both system calls, and warming must respect the memory guard."""

import os
from pathlib import Path

import pytest

from tests.support.snapshots import write_pipeline
from zops.cache import warm
from zops.events import Event, Warned, silent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20) + b"tail")
    return path


def test_mincore_must_agree_with_cachestat(file: Path) -> None:
    with file.open("rb") as stream:
        by_cachestat = warm._cachestat(stream.fileno(), file.stat().st_size)
        by_mincore = warm._mincore(stream.fileno(), file.stat().st_size)
        overlay = warm._is_overlay(stream.fileno())
    if by_cachestat is None or overlay:
        pytest.skip("cachestat(2) tells nothing here: the kernel has none, or this is overlayfs")
    assert by_mincore == by_cachestat == 257


def test_residency_must_be_told_without_cachestat(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_CACHESTAT", 100_000)
    assert warm.resident_bytes(file) == file.stat().st_size


def test_an_empty_file_must_be_all_there(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert warm.resident_bytes(tmp_path / "empty") == 0
    assert warm.Residency(0, 0).share == 1.0


def test_warming_must_leave_everything_in_memory(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path, shard_bytes=100_000)
    result = warm.warm(root, silent)
    assert result.after.share == 1.0
    assert not result.stopped


def test_warming_must_stop_at_the_memory_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pipeline(tmp_path, shard_bytes=100_000)
    read: list[int] = []
    monkeypatch.setattr(warm, "resident_bytes", lambda _path: 0)
    monkeypatch.setattr(warm, "_read_ahead", lambda _descriptor, _offset, count: read.append(count))
    events: list[Event] = []
    result = warm.warm(root, events.append, room_bytes=lambda: 0)
    assert result.stopped
    assert read == []
    assert any(isinstance(event, Warned) for event in events)


def test_warming_must_not_bring_in_more_than_there_was_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_pipeline(tmp_path, shard_bytes=100_000)
    read: list[int] = []
    monkeypatch.setattr(warm, "STEP", 10_000)
    monkeypatch.setattr(warm, "resident_bytes", lambda _path: 0)
    monkeypatch.setattr(warm, "_read_ahead", lambda _descriptor, _offset, count: read.append(count))
    assert warm.warm(root, silent, room_bytes=lambda: 50_000).stopped
    assert 40_000 <= sum(read) <= 50_000


def test_weights_must_be_read_in_the_order_of_the_loader(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path, shard_bytes=10)
    (root / "text_encoder").mkdir()
    (root / "text_encoder" / "model.safetensors").write_bytes(b"x")
    heavy = [str(p.relative_to(root)) for p in warm._in_loading_order(root) if p.suffix == ".safetensors"]
    assert heavy == [
        "text_encoder/model.safetensors",
        "transformer/shard-1-of-2.safetensors",
        "transformer/shard-2-of-2.safetensors",
        "vae/model.safetensors",
    ]

"""Snapshots must be found wherever an SDK, of whatever age, or a person has put them."""

import os
from pathlib import Path

import pytest

from tests.support.snapshots import write_pipeline
from zops.cache.layout import choose, find, place
from zops.cache.verify import pin
from zops.catalog import Z_IMAGE_TURBO
from zops.errors import SnapshotMissing
from zops.events import silent

LAYOUTS = {
    "models/o--n/snapshots/master": ("o/n", "master", "modelscope"),
    "hub/models/o--n/snapshots/master": ("o/n", "master", "modelscope"),
    "models/o/n": ("o/n", "", "modelscope-legacy"),
    "hub/models/o/n": ("o/n", "", "modelscope-legacy"),
    "hub/o/n": ("o/n", "", "modelscope-legacy"),
    "o/n___5": ("o/n.5", "", "modelscope-legacy"),
    "models--o--n/snapshots/abc": ("o/n", "abc", "huggingface"),
    "hub/models--o--n/snapshots/abc": ("o/n", "abc", "huggingface"),
}


@pytest.mark.parametrize("where", LAYOUTS)
def test_a_snapshot_must_be_found_in_every_layout(tmp_path: Path, where: str) -> None:
    write_pipeline(tmp_path / where, shard_bytes=10)
    (found,) = find(tmp_path)
    assert (found.model, found.revision, found.layout) == LAYOUTS[where]
    assert found.path == tmp_path / where


def test_a_directory_that_is_a_snapshot_must_be_found_as_such(tmp_path: Path) -> None:
    write_pipeline(tmp_path, shard_bytes=10)
    (found,) = find(tmp_path, "any/model")
    assert (found.layout, found.path) == ("plain", tmp_path)


def test_a_pinned_directory_must_tell_its_model(tmp_path: Path) -> None:
    pin(write_pipeline(tmp_path, shard_bytes=10), "me/mine", "r1", silent)
    (found,) = find(tmp_path, "me/mine")
    assert (found.model, found.revision) == ("me/mine", "r1")
    assert find(tmp_path, "some/other") == []


def test_a_cache_that_does_not_exist_must_be_an_empty_one(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") == []


def test_files_and_hidden_directories_must_not_be_taken_for_snapshots(tmp_path: Path) -> None:
    (tmp_path / "models" / "o--n" / "snapshots" / "empty").mkdir(parents=True)
    (tmp_path / ".locks" / "models--o--n").mkdir(parents=True)
    (tmp_path / "CACHEDIR.TAG").write_text("")
    assert find(tmp_path) == []


def test_place_must_be_where_find_looks(tmp_path: Path) -> None:
    path = place(tmp_path, "owner/na--me", "c0ffee")
    write_pipeline(path, shard_bytes=10)
    (found,) = find(tmp_path, "owner/na--me")
    assert (found.path, found.revision) == (path, "c0ffee")


def test_choose_must_prefer_a_verified_snapshot_to_the_catalogs_commit_and_to_a_newer_one(tmp_path: Path) -> None:
    model = Z_IMAGE_TURBO.id
    verified, pinned, newer = (place(tmp_path, model, r) for r in ("verified", Z_IMAGE_TURBO.commit, "newer"))
    for age, path in enumerate((newer, pinned, verified)):
        write_pipeline(path, shard_bytes=10)
        os.utime(path, (2e9 - age, 2e9 - age))
    assert choose(tmp_path, model).path == pinned
    pin(verified, model, "verified", silent)
    assert choose(tmp_path, model).path == verified
    assert choose(tmp_path, model, "newer").path == newer


def test_choose_must_name_the_remedy_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing) as caught:
        choose(tmp_path, "o/n")
    assert "zops cache pull" in caught.value.hint

"""The status of a cache must say who uses a snapshot, what it was made from, and when it was last backed up."""

import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.host import Host
from zops.archive.backup import backup
from zops.archive.history import last_backups
from zops.archive.store import archive_name, open_store
from zops.cache.layout import choose, place
from zops.cache.manifest import Manifest, require_verified
from zops.cache.slim import plan_slim, slim
from zops.cache.status import status
from zops.cache.verify import verify
from zops.events import silent

MODEL = "zops/synthetic-tiny"


@pytest.fixture
def parent(tmp_path: Path, tiny_model: Path) -> Path:
    path = place(tmp_path / "cache", MODEL, "seed-0")
    shutil.copytree(tiny_model, path)
    verify(path, deep=True, report=silent).require()
    return path


def test_a_slim_snapshot_must_name_what_it_was_made_from(parent: Path, tmp_path: Path) -> None:
    slim(plan_slim(parent), silent)
    full, slimmed = (each.as_json() for each in status(tmp_path / "cache"))
    assert (full["slim_of"], full["parent"]) == ("", "")
    assert (slimmed["slim_of"], slimmed["parent"]) == ("seed-0", full["manifest_digest"])
    assert slimmed["dtypes"]["transformer"] == ["BF16"]


def test_users_must_be_named_and_not_knowing_them_be_told_from_having_none(parent: Path, tmp_path: Path) -> None:
    def used_by(used):
        (only,) = status(tmp_path / "cache", used=used)
        return only.as_json()["used_by"]

    assert used_by(None) is None
    assert used_by({}) == []
    assert used_by({parent.resolve(): ("a (docker)", "b (process)"), tmp_path / "x": ("c",)}) == [
        "a (docker)",
        "b (process)",
    ]


def test_the_newest_archive_must_be_told_and_the_parents_count_for_a_slim_snapshot(
    parent: Path, tmp_path: Path
) -> None:
    slimmed = slim(plan_slim(parent), silent)
    full = require_verified(parent)
    assert (last_backups(None)(full), last_backups(tmp_path / "nowhere")(full)) == (None, None)
    store = tmp_path / "store"
    backup([choose(tmp_path / "cache", MODEL)], open_store(store), compression="none", report=silent)
    last = last_backups(store)
    assert last(full) is None, "the full snapshot cannot be made from the slim one"
    first = last(slimmed.manifest)
    assert first is not None
    backup([choose(tmp_path / "cache", MODEL, full=True)], open_store(store), compression="none", report=silent)
    last = last_backups(store)
    newest = last(full)
    assert newest is not None
    assert newest.at >= first.at
    assert last(slimmed.manifest).at == newest.at
    assert last(Manifest("o/other", "seed-0", ())) is None


def test_the_name_of_an_archive_must_tell_a_slim_snapshot_from_its_parent() -> None:
    commit = "f332072aa78be7aecdf3ee76d5c247082da564a6"
    names = [
        archive_name([Manifest("o/n", revision, (), derived=derived)], datetime(2026, 1, 2, tzinfo=UTC))
        for revision, derived in ((commit, ""), (f"{commit}-bf16", "bf16"))
    ]
    assert names == ["o--n-f332072aa78b-20260102T000000Z.tar.zst", "o--n-f332072aa78b_bf16-20260102T000000Z.tar.zst"]


def test_a_store_that_does_not_answer_must_be_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "none")
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and never says a word
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = datetime.now(UTC)
        assert last_backups("s3://bucket/models", limit_s=0.5)(Manifest("o/n", "r", ())) is None
        assert (datetime.now(UTC) - began).total_seconds() < 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert last_backups("s3://bucket/models", limit_s=0.5)(Manifest("o/n", "r", ())) is None
    assert last_backups("ftp://nowhere")(Manifest("o/n", "r", ())) is None
    (tmp_path / "file").write_text("")
    assert last_backups(tmp_path / "file")(Manifest("o/n", "r", ())) is None


@pytest.mark.slow
def test_a_slim_snapshot_must_come_back_from_its_archive_as_what_it_was(tmp_path: Path, tiny_model: Path) -> None:
    host = Host(tmp_path / "host", tiny_model, name="status", runtime="process", serve={"dtype": "bfloat16"})
    host.run("cache", "pull")
    host.run("cache", "slim", "--replace", "--yes")
    host.run("cache", "backup")
    (before,) = host.json("cache", "status")
    assert before["last_backup"]
    shutil.rmtree(host.cache)
    host.run("cache", "restore")
    (after,) = host.json("cache", "status")
    same = ("revision", "slim_of", "parent", "manifest_digest", "state", "last_backup", "used_by")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}

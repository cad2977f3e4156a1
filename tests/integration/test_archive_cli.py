"""`zops cache backup` and `zops cache restore` as an operator types them."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.archives import MODEL, make_snapshot, tree
from zops.cache.layout import choose, is_verified
from zops.cli.main import run


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A working directory with a cache of one snapshot and a zops.yaml that names it and a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOPS_OUTPUT", "json")
    make_snapshot(tmp_path / "cache")
    Path("zops.yaml").write_text(
        f"model: {MODEL}\ncache: {{dir: {tmp_path}/cache}}\nbackup: {{to: {tmp_path}/store}}\nruntime: process\n"
    )
    return tmp_path


def answer(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_backup_then_restore_must_bring_a_deleted_cache_back(host, capsys):
    before = tree(host / "cache")
    assert run(["cache", "backup"]) == 0
    made = answer(capsys)
    assert Path(made["archive"]).stat().st_size == made["size_bytes"]
    assert made["manifest_digests"] == [
        json.loads(next(host.glob("cache/**/.zops/manifest.json")).read_text())["digest"]
    ]
    shutil.rmtree(host / "cache")
    assert run(["cache", "restore"]) == 0
    restored = answer(capsys)
    assert restored["archive"] == made["archive"]
    assert restored["changed"] is True
    assert tree(host / "cache") == before
    assert is_verified(choose(host / "cache", MODEL).path)
    assert run(["cache", "restore"]) == 0
    assert answer(capsys)["changed"] is False


def test_flags_must_win_over_the_specification(host, capsys):
    assert run(["cache", "backup", "--to", str(host / "other"), "--compression", "none"]) == 0
    made = Path(answer(capsys)["archive"])
    assert (made.parent, made.suffix) == (host / "other", ".tar")
    assert run(["cache", "restore", "--from", str(host / "other"), "--cache-dir", str(host / "second")]) == 0
    assert answer(capsys)["archive"] == str(made)
    assert run(["cache", "restore", str(made), "--cache-dir", str(host / "third")]) == 0
    assert tree(host / "third") == tree(host / "second") == tree(host / "cache")


def test_a_source_that_is_an_archive_must_be_what_is_restored(host, capsys):
    assert run(["cache", "backup"]) == 0
    made = answer(capsys)["archive"]
    moved = Path(made).rename(host / "elsewhere.tar.zst")
    arguments = ["--set", "source.kind=archive", "--set", f"source.path={moved}", "--cache-dir", str(host / "second")]
    assert run(["cache", "restore", *arguments]) == 0
    assert answer(capsys)["archive"] == str(moved)


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["cache", "backup", "--model", "no/such"], 3, "snapshot-missing"),
        (["cache", "backup", "--to", "ftp://x"], 2, "usage"),
        (["cache", "restore"], 9, "archive-not-found"),
        (["cache", "restore", "nothing.tar.zst"], 9, "archive-not-found"),
        (["cache", "restore", "zops.yaml"], 4, "archive-damaged"),
    ],
)
def test_what_cannot_be_done_must_have_its_own_status_and_code(host, capsys, arguments, status, code):
    before = tree(host)
    assert run(arguments) == status
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert (error["code"], error["exit_status"]) == (code, status)
    assert tree(host) == before


def test_without_a_store_the_operator_must_be_told_how_to_set_one(host, capsys):
    Path("zops.yaml").write_text(f"model: {MODEL}\ncache: {{dir: {host}/cache}}\n")
    for command in ("backup", "restore"):
        assert run(["cache", command]) == 2
        error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
        assert error["code"] == "backup-store-missing"
        assert "backup.to" in error["hint"]

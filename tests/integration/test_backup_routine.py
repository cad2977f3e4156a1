"""Backups as they are made every night: chains, encryption, what stays, drills, and what is told of them."""

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyrage
import pytest

from tests.support.archives import FILES, MODEL, make_snapshot, tree
from zops.archive import drill as drills
from zops.archive.drill import drill
from zops.archive.history import read_history
from zops.archive.notes import read_note
from zops.archive.restore import restore
from zops.archive.store import open_archive, open_store
from zops.cli.main import run
from zops.errors import ArchiveDamaged, SourceFailed
from zops.events import silent
from zops.health.backups import BACKUP_CHECKS
from zops.host.doctor import Context
from zops.spec import Spec

OTHER = "acme/other"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A working directory with a cache of two models and a zops.yaml that names it and a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOPS_OUTPUT", "json")
    monkeypatch.delenv("ZOPS_PASSPHRASE", raising=False)
    make_snapshot(tmp_path / "cache", {**FILES, "vae/w.bin": os.urandom(500_000)})
    make_snapshot(tmp_path / "cache", {**FILES, "x.bin": b"other"}, model=OTHER)
    Path("zops.yaml").write_text(
        f"model: {MODEL}\ncache: {{dir: {tmp_path}/cache}}\nbackup: {{to: {tmp_path}/store}}\nruntime: process\n"
    )
    identity = pyrage.x25519.Identity.generate()
    Path("key.txt").write_text(f"{identity}\n")
    Path("public.txt").write_text(f"# mine\n{identity.to_public()}\n")
    return tmp_path


def answer(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def change(host, name):
    """Add a file to the snapshot and keep all others as they are."""
    directory = next(host.glob(f"cache/models/{MODEL.replace('/', '--')}/snapshots/*"))
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    kept = {path: content for path, content in files.items() if not path.startswith(".zops")}
    make_snapshot(host / "cache", {**kept, name: os.urandom(1000)})


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_chain_must_hold_each_file_once_and_restore_as_one(host, capsys, encrypted):
    keys = ["--encrypt-to", "public.txt", "--identity", "key.txt"] if encrypted else []
    bases = []
    for step in range(3):
        if step:
            change(host, f"new-{step}.bin")
        assert run(["cache", "backup", "--incremental", *keys]) == 0
        made = answer(capsys)
        bases.append(made["base"])
        assert made["archive"].endswith(".age") is encrypted
        if step:
            assert made["size_bytes"] < 100_000
    assert bases[0] is None
    assert len(set(bases)) == 3
    before = tree(host / "cache" / "models" / MODEL.replace("/", "--"))
    arguments = ["--identity", "key.txt"] if encrypted else []
    assert run(["cache", "restore", "--cache-dir", str(host / "back"), *arguments]) == 0
    capsys.readouterr()
    assert tree(host / "back" / "models" / MODEL.replace("/", "--")) == before
    assert run(["cache", "drill", *arguments]) == 0
    assert answer(capsys)["files"] == len(FILES) + 3
    next((host / "store").glob(f"{bases[1]}")).unlink()
    with pytest.raises(SourceFailed) as caught:
        restore(open_store(host / "store").list()[-1].location if not encrypted else _encrypted(host), host / "third")
    assert caught.value.code == "archive-base-missing"


def _encrypted(host):
    from zops.archive.encryption import read_keys

    return open_archive(open_store(host / "store").list()[-1].location, read_keys([host / "key.txt"]))


def test_the_rules_must_remove_after_a_backup_and_a_dry_run_nothing(host, capsys):
    for _ in range(3):
        assert run(["cache", "backup"]) == 0
    assert run(["cache", "backup", OTHER]) == 0
    capsys.readouterr()
    store = open_store(host / "store")
    assert run(["archive", "prune", "--keep", "last=1", "--dry-run"]) == 0
    assert sum(not each["kept"] for each in answer(capsys)["archives"]) == 2
    assert len(store.list()) == 4
    assert run(["archive", "prune", "--keep", "last=1"]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["code"] == "needs-yes"
    (host / "store" / "mine.tar.gz").write_text("not ours")
    assert run(["cache", "backup", "--keep", "last=2"]) == 0
    assert len(answer(capsys)["removed"]) == 2
    assert [info.model for info in store.list()].count(MODEL) == 2
    assert [info.model for info in store.list()].count(OTHER) == 1
    assert (host / "store" / "mine.tar.gz").exists()
    assert len(list((host / "store").glob("*.note.json"))) == 3
    assert run(["archive", "prune"]) == 2


def test_several_models_must_go_into_one_archive_and_back(host, capsys):
    assert run(["cache", "backup", MODEL, OTHER, "--encrypt-to", "public.txt"]) == 0
    made = answer(capsys)
    assert len(made["manifest_digests"]) == 2
    before = tree(host / "cache")
    shutil.rmtree(host / "cache")
    for model in (MODEL, OTHER):
        assert run(["cache", "restore", "--model", model, "--identity", "key.txt"]) == 0
    assert tree(host / "cache") == before


def test_a_passphrase_in_the_environment_must_encrypt_and_decrypt_and_be_told_nowhere(host, capsys, monkeypatch):
    monkeypatch.setattr("zops.archive.keys.WORK_FACTOR", 10)
    monkeypatch.setenv("ZOPS_PASSPHRASE", "open sesame")
    assert run(["cache", "backup"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["archive"].endswith(".age")
    assert "sesame" not in out.out + out.err
    assert run(["cache", "drill"]) == 0
    monkeypatch.delenv("ZOPS_PASSPHRASE")
    assert run(["cache", "drill"]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["code"] == "archive-encrypted"


def findings(host, **backup):
    spec = Spec.model_validate({"model": MODEL, "runtime": "process", "backup": {"to": str(host / "store"), **backup}})
    return {check.id: check.run(Context(spec=spec)).verdict for check in BACKUP_CHECKS}


def test_the_doctor_must_warn_until_there_is_a_young_backup_that_was_drilled(host, capsys):
    assert findings(host) == {"backup-age": "warn", "backup-drill": "skipped"}
    assert findings(host, to=None) == {"backup-age": "skipped", "backup-drill": "skipped"}
    assert findings(host, to="s3:///") == {"backup-age": "skipped", "backup-drill": "skipped"}
    assert run(["cache", "backup"]) == 0
    assert findings(host) == {"backup-age": "ok", "backup-drill": "warn"}
    assert run(["cache", "drill"]) == 0
    assert findings(host) == {"backup-age": "ok", "backup-drill": "ok"}
    assert findings(host, max_age_days=1e-9) == {"backup-age": "warn", "backup-drill": "ok"}


def test_a_drill_that_finds_damage_must_be_told_and_the_next_backup_not_build_on_it(host, capsys):
    assert run(["cache", "backup"]) == 0
    first = Path(answer(capsys)["archive"])
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(ArchiveDamaged):
        drill(open_archive(first), host / "scratch")
    assert list((host / "scratch").iterdir()) == []
    assert read_note(open_store(host / "store"), first.name).drilled.ok is False
    assert findings(host)["backup-drill"] == "warn"
    assert run(["cache", "backup", "--incremental", "--keep", "last=1"]) == 0
    made = answer(capsys)
    assert made["base"] is None
    assert made["removed"] == [first.name]


def test_what_a_killed_drill_left_must_go_and_a_running_one_stay(host, capsys):
    assert run(["cache", "backup"]) == 0
    archive = open_archive(answer(capsys)["archive"])
    dead = host / "scratch" / ".zops-drill-dead"
    (dead / "cache").mkdir(parents=True)
    (dead / "lock").write_text("")
    with drills._scratch(host / "scratch") as running:
        assert not dead.exists()
        running.mkdir()
        drill(archive, host / "scratch", report=silent)
        assert running.exists()
    assert list((host / "scratch").iterdir()) == []


def test_metrics_must_tell_of_success_failure_and_proof(host, capsys):
    def value(name):
        lines = [line for line in Path("m.prom").read_text().splitlines() if line.startswith(f"zops_backup_{name}{{")]
        return float(lines[0].rpartition(" ")[2]) if lines else None

    assert run(["cache", "backup", "--metrics", "m.prom"]) == 0
    assert (value("run_ok"), value("archives"), value("drill_timestamp_seconds")) == (1, 1, 0)
    assert value("last_size_bytes") == open_store("store").list()[0].size
    assert abs(value("last_timestamp_seconds") - datetime.now(UTC).timestamp()) < 60
    next(Path("cache").glob(f"**/{MODEL.replace('/', '--')}/**/w.bin")).write_bytes(b"broken")
    assert run(["cache", "backup", "--metrics", "m.prom"]) == 4
    assert (value("run_ok"), value("archives")) == (0, 1)
    assert run(["cache", "drill", "--metrics", "m.prom"]) == 0
    assert (value("drill_ok"), value("run_ok")) == (1, None)


def test_metrics_must_tell_of_every_model_of_a_backup(host):
    assert run(["cache", "backup", MODEL, OTHER, "--metrics", "m.prom"]) == 0
    lines = Path("m.prom").read_text().splitlines()
    for name in ("run_ok", "archives", "last_size_bytes"):
        at = [number for number, line in enumerate(lines) if line.startswith(f"zops_backup_{name}{{")]
        assert [f'model="{model}"' in lines[number] for number, model in zip(at, (MODEL, OTHER), strict=True)] == [
            True
        ] * 2
        # The format wants the values of a name together, behind its one head.
        assert lines[at[0] - 1] == f"# TYPE zops_backup_{name} gauge"
        assert at[1] == at[0] + 1


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_increment_that_is_not_encrypted_as_its_base_is_must_be_warned_of(host, capsys, encrypted):
    assert run(["cache", "backup", "--encrypt-to", "public.txt"]) == 0
    change(host, "new.bin")
    capsys.readouterr()
    keys = ["--encrypt-to", "public.txt"] if encrypted else []
    assert run(["cache", "backup", "--incremental", "--identity", "key.txt", *keys]) == 0
    assert ("is written unencrypted" in capsys.readouterr().err) is not encrypted


def test_what_did_not_match_in_the_base_must_be_stored_by_the_next_archive(host, capsys):
    file = next(host.glob(f"cache/models/{MODEL.replace('/', '--')}/snapshots/*/vae/w.bin"))
    good, stat = file.read_bytes(), file.stat()
    file.write_bytes(b"broken")
    assert run(["cache", "backup", "--allow-mismatch"]) == 0
    assert len(answer(capsys)["mismatched"]) == 1
    file.write_bytes(good)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(["cache", "backup", "--incremental"]) == 0
    made = answer(capsys)
    assert made["base"]
    assert made["stored_bytes"] >= len(good)
    back = restore(made["archive"], host / "back").snapshots[0].path
    assert (back / "vae" / "w.bin").read_bytes() == good


def test_the_status_must_tell_size_duration_and_proof(host, capsys):
    assert run(["cache", "backup"]) == 0
    made = answer(capsys)
    assert run(["cache", "status"]) == 0
    row = answer(capsys)[0]
    assert (row["last_backup_archive"], row["last_backup_bytes"]) == (made["archive"], made["size_bytes"])
    assert row["last_backup_seconds"] >= 0
    assert (row["last_drill"], row["last_drill_ok"]) == (None, None)
    assert run(["cache", "drill"]) == 0
    capsys.readouterr()
    assert run(["cache", "status"]) == 0
    row = answer(capsys)[0]
    assert row["last_drill_ok"] is True
    assert datetime.now(UTC) - datetime.fromisoformat(row["last_drill"]) < timedelta(minutes=1)


NO_NOTES = [
    b"",
    b"[]",
    b"nonsense",
    b"{}",
    b"[" * 60_000,
    b'{"format": 2, "seconds": 1}',
    b'{"format": 1, "drilled": 7}',
    b'{"format": 1, "drilled": {"at": "now", "ok": true}}',
    b'{"format": 1, "seconds": 1e999, "files": -4}',
]


@pytest.mark.parametrize("text", NO_NOTES)
def test_a_note_that_is_none_must_count_as_none(host, capsys, text):
    assert run(["cache", "backup"]) == 0
    store = open_store(host / "store")
    store.write_note(store.list()[0].name, text)
    history = read_history(store, MODEL)
    assert (history.note.seconds, history.note.files, history.drilled) == (None, None, None)
    assert run(["cache", "status"]) == 0


def test_leftovers_of_killed_backups_must_be_shown_and_removed(host, capsys):
    assert run(["cache", "backup"]) == 0
    name = open_store(host / "store").list()[0].name
    part = host / "store" / f".{name}.part"
    part.write_bytes(b"half")
    assert run(["archive", "clean", "--dry-run"]) == 0
    capsys.readouterr()
    assert part.exists()
    assert run(["archive", "clean"]) == 0
    told = answer(capsys)
    assert [each["name"] for each in told["leftovers"]] == [name]
    section = PAGE.read_text().partition("### zops archive clean\n")[2].partition("\n### ")[0]
    shown = [*told, *(f"leftovers[].{field}" for field in told["leftovers"][0])]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == set(shown)
    assert not part.exists()

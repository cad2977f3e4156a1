"""Every damage must be found, named and mended, and nothing must be reported where nothing was done."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import Cut, Hub, Status
from tests.support.snapshots import RUNTIME_FILES, write_pipeline, write_safetensors
from zops.cache import fetch, pull
from zops.cache.layout import is_verified
from zops.cache.manifest import read_manifest, read_marker, require_verified, write_manifest
from zops.cache.repair import repair
from zops.cache.status import status
from zops.cache.verify import pin, verify
from zops.catalog import Z_IMAGE_TURBO
from zops.cli.main import run
from zops.errors import SnapshotDamaged, SnapshotMissing, SourceFailed
from zops.events import silent
from zops.spec import Source, Spec

MODEL = "owner/name"
SHARD = "transformer/shard-1-of-2.safetensors"
OTHER = "transformer/shard-2-of-2.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=50_000)


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


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    stat = path.stat()
    path.write_bytes(content)
    # As a disk flips it: nobody wrote, so size, time and inode stay as they were.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def found(snapshot: Path, *, deep: bool) -> dict[str, str]:
    verification = verify(snapshot, deep=deep, report=silent)
    return {finding.path: finding.status for finding in verification.findings if finding.status != "ok"}


def test_a_sound_snapshot_must_be_found_sound(snapshot: Path) -> None:
    for deep in (False, True):
        assert verify(snapshot, deep=deep, report=silent).require().ok
        assert found(snapshot, deep=deep) == {}


def test_every_random_damage_must_be_found_and_nothing_else_reported(snapshot: Path, origin: Path) -> None:
    dice = random.Random(0)
    for _ in range(200):
        name = dice.choice(RUNTIME_FILES)
        path = snapshot / name
        size = path.stat().st_size
        expected = {name: "corrupt"}
        match dice.choice(("flip", "cut", "grow", "delete", "swap")):
            case "flip":
                flip(path, dice.randrange(size * 8))
            case "cut":
                os.truncate(path, dice.randrange(size))
                expected = {name: "wrong-size"}
            case "grow":
                with path.open("ab") as stream:
                    stream.write(b"\0")
                expected = {name: "wrong-size"}
            case "delete":
                path.unlink()
                expected = {name: "missing"}
            case "swap":
                names = (SHARD, OTHER)
                contents = [(snapshot / each).read_bytes() for each in names]
                for each, content in zip(names, reversed(contents), strict=True):
                    (snapshot / each).write_bytes(content)
                expected = dict.fromkeys(names, "corrupt")
        assert found(snapshot, deep=True) == expected
        for each in expected:
            shutil.copyfile(origin / each, snapshot / each)
    assert found(snapshot, deep=True) == {}


def test_a_bit_flipped_by_the_disk_must_be_found_by_a_deep_verification_only_and_end_the_trust(snapshot: Path) -> None:
    flip(snapshot / SHARD, 400_000)
    assert found(snapshot, deep=False) == {}
    with pytest.raises(SnapshotDamaged, match=SHARD):
        verify(snapshot, deep=True, report=silent).require()
    assert read_marker(snapshot) is None
    with pytest.raises(SnapshotMissing, match="never verified"):
        require_verified(snapshot)


@pytest.mark.parametrize("change", ["truncate", "touch", "delete"])
def test_a_quick_verification_must_find_what_a_stat_can_tell(snapshot: Path, change: str) -> None:
    path = snapshot / SHARD
    match change:
        case "truncate":
            os.truncate(path, 10)
        case "touch":
            os.utime(path, (1, 1))
        case "delete":
            path.unlink()
    expected = {"truncate": "wrong-size", "touch": "changed", "delete": "missing"}[change]
    assert found(snapshot, deep=False) == {SHARD: expected}


def test_a_file_too_many_must_be_told_and_not_be_called_damage(snapshot: Path) -> None:
    (snapshot / "vae" / "stray.safetensors").write_bytes(b"x")
    assert found(snapshot, deep=True) == {"vae/stray.safetensors": "extra"}
    assert is_verified(snapshot)


def test_weights_that_contradict_their_index_must_be_found_though_their_hash_is_right(snapshot: Path) -> None:
    write_safetensors(snapshot / OTHER, {"other": 50_000})
    with pytest.raises(SnapshotDamaged, match=OTHER):
        pin(snapshot, MODEL, "r2", silent)
    assert not is_verified(snapshot)


def test_a_deep_verification_must_make_an_unverified_snapshot_a_verified_one(snapshot: Path) -> None:
    (snapshot / ".zops" / "verified.json").unlink()
    with pytest.raises(SnapshotMissing) as caught:
        verify(snapshot, deep=False, report=silent).require()
    assert caught.value.code == "snapshot-unverified"
    verify(snapshot, deep=True, report=silent).require()
    assert is_verified(snapshot)


def test_a_directory_without_a_manifest_must_name_the_remedy(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "plain", shard_bytes=10)
    with pytest.raises(SnapshotMissing) as caught:
        verify(root, deep=True, report=silent)
    assert caught.value.code == "manifest-missing"
    assert f"zops cache pin {root}" in caught.value.hint
    manifest = pin(root, "me/mine", "", silent)
    assert manifest.origin == "local"
    assert manifest.revision == f"local-{manifest.digest[:12]}"
    assert is_verified(root)


def test_the_catalogs_manifest_must_be_damage_to_a_directory_of_other_files(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "plain", shard_bytes=10)
    manifest = pin(root, Z_IMAGE_TURBO.id, "", silent)
    assert manifest.origin == "local", "other files than the catalog's must not be called upstream"


def test_repair_must_fetch_only_the_bad_file_and_touch_no_other(snapshot: Path, origin: Path, hub: Hub) -> None:
    untouched = {name: (snapshot / name).stat().st_ino for name in RUNTIME_FILES if name != SHARD}
    manifest = read_manifest(snapshot)
    flip(snapshot / SHARD, 400_000)
    # The hub knows the files under its own commit.
    write_manifest(snapshot, type(manifest)(MODEL, hub.commit, manifest.files))
    result = repair(snapshot, Source(kind="modelscope", endpoint=hub.url), silent)
    assert [(f.path, f.status) for f in result.found] == [(SHARD, "corrupt")]
    assert hub.fetched() == [SHARD]
    assert result.fetched == (SHARD,)
    assert (snapshot / SHARD).read_bytes() == (origin / SHARD).read_bytes()
    assert {name: (snapshot / name).stat().st_ino for name in untouched} == untouched
    assert is_verified(snapshot)


def test_repair_from_a_directory_must_mend_everything_that_is_bad(snapshot: Path, origin: Path) -> None:
    (snapshot / "model_index.json").unlink()
    os.truncate(snapshot / OTHER, 3)
    result = repair(snapshot, Source(kind="directory", path=str(origin)), silent)
    assert set(result.fetched) == {"model_index.json", OTHER}
    assert result.verification.ok
    assert is_verified(snapshot)


def test_repair_must_not_replace_anything_when_the_source_fails(snapshot: Path, hub: Hub) -> None:
    manifest = read_manifest(snapshot)
    write_manifest(snapshot, type(manifest)(MODEL, hub.commit, manifest.files))
    flip(snapshot / SHARD, 400_000)
    flip(snapshot / OTHER, 400_000)
    before = [(snapshot / name).read_bytes() for name in RUNTIME_FILES]
    hub.misbehave(OTHER, Cut(0), *[Status(404)] * 5)
    with pytest.raises(SourceFailed, match=OTHER):
        repair(snapshot, Source(kind="huggingface", endpoint=hub.url), silent)
    assert [(snapshot / name).read_bytes() for name in RUNTIME_FILES] == before
    assert not is_verified(snapshot)
    hub._faults.clear()
    hub.requests.clear()
    assert repair(snapshot, Source(kind="huggingface", endpoint=hub.url), silent).verification.ok
    assert hub.fetched() == [OTHER], "what had arrived was fetched again"


def test_repair_through_links_must_leave_the_blobs_of_another_tool_alone(tmp_path: Path, origin: Path) -> None:
    blobs, root = tmp_path / "blobs", tmp_path / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(origin, blobs)
    for name in RUNTIME_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(blobs / name)
    pin(root, MODEL, "abc", silent)
    flip(blobs / SHARD, 400_000)
    damaged = (blobs / SHARD).read_bytes()
    assert found(root, deep=True) == {SHARD: "corrupt"}
    repair(root, Source(kind="directory", path=str(origin)), silent)
    assert is_verified(root)
    assert (blobs / SHARD).read_bytes() == damaged


def test_repair_of_a_sound_snapshot_must_change_nothing(snapshot: Path) -> None:
    result = repair(snapshot, Source(kind="directory", path="/nowhere"), silent)
    assert (result.found, result.fetched) == ((), ())
    assert is_verified(snapshot)


def test_status_must_tell_each_state(snapshot: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def state() -> str:
        (only,) = status(cache, MODEL)
        return only.state

    (only,) = status(cache)
    assert (only.state, only.files, only.origin) == ("verified", len(RUNTIME_FILES), "local")
    assert only.dtypes == {"transformer": ("U8",), "vae": ("U8",)}
    assert only.size_bytes == sum((snapshot / name).stat().st_size for name in RUNTIME_FILES)
    assert only.residency.total == only.size_bytes
    assert only.verified_at is not None
    os.truncate(snapshot / SHARD, 3)
    assert state() == "damaged"
    (snapshot / ".zops" / "verified.json").unlink()
    assert state() == "damaged"
    (snapshot / ".zops" / "manifest.json").unlink()
    assert state() == "unverified"
    (snapshot / "model_index.json").unlink()
    assert state() == "incomplete"
    (snapshot / ".zops" / "manifest.json").write_text("{")
    assert state() == "damaged"


def call(capsys: pytest.CaptureFixture[str], cache: Path, *arguments: str) -> tuple[int, object, str]:
    settings = ("--cache-dir", str(cache), "--model", MODEL, "--output", "json")
    code = run(["cache", *arguments, *settings])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def test_the_command_line_must_tell_by_its_exit_status_what_is_wrong(
    snapshot: Path, tmp_path: Path, origin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert call(capsys, tmp_path / "empty", "verify")[0] == 3
    code, body, _ = call(capsys, cache, "verify")
    assert (code, body["ok"], len(body["findings"])) == (0, True, len(RUNTIME_FILES))
    flip(snapshot / SHARD, 400_000)
    code, body, errors = call(capsys, cache, "verify", "--deep")
    assert (code, body["ok"]) == (4, False)
    assert [f["path"] for f in body["findings"] if f["status"] == "corrupt"] == [SHARD]
    assert json.loads(errors.splitlines()[-1])["error"]["code"] == "snapshot-damaged"
    assert call(capsys, cache, "verify", "--repair")[0] == 2
    source = ("--set", "source.kind=directory", "--set", f"source.path={origin}")
    code, body, _ = call(capsys, cache, "verify", "--deep", "--repair", *source)
    assert (code, body["ok"], body["fetched"]) == (0, True, [SHARD])
    code, body, _ = call(capsys, cache, "status")
    assert [each["state"] for each in body] == ["verified"]
    assert call(capsys, cache, "warm")[1]["share"] == 1.0
    assert call(capsys, cache, "warm", "--check")[1]["share"] == 1.0
    assert (
        call(capsys, tmp_path / "x", "pull", "--set", "source.kind=directory", "--set", "source.path=/nowhere")[0] == 9
    )
    assert call(capsys, tmp_path / "x", "pull", *source)[1]["changed"] is True


def test_the_exit_status_must_tell_missing_files_from_damaged_ones(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (snapshot / "vae/config.json").unlink()
    for depth in ((), ("--deep",)):
        code, body, errors = call(capsys, tmp_path / "cache", "verify", *depth)
        assert (code, json.loads(errors.splitlines()[-1])["error"]["code"]) == (3, "snapshot-incomplete")
        assert [f["path"] for f in body["findings"] if f["status"] != "ok"] == ["vae/config.json"]
    flip(snapshot / SHARD, 400_000)
    assert call(capsys, tmp_path / "cache", "verify", "--deep")[0] == 4


def test_a_directory_must_be_pinned_and_verified_by_its_path(origin: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(origin, tmp_path / "plain")
    code, body, _ = call(
        capsys, tmp_path / "cache", "pin", str(tmp_path / "plain"), "--from-disk", "--revision", "mine"
    )
    assert (code, body["revision"], body["origin"]) == (0, "mine", "local")
    assert call(capsys, tmp_path / "cache", "verify", str(tmp_path / "plain"), "--deep")[0] == 0


def test_the_cache_commands_must_not_import_the_sdks_or_torch() -> None:
    program = (
        "import sys; from zops.cli.main import run; run(['cache', 'status', '--cache-dir', '/nowhere']);"
        "heavy = {'modelscope_hub', 'huggingface_hub', 'torch', 'rich', 'obstore', 'numpy'};"
        "print(sorted({module.partition('.')[0] for module in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

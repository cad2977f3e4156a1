"""A process that dies between any two of its changes to the file system must leave what the next one completes."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import crash, small_ranges
from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from zops.cache.layout import is_verified
from zops.cache.manifest import read_marker, require_verified
from zops.cache.pull import pull
from zops.cache.repair import repair
from zops.cache.verify import verify
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import silent
from zops.spec import Source, Spec

MODEL = "owner/name"
SHARDS = ("transformer/shard-1-of-2.safetensors", "transformer/shard-2-of-2.safetensors")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=20_000)


def specify(cache: Path, origin: Path) -> Spec:
    source = {"kind": "directory", "path": str(origin), "revision": "r1"}
    return Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": cache}})


def die_at(moment: int, cache: Path, origin: Path, *command: str) -> bool:
    """Run zops until just before its change number `moment` in the cache; tell whether it came to that."""
    settings = {"cache.dir": cache, "source.kind": "directory", "source.path": origin, "source.revision": "r1"}
    flags = [flag for key, value in (settings | {"model": MODEL}).items() for flag in ("--set", f"{key}={value}")]
    environ = os.environ | {"TEST_EXIT_AT": str(moment), "TEST_EXIT_BELOW": str(cache)}
    line = small_ranges.command("cache", *command, *flags, "--output", "json")
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode in {0, crash.STATUS}, done.stderr
    return done.returncode == crash.STATUS


def assert_honest(snapshot: Path, origin: Path) -> None:
    """Whoever finds the snapshot verified must find the right bytes."""
    if read_marker(snapshot) is not None:
        try:
            require_verified(snapshot)
        except (SnapshotDamaged, SnapshotMissing):
            return
        for name in RUNTIME_FILES:
            assert (snapshot / name).read_bytes() == (origin / name).read_bytes(), name


@pytest.mark.slow
def test_a_pull_that_dies_at_any_change_must_be_completed_by_the_next(tmp_path: Path, origin: Path) -> None:
    moment = 0
    # A third of them; all take a minute.
    for moment in range(0, 400, 3):
        cache = tmp_path / str(moment)
        died = die_at(moment, cache, origin, "pull")
        snapshot = cache / "models" / "owner--name" / "snapshots" / "r1"
        assert_honest(snapshot, origin)
        if not died:
            break
        complete = {name for name in RUNTIME_FILES if (snapshot / name).exists()}
        result = pull(specify(cache, origin), silent)
        assert not complete & set(result.fetched), "a file that was in place was fetched again"
        assert verify(snapshot, deep=True, report=silent).ok
        assert not (snapshot / ".zops" / "incoming").exists()
    assert moment > 60, "the process was over before it could die often enough to show anything"


def test_what_a_dead_process_left_half_written_must_go_with_the_next_pull(tmp_path: Path, origin: Path) -> None:
    snapshot = tmp_path / "models" / "owner--name" / "snapshots" / "r1"
    (snapshot / ".zops").mkdir(parents=True)
    parts = {age: snapshot / ".zops" / f".verified.json.{age}.part" for age in (0, 7200)}
    for age, part in parts.items():
        part.write_text("{")
        os.utime(part, (time.time() - age,) * 2)
    pull(specify(tmp_path, origin), silent)
    assert {age: part.exists() for age, part in parts.items()} == {0: True, 7200: False}


@pytest.mark.slow
def test_a_repair_that_dies_at_any_change_must_never_leave_a_marker_on_what_is_half_replaced(
    tmp_path: Path, origin: Path
) -> None:
    whole = pull(specify(tmp_path / "whole", origin), silent).snapshot.path
    moment = 0
    for moment in range(0, 400, 2):
        cache = tmp_path / str(moment)
        shutil.copytree(tmp_path / "whole", cache, copy_function=shutil.copy2)
        snapshot = cache / whole.relative_to(tmp_path / "whole")
        assert verify(snapshot, deep=True, report=silent).ok
        for name in SHARDS:
            flip(snapshot / name)
        died = die_at(moment, cache, origin, "verify", str(snapshot), "--deep", "--repair")
        wrong = [name for name in RUNTIME_FILES if (snapshot / name).read_bytes() != (origin / name).read_bytes()]
        assert set(wrong) <= set(SHARDS)
        assert not (is_verified(snapshot) and 0 < len(wrong) < len(SHARDS)), "half replaced, with its marker"
        if not died:
            break
        assert repair(snapshot, Source(kind="directory", path=str(origin)), silent).verification.ok
        assert verify(snapshot, deep=True, report=silent).ok
    assert not wrong
    assert moment > 20, "the process was over before it could die often enough to show anything"


def flip(path: Path) -> None:
    """Flip a bit as a disk does: size, time and inode stay as they were."""
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

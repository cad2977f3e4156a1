"""Backups, restores and uploads that are killed at random moments and run again, with a count of what became of each.

The short forms run in the suite, the long ones (100 kills of each) in benchmarks/archive.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tests.support.archives import MODEL, REVISION, make_snapshot, tree
from tests.support.waiting import eventually
from zops.archive.backup import BackupResult, backup
from zops.archive.format import Compression
from zops.archive.restore import restore, verify_archive
from zops.archive.store import DirectoryStore, Store, open_store
from zops.cache.layout import is_verified, place
from zops.errors import SourceFailed

ROOT = Path(__file__).parents[2]
# The smallest part that S3 takes, and notes on the progress so often that a kill finds some.
_SCRIPT = """
import sys
from datetime import timedelta
from pathlib import Path
from zops.archive import resume
from zops.archive.backup import backup
from zops.archive.restore import restore
from zops.archive.store import open_store
what, source, target, compression, interval = sys.argv[1:]
resume.INTERVAL_S = float(interval)
store = open_store(target) if what == "backup" else None
if target.startswith("s3://"):
    from zops.archive import bucket
    bucket.PART, bucket.LEFTOVER_AGE = 5 << 20, timedelta(days=36_500)
sys.stdout.write("ready\\n")
sys.stdout.flush()
if store:
    backup([Path(source)], store, compression=compression)
else:
    restore(source, Path(target))
"""
OLD = {"model_index.json": b"[1]", "old.json": b"old"}


@dataclass
class Kills:
    """How many runs there were, how many were killed in time, and what was not as promised, in words."""

    tried: int = 0
    killed: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)


class Work:
    """A backup or restore in a process of its own."""

    def __init__(self, what: str, source: object, target: object, compression: str = "-", interval: float = 5) -> None:
        self._arguments = [str(each) for each in (what, source, target, compression, interval)]

    def run(self, seconds: float | None = None) -> bool:
        """Run it, and kill it that long after it began; tell whether it was still at work."""
        command = [sys.executable, "-c", _SCRIPT, *self._arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.send_signal(signal.SIGKILL)
        assert process.returncode in {0, -signal.SIGKILL}, f"{self._arguments} failed by itself"
        return process.returncode == -signal.SIGKILL

    def run_until(self, moment: Callable[[], object], what: str) -> None:
        """Run it and kill it as soon as something is the case."""
        command = [sys.executable, "-c", _SCRIPT, *self._arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
            try:
                eventually(moment, what)
            finally:
                process.kill()

    def seconds(self) -> float:
        """Run it to its end and return how long it works, its start apart."""
        command = [sys.executable, "-c", _SCRIPT, *self._arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            process.stdout.readline()
            began = time.monotonic()
            assert process.wait() == 0
        return time.monotonic() - began


def _moments(count: int, longest: float, seed: int) -> Iterator[float]:
    chance = random.Random(seed)
    return (chance.uniform(0, longest) for _ in range(count))


def kill_backups(
    snapshot: Path, scratch: Path, count: int, *, compression: Compression = "zstd", notes: bool = True, seed: int = 9
) -> Kills:
    """Kill backups into a directory; each next one must succeed, leave nothing but archives, and every one be right.

    Args:
        snapshot: what is backed up.
        scratch: where to make stores.
        count: how often.
        compression: of the archive.
        notes: whether to note the progress as often as possible, so that the next run goes on with it.
        seed: of the moments.
    """
    kills = Kills()
    interval = 0.0 if notes else 5.0
    longest = Work("backup", snapshot, scratch / "store", compression, interval).seconds()
    shutil.rmtree(scratch / "store")
    for number, moment in enumerate(_moments(count, longest, seed)):
        directory = scratch / f"store-{number}"
        kills.tried += 1
        kills.killed += Work("backup", snapshot, directory, compression, interval).run(moment)
        store = DirectoryStore(directory)
        what = f"{compression}, killed after {moment:.3f} s"
        _check_listed(store, kills, what)
        result = backup([snapshot], store, compression=compression)
        kills.resumed += result.resumed_size > 0
        _check_listed(store, kills, f"{what}, then run again")
        _check_equal(result.location, snapshot, scratch / "back", kills, what)
        left = {path.name for path in directory.iterdir()} - {info.name for info in store.list()}
        if left:
            kills.wrong.append(f"{what}: {sorted(left)} left behind")
        shutil.rmtree(directory)
    return kills


def kill_uploads(
    snapshot: Path, scratch: Path, location: str, count: int, uploads: Callable[[], int], *, seed: int = 9
) -> Kills:
    """Kill backups into a bucket; each next one must succeed, leave no unfinished upload, and every archive be right.

    Args:
        snapshot: what is backed up.
        scratch: where to restore to.
        location: of the store; what is in it is deleted.
        count: how often.
        uploads: returns how many uploads the bucket knows that are not finished.
        seed: of the moments.
    """
    from zops.archive import bucket

    kills = Kills()
    store = open_store(location)
    longest = Work("backup", snapshot, location, "zstd").seconds()
    _empty(store)
    age, bucket.LEFTOVER_AGE = bucket.LEFTOVER_AGE, timedelta(days=36_500)  # moto dates every upload to 2010
    try:
        for moment in _moments(count, longest, seed):
            kills.tried += 1
            kills.killed += Work("backup", snapshot, location, "zstd").run(moment)
            what = f"upload, killed after {moment:.3f} s"
            _check_listed(store, kills, what)
            result = _back_up_again(snapshot, store)
            kills.resumed += result.resumed_size > 0
            _check_equal(result.location, snapshot, scratch / "back", kills, what)
            if uploads():
                kills.wrong.append(f"{what}: {uploads()} unfinished uploads left behind")
            _empty(store)
    finally:
        bucket.LEFTOVER_AGE = age
    return kills


def _back_up_again(snapshot: Path, store: Store) -> BackupResult:
    """Back up; once more, as its message says, when the bucket finished the killed one's upload at this very moment."""
    try:
        return backup([snapshot], store)
    except SourceFailed as error:
        if error.code != "archive-exists":
            raise
        return backup([snapshot], store)


def kill_restores(
    archive: Path, scratch: Path, count: int, *, seed: int = 9, over_another: bool = False, longest: float | None = None
) -> Kills:
    """Kill restores; what is there then must be the old snapshot or the new one, and each next one must complete.

    Args:
        archive: what is restored.
        scratch: where to make caches.
        count: how often.
        seed: of the moments.
        over_another: whether another snapshot is in the way.
        longest: seconds after which a kill comes at the latest; as long as a restore takes when it is not given.
    """
    kills = Kills()
    true = tree(restore(archive, scratch / "true").snapshots[0].path)
    longest = longest or Work("restore", archive, scratch / "timed").seconds()
    shutil.rmtree(scratch / "timed", ignore_errors=True)
    for number, moment in enumerate(_moments(count, longest, seed)):
        cache = scratch / f"cache-{number}"
        if over_another:
            make_snapshot(cache, OLD)
        kills.tried += 1
        kills.killed += Work("restore", archive, cache).run(moment)
        what = f"restore, killed after {moment:.3f} s"
        target = place(cache, MODEL, REVISION)
        aside = target.with_name(f".{REVISION}.replaced")
        if target.exists():
            if not (is_verified(target) and ((target / "old.json").exists() or tree(target) == true)):
                kills.wrong.append(f"{what}: neither the old snapshot nor the new one")
        elif over_another and not is_verified(aside):
            kills.wrong.append(f"{what}: the old snapshot is gone")
        snapshot = restore(archive, cache).snapshots[0]
        kills.resumed += snapshot.kept > 0
        names = [path.name for path in target.parent.iterdir()]
        if tree(target) != true or names != [target.name] or not is_verified(target):
            kills.wrong.append(f"{what}, then run again: {names}")
        shutil.rmtree(cache)
    shutil.rmtree(scratch / "true")
    return kills


def _check_listed(store: Store, kills: Kills, what: str) -> None:
    """Whatever has the name of an archive must be one, whole."""
    for info in store.list():
        try:
            verify_archive(info.location)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is counted
            kills.wrong.append(f"{what}: {info.name}: {error}")


def _check_equal(location: str, snapshot: Path, cache: Path, kills: Kills, what: str) -> None:
    if tree(restore(location, cache).snapshots[0].path) != tree(snapshot):
        kills.wrong.append(f"{what}: other files than were backed up")
    shutil.rmtree(cache)


def _empty(store: Store) -> None:
    for info in store.list():
        store.delete(info.name)

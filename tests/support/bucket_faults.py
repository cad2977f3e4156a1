"""Backups into a bucket that misbehaves, and restores out of it: what is promised of each, and what became of it.

The suite looks at single requests; the whole way there and back is played in benchmarks/archive.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

from tests.support.archives import tree
from tests.support.s3 import Proxy
from zops.archive import bucket, signed
from zops.archive.backup import backup
from zops.archive.restore import restore
from zops.archive.store import Store
from zops.errors import ArchiveDamaged, SourceFailed

PART = 5 << 20
"""The smallest that S3 takes."""
ALWAYS = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """What goes wrong with how many requests of which kind while a backup is made, or restored."""

    work: str
    what: str
    method: str
    text: str
    times: int

    def __str__(self) -> str:
        often = "always" if self.times == ALWAYS else f"{self.times} times"
        return f"{self.work}: {self.method} {self.text} {self.what}, {often}"


def scenarios() -> Iterator[Scenario]:
    """Yield every kind of fault at every kind of request, once, twice and always."""
    for times in (1, 2, ALWAYS):
        for what in ("status", "drop", "stall", "cut", "refuse", "corrupt"):
            for text in ("partNumber=1", "partNumber=2"):
                yield Scenario("backup", what, "PUT", text, times)
        for what in ("status", "drop", "cut", "refuse", "etag"):
            yield Scenario("backup", what, "POST", "upload", times)
        for what in ("status", "drop", "refuse"):
            yield Scenario("backup", what, "HEAD", "", times)
        for what in ("status", "drop", "stall", "cut", "refuse", "flip", "whole"):
            yield Scenario("restore", what, "GET", "bytes=", times)


@contextmanager
def hurried() -> Iterator[None]:
    """Let the bucket's client lose patience in seconds."""
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
    changes: dict[tuple[ModuleType, str], object] = {
        (bucket, "PART"): PART,
        (bucket, "_CLIENT"): {"connect_timeout": "2s", "read_timeout": "700ms", "timeout": "5s"},
        (bucket, "_RETRY"): {"max_retries": 2, "retry_timeout": timedelta(seconds=10), "backoff": backoff},
        (signed, "TIMEOUT_S"): 0.7,
        (signed, "RETRIES"): 2,
        (signed, "BACKOFF_S"): 0.005,
    }
    before = {(module, name): getattr(module, name) for module, name in changes}
    for (module, name), value in changes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


@dataclass(frozen=True)
class Stage:
    """Where scenarios are played.

    Attributes:
        proxy: in front of the bucket.
        store: behind it, and empty; it is emptied again each time.
        snapshot: what is backed up.
        cache: where to restore to.
        uploads: returns how many uploads the bucket knows that are not finished.
    """

    proxy: Proxy
    store: Store
    snapshot: Path
    cache: Path
    uploads: Callable[[], int]


def play(scenario: Scenario, stage: Stage) -> tuple[str, list[str]]:
    """Play a scenario and return how it ended (completed, or the error's code) and what was not as promised."""
    proxy, store, snapshot, cache = stage.proxy, stage.store, stage.snapshot, stage.cache
    wrong = []
    location = backup([snapshot], store).location if scenario.work == "restore" else ""
    proxy.fail(scenario.what, scenario.method, scenario.text, scenario.times)
    try:
        location = location or backup([snapshot], store).location
        if scenario.work == "restore":
            restore(location, cache)
        end = "completed"
    except (SourceFailed, ArchiveDamaged) as error:
        end = error.code
        if cache.exists() and list(cache.rglob("*.bin")):
            wrong.append("something was left in the cache")
    proxy.faults.clear()
    listed = store.list()
    if end == "completed" or scenario.work == "restore":
        with suppress(FileNotFoundError):
            shutil.rmtree(cache)
        if tree(restore(location, cache).snapshots[0].path) != tree(snapshot):
            wrong.append("the archive brings other files back")
        shutil.rmtree(cache)
    elif listed:
        wrong.append(f"the backup failed, but {listed[0].name} is there")
    # What could not be removed while the store failed is removed by the next backup.
    store.clean()
    if stage.uploads():
        wrong.append(f"{stage.uploads()} unfinished uploads are left")
    for info in listed:
        store.delete(info.name)
    return end, wrong

"""Schedules of faults for a hub, and moments to kill a pull at: each is played by a number, the same every time.

The suite plays some of them, benchmarks/cache/faults.py all.
"""

import json
import os
import random
import signal
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.support import small_ranges
from tests.support.hub import Cut, Fault, Flip, Hub, Short, Stall, Status, Whole
from tests.support.snapshots import RUNTIME_FILES
from tests.support.waiting import eventually
from zops.cache.layout import find, is_verified
from zops.cache.manifest import read_marker, require_verified
from zops.cache.pull import pull
from zops.errors import SourceFailed
from zops.events import silent
from zops.spec import Spec

MODEL = "owner/name"
HUBS = ("modelscope", "huggingface")
KINDS = ("status", "refusal", "cut", "stall", "flip", "short", "whole", "mixed")
ABILITIES: tuple[dict[str, bool], ...] = ({}, {"ranges": False}, {"digests": False})
TIMEOUTS = {"MODELSCOPE_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
"""To be set before the SDKs are imported, where stalls are played."""


@dataclass(frozen=True)
class Schedule:
    """One hub, what it cannot do, and one kind of fault; `seed` decides files, number and places."""

    hub: str
    kind: str
    seed: int
    unable: str = ""

    @property
    def able(self) -> dict[str, bool]:
        return {self.unable: False} if self.unable else {}


@dataclass(frozen=True)
class End:
    """How a schedule ended: `verified`, or `refused` with an error that named the files."""

    schedule: Schedule
    outcome: str
    faults: int
    requests: int
    named: tuple[str, ...]


def schedules(*, stalls: bool = True) -> list[Schedule]:
    """Return every schedule: both hubs, every kind of fault, with and without ranges and digests."""
    kinds = [kind for kind in KINDS if stalls or kind not in {"stall", "mixed"}]
    plain = [Schedule(hub, kind, seed) for hub in HUBS for kind in kinds for seed in range(2)]
    # Where a hub lists no hash (Hugging Face always does) nobody can tell a flipped bit; all else must still be told.
    unable = [
        Schedule(hub, kind, 7, lacking)
        for hub in HUBS
        for kind in kinds
        for lacking in ("ranges", "digests")
        if lacking == "ranges" or (hub == "modelscope" and kind not in {"flip", "mixed"})
    ]
    return plain + unable


def make_fault(kind: str, dice: random.Random, size: int) -> Fault:
    """Return a fault of a kind for a file of that size."""
    fault: Fault
    match kind:
        case "status":
            fault = Status(dice.choice((408, 429, 500, 502, 503, 504)), 0)
        case "refusal":
            fault = Status(dice.choice((401, 403, 404, 410)))
        case "cut":
            fault = Cut(dice.randrange(size))
        case "stall":
            fault = Stall(dice.randrange(size))
        case "flip":
            fault = Flip(dice.randrange(size))
        case "short":
            fault = Short(dice.randrange(size))
        case "whole":
            fault = Whole()
        case _:
            fault = make_fault(dice.choice(KINDS[:-1]), dice, size)
    return fault


def play(schedule: Schedule, origin: Path, cache: Path) -> End:
    """Pull through a hub that misbehaves and hold the end to what was promised; then pull again from it, healed."""
    dice = random.Random(str(schedule))
    with Hub(origin, MODEL, **schedule.able) as hub:
        count = 0
        for name in dice.sample(RUNTIME_FILES, dice.randrange(1, 4)):
            size = len(hub.files[name].content)
            faults = [make_fault(schedule.kind, dice, size) for _ in range(dice.randrange(1, 9))]
            hub.misbehave(name, *faults)
            count += len(faults)
        faulty = set(hub._faults)
        try:
            pull(specify(cache, hub, schedule.hub), silent)
        except SourceFailed as error:
            named = tuple(error.details["files"])
            assert set(named) <= faulty, f"{schedule}: {named} did nothing wrong"
            assert all(name in error.message for name in named[:3]), f"{schedule}: {error.message}"
            assert_nothing_served(cache)
            requests = len(hub.fetched())
            hub._faults.clear()
            hub.requests.clear()
            pull(specify(cache, hub, schedule.hub), silent)
            assert set(hub.fetched()) == set(named), f"{schedule}: what had arrived was fetched again"
            assert_served(cache, hub, origin)
            return End(schedule, "refused", count, requests, named)
        assert_served(cache, hub, origin)
        return End(schedule, "verified", count, len(hub.fetched()), ())


@dataclass(frozen=True)
class Kill:
    """A pull that was killed: when, what it had recorded then, and what the next run asked for again."""

    share: float
    """Of all bytes, sent when it was killed; above 1 for moments after the last byte."""
    files_kept: int
    bytes_kept: int
    bytes_sent_again: int
    """Of what was recorded as complete; must be 0."""
    ended_before: bool


def kill(hub_kind: str, share: float, origin: Path, cache: Path) -> Kill:
    """Kill a pull when the hub has sent a share of all bytes; hold the next run to completing it."""
    with Hub(origin, MODEL, pace_s=0.004) as hub:
        total = sum(len(hub.files[name].content) for name in RUNTIME_FILES)
        command = small_ranges.command("cache", "pull", *flags(cache, hub, hub_kind), "--output", "json")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(
                lambda: process.poll() is not None or sum(hub.sent.values()) >= min(share, 1.0) * total,
                "the hub sends",
            )
            if share > 1:
                hub.closing.wait(share - 1)
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        ended = process.returncode == 0
        assert ended or process.returncode == -signal.SIGKILL, process.returncode
        marked = [s for s in find(cache) if read_marker(s.path)]
        assert all(is_verified(snapshot.path) for snapshot in marked)
        files, spans = recorded(cache, hub)
        hub.pace_s = 0
        hub.requests.clear()
        pull(specify(cache, hub, hub_kind), silent)
        assert_served(cache, hub, origin)
        again = 0
        for request in hub.requests:
            if request.file is None or request.method != "GET":
                continue
            assert not marked, "a verified snapshot was fetched again"
            size = len(hub.files[request.file].content)
            first, last = request.range_start or 0, request.range_end or size
            done = [(0, size)] if request.file in files else spans[request.file]
            again += sum(max(0, min(last, end) - max(first, start)) for start, end in done)
        kept = sum(len(hub.files[name].content) for name in files)
        kept += sum(end - start for each in spans.values() for start, end in each)
        return Kill(share, len(files), total if marked else kept, again, ended)


def recorded(cache: Path, hub: Hub) -> tuple[set[str], dict[str, list[tuple[int, int]]]]:
    """Return what is on record: the files that were hashed, and the complete ranges of the others."""
    sidecar = place(cache, hub) / ".zops"
    files: set[str] = set()
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    if (sidecar / "incoming.json").is_file():
        files = set(json.loads((sidecar / "incoming.json").read_text())["checked"])
    for record in (sidecar / "incoming").rglob("*.partial.json"):
        name = record.relative_to(sidecar / "incoming").as_posix().removesuffix(".partial.json")
        # Without its partial file the record is of one that was complete.
        if record.with_suffix("").is_file():
            spans[name] = [(start, end) for start, end in json.loads(record.read_text())["done"]]
    return files, spans


def specify(cache: Path, hub: Hub, kind: str) -> Spec:
    source = {"kind": kind, "endpoint": hub.url}
    return Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": cache}})


def flags(cache: Path, hub: Hub, kind: str) -> list[str]:
    settings = {"cache.dir": cache, "source.kind": kind, "source.endpoint": hub.url, "model": MODEL}
    return [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]


def place(cache: Path, hub: Hub) -> Path:
    return cache / "models" / "owner--name" / "snapshots" / hub.commit


def assert_served(cache: Path, hub: Hub, origin: Path) -> None:
    """The files must be the hub's, whatever the manifest says of them."""
    snapshot = place(cache, hub)
    require_verified(snapshot)
    for name in RUNTIME_FILES:
        assert (snapshot / name).read_bytes() == (origin / name).read_bytes(), name
    assert not (snapshot / ".zops" / "incoming").exists()


def assert_nothing_served(cache: Path) -> None:
    for snapshot in find(cache):
        assert read_marker(snapshot.path) is None
        assert [p.name for p in snapshot.path.iterdir()] == [".zops"], "half a snapshot, which an SDK takes for one"

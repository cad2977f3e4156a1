"""A large file must come in ranges, over several connections, and what is complete must survive any end of zops."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import small_ranges
from tests.support.hub import Cut, Flip, Hub, Short, Stall, Status, Whole
from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from tests.support.waiting import eventually
from zops.cache import fetch, pull, ranges
from zops.cache.hubs import Listed
from zops.cache.layout import is_verified
from zops.cache.manifest import read_marker, require_verified
from zops.errors import SourceFailed
from zops.events import Event, Finished, Progressed, Started, Warned, silent
from zops.spec import Spec

MODEL = "owner/name"
HUBS = ("modelscope", "huggingface")
SHARD = "transformer/shard-1-of-2.safetensors"
BIG = (SHARD, "transformer/shard-2-of-2.safetensors", "vae/model.safetensors")
RANGE = small_ranges.RANGE_BYTES


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=3_000_000)


@pytest.fixture
def hub(origin: Path) -> Iterator[Hub]:
    with Hub(origin, MODEL) as running:
        yield running


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((ranges, "RANGE_BYTES"), (ranges, "RANGED_BYTES"), (fetch, "FIRST_WAIT_S")):
        monkeypatch.setattr(module, name, getattr(module, name))
    small_ranges.shrink()


def specify(cache: Path, hub: Hub, kind: str) -> Spec:
    source = {"kind": kind, "endpoint": hub.url}
    return Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": cache}})


def assert_verified(cache: Path, hub: Hub, origin: Path) -> None:
    snapshot = cache / "models" / "owner--name" / "snapshots" / hub.commit
    require_verified(snapshot)
    for name in RUNTIME_FILES:
        assert (snapshot / name).read_bytes() == (origin / name).read_bytes(), name
    assert not (snapshot / ".zops" / "incoming").exists()


def asked(hub: Hub, name: str) -> list[tuple[int | None, int | None]]:
    return sorted((r.range_start or 0, r.range_end or 0) for r in hub.requests if r.file == name and r.method == "GET")


@pytest.mark.parametrize("kind", HUBS)
def test_a_large_file_must_come_in_ranges_each_asked_for_once(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    events: list[Event] = []
    pull.pull(specify(tmp_path, hub, kind), events.append)
    assert_verified(tmp_path, hub, origin)
    for name in BIG:
        size = (origin / name).stat().st_size
        assert asked(hub, name) == [(at, min(at + RANGE, size)) for at in range(0, size, RANGE)]
        assert hub.sent[name] == size
    total = next(event.total for event in events if isinstance(event, Started) and event.task == "fetch")
    done = [event.done for event in events if isinstance(event, Progressed) and event.task == "fetch"]
    assert done[-1] == total
    assert max(done) == total, "more was counted than there is"


@pytest.mark.parametrize("kind", HUBS)
def test_several_connections_must_work_on_one_file_at_once(tmp_path: Path, hub: Hub, kind: str) -> None:
    hub.hold_bodies(after=1)
    process = subprocess.Popen(zops(hub, tmp_path, kind), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: len(hub.fetched()) == fetch.CONNECTIONS, "every connection asks for a range")
        assert {hub.fetched().count(name) for name in set(hub.fetched())} == {fetch.CONNECTIONS}
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", HUBS)
def test_a_hub_that_ignores_ranges_must_be_read_in_one_stream(tmp_path: Path, origin: Path, kind: str) -> None:
    with Hub(origin, MODEL, ranges=False) as hub:
        pull.pull(specify(tmp_path, hub, kind), silent)
        assert_verified(tmp_path, hub, origin)


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("before", [0, 3])
def test_ranges_that_stop_being_honoured_must_not_end_in_a_patchwork(
    tmp_path: Path, origin: Path, hub: Hub, kind: str, before: int
) -> None:
    hub.misbehave(SHARD, *[Cut(100)] * before, Whole())
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)


@pytest.mark.parametrize("kind", HUBS)
def test_a_range_that_was_cut_must_go_on_at_the_byte_where_it_stopped(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    hub.misbehave(SHARD, Cut(100_000))
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)
    (resumed,) = [start for start, _ in asked(hub, SHARD) if start % RANGE]
    assert 0 < resumed % RANGE <= 100_000


@pytest.mark.parametrize("kind", HUBS)
def test_a_flipped_bit_in_a_range_must_cost_the_file_and_be_mended(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    hub.misbehave(SHARD, *[Flip(RANGE + 5)] * 12)
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)
    assert hub.sent[SHARD] == 2 * (origin / SHARD).stat().st_size


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize(
    "fault", [Status(403), Status(500, 0), Short(1000), Short(RANGE + 7), Flip(3), Cut(0)], ids=str
)
def test_a_file_that_does_not_come_must_be_named_and_all_others_kept(
    tmp_path: Path, origin: Path, hub: Hub, kind: str, fault: object
) -> None:
    hub.misbehave(SHARD, *[fault] * 200)
    with pytest.raises(SourceFailed, match=SHARD) as caught:
        pull.pull(specify(tmp_path, hub, kind), silent)
    assert list(caught.value.details["files"]) == [SHARD]
    hub._faults.clear()
    hub.requests.clear()
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)
    assert set(hub.fetched()) == {SHARD}, "what had arrived was fetched again"


@pytest.mark.parametrize("kind", HUBS)
def test_complete_ranges_of_a_file_that_failed_must_not_be_fetched_again(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    size = (origin / SHARD).stat().st_size
    hub.refuse_after[SHARD] = 3 * RANGE
    with pytest.raises(SourceFailed, match="403"):
        pull.pull(specify(tmp_path, hub, kind), silent)
    done = recorded(tmp_path, hub)[SHARD]
    assert sum(end - start for start, end in done) >= 3 * RANGE
    hub.refuse_after.clear()
    hub.requests.clear()
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)
    for start, end in asked(hub, SHARD):
        assert all(end <= first or start >= last for first, last in done), f"{start}-{end} of {size} was there"


@pytest.mark.parametrize("kind", HUBS)
def test_a_pull_that_was_killed_must_keep_its_complete_ranges(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    hub.pace_s = 0.02
    process = subprocess.Popen(zops(hub, tmp_path, kind), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: recorded(tmp_path, hub).get(SHARD), "a range is complete")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = recorded(tmp_path, hub)
    hub.pace_s = 0
    hub.requests.clear()
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(tmp_path, hub, origin)
    for name, spans in done.items():
        for start, end in asked(hub, name):
            assert all(end <= first or start >= last for first, last in spans), f"{start}-{end} of {name} was there"


@pytest.mark.parametrize("kind", HUBS)
def test_a_stalled_range_must_be_given_up_and_resumed(tmp_path: Path, origin: Path, hub: Hub, kind: str) -> None:
    hub.misbehave(SHARD, Stall(100_000))
    environ = os.environ | {"MODELSCOPE_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = subprocess.run(zops(hub, tmp_path, kind), capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    assert_verified(tmp_path, hub, origin)


def test_a_record_of_another_file_must_count_for_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a"
    first = ranges.Partial(Listed("a", 4 * RANGE, "0" * 64), target)
    spans = first.open()
    assert spans == [(at * RANGE, (at + 1) * RANGE) for at in range(4)]
    first.write(RANGE, b"x" * RANGE)
    first.complete(spans[1])
    first.close()
    same = ranges.Partial(Listed("a", 4 * RANGE, "0" * 64), target)
    assert same.open() == [spans[0], spans[2], spans[3]]
    assert same.size_done == RANGE
    same.close()
    for other in (Listed("a", 4 * RANGE, "1" * 64), Listed("a", 3 * RANGE, "0" * 64)):
        partial = ranges.Partial(other, target)
        assert len(partial.open()) * RANGE == other.size
        partial.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "done": [[5, 3]]}', '{"done": "x"}'])
def test_a_record_that_cannot_be_read_must_only_cost_fetching(tmp_path: Path, text: str) -> None:
    file = Listed("a", 2 * RANGE, "0" * 64)
    partial = ranges.Partial(file, tmp_path / "a")
    partial.complete(partial.open()[0])
    partial.close()
    (tmp_path / "a.partial.json").write_text(text)
    assert len(ranges.Partial(file, tmp_path / "a").open()) == 2


def test_each_file_in_flight_must_be_told_beside_the_total(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "OWN_BAR_BYTES", 1_000_000)
    events: list[Event] = []
    pull.pull(specify(tmp_path, hub, "modelscope"), events.append)
    for name in BIG:
        done = [event.done for event in events if isinstance(event, Progressed) and event.task == name]
        assert done == sorted(done)
        assert done[-1] == (tmp_path / f"models/owner--name/snapshots/{hub.commit}" / name).stat().st_size
        assert [event.seconds > 0 for event in events if isinstance(event, Finished) and event.task == name] == [True]


@pytest.mark.parametrize("kind", HUBS)
def test_a_long_pause_that_a_hub_asks_for_must_be_told(
    tmp_path: Path, hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "NOTABLE_WAIT_S", 0.5)
    hub.misbehave(SHARD, Status(429, retry_after=1))
    events: list[Event] = []
    pull.pull(specify(tmp_path, hub, kind), events.append)
    (told,) = [event.text for event in events if isinstance(event, Warned) and SHARD in event.text]
    assert "429" in told
    assert "1 s" in told


def recorded(cache: Path, hub: Hub) -> dict[str, list[tuple[int, int]]]:
    staging = cache / "models" / "owner--name" / "snapshots" / hub.commit / ".zops" / "incoming"
    found = {}
    for record in staging.rglob("*.partial.json"):
        name = record.relative_to(staging).as_posix().removesuffix(".partial.json")
        found[name] = [tuple(span) for span in json.loads(record.read_text())["done"]]
    return found


def zops(hub: Hub, cache: Path, kind: str) -> list[str]:
    settings = {"cache.dir": cache, "source.kind": kind, "source.endpoint": hub.url, "model": MODEL}
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    return small_ranges.command("cache", "pull", *flags, "--output", "json")


def test_nothing_must_be_verified_by_a_record_alone(tmp_path: Path, hub: Hub) -> None:
    """A record that lies (a disk that lost what it had promised) must be found out by the hash of the whole."""
    spec = specify(tmp_path, hub, "modelscope")
    hub.refuse_after[SHARD] = 3 * RANGE
    with pytest.raises(SourceFailed):
        pull.pull(spec, silent)
    hub.refuse_after.clear()
    snapshot = tmp_path / "models" / "owner--name" / "snapshots" / hub.commit
    partial = snapshot / ".zops" / "incoming" / f"{SHARD}.partial"
    start, end = recorded(tmp_path, hub)[SHARD][0]
    with partial.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(end - start))
    assert read_marker(snapshot) is None
    pull.pull(spec, silent)
    assert is_verified(snapshot)


@pytest.mark.parametrize("kind", HUBS)
def test_a_connection_that_only_trickles_must_be_given_up(
    tmp_path: Path, hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SLOW_WINDOW_S", 0.0)
    monkeypatch.setattr(fetch, "SLOWEST_BYTES_S", 1 << 60)
    with pytest.raises(SourceFailed, match="bytes a second"):
        pull.pull(specify(tmp_path, hub, kind), silent)

"""A pull through the real SDKs must end verified, or with an error that names the file, whatever the hub does."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.support.hub import Cut, Fault, Flip, Hub, Short, Stall, Status
from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from zops.cache import fetch, pull, room
from zops.cache.layout import choose, find, is_verified
from zops.cache.manifest import read_manifest, read_marker, require_verified
from zops.cache.pull import PullResult
from zops.cache.status import status
from zops.catalog import Z_IMAGE_TURBO
from zops.errors import HostShort, SnapshotMissing, SourceFailed, UsageError
from zops.events import Event, Progressed, Report, Started, Warned, silent
from zops.host.disk import Disk
from zops.spec import Spec

MODEL = "owner/name"
HUBS = ("modelscope", "huggingface")
SHARD = "transformer/shard-1-of-2.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=3_000_000)


@pytest.fixture
def hub(origin: Path) -> Iterator[Hub]:
    with Hub(origin, MODEL) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def specify(cache: Path, hub: Hub | None, kind: str, **source: str) -> Spec:
    endpoint = {"endpoint": hub.url} if hub else {}
    return Spec.model_validate(
        {"model": hub.model if hub else MODEL, "source": {"kind": kind} | endpoint | source, "cache": {"dir": cache}}
    )


def assert_verified(result: PullResult, origin: Path) -> None:
    """The files must be the hub's, whatever the manifest says of them."""
    require_verified(result.snapshot.path)
    for name in RUNTIME_FILES:
        assert (result.snapshot.path / name).read_bytes() == (origin / name).read_bytes(), name
    assert not (result.snapshot.path / ".zops" / "incoming").exists()


def assert_nothing_served(cache: Path) -> None:
    for snapshot in find(cache):
        assert not is_verified(snapshot.path)
        assert read_marker(snapshot.path) is None
        assert [p.name for p in snapshot.path.iterdir()] == [".zops"], (
            "half a snapshot, which an SDK would take for one"
        )


def zops(*arguments: str, cache: Path, hub: Hub, kind: str, **environ: str) -> list[str]:
    settings = {"cache.dir": cache, "source.kind": kind, "source.endpoint": hub.url, "model": MODEL}
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    return [str(Path(sys.executable).with_name("zops")), *arguments, *flags, "--output", "json"]


@pytest.mark.parametrize("kind", HUBS)
def test_a_clean_pull_must_bring_what_is_needed_and_nothing_else(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    events: list[Event] = []
    result = pull.pull(specify(tmp_path, hub, kind), events.append)
    assert_verified(result, origin)
    assert result.fetched == RUNTIME_FILES
    assert sorted(hub.fetched()) == sorted(RUNTIME_FILES)
    assert (result.manifest.revision, result.manifest.origin) == (hub.commit, "upstream")
    assert result.snapshot.path == tmp_path / "models" / "owner--name" / "snapshots" / hub.commit
    assert choose(tmp_path, MODEL).path == result.snapshot.path
    total = next(event.total for event in events if isinstance(event, Started) and event.task == "fetch")
    last = [event.done for event in events if isinstance(event, Progressed) and event.task == "fetch"][-1]
    assert last == total == result.bytes


@pytest.mark.parametrize("kind", HUBS)
def test_a_real_pipeline_must_arrive_as_the_hub_has_it(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    with Hub(tiny_model, MODEL) as hub:
        result = pull.pull(specify(tmp_path, hub, kind), silent)
    files = set(require_verified(tiny_model).files)
    assert set(result.manifest.files) == {file for file in files if file.path not in {"README.md", ".gitattributes"}}
    (only,) = status(tmp_path, MODEL)
    assert only.dtypes == {"text_encoder": ("BF16",), "transformer": ("F32",), "vae": ("BF16",)}


@pytest.mark.parametrize("kind", HUBS)
def test_a_second_pull_must_fetch_nothing(tmp_path: Path, hub: Hub, kind: str) -> None:
    pull.pull(specify(tmp_path, hub, kind), silent)
    hub.requests.clear()
    result = pull.pull(specify(tmp_path, hub, kind), silent)
    assert (result.fetched, result.found, result.changed) == ((), RUNTIME_FILES, False)
    assert hub.fetched() == []


def test_a_commit_that_is_there_must_be_found_without_the_hub(tmp_path: Path, origin: Path) -> None:
    with Hub(origin, MODEL) as hub:
        pull.pull(specify(tmp_path, hub, "modelscope"), silent)
    result = pull.pull(specify(tmp_path, hub, "modelscope", revision=hub.commit), silent)
    assert_verified(result, origin)


@pytest.mark.parametrize("kind", HUBS)
def test_the_sdks_must_not_talk_on_our_streams(tmp_path: Path, hub: Hub, kind: str) -> None:
    hub.misbehave(SHARD, Cut(1000), Status(503, 0))
    command = zops("cache", "pull", cache=tmp_path, hub=hub, kind=kind)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changed"] is True
    for line in done.stderr.splitlines():
        assert "event" in json.loads(line), line


FAULTS: list[Callable[[random.Random], Fault]] = [
    lambda dice: Cut(dice.choice((1000, 2_500_000))),
    lambda dice: Cut(0),
    lambda dice: Flip(dice.randrange(100)),
    lambda dice: Short(dice.randrange(100)),
    lambda _dice: Status(500, 0),
    lambda _dice: Status(503, 0),
    lambda dice: Status(dice.choice((403, 404)), None),
]


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("able", [{}, {"ranges": False}, {"digests": False}], ids=str)
def test_every_schedule_of_faults_must_end_verified_or_name_the_file(
    tmp_path: Path, origin: Path, kind: str, able: dict
) -> None:
    def play(seed: int) -> str:
        dice = random.Random(f"{kind} {able} {seed}")
        cache = tmp_path / str(seed)
        # Without any digest nobody could tell a flipped bit; everything else must still be told.
        kinds = [make for make in FAULTS if able.get("digests", True) or not isinstance(make(dice), Flip)]
        with Hub(origin, MODEL, **able) as hub:
            for name in dice.sample(RUNTIME_FILES, dice.randrange(1, 4)):
                faults = [dice.choice(kinds)(dice) for _ in range(dice.randrange(1, 7))]
                limit = len(hub.files[name].content)
                if any(getattr(fault, "offset", 0) >= limit for fault in faults):
                    faults = [Cut(0)]
                hub.misbehave(name, *faults)
            faulty = set(hub._faults)
            try:
                result = pull.pull(specify(cache, hub, kind), silent)
            except SourceFailed as error:
                assert set(error.details["files"]) <= faulty
                assert all(name in error.message for name in list(error.details["files"])[:3])
                assert_nothing_served(cache)
                hub._faults.clear()
                hub.requests.clear()
                result = pull.pull(specify(cache, hub, kind), silent)
                assert set(hub.fetched()) == set(error.details["files"]), "what had arrived was fetched again"
                assert_verified(result, origin)
                return "refused"
            assert_verified(result, origin)
            return "verified"

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(play, range(10)))
    assert set(ends) == {"refused", "verified"}, "the schedules were too kind, or too cruel, to show anything"


@pytest.mark.parametrize("kind", HUBS)
def test_a_stalled_connection_must_be_given_up_and_resumed(tmp_path: Path, origin: Path, hub: Hub, kind: str) -> None:
    hub.misbehave(SHARD, Stall(2_000_000))
    environ = os.environ | {"MODELSCOPE_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = zops("cache", "pull", cache=tmp_path, hub=hub, kind=kind)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    assert is_verified(choose(tmp_path, MODEL).path)
    assert [r.range_start for r in hub.requests if r.file == SHARD][-1], "it started over instead of going on"


@pytest.mark.parametrize("kind", HUBS)
def test_a_pull_that_was_killed_must_go_on_where_it_stopped(tmp_path: Path, origin: Path, hub: Hub, kind: str) -> None:
    hub.hold_bodies(after=1_200_000)
    small = {name for name in RUNTIME_FILES if not name.endswith(".safetensors")}
    command = zops("cache", "pull", cache=tmp_path, hub=hub, kind=kind)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "models" / "owner--name" / "snapshots" / hub.commit / ".zops" / "incoming.json"
    partial = record.with_name("incoming") / f"{SHARD}.incomplete"
    try:
        wait_until(lambda: record.exists() and set(json.loads(record.read_text())["checked"]) == small)
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert_nothing_served(tmp_path)
    hub.gate.set()
    hub.requests.clear()
    result = pull.pull(specify(tmp_path, hub, kind), silent)
    assert_verified(result, origin)
    assert set(hub.fetched()) == set(RUNTIME_FILES) - small
    assert [r.range_start for r in hub.requests if r.file == SHARD][-1], "it started over instead of going on"


@pytest.mark.parametrize("kind", HUBS)
def test_an_interrupted_pull_must_end_at_once_and_keep_what_arrived(tmp_path: Path, hub: Hub, kind: str) -> None:
    hub.hold_bodies(after=1_200_000)
    command = zops("cache", "pull", cache=tmp_path, hub=hub, kind=kind)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.rglob("*.incomplete")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert_nothing_served(tmp_path)
    assert not list(tmp_path.rglob("lock")), "the lock outlived its holder"
    assert list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_must_not_be_repeated(tmp_path: Path, hub: Hub, kind: str, status: int) -> None:
    hub.misbehave(SHARD, *[Status(status)] * 9)
    with pytest.raises(SourceFailed, match=str(status)) as caught:
        pull.pull(specify(tmp_path, hub, kind), silent)
    assert list(caught.value.details["files"]) == [SHARD]
    assert hub.fetched().count(SHARD) == 1


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_pause_that_the_hub_asks_for_must_be_kept(tmp_path: Path, hub: Hub, kind: str, form: str) -> None:
    # A date counts whole seconds, so of two at least one is left.
    asked = 1 if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    hub.misbehave(SHARD, Status(503, retry_after=asked))
    began = time.monotonic()
    pull.pull(specify(tmp_path, hub, kind), silent)
    assert 1 <= time.monotonic() - began < 8


@pytest.mark.parametrize("kind", HUBS)
def test_bytes_that_stay_wrong_must_end_in_an_error_that_names_the_file(tmp_path: Path, hub: Hub, kind: str) -> None:
    hub.misbehave(SHARD, *[Flip(5)] * 9)
    with pytest.raises(SourceFailed, match=f"{SHARD}: its SHA-256 is"):
        pull.pull(specify(tmp_path, hub, kind), silent)
    assert_nothing_served(tmp_path)


def test_a_small_file_without_a_sha256_must_be_held_to_its_git_hash(tmp_path: Path, origin: Path, hub: Hub) -> None:
    hub.misbehave("model_index.json", Flip(5))
    assert_verified(pull.pull(specify(tmp_path / "once", hub, "huggingface"), silent), origin)
    hub.misbehave("model_index.json", *[Flip(5)] * 9)
    with pytest.raises(SourceFailed, match=r"model_index.json: its git hash"):
        pull.pull(specify(tmp_path / "always", hub, "huggingface"), silent)


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("model", ["owner/other", MODEL])
def test_a_model_or_revision_that_is_not_there_must_leave_nothing(
    tmp_path: Path, hub: Hub, kind: str, model: str
) -> None:
    spec = specify(tmp_path / "cache", hub, kind, revision="nothing-like-it").model_copy(update={"model": model})
    with pytest.raises(SourceFailed) as caught:
        pull.pull(spec, silent)
    assert caught.value.code == "source-not-found"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", HUBS)
def test_a_hub_that_is_down_must_be_told_quickly_and_leave_nothing(tmp_path: Path, origin: Path, kind: str) -> None:
    with Hub(origin, MODEL) as hub:
        pass
    began = time.monotonic()
    with pytest.raises(SourceFailed) as caught:
        pull.pull(specify(tmp_path / "cache", hub, kind), silent)
    assert caught.value.code == "source-unreachable"
    assert time.monotonic() - began < 15
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", HUBS)
def test_other_files_than_the_catalog_pins_must_be_refused_before_a_byte_is_fetched(
    tmp_path: Path, origin: Path, kind: str
) -> None:
    with Hub(origin, Z_IMAGE_TURBO.id) as hub:
        with pytest.raises(SourceFailed) as caught:
            pull.pull(specify(tmp_path / "cache", hub, kind), silent)
        assert hub.fetched() == []
    assert caught.value.code == "source-not-pinned"
    assert caught.value.details["files"]["tokenizer/vocab.json"] == "is not there"
    assert not (tmp_path / "cache").exists()


def test_files_that_nobody_vouches_for_must_be_recorded_as_local_with_a_warning(tmp_path: Path, origin: Path) -> None:
    events: list[Event] = []
    with Hub(origin, MODEL, digests=False) as hub:
        result = pull.pull(specify(tmp_path, hub, "modelscope"), events.append)
    assert_verified(result, origin)
    assert result.manifest.origin == "local"
    assert any(isinstance(event, Warned) for event in events)


def test_two_pulls_at_once_must_fetch_each_file_once(tmp_path: Path, origin: Path, hub: Hub) -> None:
    waiting = threading.Event()

    def second(event: Event) -> None:
        if isinstance(event, Warned):
            waiting.set()

    def run(report: Report) -> PullResult:
        return pull.pull(specify(tmp_path, hub, "modelscope"), report)

    hub.hold_bodies()
    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(run, silent)
            assert hub.holding.wait(30)
            other = pool.submit(run, second)
            assert waiting.wait(10), "the second did not say for whom it waits"
        finally:
            hub.gate.set()
        assert_verified(first.result(), origin)
        assert other.result().fetched == ()
    assert sorted(hub.fetched()) == sorted(RUNTIME_FILES)


def test_too_little_room_must_be_told_in_numbers_before_anything_is_fetched(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(HostShort, match=r"GB free, .* GB are needed") as caught:
        pull.pull(specify(tmp_path / "cache", hub, "modelscope"), silent)
    assert caught.value.code == "disk-full"
    assert hub.fetched() == []
    assert not list((tmp_path / "cache").rglob("*")), "a refused pull left something behind"


@pytest.mark.parametrize("kind", HUBS)
def test_a_pull_whose_holder_of_the_lock_was_killed_must_be_taken_over(
    tmp_path: Path, origin: Path, hub: Hub, kind: str
) -> None:
    hub.hold_bodies(after=1)
    command = zops("cache", "pull", cache=tmp_path, hub=hub, kind=kind)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.holding.wait(30)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told = next(line for line in second.stderr if "waiting for" in line)
    assert f"process {first.pid}" in json.loads(told)["text"]
    hub.gate.set()
    first.send_signal(signal.SIGKILL)
    first.wait()
    out, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert json.loads(out)["path"] == str(choose(tmp_path, MODEL).path)
    assert is_verified(choose(tmp_path, MODEL).path)


def test_too_few_inodes_must_be_told_before_anything_is_fetched(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RESERVE_INODES", 1 << 60)
    with pytest.raises(HostShort, match="inodes free"):
        pull.pull(specify(tmp_path / "cache", hub, "modelscope"), silent)
    assert hub.fetched() == []


@pytest.mark.parametrize(("system", "told"), [("nfs4", "network"), ("tmpfs", "in memory"), ("ext4", "")])
def test_a_disk_that_serves_a_cache_badly_must_be_told(
    tmp_path: Path, hub: Hub, system: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = room.disk_of

    def disk_of(path: Path) -> Disk:
        return replace(real(path), mount=replace(real(path).mount, system=system))

    monkeypatch.setattr(room, "disk_of", disk_of)
    events: list[Event] = []
    pull.pull(specify(tmp_path, hub, "modelscope"), events.append)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert [told in text for text in warned] == ([True] if told else [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("kind", [*HUBS, "directory"])
def test_a_disk_that_fills_up_must_end_in_a_clear_error_and_no_snapshot(
    small_disk: Path, origin: Path, hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RESERVE_BYTES", -(1 << 40))
    source = specify(small_disk, None, kind, path=str(origin)) if kind == "directory" else None
    with pytest.raises(HostShort, match="full") as caught:
        pull.pull(source or specify(small_disk, hub, kind), silent)
    assert caught.value.code == "disk-full"
    assert_nothing_served(small_disk)


def test_what_an_sdk_fetched_must_be_verified_where_it_lies_instead_of_fetched_again(
    tmp_path: Path, origin: Path, hub: Hub
) -> None:
    other = tmp_path / "models" / "owner--name" / "snapshots" / "master"
    shutil.copytree(origin, other)
    result = pull.pull(specify(tmp_path, hub, "modelscope"), silent)
    assert hub.fetched() == []
    assert result.snapshot.path == other
    assert require_verified(other).revision == hub.commit


def test_what_an_sdk_fetched_badly_must_not_be_taken(tmp_path: Path, origin: Path, hub: Hub) -> None:
    other = tmp_path / "models" / "owner--name" / "snapshots" / "master"
    shutil.copytree(origin, other)
    flip(other / SHARD)
    result = pull.pull(specify(tmp_path, hub, "modelscope"), silent)
    assert_verified(result, origin)
    assert result.snapshot.path != other
    assert read_manifest(other) is None


def test_a_directory_must_be_copied_and_left_as_it_was(tmp_path: Path, origin: Path) -> None:
    def state() -> list[tuple[str, int, str]]:
        files = sorted(path for path in origin.rglob("*") if path.is_file())
        return [(str(f), f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]

    before = state()
    result = pull.pull(specify(tmp_path, None, "directory", path=str(origin)), silent)
    assert_verified(result, origin)
    assert result.manifest.origin == "local"
    assert state() == before
    assert pull.pull(specify(tmp_path, None, "directory", path=str(origin)), silent).fetched == ()


def test_a_verified_directory_must_hand_on_its_manifest(tmp_path: Path, origin: Path, hub: Hub) -> None:
    first = pull.pull(specify(tmp_path / "a", hub, "huggingface"), silent)
    second = pull.pull(specify(tmp_path / "b", None, "directory", path=str(tmp_path / "a")), silent)
    assert_verified(second, origin)
    assert second.manifest == first.manifest


def test_a_damaged_directory_must_not_be_copied_as_good(tmp_path: Path, hub: Hub) -> None:
    first = pull.pull(specify(tmp_path / "a", hub, "huggingface"), silent)
    flip(first.snapshot.path / SHARD)
    with pytest.raises(SourceFailed, match=SHARD):
        pull.pull(specify(tmp_path / "b", None, "directory", path=str(first.snapshot.path)), silent)
    assert_nothing_served(tmp_path / "b")


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_directory_without_a_snapshot_must_be_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(SourceFailed, match="holds no snapshot"):
        pull.pull(specify(tmp_path / "cache", None, "directory", path=str(tmp_path / path)), silent)


def test_an_archive_must_be_left_to_restore(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="restored"):
        pull.pull(specify(tmp_path, None, "archive", path="/a.tar.zst"), silent)


def test_a_snapshot_that_was_never_verified_must_be_refused(tmp_path: Path, origin: Path) -> None:
    shutil.copytree(origin, tmp_path / "copy")
    with pytest.raises(SnapshotMissing) as caught:
        require_verified(tmp_path / "copy")
    assert caught.value.code == "snapshot-unverified"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def wait_until(check: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it did not come to that in time"
        threading.Event().wait(0.02)

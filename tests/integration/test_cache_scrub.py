"""A scrub must go on where it stopped, find what rots on the disk, and never vouch for what it did not read."""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from zops.cache import background, scrub, scrubbed
from zops.cache.background import Pace
from zops.cache.lanes import Stopped
from zops.cache.lock import hold
from zops.cache.manifest import clear_marker, read_marker, require_verified, sidecar
from zops.cache.scrubbed import read_record
from zops.cache.status import status
from zops.cache.textfile import Metric, render
from zops.cache.verify import pin, verify
from zops.cli.main import run
from zops.errors import LockHeld, SnapshotDamaged, SnapshotMissing
from zops.events import silent

MODEL = "owner/name"
SHARD = "transformer/shard-1-of-2.safetensors"
FAST = 1e12


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    root = write_pipeline(tmp_path / "cache", shard_bytes=50_000)
    pin(root, MODEL, "r1", silent)
    return root


def flip(path: Path) -> None:
    """Flip a bit as a disk does: size, time and inode stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def scrub_all(snapshot: Path, **options: object) -> scrub.Scrub:
    return scrub.scrub(snapshot, silent, **{"rate": FAST, **options})


def test_a_round_that_ends_well_must_renew_the_marker(snapshot: Path) -> None:
    before = read_marker(snapshot)
    result = scrub_all(snapshot).require()
    assert result.finished
    assert (result.read_files, result.left_files, result.result) == (len(RUNTIME_FILES), 0, "ok")
    assert result.read_bytes == result.manifest.size
    after = read_marker(snapshot)
    assert after.verified_at > before.verified_at
    assert after.stats == before.stats


def test_a_round_must_make_a_snapshot_servable_that_nobody_had_verified(snapshot: Path) -> None:
    clear_marker(snapshot)
    scrub_all(snapshot)
    assert require_verified(snapshot).model == MODEL


def test_a_round_must_keep_the_digests_by_which_a_snapshot_is_reread(snapshot: Path) -> None:
    verify(snapshot, deep=True, report=silent)
    scrub_all(snapshot)
    assert verify(snapshot, deep=False, reread=True, report=silent).ok


def test_each_run_must_go_on_where_the_last_one_stopped_and_the_round_must_end(snapshot: Path) -> None:
    before = read_marker(snapshot)
    for number in range(1, len(RUNTIME_FILES)):
        result = scrub_all(snapshot, limit_s=0)
        assert (result.read_files, result.left_files) == (1, len(RUNTIME_FILES) - number)
        assert not result.finished
        assert read_marker(snapshot) == before
    assert scrub_all(snapshot, limit_s=0).finished
    assert read_marker(snapshot).verified_at > before.verified_at
    assert scrub_all(snapshot, limit_s=0).left_files == len(RUNTIME_FILES) - 1, "the next round did not begin"


def test_a_run_that_is_interrupted_must_keep_what_it_read(snapshot: Path) -> None:
    def stop_at_the_third(event: object) -> None:
        nonlocal seen
        seen += type(event).__name__ == "Progressed"
        if seen == 3:
            raise KeyboardInterrupt

    seen = 0
    with pytest.raises(KeyboardInterrupt):
        scrub.scrub(snapshot, stop_at_the_third, rate=FAST)
    assert len(read_record(snapshot).seen) == 2
    assert scrub_all(snapshot).read_files == len(RUNTIME_FILES) - 2


def test_a_file_that_changed_since_it_was_read_must_be_read_again_before_the_round_ends(snapshot: Path) -> None:
    first = scrub_all(snapshot, limit_s=0)
    name = first.findings[0].path
    path = snapshot / name
    flip(path)
    os.utime(path)
    result = scrub_all(snapshot)
    assert {finding.path: finding.status for finding in result.bad} == {name: "corrupt"}
    assert read_marker(snapshot) is None


def test_a_bad_file_must_end_the_trust_at_once_and_all_of_them_be_named(snapshot: Path) -> None:
    other = "vae/model.safetensors"
    flip(snapshot / SHARD)
    (snapshot / other).unlink()
    markers = []

    def watch(event: object) -> None:
        markers.append(read_marker(snapshot) is not None)

    result = scrub.scrub(snapshot, watch, rate=FAST)
    assert {finding.path: finding.status for finding in result.bad} == {SHARD: "corrupt", other: "missing"}
    assert markers[0]
    assert not markers[-2], "the marker stayed until the end"
    with pytest.raises(SnapshotDamaged, match=SHARD):
        result.require()
    with pytest.raises(SnapshotMissing):
        require_verified(snapshot)
    assert read_record(snapshot).result == "damaged"


def test_damage_must_be_told_by_every_later_run_of_the_round(snapshot: Path) -> None:
    first = min(RUNTIME_FILES)
    flip(snapshot / first)
    for _ in RUNTIME_FILES:
        assert [finding.path for finding in scrub_all(snapshot, limit_s=0).bad] == [first]
    assert scrub_all(snapshot, limit_s=0).bad, "the next round began without it"


def test_a_mended_snapshot_must_be_found_sound_by_the_next_round(snapshot: Path, tmp_path: Path) -> None:
    shutil.copyfile(snapshot / SHARD, tmp_path / "kept")
    flip(snapshot / SHARD)
    assert scrub_all(snapshot).result == "damaged"
    shutil.copyfile(tmp_path / "kept", snapshot / SHARD)
    assert scrub_all(snapshot).result == "ok"
    assert require_verified(snapshot)


def test_weights_whose_headers_contradict_each_other_must_not_pass(snapshot: Path) -> None:
    index = snapshot / "transformer" / "shard.safetensors.index.json"
    index.write_text(index.read_text().replace('"a"', '"c"'))
    with pytest.raises(SnapshotDamaged):
        pin(snapshot, MODEL, "r1", silent)
    # Pinned by somebody who did not look: every hash is right, and still it cannot be loaded.
    body = json.loads((sidecar(snapshot) / "manifest.json").read_text())
    for each in body["files"]:
        each["sha256"] = hashlib.sha256((snapshot / each["path"]).read_bytes()).hexdigest()
        each["size"] = (snapshot / each["path"]).stat().st_size
    del body["digest"]
    (sidecar(snapshot) / "manifest.json").write_text(json.dumps(body))
    result = scrub_all(snapshot)
    assert result.result == "damaged"
    assert result.bad
    assert read_marker(snapshot) is None


def test_a_file_that_is_being_replaced_must_be_left_for_the_next_run(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scrub.judge
    content = (snapshot / SHARD).read_bytes()
    (snapshot / SHARD).write_bytes(b"half")

    def replaced(entry, found, *rest):
        finding = real(entry, found, *rest)
        if entry.path == SHARD:
            (snapshot / SHARD).write_bytes(content)
        return finding

    monkeypatch.setattr(scrub, "judge", replaced)
    result = scrub_all(snapshot)
    assert (result.bad, result.left_files, result.finished) == ((), 1, False)
    monkeypatch.undo()
    assert scrub_all(snapshot).finished


def test_a_snapshot_on_a_read_only_mount_must_be_scrubbed_with_its_record_elsewhere(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOPS_STATE_DIR", str(tmp_path / "state"))
    for module in (scrub, scrubbed):
        monkeypatch.setattr(module, "is_writable", lambda _snapshot: False)
    before = sorted(path.name for path in sidecar(snapshot).iterdir())
    scrub_all(snapshot, limit_s=0)
    assert scrub_all(snapshot).read_files == len(RUNTIME_FILES) - 1
    assert sorted(path.name for path in sidecar(snapshot).iterdir()) == before
    assert status(snapshot)[0].scrub_result == "ok"


def test_a_record_of_another_manifest_must_count_for_nothing(snapshot: Path) -> None:
    scrub_all(snapshot)
    assert status(snapshot)[0].scrubbed_at
    (snapshot / SHARD).unlink()
    (snapshot / "transformer" / "shard.safetensors.index.json").unlink()
    pin(snapshot, MODEL, "r2", silent)
    assert (status(snapshot)[0].scrubbed_at, status(snapshot)[0].scrub_result) == (None, "")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "seen": {"a": 1}}', '{"format": 1, "seen": []}'])
def test_a_record_that_cannot_be_read_must_only_cost_reading_again(snapshot: Path, text: str) -> None:
    scrub_all(snapshot, limit_s=0)
    (sidecar(snapshot) / "scrub.json").write_text(text)
    assert scrub_all(snapshot).read_files == len(RUNTIME_FILES)


def test_a_second_scrub_must_not_run_beside_the_first(snapshot: Path) -> None:
    with hold(sidecar(snapshot) / "scrub.lock", silent), pytest.raises(LockHeld):
        scrub_all(snapshot)


def test_the_rate_must_be_kept_on_average_and_idle_time_not_be_made_up_for() -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(1_000_000, clock=lambda: now, wait=wait)
    for _ in range(100):
        pace.spend(100_000)
    assert now == pytest.approx(10, abs=0.2)
    now += 1000
    began = now
    for _ in range(100):
        pace.spend(100_000)
    assert now - began == pytest.approx(10, abs=0.2)


def test_every_byte_must_pass_at_the_pace(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Pace):
        def spend(self, count: int) -> None:
            spent.append(count)

    spent: list[int] = []
    monkeypatch.setattr(scrub, "Pace", Counted)
    assert scrub_all(snapshot).read_bytes == sum(spent)


def test_a_pace_that_is_stopped_must_let_nobody_wait() -> None:
    pace = Pace(1.0)
    pace.stopped.set()
    with pytest.raises(Stopped):
        pace.spend(1000)


def test_only_the_thread_that_reads_must_stand_back() -> None:
    def look() -> None:
        background.stand_back()
        seen.append(os.getpriority(os.PRIO_PROCESS, 0))
        stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat").read_text()
        seen.append(int(stat.rpartition(")")[2].split()[16]))

    seen: list[int] = []
    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [19, 19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# --- the command


def test_the_command_must_say_what_it_found_and_leave_metrics(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "zops.prom"
    argv = ["cache", "scrub", str(snapshot), "--rate", "1GB/s", "--metrics", str(metrics), "--output", "json"]
    assert run(argv) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["finished"], body["scrub_result"]) == (True, "ok")
    assert value(metrics, "ok") == 1
    assert value(metrics, "run_bytes") == body["read_bytes"]
    assert value(metrics, "scrubbed_timestamp_seconds") == pytest.approx(time.time(), abs=60)
    assert metrics.stat().st_mode & 0o777 == 0o644
    flip(snapshot / SHARD)
    assert run(argv) == 4
    assert (value(metrics, "ok"), value(metrics, "bad_files")) == (0, 1)
    assert [path.name for path in tmp_path.iterdir() if "prom" in path.name] == ["zops.prom"]
    out = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in out["findings"] if each["status"] == "corrupt"] == [SHARD]


def value(metrics: Path, name: str) -> float:
    """Return a metric from a text file, every line of which must be in the format."""
    line = re.compile(r'(?:# (?:HELP|TYPE) .+|zops_cache_scrub_\w+\{model="[^"]*",revision="[^"]*",path="[^"]*"\} \S+)')
    lines = metrics.read_text().splitlines()
    assert all(line.fullmatch(each) for each in lines), lines
    found = [each for each in lines if each.startswith(f"zops_cache_scrub_{name}{{")]
    assert len(found) == 1
    return float(found[0].rpartition(" ")[2])


@pytest.mark.parametrize("option", ["--rate=fast", "--rate=0", "--rate=5 apples", "--limit=soon", "--limit=5"])
def test_a_rate_or_time_that_is_none_must_be_refused(snapshot: Path, option: str) -> None:
    assert run(["cache", "scrub", str(snapshot), option]) == 2


def test_labels_must_not_break_the_format() -> None:
    text = render("zops_", ({"path": 'a"b\\c\nd'}, [Metric("x", "An x.", True)]))
    assert text.splitlines()[-1] == 'zops_x{path="a\\"b\\\\c\\nd"} 1'

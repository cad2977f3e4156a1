"""Each fault of an instance, made on purpose, and the verdict that names it."""

import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.instance import DIGEST, picture, png, running
from zops.errors import NotReady
from zops.events import silent
from zops.health.probes import check_instance
from zops.health.ready import wait_ready
from zops.host.paths import state_dir
from zops.runtime.base import Instance


def an_instance(url: str, **changes) -> Instance:
    whole = Instance(
        name="zops",
        id="0123456789abcdef",
        runtime="docker",
        state="running",
        url=url,
        model="zops/synthetic-tiny",
        snapshot="/cache/tiny",
        manifest_digest=DIGEST,
        spec_digest="s",
        started_at="2026-01-01T00:00:00Z",
        traits={"gpus": "none", "serve": {"warmup_size": 32}},
    )
    return replace(whole, **changes)


@pytest.fixture
def served():
    with running() as (url, behaviour):
        yield an_instance(url), behaviour


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def layers(health) -> list[tuple[str, str]]:
    return [(probe.layer, probe.verdict) for probe in health.probes]


def test_a_sound_instance_must_be_ok_in_every_layer_within_300_ms(served):
    instance, behaviour = served
    began = time.monotonic()
    health = check_instance(instance)
    assert time.monotonic() - began < 0.3
    assert layers(health) == [(layer, "ok") for layer in ("running", "live", "gpu", "cache", "ready", "queue")]
    assert (health.verdict, health.code) == ("ok", "")
    assert "/v1/images/generations" not in [path for path, _ in behaviour.requests]


def test_a_deep_look_must_make_an_image_of_the_warm_up_size_and_report_its_hash(served):
    instance, behaviour = served
    probe = check_instance(instance, deep=True).probes[-1]
    assert (probe.layer, probe.verdict) == ("canary", "ok")
    assert behaviour.requests[-1][1]["size"] == "32x32"
    assert len(probe.evidence["sha256"]) == 64
    assert probe.evidence["deviation"] > 1


@pytest.mark.parametrize(
    ("changes", "code", "reason", "remedy"),
    [
        ({"state": "exited", "exit_code": 1}, "exited", "exited with status 1", "zops logs"),
        ({"state": "exited", "exit_code": 0}, "stopped", "it was stopped", "zops up"),
        ({"state": "exited", "exit_code": 137, "oom_killed": True}, "oom-killed", "out of memory", "resources.memory"),
        ({"state": "restarting", "restarts": 4, "exit_code": 3}, "restart-loop", "again (4 times", "zops logs"),
        ({"state": "restarting", "restarts": 1, "exit_code": 3}, "exited", "is being restarted", "zops logs"),
        ({"state": "paused"}, "paused", "paused", "docker unpause 0123456789ab"),
        ({"state": "created"}, "created", "never started", "zops up"),
        ({"state": "dead"}, "dead", "dead", "zops logs"),
    ],
)
def test_an_instance_that_does_not_run_must_fail_there_and_not_be_asked_further(served, changes, code, reason, remedy):
    instance, behaviour = served
    health = check_instance(replace(instance, **changes), deep=True)
    assert layers(health) == [("running", "failed")]
    assert health.code == code
    assert reason in health.first_bad.reason
    assert remedy in health.first_bad.remedy
    assert behaviour.requests == []


def test_a_restart_loop_must_be_seen_between_two_deaths(served):
    instance, behaviour = served
    loops = replace(instance, restarts=3, started_at=ago(1))
    assert (check_instance(loops).verdict, check_instance(loops).code) == ("degraded", "restart-loop")
    behaviour.ready = 503
    assert layers(check_instance(loops)) == [("running", "failed")]


def test_one_restart_long_ago_must_not_count_against_an_instance(served):
    instance, _ = served
    assert check_instance(replace(instance, restarts=5)).verdict == "ok"


@pytest.fixture
def closed():
    """The address of a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("health", "age_s", "code"),
    [
        ("", 3600, "unreachable"),
        ("", 5, "starting"),
        ("", 45, "unreachable"),
        ("starting", 45, "starting"),
        ("starting", 3600, "unreachable"),
        ("healthy", 5, "unreachable"),
    ],
)
def test_a_port_on_which_nobody_answers_must_fail_the_live_layer_unless_it_may_still_open(closed, health, age_s, code):
    found = check_instance(an_instance(closed, health=health, started_at=ago(age_s)))
    assert layers(found)[-1] == ("live", "failed")
    assert found.code == code


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_frozen_server_must_fail_the_live_layer_in_bounded_time(served, path):
    instance, behaviour = served
    behaviour.hang.add(path)
    began = time.monotonic()
    health = check_instance(instance, probe_timeout_s=0.3)
    assert time.monotonic() - began < 1.5
    assert layers(health)[-1] == ("live", "failed")
    assert health.code == "hung"
    assert "did not answer within 0.3 s" in health.first_bad.reason


def test_a_server_that_is_silent_while_it_starts_must_be_a_start(served):
    instance, behaviour = served
    behaviour.hang.add("/livez")
    assert check_instance(replace(instance, started_at=ago(3)), probe_timeout_s=0.3).code == "starting"


def test_a_key_that_is_none_must_be_degraded_and_end_the_questions(served, monkeypatch):
    monkeypatch.setenv("ZOPS_API_KEY", "not a key")
    instance, behaviour = served
    health = check_instance(instance, deep=True)
    assert layers(health) == [("running", "ok"), ("live", "degraded")]
    assert health.code == "key-refused"
    assert behaviour.requests == []


def test_an_instance_without_a_usable_address_must_be_a_verdict_and_no_crash(served):
    health = check_instance(an_instance(""))
    assert layers(health)[-1] == ("live", "failed")


def test_something_else_at_the_address_must_be_named_as_such(served):
    instance, behaviour = served
    behaviour.raw = {"/livez": b"<html>", "/readyz": b"<html>It works!"}
    assert (check_instance(instance).first_bad.layer, check_instance(instance).code) == ("live", "stranger")


def test_a_server_that_denies_that_it_lives_must_fail_the_live_layer(served):
    instance, behaviour = served
    behaviour.live = 503
    assert (check_instance(instance).first_bad.layer, check_instance(instance).code) == ("live", "not-live")


@pytest.mark.parametrize(
    ("phase", "restarts", "age_s", "code"),
    [
        ("load", 0, 10, "starting"),
        ("load", 0, 901, "start-overdue"),
        ("restarting", 1, 3600, "worker-down"),
        ("load", 1, 3600, "worker-down"),
        ("failed", 0, 10, "worker-down"),
        ("draining", 0, 3600, "draining"),
    ],
)
def test_live_but_not_ready_must_name_the_phase_and_tell_a_start_from_a_loss(served, phase, restarts, age_s, code):
    instance, behaviour = served
    behaviour.ready = 503
    behaviour.readiness = {"phase": phase, "reason": "shard 2", "workers": [{"phase": phase, "restarts": restarts}]}
    health = check_instance(replace(instance, started_at=ago(age_s)), deep=True)
    assert layers(health)[-1] == ("ready", "failed")
    assert health.code == code
    assert health.first_bad.reason.startswith(f"live but not ready: {phase}: shard 2")


def test_the_time_for_a_start_must_be_the_specifications_own(served):
    instance, behaviour = served
    behaviour.ready, behaviour.readiness = 503, {"phase": "load"}
    assert check_instance(replace(instance, started_at=ago(20)), startup_timeout_s=10).code == "start-overdue"


def test_one_lost_worker_of_two_must_be_degraded_and_one_that_still_starts_must_not(served):
    instance, behaviour = served
    well, lost = {"phase": "ready", "restarts": 0}, {"phase": "load", "restarts": 1, "reason": "its process ended"}
    behaviour.info["workers"] = [well, lost]
    health = check_instance(instance)
    assert (health.verdict, health.code) == ("degraded", "worker-down")
    assert "1 of 2 workers down" in health.first_bad.reason
    behaviour.info["workers"] = [well, {"phase": "load", "restarts": 0}]
    assert check_instance(instance).verdict == "ok"


def test_another_snapshot_than_the_expected_one_must_fail_the_cache_layer(served):
    instance, behaviour = served
    behaviour.info["manifest_digest"] = "b" * 64
    health = check_instance(instance)
    assert layers(health)[-1] == ("cache", "failed")
    assert health.code == "manifest-differs"
    assert check_instance(instance, expected_digest="b" * 64).verdict == "ok"


@pytest.mark.parametrize(
    ("snapshot", "code"),
    [
        ({"manifest_digest": "b" * 64, "writable": False, "error": ""}, "manifest-differs"),
        ({"manifest_digest": "", "writable": False, "error": "no manifest at /cache/tiny"}, "snapshot-gone"),
        ({"manifest_digest": DIGEST, "writable": True, "error": ""}, "cache-writable"),
        ({"manifest_digest": DIGEST, "writable": False, "error": ""}, ""),
    ],
)
def test_what_lies_on_the_disk_now_must_count_not_what_was_loaded_once(served, snapshot, code):
    instance, behaviour = served
    behaviour.info["snapshot"] = snapshot
    health = check_instance(instance)
    assert health.code == code
    assert health.verdict == {"": "ok", "cache-writable": "degraded"}.get(code, "failed")
    assert "/v1/zops/info" not in [path for path, _ in behaviour.requests]


def test_a_cache_that_an_older_instance_can_write_to_must_be_degraded(served):
    instance, behaviour = served
    behaviour.info["snapshot_writable"] = True
    assert check_instance(instance).code == "cache-writable"
    assert check_instance(instance).verdict == "degraded"
    assert check_instance(replace(instance, runtime="process")).verdict == "ok"


@pytest.mark.parametrize("device", ["cpu", None])
def test_an_older_instance_that_lost_its_gpu_must_fail_the_gpu_layer(served, device):
    instance, behaviour = served
    wants = replace(instance, traits={"gpus": "all"})
    behaviour.info["device"] = device
    health = check_instance(wants)
    assert layers(health)[-1] == ("gpu", "failed")
    assert health.code == "gpu-missing"
    assert "zops down" in health.first_bad.remedy
    behaviour.info["device"] = "NVIDIA H200"
    assert check_instance(wants).verdict == "ok"


H200 = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H200", "memory_used": 21 << 30, "memory_total": 141 << 30,
        "temperature": 41, "ecc_uncorrected": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "code"),
    [
        ("all", {"error": "", "devices": [H200]}, "NVIDIA H200", ""),
        ("all", {"error": "Unknown Error", "devices": []}, "NVIDIA H200", "gpu-lost"),
        ("all", {"error": "GPU 1 is gone", "devices": [H200]}, "NVIDIA H200", "gpu-lost"),
        ("all", {"error": "", "devices": []}, "cpu", "gpu-missing"),
        ([0, 1], {"error": "", "devices": [H200]}, "NVIDIA H200", "gpu-missing"),
        ("all", {"error": "", "devices": [H200]}, "cpu", "gpu-unused"),
        ("all", {"error": "", "devices": [H200 | {"ecc_uncorrected": 2}]}, "NVIDIA H200", "gpu-errors"),
        ("none", None, "cpu", ""),
    ],
)
def test_the_gpu_must_be_judged_by_what_nvml_says_inside(served, asked, gpus, device, code):
    instance, behaviour = served
    behaviour.info |= {"gpus": gpus, "device": device}
    health = check_instance(replace(instance, traits={"gpus": asked}))
    assert health.code == code
    assert health.verdict == {"": "ok", "gpu-errors": "degraded"}.get(code, "failed")


def test_a_worker_that_died_with_its_gpu_must_be_told_as_the_gpu(served):
    instance, behaviour = served
    behaviour.ready, behaviour.readiness = 503, {"phase": "restarting", "reason": "its process ended"}
    behaviour.info |= {"gpus": {"error": "Unknown Error", "devices": []}, "device": None}
    assert check_instance(replace(instance, traits={"gpus": "all"})).code == "gpu-lost"


def test_a_start_whose_gpus_are_not_told_yet_must_be_a_start(served):
    instance, behaviour = served
    behaviour.ready, behaviour.readiness = 503, {"phase": "imports"}
    behaviour.info |= {"gpus": None, "device": None}
    young = replace(instance, traits={"gpus": "all"}, started_at=ago(3))
    assert check_instance(young).code == "starting"


@pytest.mark.parametrize(
    ("queue", "device", "code"),
    [
        ({"waiting": 3, "running": 1, "idle_s": 61.0}, "NVIDIA H200", "queue-stuck"),
        ({"waiting": 0, "running": 1, "idle_s": 61.0}, "NVIDIA H200", "queue-stuck"),
        ({"waiting": 3, "running": 1, "idle_s": 59.0}, "NVIDIA H200", ""),
        ({"waiting": 0, "running": 0, "idle_s": None}, "NVIDIA H200", ""),
        ({"waiting": 16, "running": 1, "idle_s": 0.1, "oldest_s": 500.0}, "NVIDIA H200", ""),
        ({"waiting": 3, "running": 1}, "NVIDIA H200", ""),
        ({"waiting": 0, "running": 1, "idle_s": 250.0}, "cpu", ""),
        ({"waiting": 0, "running": 1, "idle_s": 301.0}, "cpu", "queue-stuck"),
    ],
)
def test_a_queue_must_be_stuck_only_when_something_waits_and_nothing_moves(served, queue, device, code):
    instance, behaviour = served
    behaviour.info |= {"queue": queue, "device": device}
    patient = replace(instance, traits={"gpus": "none", "serve": {"request_timeout_s": 300}})
    assert check_instance(patient).code == code


@pytest.mark.parametrize(
    ("image", "code", "reason"),
    [
        (lambda w, h: png(w, h, lambda x, y: b"\0\0\0"), "canary-black", "black"),
        (lambda w, h: png(w, h, lambda x, y: b"\x80\x10\x20"), "canary-black", "flat"),
        (lambda w, h: png(16, 16, lambda x, y: bytes((x, y, x * y))), "canary-failed", "32 x 32 were asked for"),
        (lambda w, h: b"no image at all", "canary-failed", "no PNG"),
    ],
)
def test_an_image_that_shows_nothing_must_fail_the_canary_and_never_become_golden(served, image, code, reason):
    instance, behaviour = served
    behaviour.image = image
    for record in (False, True):
        health = check_instance(instance, deep=True, record=record)
        assert layers(health)[-1] == ("canary", "failed")
        assert health.code == code
        assert reason in health.first_bad.reason
    behaviour.image = picture
    assert check_instance(instance, deep=True).probes[-1].evidence["golden"] == "recorded"


def test_a_worker_that_hangs_must_fail_the_canary_in_bounded_time(served):
    instance, behaviour = served
    behaviour.hang.add("/v1/images/generations")
    began = time.monotonic()
    health = check_instance(instance, deep=True, canary_timeout_s=0.3)
    assert time.monotonic() - began < 1.5
    assert layers(health)[-1] == ("canary", "failed")
    assert health.code == "canary-failed"


def test_a_canary_that_a_full_queue_refuses_must_say_nothing_against_the_instance(served):
    instance, behaviour = served
    behaviour.refusal = (429, {"error": {"message": "16 requests are waiting", "code": "queue_full"}})
    probe = check_instance(instance, deep=True).probes[-1]
    assert (probe.verdict, probe.evidence["skipped"]) == ("ok", True)


@pytest.mark.parametrize(("made", "verdict"), [(8, "ok"), (7, "failed")])
def test_a_canary_that_waited_behind_others_must_be_excused_only_if_they_got_theirs(served, made, verdict):
    instance, behaviour = served
    behaviour.info["queue"] = {"waiting": 9, "running": 1, "idle_s": 0.1, "made": 7}
    behaviour.hang.add("/v1/images/generations")
    behaviour.on_request["/v1/images/generations"] = lambda: behaviour.info["queue"].update(made=made)
    assert check_instance(instance, deep=True, canary_timeout_s=0.3).verdict == verdict


def test_the_first_canary_must_be_the_golden_one_of_later_ones_until_recorded_anew(served):
    instance, behaviour = served

    def golden(**how) -> tuple[str, str]:
        health = check_instance(instance, deep=True, **how)
        return health.code, health.probes[-1].evidence["golden"]

    assert golden() == ("", "recorded")
    assert golden() == ("", "equal")
    behaviour.image = lambda w, h: png(w, h, lambda x, y: bytes((x * 7 % 256, y * 11 % 256, (x * y + 1) % 256)))
    assert golden() == ("", "similar")
    behaviour.image = lambda w, h: png(w, h, lambda x, y: bytes((255 - x, y * 3, x * 2)))
    assert golden() == ("canary-differs", "different")
    assert golden() == ("canary-differs", "different")
    assert golden(record=True) == ("", "recorded")
    assert golden() == ("", "equal")


@pytest.mark.parametrize(
    "change", [{"manifest_digest": "b" * 64}, {"preset": "fp8"}, {"dtype": "float32"}, {"device": "NVIDIA L4"}]
)
def test_another_way_of_serving_must_have_a_golden_of_its_own(served, change):
    instance, behaviour = served
    check_instance(instance, deep=True)
    before = dict(behaviour.info)
    behaviour.info |= change
    look = {"deep": True, "expected_digest": ""}
    assert check_instance(instance, **look).probes[-1].evidence["golden"] == "recorded"
    behaviour.info = before
    assert check_instance(instance, **look).probes[-1].evidence["golden"] == "equal"


def test_a_slow_canary_must_be_judged_by_the_work_and_not_by_the_wait(served):
    instance, behaviour = served

    def look(seconds: float, queue: float = 0.0, batch_size: int = 1) -> tuple[str, str]:
        # The stand-in answers at once: a wait below zero stands for work that it did not do.
        behaviour.receipt |= {"seconds": {"queue": queue - seconds}, "batch_size": batch_size}
        health = check_instance(instance, deep=True)
        return health.verdict, health.code

    assert look(1.0) == ("ok", "")
    assert look(1.5) == ("ok", "")
    assert look(3.5) == ("degraded", "canary-slow")
    assert look(9.0) == ("failed", "canary-slow")
    assert look(9.0, queue=8.0) == ("ok", "")
    assert look(9.0, batch_size=4) == ("ok", "")
    assert look(1.0) == ("ok", "")


def test_a_damaged_record_of_canaries_must_cost_the_comparison_and_not_the_verdict(served):
    instance, _ = served
    check_instance(instance, deep=True)
    (file,) = (state_dir() / "canaries").iterdir()
    for damage in ("", "[]", '{"format": 2}', '{"format": 1, "goldens": {"x": 3}}'):
        file.write_text(damage)
        assert check_instance(instance, deep=True).probes[-1].evidence["golden"] == "recorded"


def test_a_state_directory_that_cannot_be_written_must_not_fail_an_instance(served, monkeypatch, tmp_path):
    instance, _ = served
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOPS_STATE_DIR", str(tmp_path / "file"))
    health = check_instance(instance, deep=True)
    assert health.verdict == "ok"
    assert "not recorded" in health.probes[-1].reason


def test_waiting_must_report_each_phase_once_and_end_when_ready(served):
    instance, behaviour = served
    phases = ["load", "load", "warmup"]
    events = []

    def alive():
        if phases:
            behaviour.readiness = {"phase": phases.pop(0), "reason": ""}
        else:
            behaviour.ready, behaviour.readiness = 200, {"phase": "ready"}

    behaviour.ready, behaviour.readiness = 503, {"phase": "imports"}
    info = wait_ready(instance.url, timeout_s=10, alive=alive, report=events.append)
    assert [name for name, _ in info.phases] == ["imports", "load", "warmup"]
    assert [event.task for event in events] == [
        f"ready:{phase}" for phase in ("imports", "load", "warmup") for _ in ("started", "finished")
    ]


def test_waiting_must_end_at_once_when_the_instance_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(NotReady, match="it exited with status 3") as caught:
        wait_ready(f"http://127.0.0.1:{port}", timeout_s=60, alive=lambda: "it exited with status 3", report=silent)
    assert time.monotonic() - began < 1
    assert caught.value.details["phase"] == "starting"


def test_waiting_must_end_in_time_and_name_the_phase(served):
    instance, behaviour = served
    behaviour.ready, behaviour.readiness = 503, {"phase": "warmup", "reason": "slow"}
    began = time.monotonic()
    with pytest.raises(NotReady, match=r"in phase warmup \(slow\)"):
        wait_ready(instance.url, timeout_s=0.4, alive=lambda: None, report=silent)
    assert 0.4 <= time.monotonic() - began < 1.5

"""Each fault of an instance, made on purpose, and the verdict that names it."""

import socket
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.support.instance import DIGEST, png, running
from zops.errors import NotReady
from zops.events import silent
from zops.health.probes import check_instance
from zops.health.ready import wait_ready
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


def layers(health) -> list[tuple[str, str]]:
    return [(probe.layer, probe.verdict) for probe in health.probes]


def test_a_sound_instance_must_be_ok_in_every_layer_within_300_ms(served):
    instance, behaviour = served
    began = time.monotonic()
    health = check_instance(instance)
    assert time.monotonic() - began < 0.3
    assert layers(health) == [(layer, "ok") for layer in ("running", "live", "ready", "gpu", "cache")]
    assert health.verdict == "ok"
    assert "/v1/images/generations" not in [path for path, _ in behaviour.requests]


def test_a_deep_look_must_make_an_image_of_the_warm_up_size_and_report_its_hash(served):
    instance, behaviour = served
    probe = check_instance(instance, deep=True).probes[-1]
    assert (probe.layer, probe.verdict) == ("canary", "ok")
    assert behaviour.requests[-1][1]["size"] == "32x32"
    assert len(probe.evidence["sha256"]) == 64
    assert probe.evidence["deviation"] > 1


@pytest.mark.parametrize(
    ("changes", "reason", "remedy"),
    [
        ({"state": "exited", "exit_code": 1}, "exited with status 1", "zops logs"),
        ({"state": "exited", "exit_code": 137, "oom_killed": True}, "out of memory", "resources.memory"),
        ({"state": "restarting", "restarts": 4, "exit_code": 3}, "restarted again and again (4 times", "zops logs"),
        ({"state": "paused"}, "paused", "docker unpause 0123456789ab"),
        ({"state": "created"}, "never started", "zops up"),
        ({"state": "dead"}, "dead", "zops logs"),
    ],
)
def test_an_instance_that_does_not_run_must_fail_there_and_not_be_asked_further(served, changes, reason, remedy):
    instance, behaviour = served
    health = check_instance(replace(instance, **changes), deep=True)
    assert layers(health) == [("running", "failed")]
    assert reason in health.first_bad.reason
    assert remedy in health.first_bad.remedy
    assert behaviour.requests == []


def test_a_restart_loop_must_be_seen_between_two_deaths(served):
    instance, _ = served
    health = check_instance(replace(instance, restarts=3, started_at=datetime.now(UTC).isoformat()))
    assert health.first_bad.layer == "running"
    assert health.verdict == "degraded"


def test_one_restart_long_ago_must_not_count_against_an_instance(served):
    instance, _ = served
    assert check_instance(replace(instance, restarts=5)).verdict == "ok"


def test_a_port_on_which_nobody_answers_must_fail_the_live_layer():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    health = check_instance(an_instance(f"http://127.0.0.1:{port}"))
    assert layers(health)[-1] == ("live", "failed")


def test_a_frozen_server_must_fail_the_live_layer_in_bounded_time(served):
    instance, behaviour = served
    behaviour.hang.add("/livez")
    began = time.monotonic()
    health = check_instance(instance, probe_timeout_s=0.3)
    assert time.monotonic() - began < 1.5
    assert layers(health)[-1] == ("live", "failed")
    assert "did not answer within 0.3 s" in health.first_bad.reason


def test_live_but_not_ready_must_name_the_phase(served):
    instance, behaviour = served
    behaviour.ready, behaviour.readiness = 503, {"status": "unready", "phase": "load", "reason": "reading shard 2"}
    health = check_instance(instance, deep=True)
    assert layers(health)[-1] == ("ready", "failed")
    assert health.first_bad.reason == "live but not ready: load: reading shard 2"


def test_another_snapshot_than_the_expected_one_must_fail_the_cache_layer(served):
    instance, behaviour = served
    behaviour.info["manifest_digest"] = "b" * 64
    health = check_instance(instance)
    assert layers(health)[-1] == ("cache", "failed")
    assert check_instance(instance, expected_digest="b" * 64).verdict == "ok"


def test_a_cache_that_the_instance_can_write_to_must_be_degraded(served):
    instance, behaviour = served
    behaviour.info["snapshot_writable"] = True
    assert check_instance(instance).first_bad.layer == "cache"
    assert check_instance(instance).verdict == "degraded"
    assert check_instance(replace(instance, runtime="process")).verdict == "ok"


@pytest.mark.parametrize("device", ["cpu", None])
def test_an_instance_that_lost_its_gpu_must_fail_the_gpu_layer(served, device):
    instance, behaviour = served
    wants = replace(instance, traits={"gpus": "all"})
    behaviour.info["device"] = device
    health = check_instance(wants)
    assert layers(health)[-1] == ("gpu", "failed")
    assert "zops down" in health.first_bad.remedy
    behaviour.info["device"] = "NVIDIA H200"
    assert check_instance(wants).verdict == "ok"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda w, h: png(w, h, lambda x, y: b"\0\0\0"), "black"),
        (lambda w, h: png(w, h, lambda x, y: b"\x80\x10\x20"), "flat"),
        (lambda w, h: png(16, 16, lambda x, y: bytes((x, y, x * y))), "32 x 32 were asked for"),
        (lambda w, h: b"no image at all", "no PNG"),
    ],
)
def test_an_image_that_shows_nothing_must_fail_the_canary(served, image, reason):
    instance, behaviour = served
    behaviour.image = image
    health = check_instance(instance, deep=True)
    assert layers(health)[-1] == ("canary", "failed")
    assert reason in health.first_bad.reason


def test_a_worker_that_hangs_must_fail_the_canary_in_bounded_time(served):
    instance, behaviour = served
    behaviour.hang.add("/v1/images/generations")
    began = time.monotonic()
    health = check_instance(instance, deep=True, canary_timeout_s=0.3)
    assert time.monotonic() - began < 1.5
    assert layers(health)[-1] == ("canary", "failed")


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

"""The main job on a real engine: from a bare host to a serving one, through a loss of the cache, and back."""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.support.host import Host, free_port
from tests.support.waiting import eventually
from zops.runtime.replacing import remove_volume

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def engine(docker_client: docker.DockerClient) -> docker.DockerClient:
    return docker_client


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path, inference_image: str, engine: docker.DockerClient) -> Iterator[Host]:
    name = f"e2e-{os.getpid()}-{free_port()}"
    made = Host(tmp_path / "host", tiny_model, name=name, runtime="docker", image={"name": inference_image})
    yield made
    for container in containers(engine, made):
        container.remove(force=True)
    for volume in engine.volumes.list(filters={"label": f"io.zops.deployment={name}"}):
        remove_volume(volume)


def containers(engine: docker.DockerClient, host: Host) -> list[Any]:
    return engine.containers.list(all=True, filters={"label": f"io.zops.deployment={host.name}"})


def test_a_bare_host_must_become_a_serving_one_survive_a_crash_and_the_loss_of_its_cache(
    host: Host, engine: docker.DockerClient
) -> None:
    # A dry run says what it would do and touches nothing.
    plan = host.json("provision", "--dry-run")
    assert {step["step"]: step["state"] for step in plan["steps"]} == {
        "doctor": "found",
        "snapshot": "would",
        "verify": "would",
        "warm": "would",
        "image": "found",
        "up": "would",
        "ready": "would",
        "canary": "would",
    }
    assert not host.cache.exists()
    assert not containers(engine, host)
    assert sorted(p.name for p in host.root.iterdir()) == ["zops.yaml"]

    # Provision: one container, with the cache read-only, that serves.
    host.run("provision")
    [container] = containers(engine, host)
    inspected = container.attrs
    assert inspected["State"]["Running"]
    cache_mount = next(m for m in inspected["Mounts"] if m["Destination"] == "/cache")
    assert (cache_mount["Source"], cache_mount["RW"]) == (str(host.cache), False)
    first = host.image(seed=7)
    assert first.startswith(b"\x89PNG")
    assert host.image(seed=7) == first
    assert host.image(seed=8) != first

    # Run twice, the second run changes nothing.
    again = host.json("provision")
    assert {step["state"] for step in again["steps"]} == {"found"}
    assert [c.id for c in containers(engine, host)] == [container.id]
    assert containers(engine, host)[0].attrs["State"]["StartedAt"] == inspected["State"]["StartedAt"]

    # Healthy, also by a real image.
    health = host.json("health", "--deep", "--name", host.name)
    assert [instance["verdict"] for instance in health["instances"]] == ["ok"]
    [cache] = [layer for layer in health["instances"][0]["layers"] if layer["layer"] == "cache"]
    assert cache["evidence"]["writable"] is False

    # Killed as an out-of-memory killer would, it comes back by itself.
    os.kill(inspected["State"]["Pid"], signal.SIGKILL)
    eventually(
        lambda: (c := containers(engine, host)[0]).attrs["RestartCount"] == 1 and c.attrs["State"]["Running"],
        "the restart",
    )
    eventually(host.ready, "readiness after the restart", timeout_s=90)
    assert host.image(seed=7) == first

    # Down leaves nothing running; the cache survives it.
    host.run("down")
    assert not containers(engine, host)
    assert host.cache.exists()

    # Back up, lose the cache, restore, verify.
    backup = host.json("cache", "backup")
    assert Path(backup["archive"]).is_file()
    shutil.rmtree(host.cache)
    host.run("cache", "verify", status=3)
    host.run("cache", "restore")
    verified = host.json("cache", "verify", "--deep")
    assert {finding["status"] for finding in verified["findings"]} == {"ok"}

    # And serve again: the same bytes for the same seed.
    host.run("provision")
    assert host.image(seed=7) == first


def test_a_changed_spec_must_show_as_drift_and_up_must_recreate_the_container(
    host: Host, engine: docker.DockerClient
) -> None:
    host.run("provision")
    [before] = containers(engine, host)
    host.run("up")
    assert [c.id for c in containers(engine, host)] == [before.id]
    [shown] = [one for one in host.json("ps", "--set", "serve.max_queue=3") if one["name"] == host.name]
    assert shown["drift"] == ["serve.max_queue: 16 -> 3"]
    host.run("up", "--set", "serve.max_queue=3")
    [after] = containers(engine, host)
    assert after.id != before.id
    assert "ZOPS_SERVE_MAX_QUEUE=3" in after.attrs["Config"]["Env"]


def test_a_taken_port_must_be_one_line_and_leave_no_container(host: Host, engine: docker.DockerClient) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", host.port))
        other.listen()
        done = host.run("provision", status=6)
    assert f"{host.port}" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not containers(engine, host)


def test_an_engine_that_does_not_answer_must_be_one_line(host: Host) -> None:
    host.run("cache", "pull")
    done = host.run("up", "--engine", "unix:///nonexistent/docker.sock", status=5)
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_a_damaged_snapshot_must_be_refused_and_repaired_by_the_command_that_the_error_names(
    host: Host, engine: docker.DockerClient
) -> None:
    host.run("cache", "pull")
    victim = next(host.cache.rglob("vae/*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    done = host.run("up", status=4)
    assert victim.name in done.stderr
    assert "zops cache verify --deep --repair" in done.stderr
    assert not containers(engine, host)
    host.run("cache", "verify", "--deep", "--repair")
    host.run("up")
    assert len(containers(engine, host)) == 1


def test_a_size_out_of_range_must_be_refused_with_the_limit_and_leave_no_file(host: Host) -> None:
    host.run("provision")
    picture = host.root / "out.png"
    done = host.run("generate", "a kite", "--size", "100x100", "-o", str(picture), status=2)
    assert "multiple of 16" in done.stderr
    assert not picture.exists()
    host.run("generate", "a kite", "--size", "64x64", "--seed", "3", "-o", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")

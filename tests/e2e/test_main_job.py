"""The main job on a real engine: from a bare host to a serving one, through a loss of the cache, and back."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(check: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """Wait until a check returns something true; fail loudly otherwise."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.2)
    pytest.fail(f"{what} did not happen within {timeout_s} s")


class Host:
    """A host of its own: working directory, state, cache and a deployment name that nobody else has."""

    def __init__(self, root: Path, model: Path, image: str) -> None:
        self.root = root
        self.port = free_port()
        self.name = f"e2e-{os.getpid()}-{self.port}"
        self.cache = root / "cache"
        self.backup = root / "backup"
        # The engine's user 10001 must be able to walk down to the cache.
        for directory in (root, *root.parents[:2]):
            directory.chmod(0o755)
        (root / "zops.yaml").write_text(
            f"name: {self.name}\n"
            "model: zops/synthetic-tiny\n"
            f"source: {{kind: directory, path: {model}}}\n"
            "cache: {dir: ./cache}\n"
            "runtime: docker\n"
            "gpus: none\n"
            f"image: {{name: '{image}'}}\n"
            f"serve: {{port: {self.port}, warmup_size: 64, startup_timeout_s: 120}}\n"
            "backup: {to: ./backup}\n"
        )

    def run(self, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zops", *argv],
            cwd=self.root,
            env=os.environ | {"ZOPS_STATE_DIR": str(self.root / "state")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, f"zops {' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *argv: str, status: int = 0) -> Any:
        return json.loads(self.run(*argv, "--output", "json", status=status).stdout)

    def image(self, seed: int) -> bytes:
        """Fetch an image through the published port, as any client would."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            data=json.dumps({"prompt": "a red kite", "size": "64x64", "seed": seed}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return base64.b64decode(json.load(response)["data"][0]["b64_json"])

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False


@pytest.fixture
def engine() -> Iterator[docker.DockerClient]:
    client = docker.DockerClient.from_env(use_context=False)
    yield client
    client.close()


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path, inference_image: str, engine: docker.DockerClient) -> Iterator[Host]:
    root = tmp_path / "host"
    root.mkdir()
    made = Host(root, tiny_model, inference_image)
    yield made
    for container in engine.containers.list(all=True, filters={"label": f"io.zops.deployment={made.name}"}):
        container.remove(force=True)
    for volume in engine.volumes.list(filters={"label": f"io.zops.deployment={made.name}"}):
        volume.remove(force=True)


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
    health = host.json("health", "--deep")
    assert [instance["verdict"] for instance in health["instances"]] == ["ok"]

    # Killed as an out-of-memory killer would, it comes back by itself.
    os.kill(inspected["State"]["Pid"], signal.SIGKILL)
    eventually(
        lambda: (c := containers(engine, host)[0]).attrs["RestartCount"] == 1 and c.attrs["State"]["Running"],
        timeout_s=30,
        what="the restart",
    )
    eventually(host.ready, timeout_s=90, what="readiness after the restart")
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
    [shown] = host.json("ps", "--set", "serve.max_queue=3")
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

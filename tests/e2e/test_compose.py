"""compose/ on a real engine: an instance comes up, gets healthy, makes an image, and leaves nothing behind."""

import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from tests.support.host import free_port
from zops.cache.synthetic import synthesize_snapshot

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
STARTUP_TIMEOUT_S = 180
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Project:
    """A compose project with a name, a port and a cache of its own."""

    name: str
    command: tuple[str, ...]
    settings: Path
    """Its .env file: not the one that a developer may have beside compose.yaml."""
    port: int

    def run(self, *arguments: str) -> str:
        files = ["--env-file", str(self.settings), "-f", str(COMPOSE / "compose.yaml")]
        argv = [*self.command, "-p", self.name, *files, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def compose_command() -> tuple[str, ...]:
    done = subprocess.run([str(ROOT / "scripts" / "ensure-compose")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


@pytest.fixture
def project(tmp_path: Path, inference_image: str, compose_command, docker_client) -> Iterator[Project]:
    cache = tmp_path / "cache"
    synthesize_snapshot(cache / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0", "tiny")
    subprocess.run(["chmod", "-R", "a+rX", str(cache)], check=True)
    port = free_port()
    environment = {
        "ZOPS_CACHE_DIR": str(cache),
        "ZOPS_IMAGE_NAME": inference_image,
        "ZOPS_MODEL": "zops/synthetic-tiny",
        "ZOPS_SERVE_PORT": str(port),
        "ZOPS_SERVE_WARMUP_SIZE": "64",
        "ZOPS_RESOURCES_MEMORY": str(2 << 30),
    }
    settings = tmp_path / ".env"
    settings.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    made = Project(f"zops-e2e-{os.getpid()}", compose_command, settings, port)
    yield made
    made.run("down", "--volumes", "--timeout", "10")
    label = f"com.docker.compose.project={made.name}"
    assert docker_client.containers.list(all=True, filters={"label": label}) == []
    assert docker_client.volumes.list(filters={"label": label}) == []


def wait_until_healthy(container) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline:
        container.reload()
        if container.attrs["State"]["Health"]["Status"] == "healthy":
            return
        assert container.status == "running", container.logs().decode()
        assert container.attrs["RestartCount"] == 0, container.logs().decode()
        time.sleep(0.5)
    pytest.fail(f"not healthy within {STARTUP_TIMEOUT_S} s:\n{container.logs().decode()}")


def test_compose_must_bring_up_an_instance_that_makes_images(project: Project, docker_client: docker.DockerClient):
    project.run("up", "-d")
    (container,) = docker_client.containers.list(filters={"label": f"com.docker.compose.project={project.name}"})
    wait_until_healthy(container)
    request = urllib.request.Request(
        f"http://127.0.0.1:{project.port}/v1/images/generations",
        data=json.dumps({"prompt": "a red kite", "size": "64x64", "seed": 7}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        image = base64.b64decode(json.load(response)["data"][0]["b64_json"])
    assert image.startswith(PNG)

    attributes = container.attrs
    host = attributes["HostConfig"]
    assert attributes["Config"]["User"] == "10001:10001"
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (2 << 30, 2 << 30, 1 << 30)
    assert {m["Destination"]: m["RW"] for m in attributes["Mounts"]} == {"/cache": False, "/compile-cache": True}
    ports = attributes["NetworkSettings"]["Ports"]["8000/tcp"]
    assert [port["HostIp"] for port in ports] == ["127.0.0.1"]
    # The volume belongs to the user that runs, else nothing could be compiled into it.
    assert container.exec_run(["sh", "-c", "touch /compile-cache/x && ! touch /cache/x 2>/dev/null"]).exit_code == 0

    # Python ends on SIGTERM by itself; 137 would mean that the engine had to kill it.
    project.run("stop")
    container.reload()
    assert container.attrs["State"]["ExitCode"] != 137


def test_the_gpu_file_must_be_understood_by_this_compose(project: Project):
    rendered = project.run("-f", str(COMPOSE / "compose.gpu.yaml"), "config")
    assert "driver: nvidia" in rendered
    assert "NVIDIA_VISIBLE_DEVICES: all" in rendered

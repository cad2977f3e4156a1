"""`zops up`, `ps`, `logs` and `down` as an operator types them, with the real server on the tiny model."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.instances import deployment, free_port
from zops.events import silent
from zops.runtime.deployment import deploy, drift_of, end_of
from zops.runtime.process import ProcessRuntime
from zops.spec import Spec

ROOT = Path(__file__).parent.parent.parent


class Host:
    """A directory with a zops.yaml, a cache and a state directory of its own."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.port = free_port()
        shutil.copytree(model, root / "cache" / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0")
        self.write()

    def write(self, **changes: Any) -> None:
        settings = {
            "name": "cli",
            "model": "zops/synthetic-tiny",
            "cache": {"dir": str(self.root / "cache")},
            "runtime": "process",
            "gpus": "none",
            "serve": {"port": self.port, "warmup_size": 64, "startup_timeout_s": 60},
        }
        # JSON is YAML too.
        (self.root / "zops.yaml").write_text(json.dumps(settings | changes))

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zops", *argv],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def json(self, *argv: str) -> Any:
        done = self.run(*argv, "--output", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def error(self, *argv: str) -> tuple[int, str]:
        done = self.run(*argv, "--output", "json")
        return done.returncode, json.loads(done.stderr.splitlines()[-1])["error"]["code"]


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path) -> Iterator[Host]:
    root = tmp_path / "host"
    root.mkdir()
    made = Host(root, tiny_model)
    # The copy has other inodes than those that were verified.
    assert made.run("cache", "verify", "--deep").returncode == 0
    yield made
    for instance in ProcessRuntime().instances():
        ProcessRuntime().down(instance.name, silent)


def eventually(check: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {timeout_s} s")


def test_an_instance_must_come_serve_show_and_go(host: Host) -> None:
    started = host.json("up")
    assert (started["name"], started["state"], started["url"]) == ("cli", "running", f"http://127.0.0.1:{host.port}")
    with urllib.request.urlopen(f"{started['url']}/readyz", timeout=5) as response:
        assert json.load(response)["model"] == "zops/synthetic-tiny"
    assert host.json("up")["id"] == started["id"]
    assert [(i["name"], i["drift"]) for i in host.json("ps")] == [("cli", [])]
    (drifted,) = host.json("ps", "--port", "1234")
    assert drifted["drift"] == [f"serve.port: {host.port} -> 1234"]
    (other,) = host.json("ps", "--name", "other")
    assert other["drift"] is None
    everything = host.run("logs").stdout.splitlines()
    assert host.run("logs", "--tail", "1").stdout.splitlines() == everything[-1:]
    assert json.loads(host.run("logs", "--tail", "1", "--output", "json").stdout) == {"line": everything[-1]}
    table = host.run("ps").stdout.splitlines()
    assert table[0].split("  ")[0] == "NAME"
    assert len(table) == 2
    assert host.json("down") == {"name": "cli", "runtime": "process", "removed": True}
    assert host.json("ps") == []
    assert host.json("down")["removed"] is False
    assert host.error("logs") == (1, "instance-missing")


def test_a_failed_start_must_have_its_own_status_and_leave_nothing(host: Host) -> None:
    with socket.create_server(("127.0.0.1", host.port)):
        assert host.error("up") == (6, "port-taken")
    assert host.error("up", "--gpus", "all") == (6, "gpu-missing")
    assert host.error("up", "--model", "nobody/nothing") == (3, "snapshot-missing")
    weights = next((host.root / "cache").rglob("*.safetensors"))
    weights.write_bytes(b"not weights")
    assert host.error("up") == (4, "snapshot-damaged")
    assert host.json("ps") == []


def test_an_engine_that_is_not_there_must_have_its_own_status(host: Host) -> None:
    host.write(runtime="docker", engine=f"unix://{host.root}/nothing.sock")
    for command in ("up", "down", "ps", "logs"):
        assert host.error(command) == (5, "engine-not-running")


def test_an_instance_must_be_hopeless_once_it_is_gone_or_keeps_ending(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    runtime = ProcessRuntime(argv=(sys.executable, "-c", "raise SystemExit(3)"))
    look = end_of(runtime, "demo")
    assert look() == "the instance disappeared"
    runtime.up(deployment(tmp_path, runtime="process", serve={"port": free_port()}), silent)
    try:
        assert look() is None
        assert eventually(look, "the end of hope") == "the instance ended 3 times, the last time with status 3"
    finally:
        runtime.down("demo", silent)


def test_drift_must_be_unknown_without_a_snapshot_to_compare_with(host: Host, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = Spec.model_validate(json.loads((host.root / "zops.yaml").read_text()))
    deployment_now = deploy(spec)
    assert deployment_now.revision == "seed-0"
    runtime = ProcessRuntime(argv=(sys.executable, "-c", "input()"))
    instance = runtime.up(deployment_now, silent)
    assert drift_of(spec, instance) == []
    shutil.rmtree(host.root / "cache")
    assert drift_of(spec, instance) is None

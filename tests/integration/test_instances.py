"""`zops up`, `ps`, `logs` and `down` as an operator types them, with the real server on the tiny model."""

import json
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host, free_port
from tests.support.instances import deployment
from tests.support.waiting import eventually
from zops.events import silent
from zops.runtime.deployment import deploy, drift_of, end_of
from zops.runtime.process import ProcessRuntime
from zops.spec import load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path) -> Iterator[Host]:
    made = Host(tmp_path / "host", tiny_model, name="cli", runtime="process")
    made.run("cache", "pull")
    yield made
    made.run("down", "--runtime", "process", "--engine", "local")
    for instance in ProcessRuntime().instances():
        ProcessRuntime().down(instance.name, silent)


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
    assert host.error("logs", status=1) == "instance-missing"


def test_a_failed_start_must_have_its_own_status_and_leave_nothing(host: Host) -> None:
    with socket.create_server(("127.0.0.1", host.port)):
        assert host.error("up", status=6) == "port-taken"
    assert host.error("up", "--gpus", "all", status=6) == "gpu-missing"
    assert host.error("up", "--model", "nobody/nothing", status=3) == "snapshot-missing"
    weights = next((host.root / "cache").rglob("*.safetensors"))
    weights.write_bytes(b"not weights")
    assert host.error("up", status=4) == "snapshot-damaged"
    assert host.json("ps") == []


def test_an_engine_that_is_not_there_must_have_its_own_status(host: Host) -> None:
    host.write(runtime="docker", engine=f"unix://{host.root}/nothing.sock")
    for command in ("up", "down", "ps", "logs"):
        assert host.error(command, status=5) == "engine-not-running"


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
    spec = load(host.root / "zops.yaml", environ={}).spec
    deployment_now = deploy(spec)
    assert deployment_now.revision == "seed-0"
    runtime = ProcessRuntime(argv=(sys.executable, "-c", "input()"))
    instance = runtime.up(deployment_now, silent)
    assert drift_of(spec, instance) == []
    shutil.rmtree(host.root / "cache")
    assert drift_of(spec, instance) is None

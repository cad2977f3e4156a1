"""The main job with the embedded runtime: from nothing to an image, twice, and by dry run."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


class Host:
    """A host of its own with a process runtime."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (root / "zops.yaml").write_text(
            "name: here\nmodel: zops/synthetic-tiny\n"
            f"source: {{kind: directory, path: {model}}}\n"
            "cache: {dir: ./cache}\nruntime: process\ngpus: none\n"
            f"serve: {{port: {self.port}, warmup_size: 64, startup_timeout_s: 90}}\n"
            "backup: {to: ./backup}\n"
        )

    def run(self, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zops", *argv],
            cwd=self.root,
            env=os.environ | {"ZOPS_STATE_DIR": str(self.root / "state")},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == status, f"zops {' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *argv: str, status: int = 0) -> Any:
        return json.loads(self.run(*argv, "--output", "json", status=status).stdout)


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path) -> Iterator[Host]:
    root = tmp_path / "host"
    root.mkdir()
    made = Host(root, tiny_model)
    yield made
    made.run("down")


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in root.rglob("*")
    }


def test_a_dry_run_on_a_bare_host_must_show_the_plan_and_leave_every_file_as_it_was(host: Host) -> None:
    before = tree(host.root)
    plan = host.json("provision", "--dry-run")
    assert plan["dry_run"] is True
    assert [step["step"] for step in plan["steps"]] == [
        "doctor", "snapshot", "verify", "warm", "image", "up", "ready", "canary",
    ]  # fmt: skip
    assert all(step["text"] for step in plan["steps"])
    assert tree(host.root) == before


def test_provision_must_serve_then_find_everything_done_then_mend_only_what_broke(host: Host) -> None:
    first = host.json("provision")
    states = {step["step"]: step["state"] for step in first["steps"]}
    assert states["snapshot"] == states["up"] == states["ready"] == states["canary"] == "done"
    [instance] = host.json("ps")
    assert instance["state"] == "running"

    second = host.json("provision")
    assert {step["state"] for step in second["steps"]} == {"found"}
    assert sum(step["seconds"] for step in second["steps"]) < 20
    assert host.json("ps")[0]["id"] == instance["id"]

    before = tree(host.root / "cache")
    dry = host.json("provision", "--dry-run")
    assert {step["state"] for step in dry["steps"]} == {"found"}
    assert tree(host.root / "cache") == before

    host.run("down")
    third = {step["step"]: step["state"] for step in host.json("provision")["steps"]}
    assert third["snapshot"] == third["verify"] == "found"
    assert third["up"] == third["ready"] == third["canary"] == "done"


def test_a_host_with_a_backup_must_be_restored_from_it_when_its_source_is_gone(host: Host, tmp_path: Path) -> None:
    host.run("cache", "pull")
    host.run("cache", "backup")
    digest = host.json("cache", "status")[0]["manifest_digest"]
    subprocess.run(["rm", "-rf", str(host.root / "cache")], check=True)
    gone = tmp_path / "gone"
    plan = host.json("provision", "--dry-run", "--set", f"source.path={gone}")
    snapshot = next(step for step in plan["steps"] if step["step"] == "snapshot")
    assert str(host.root / "backup") in snapshot["text"]
    host.run("provision", "--set", f"source.path={gone}")
    assert host.json("cache", "status")[0]["manifest_digest"] == digest


def test_a_step_that_fails_must_name_itself_the_remedy_and_the_way_on(host: Host) -> None:
    done = host.run("provision", "--set", "source.path=/nonexistent/model", status=9)
    assert "step snapshot failed" in done.stderr
    assert "then go on with: zops provision --set source.path=/nonexistent/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (host.root / "cache" / "models").exists()


def test_a_taken_port_must_stop_the_plan_before_anything_is_made(host: Host) -> None:
    before = tree(host.root)
    with socket.socket() as other:
        other.bind(("127.0.0.1", host.port))
        other.listen()
        done = host.run("provision", status=6)
    assert str(host.port) in done.stderr
    assert tree(host.root) == before

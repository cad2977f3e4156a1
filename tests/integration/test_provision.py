"""The main job with the embedded runtime: from nothing to an image, twice, and by dry run."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host

pytestmark = pytest.mark.slow


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path) -> Iterator[Host]:
    made = Host(tmp_path / "host", tiny_model, name="here", runtime="process")
    yield made
    made.run("down")


def test_a_dry_run_on_a_bare_host_must_show_the_plan_and_leave_every_file_as_it_was(host: Host) -> None:
    before = host.tree()
    plan = host.json("provision", "--dry-run")
    assert plan["dry_run"] is True
    assert [step["step"] for step in plan["steps"]] == [
        "doctor", "snapshot", "verify", "warm", "image", "up", "ready", "canary",
    ]  # fmt: skip
    assert all(step["text"] for step in plan["steps"])
    assert host.tree() == before


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

    before = host.tree("cache")
    dry = host.json("provision", "--dry-run")
    assert {step["state"] for step in dry["steps"]} == {"found"}
    assert host.tree("cache") == before

    host.run("down")
    third = {step["step"]: step["state"] for step in host.json("provision")["steps"]}
    assert third["snapshot"] == third["verify"] == "found"
    assert third["up"] == third["ready"] == third["canary"] == "done"


def test_a_host_with_a_backup_must_be_restored_from_it_when_its_source_is_gone(host: Host, tmp_path: Path) -> None:
    host.run("cache", "pull")
    host.run("cache", "backup")
    digest = host.json("cache", "status")[0]["manifest_digest"]
    shutil.rmtree(host.cache)
    gone = tmp_path / "gone"
    plan = host.json("provision", "--dry-run", "--set", f"source.path={gone}")
    snapshot = next(step for step in plan["steps"] if step["step"] == "snapshot")
    assert str(host.backup) in snapshot["text"]
    host.run("provision", "--set", f"source.path={gone}")
    assert host.json("cache", "status")[0]["manifest_digest"] == digest


def test_a_step_that_fails_must_name_itself_the_remedy_and_the_way_on(host: Host) -> None:
    done = host.run("provision", "--set", "source.path=/nonexistent/model", status=9)
    assert "step snapshot failed" in done.stderr
    assert "then go on with: zops provision --set source.path=/nonexistent/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (host.root / "cache" / "models").exists()


def test_a_taken_port_must_stop_the_plan_before_anything_is_made(host: Host) -> None:
    before = host.tree()
    with socket.socket() as other:
        other.bind(("127.0.0.1", host.port))
        other.listen()
        done = host.run("provision", status=6)
    assert str(host.port) in done.stderr
    assert host.tree() == before

"""`zops health`, `zops generate` and `zops doctor` as an operator runs them, with a stand-in for `zops serve`."""

import json
import os
import select
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support import instance as stand_in
from tests.support.instance import DIGEST, picture, running
from zops.cli.main import run
from zops.events import silent
from zops.health.survey import survey, wait_healthy
from zops.runtime.base import Deployment, Instance
from zops.runtime.process import ProcessRuntime
from zops.spec import Spec


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def deployed(tmp_path, port):
    """Run the stand-in as a supervised process and return the runtime."""
    runtime = ProcessRuntime(argv=(sys.executable, stand_in.__file__))
    spec = Spec.model_validate({
        "runtime": "process", "gpus": "none", "model": "zops/synthetic-tiny",
        "serve": {"port": port, "warmup_size": 32, "request_timeout_s": 2}, "cache": {"dir": tmp_path},
    })  # fmt: skip
    runtime.up(Deployment(spec, tmp_path / "snapshot", "seed-0", DIGEST), silent)
    yield runtime
    runtime.down("zops", silent)


@pytest.fixture
def zops(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty directory; returns status, JSON of stdout and the error on stderr, if any."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # The main program's own handlers are not installed here; nothing of this process may change.
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv: str):
        status = run([*argv, "--output", "json"])
        said = capsys.readouterr()
        errors = [json.loads(line)["error"] for line in said.err.splitlines() if line.startswith('{"error"')]
        return status, json.loads(said.out) if said.out else None, errors[-1] if errors else None

    yield call
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def zops_text(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty directory; returns status, stdout and stderr as they are."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")

    def call(*argv: str):
        capsys.readouterr()
        status = run(list(argv))
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


class FixedRuntime:
    """A runtime whose instances are what a test says."""

    def __init__(self, instances: list[Instance]) -> None:
        self._instances = instances

    def instances(self) -> list[Instance]:
        return self._instances

    def logs(self, name: str, **_how: object) -> list[str]:
        return [f"the log of {name}"]


def deployed_at(url: str, name: str = "web") -> Instance:
    return Instance(name, "0" * 64, "docker", "running", url, "m", "s", DIGEST, "d", traits={"gpus": "none"})


def test_no_instance_must_be_failed_with_the_command_that_makes_one(zops):
    status, body, error = zops("health", "--runtime", "process")
    assert (status, body["verdict"], body["instances"]) == (1, "failed", [])
    assert (error["code"], error["hint"]) == ("instance-missing", "start it with: zops up")


def test_a_sound_instance_must_be_waited_for_judged_and_reported(zops, deployed, tmp_path, port):
    report = tmp_path / "report.json"
    status, body, error = zops(
        "health", "--runtime", "process", "--port", str(port), "--wait", "--deep", "--report", str(report)
    )
    assert (status, body["verdict"], error) == (0, "ok", None)
    (one,) = body["instances"]
    layers = ["running", "live", "gpu", "cache", "ready", "queue", "canary"]
    assert [layer["layer"] for layer in one["layers"]] == layers
    assert json.loads(report.read_text()) == body
    assert zops("health", "--runtime", "process", "--name", "zops")[0] == 0
    assert zops("health", "--runtime", "process", "--name", "other")[2]["code"] == "instance-missing"


def test_a_report_that_cannot_be_written_must_be_one_clear_error(zops, deployed, tmp_path):
    (tmp_path / "file").touch()
    _, _, error = zops("health", "--runtime", "process", "--report", str(tmp_path / "file" / "report.json"))
    assert error["code"] == "file-not-written"


def test_a_killed_instance_must_fail_its_first_layer(zops, deployed, tmp_path):
    supervisor = int(deployed.find("zops").id)
    descriptor = os.pidfd_open(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)
    status, body, _ = zops("health", "--runtime", "process")
    assert status == 1
    (one,) = body["instances"]
    assert (one["verdict"], one["layers"][0]["layer"], len(one["layers"])) == ("failed", "running", 1)
    assert "zops up" in one["remedy"]


def test_a_canary_must_be_recorded_anew_on_request_only(zops, deployed):
    def golden(*argv: str) -> str:
        _, body, _ = zops("health", "--runtime", "process", "--wait", *argv)
        return body["instances"][0]["layers"][-1]["evidence"]["golden"]

    assert [golden("--deep"), golden("--deep"), golden("--record"), golden("--deep")] == [
        "recorded", "equal", "recorded", "equal",
    ]  # fmt: skip


def test_waiting_must_end_when_all_is_well_or_the_time_is_over(zops, port, deployed):
    deployed.down("zops", silent)
    with running() as (url, behaviour):
        behaviour.ready, behaviour.readiness = 503, {"phase": "load", "reason": ""}
        looks = []

        def get_ready():
            looks.append(1)
            if len(looks) == 4:
                behaviour.ready, behaviour.readiness = 200, {"phase": "ready"}

        behaviour.on_request["/readyz"] = get_ready
        instance = deployed_at(url)
        look = partial(survey, FixedRuntime([instance]), Spec())
        wait_healthy(look, timeout_s=30, report=silent)
        assert look().verdict == "ok"
        behaviour.on_request.clear()
        behaviour.ready, behaviour.readiness = 503, {"phase": "load"}
        began = time.monotonic()
        wait_healthy(look, timeout_s=0.5, report=silent)
        assert 0.5 <= time.monotonic() - began < 2
        # What no waiting mends must not be waited for.
        behaviour.info["manifest_digest"] = "b" * 64
        began = time.monotonic()
        wait_healthy(look, timeout_s=30, report=silent)
        assert time.monotonic() - began < 2


def test_one_hanging_instance_must_not_add_its_time_to_that_of_the_others():
    with running() as (url, _), running() as (mute, behaviour):
        behaviour.hang.add("/livez")
        hanging = [deployed_at(mute, name=f"mute-{number}") for number in range(3)]
        began = time.monotonic()
        found = survey(FixedRuntime([*hanging, deployed_at(url)]), Spec())
        assert time.monotonic() - began < 9
    assert [one.code for one in found.healths] == ["hung", "hung", "hung", ""]


def test_a_plugin_must_print_one_line_and_exit_as_plugins_do(zops_text, deployed, tmp_path):
    zops_text("health", "--runtime", "process", "--wait")
    status, out, _ = zops_text("health", "--runtime", "process", "--format", "nagios")
    assert (status, out.count("\n")) == (0, 1)
    assert out.startswith("ZOPS OK - 1 instance ok | 'zops time'=")
    deployed.down("zops", silent)
    status, out, _ = zops_text("health", "--runtime", "process", "--format", "nagios")
    assert (status, out) == (2, "ZOPS CRITICAL - there is no instance\n")


@pytest.mark.parametrize(
    "argv",
    [("--engine", "unix:///nowhere/docker.sock"), ("--engine", "nonsense"), ("--set", "serve.port=many"), ("--all",)],
)
def test_a_plugin_that_can_ask_nobody_must_be_unknown_whatever_the_reason(zops_text, argv):
    status, out, err = zops_text("health", "--format", "nagios", *argv)
    assert status == 3
    assert out.startswith("ZOPS UNKNOWN - ")
    assert out.count("\n") == 1
    assert err == ""


def test_metrics_must_be_written_whole_to_the_file_or_printed(zops_text, deployed, tmp_path):
    zops_text("health", "--runtime", "process", "--wait")
    file = tmp_path / "textfile" / "zops_health.prom"
    status, out, _ = zops_text("health", "--runtime", "process", "--format", "prometheus", "--report", str(file))
    assert (status, out) == (0, "")
    assert 'zops_health_verdict{deployment="zops",host="",runtime="process"} 0\n' in file.read_text()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644
    status, out, _ = zops_text("health", "--runtime", "process", "--format", "prometheus")
    assert (status, out.splitlines()[0][:6]) == (0, "# HELP")


def test_metrics_must_tell_of_an_engine_that_cannot_be_asked_instead_of_going_stale(zops_text, tmp_path):
    file = tmp_path / "zops_health.prom"
    status, _, _ = zops_text(
        "health", "--engine", "unix:///nowhere/docker.sock", "--format", "prometheus", "--report", str(file)
    )
    assert status == 5
    assert 'code="engine-unreachable"' in file.read_text()
    assert "zops_health_verdict_worst{} 2\n" in file.read_text()


def test_a_time_for_hosts_without_hosts_must_be_refused(zops):
    assert zops("health", "--runtime", "process", "--host-timeout", "3")[0] == 2


def test_people_must_see_the_layer_the_reason_and_the_remedy(zops_text, deployed, tmp_path):
    zops_text("health", "--runtime", "process", "--wait")
    status, out, _ = zops_text("health", "--runtime", "process", "-v")
    assert status == 0
    assert out.splitlines()[0].split() == ["NAME", "VERDICT", "LAYER", "REASON"]
    assert [line.split()[1] for line in out.splitlines()[2:]] == [
        "running", "live", "gpu", "cache", "ready", "queue",
    ]  # fmt: skip


def test_an_image_must_be_written_with_its_receipt(zops, tmp_path):
    with running() as (url, _):
        status, body, _ = zops("generate", "a fox", "-o", "fox.png", "--size", "32x32", "--seed", "7", "--url", url)
    assert status == 0
    assert Path("fox.png").read_bytes() == picture(32, 32)
    (image,) = body["images"]
    assert (image["path"], image["receipt"]["seed"]) == ("fox.png", 7)
    assert [file.name for file in Path().iterdir()] == ["fox.png"]


def test_several_images_must_be_numbered(zops):
    with running() as (url, _):
        zops("generate", "a fox", "-o", "fox.png", "-n", "2", "--seed", "7", "--url", url)
    assert sorted(file.name for file in Path().iterdir()) == ["fox-1.png", "fox-2.png"]


def test_a_file_that_exists_must_be_kept_unless_forced_and_no_image_be_made_for_nothing(zops):
    Path("fox.png").write_text("mine")
    with running() as (url, behaviour):
        status, _, error = zops("generate", "a fox", "-o", "fox.png", "--url", url)
        assert (status, error["code"], behaviour.requests) == (2, "file-exists", [])
        assert Path("fox.png").read_text() == "mine"
        assert zops("generate", "a fox", "-o", "fox.png", "--force", "--url", url)[0] == 0
    assert Path("fox.png").read_bytes() == picture(64, 64)


def test_a_file_that_came_to_exist_meanwhile_must_be_kept_too(zops):
    with running() as (url, behaviour):

        def slow(width, height):
            Path("fox.png").write_text("another's")
            return picture(width, height)

        behaviour.image = slow
        status, _, error = zops("generate", "a fox", "-o", "fox.png", "--url", url)
    assert (status, error["code"]) == (2, "file-exists")
    assert Path("fox.png").read_text() == "another's"
    assert [file.name for file in Path().iterdir()] == ["fox.png"]


@pytest.mark.parametrize(("target", "words"), [("fox.gif", "no image format"), ("no/fox.png", "does not exist")])
def test_a_target_that_cannot_be_must_be_refused_before_anything_is_asked(zops, target, words):
    with running() as (url, behaviour):
        status, _, error = zops("generate", "a fox", "-o", target, "--url", url)
    assert (status, behaviour.requests) == (2, [])
    assert words in error["message"]


def test_a_refused_request_must_leave_no_file(zops):
    with running() as (url, behaviour):
        behaviour.refusal = (400, {"error": {"message": "no", "type": "invalid_request_error"}})
        status, _, error = zops("generate", "a fox", "-o", "fox.png", "--size", "1x1", "--url", url)
    assert (status, error["message"]) == (2, "no")
    assert list(Path().iterdir()) == []


def test_nobody_at_the_address_must_exit_with_five(zops, port):
    status, _, error = zops("generate", "a fox", "-o", "fox.png", "--port", str(port))
    assert (status, error["code"]) == (5, "instance-unreachable")
    assert str(port) in error["message"]


def test_a_taken_port_must_fail_the_doctor_and_name_its_holder(zops):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, body, _ = zops("doctor", "--runtime", "process", "--only", "port", "--only", "python", "--port", port)
    assert (status, body["sound"]) == (1, False)
    assert [check["id"] for check in body["checks"]] == ["python", "port"]
    assert "pid" in body["checks"][1]["evidence"]


def test_a_port_that_our_own_instance_holds_must_be_fine(zops, deployed, port):
    status, body, _ = zops("doctor", "--runtime", "process", "--only", "port", "--port", str(port))
    assert (status, body["checks"][0]["verdict"]) == (0, "ok")
    assert "our own" in body["checks"][0]["reason"]


def test_the_doctor_must_work_where_there_is_no_gpu_and_no_engine(zops, tmp_path):
    status, body, _ = zops("doctor", "--engine", f"unix://{tmp_path}/nothing.sock", "--gpus", "none")
    verdicts = {check["id"]: check["verdict"] for check in body["checks"]}
    assert status == 1
    assert (verdicts["engine"], verdicts["gpu-driver"], verdicts["engine-gpu"]) == ("fail", "skipped", "skipped")
    assert all(check["documentation"].endswith(f"#{check['id']}") for check in body["checks"])

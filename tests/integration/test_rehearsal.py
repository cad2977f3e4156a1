"""`zops cache warm --compile`: an instance that starts, becomes ready and ends, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import free_port
from zops.errors import UsageError
from zops.events import silent
from zops.health.rehearsal import rehearse
from zops.runtime.base import Deployment
from zops.runtime.process import ProcessRuntime
from zops.spec import Spec

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def environment(tiny_model, tmp_path, monkeypatch):
    """The tiny model as a deployment of processes on the CPU; whatever is still there in the end is stopped."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ZOPS_NAME": "rehearsed",
        "ZOPS_RUNTIME": "process",
        "ZOPS_GPUS": "none",
        "ZOPS_MODEL": "zops/synthetic-tiny",
        "ZOPS_CACHE_DIR": str(tiny_model),
        "ZOPS_STATE_DIR": str(tmp_path / "state"),
        "ZOPS_SERVE_PORT": str(free_port()),
        "ZOPS_SERVE_WARMUP_SIZE": "64",
        # The reference numbers of a fast preset, so that the gate has something to judge and to leave.
        "ZOPS_SERVE_PRESET": "bf16",
        "ZOPS_SERVE_FORCE_PRESET": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield os.environ | settings
    ProcessRuntime().down("rehearsed", silent)


def zops(environment, *words):
    command = [sys.executable, "-m", "zops", *words, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_rehearsal_must_leave_the_verdict_and_no_instance_and_a_running_one_alone(environment, tmp_path):
    first = zops(environment, "cache", "warm", "--compile")
    assert first["compiled"]
    assert first["compile_seconds"] > 0
    assert zops(environment, "ps") == []
    gates = list((tmp_path / "state" / "compile" / "rehearsed").glob("*/gates/*.json"))
    assert [json.loads(path.read_text())["gate"]["result"] for path in gates] == ["passed"]
    written = gates[0].stat().st_mtime_ns

    zops(environment, "up")
    assert gates[0].stat().st_mtime_ns == written, "the next start must not judge again"
    (running,) = zops(environment, "ps")
    second = zops(environment, "cache", "warm", "--compile")
    assert not second["compiled"]
    assert [instance["id"] for instance in zops(environment, "ps")] == [running["id"]]


def test_a_runtime_that_keeps_nothing_must_be_refused(tmp_path):
    deployment = Deployment(Spec(runtime="kubernetes"), tmp_path, "main", "ab" * 32)
    with pytest.raises(UsageError, match="lives and dies with its pod"):
        rehearse(ProcessRuntime(), deployment, silent)

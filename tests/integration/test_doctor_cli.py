"""`zops doctor` as an operator runs it: what it shows, what it mends, how it ends, and how long it takes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.test_gpu import SCENARIOS, compile_library
from tests.support.host import ROOT, Host
from zops.errors import HostShort
from zops.health.examine import require_gpu_room
from zops.host.context import Senses
from zops.host.gpu import Gpu, GpuFacts
from zops.host.hub import Answer, Silence, ask
from zops.host.mending import mend
from zops.spec import load

# Under this everything must be done on a machine that others use too; the promise to people is two seconds.
LONGEST_S = 5.0


@pytest.fixture
def host(tmp_path: Path, tiny_model: Path) -> Host:
    return Host(tmp_path / "host", tiny_model, name="doctor", runtime="process")


def run(host: Host, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zops", "doctor", *argv],
        cwd=host.root, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ZOPS_STATE_DIR": str(host.root / "state")} | environ,
    )  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpu(library: Path, tmp_path: Path) -> dict[str, str]:
    """An RTX 4090 D whose persistence mode `nvidia-smi -pm 1` really switches on, and sudo that lets us."""
    scenario = tmp_path / "gpu.nvml"
    scenario.write_text((SCENARIOS / "ada-24gb.nvml").read_text())
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(
        f'#!/bin/sh\n[ "$*" = "-pm 1" ] && sed -i "s/PersistenceMode 0/PersistenceMode 1/" {scenario}\n'
    )
    (programs / "sudo").write_text('#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return {
        "FAKE_NVML": str(scenario), "LD_LIBRARY_PATH": str(library), "PATH": f"{programs}:{os.environ['PATH']}",
    }  # fmt: skip


def test_what_is_fine_must_take_a_line_and_what_is_wrong_stand_last_with_its_remedy(host):
    host.write(gpus="all")
    shown = run(host).stdout.splitlines()
    assert shown[0].startswith("ok ")
    assert "python" in shown[0]
    assert "memory" in shown[0]
    first_failure = next(number for number, line in enumerate(shown) if line.startswith("FAIL"))
    assert not any(line.startswith(("ok", "skipped", "unseen", "warn")) for line in shown[first_failure:])
    assert "fix: " in shown[first_failure + 1]
    assert shown[-1].startswith("1 failed, ")
    assert len(shown) < 24


def test_every_check_must_be_shown_where_that_is_asked_for(host):
    ids = {check["id"] for check in json.loads(run(host, "--output", "json").stdout)["checks"]}
    shown = run(host, "--verbose").stdout
    assert {name for name in ids if f" {name} " in shown} == ids


def test_a_warning_must_end_well_unless_strictness_is_asked_for(host, gpu):
    host.write(gpus="all")
    assert run(host, "--only", "gpu-persistence", **gpu).returncode == 0
    assert run(host, "--only", "gpu-persistence", "--strict", **gpu).returncode == 10
    assert run(host, "--only", "python", "--strict").returncode == 0


def test_a_fix_must_be_run_only_with_consent_and_be_judged_again(host, gpu):
    host.write(gpus="all")
    asked = run(host, "--only", "gpu-persistence", "--fix", "--output", "json", **gpu)
    assert asked.returncode == 2
    assert json.loads(asked.stderr.splitlines()[-1])["error"]["code"] == "needs-yes"
    assert "PersistenceMode 0" in Path(gpu["FAKE_NVML"]).read_text()
    done = run(host, "--only", "gpu-persistence", "--only", "python", "--fix", "--yes", "--output", "json", **gpu)
    checks = {check["id"]: (check["verdict"], check["fixed"]) for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks) == (0, {"python": ("ok", False), "gpu-persistence": ("ok", True)})


def test_a_fix_that_does_not_work_must_say_why_and_leave_the_verdict(host, gpu, tmp_path):
    host.write(gpus="all")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'Insufficient Permissions' >&2; exit 4\n")
    done = run(host, "--only", "gpu-persistence", "--fix", "--yes", **gpu)
    assert "did not work: Insufficient Permissions" in done.stderr
    assert (done.returncode, "(mended)" in done.stdout) == (0, False)
    assert mend(["/no/such/program"]).reason == "there is no /no/such/program here"


def test_all_checks_together_must_be_quick(host):
    began = time.monotonic()
    body = json.loads(run(host, "--output", "json").stdout)
    assert time.monotonic() - began < LONGEST_S
    assert body["seconds"] < LONGEST_S


def test_what_cannot_fit_must_be_refused_before_anything_is_started(host):
    card = Gpu(0, "GPU-a", "NVIDIA GeForce RTX 4090 D", 25_757_220_864, 0)
    senses = Senses(gpus=lambda: GpuFacts((card,), "580.65", "13.0"))
    host.write(gpus="all", model="zops/synthetic-full")
    with pytest.raises(HostShort) as refused:
        require_gpu_room(load(host.root / "zops.yaml"), senses)
    assert refused.value.code == "host-unfit"
    largest = int(refused.value.hint.partition("serve.max_pixels=")[2].partition(";")[0])
    host.write(gpus="all", model="zops/synthetic-full", serve={"max_pixels": largest})
    require_gpu_room(load(host.root / "zops.yaml"), senses)


# --- the hub


@contextmanager
def hub(status: int, *, wait: threading.Event | None = None, skew_s: float = 0) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            if wait:
                wait.wait(10)
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + skew_s, usegmt=True))
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            if wait:
                wait.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_a_hub_must_be_asked_once_and_never_be_followed_elsewhere(status):
    with hub(status) as (url, seen):
        answer = ask(url, "Bearer secret")
    assert isinstance(answer, Answer)
    assert (answer.status, seen) == (status, ["Bearer secret"])


def test_a_hub_with_another_time_must_show_how_far_our_clock_is_off():
    with hub(200, skew_s=-3600) as (url, _):
        answer = ask(url)
    assert isinstance(answer, Answer)
    assert answer.ahead_s == pytest.approx(3600, abs=3)


def test_a_hub_that_does_not_answer_must_not_hold_the_doctor_up():
    with hub(200, wait=threading.Event()) as (url, _):
        began = time.monotonic()
        answer = ask(url, timeout_s=0.3)
        assert time.monotonic() - began < 2
    assert isinstance(answer, Silence)


def test_a_resolver_that_hangs_must_not_hold_the_doctor_up(monkeypatch):
    # No timeout of a socket counts while its name is looked up.
    over = threading.Event()

    def hang(*_arguments: object, **_named: object) -> None:
        over.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        began = time.monotonic()
        assert ask("http://hub.invalid/x", timeout_s=0.2) == Silence("no answer within 0.2 s")
        assert time.monotonic() - began < 5
    finally:
        over.set()
        for thread in threading.enumerate():
            if thread.name == "ask-hub":
                thread.join(5)


def test_nobody_at_the_address_of_a_hub_must_be_a_silence_with_a_reason():
    answer = ask("http://127.0.0.1:1/x")
    assert isinstance(answer, Silence)
    assert "refused" in answer.reason


def test_a_refused_token_must_be_told_apart_and_never_be_shown(host):
    with hub(401) as (url, seen):
        host.write(model="someone/else", source={"kind": "huggingface", "endpoint": url}, backup={})
        done = run(host, "--only", "hub", "-v", HF_TOKEN="hf_secret")
    assert (done.returncode, seen) == (1, ["Bearer hf_secret"])
    assert "refuses our token" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr

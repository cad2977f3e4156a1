"""The life of `zops serve`: refusals before anything is loaded, start, loss of the worker, drain."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.host import free_port
from tests.support.serving import LONG, clean_environment, start_server, stop_hard
from tests.support.waiting import eventually
from zops.cache.manifest import FileEntry, Manifest, read_manifest, stat_key, write_manifest, write_marker


@pytest.fixture
def launch(tiny_model, tmp_path):
    """Return a function that starts a server of the test's own."""
    servers = []

    def start(**environ):
        servers.append(start_server(tiny_model, tmp_path / "serve", **environ))
        return servers[-1]

    yield start
    for server in servers:
        stop_hard(server)


@pytest.fixture(scope="module")
def narrow(tiny_model, tmp_path_factory):
    """A server in whose queue one request may wait; its worker may be killed."""
    server = start_server(tiny_model, tmp_path_factory.mktemp("narrow"), ZOPS_SERVE_MAX_QUEUE="1")
    yield server.wait_ready()
    stop_hard(server)


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def catches(pid, number):
    """Tell whether a process has a handler for a signal of its own, as SIGTERM is not Python's."""
    [mask] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def vouch(snapshot):
    """Make a snapshot count as verified just as it is."""
    old = read_manifest(snapshot)
    digests = {f.path: sha256((snapshot / f.path).read_bytes()).hexdigest() for f in old.files}
    files = tuple(FileEntry(path, (snapshot / path).stat().st_size, digest) for path, digest in digests.items())
    manifest = Manifest(old.model, old.revision, files, "local")
    write_manifest(snapshot, manifest)
    write_marker(snapshot, manifest, {path: stat_key(snapshot / path) for path in digests})


def refused(snapshot, port, *argv):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "zops", "serve", "--snapshot", str(snapshot), "--port", str(port), *argv],
        env=clean_environment(),
        cwd=snapshot.parent,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 5, "it loaded something first"
    return done


def test_an_unverified_snapshot_must_be_refused_with_the_command_that_fixes_it(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / ".zops/verified.json").unlink()
    done = refused(copy, free_port())
    assert done.returncode == 3
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["error", "fix"]
    assert "zops cache verify" in done.stderr


def test_a_damaged_snapshot_must_be_refused_naming_the_file(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    vouch(copy)
    shard = next((copy / "transformer").glob("*.safetensors"))
    with shard.open("r+b") as stream:
        stream.truncate(100)
    done = refused(copy, free_port())
    assert done.returncode == 4
    assert shard.name in done.stderr


def test_a_missing_snapshot_must_be_refused(tmp_path):
    done = refused(tmp_path / "nothing", free_port())
    assert done.returncode == 3


def test_a_snapshot_of_another_model_must_be_refused(tiny_model):
    done = refused(tiny_model, free_port(), "--model", "owner/other")
    assert done.returncode == 2
    assert "--model zops/synthetic-tiny" in done.stderr


def test_a_taken_port_must_be_refused_before_anything_is_loaded(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = refused(tiny_model, port, "--output", "json")
    assert done.returncode == 6
    [line] = done.stderr.splitlines()
    error = json.loads(line)["error"]
    assert (error["code"], error["details"]["port"]) == ("port-taken", port)


def test_a_server_must_tell_its_phase_until_it_is_ready_and_give_the_same_bytes_as_another(launch, served):
    server = launch()
    eventually(server.is_up, "the socket")
    seen, refusals = [], set()
    while (answer := server.call("GET", "/readyz")).status == 503:
        body = answer.json
        assert body["status"] == "unready"
        seen.append(body["phase"])
        refusal = server.generate()
        if refusal.status != 200:  # it may have become ready in between
            refusals.add((refusal.status, refusal.code))
            assert int(refusal.headers["retry-after"]) > 0
        assert server.call("GET", "/livez").status == 200
    order = ["starting", "verify", "imports", "read", "build", "gate", "warmup"]
    assert [order.index(phase) for phase in seen] == sorted(order.index(phase) for phase in seen)
    assert "imports" in seen
    assert refusals == {(503, "not_ready")}
    assert server.generate(seed=77).images == served.generate(seed=77).images
    worker = server.worker_pid
    assert server.stop() == 0
    eventually(lambda: not is_alive(worker), "the worker to end", timeout_s=5)


def test_a_killed_worker_must_cost_no_request_and_be_replaced(narrow):
    server = narrow
    alone = server.call("POST", "/v1/images/generations", LONG).images
    first = server.worker_pid
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.call, "POST", "/v1/images/generations", LONG)
        eventually(lambda: server.state["queue"]["running"] == 1, "the request to run")
        os.kill(first, signal.SIGKILL)
        state = eventually(lambda: (s := server.state)["status"] == "unready" and s, "the loss to be seen")
        assert (state["phase"], state["queue"]["running"]) == ("restarting", 1)
        assert "SIGKILL" in state["reason"]
        assert server.generate().code == "not_ready"
        assert running.result(timeout=60).images == alone
    assert server.worker_pid != first
    assert server.state["workers"][0]["restarts"] == 1


def test_a_worker_that_hangs_must_be_killed_after_the_deadline_and_replaced(launch):
    server = launch(ZOPS_SERVE_REQUEST_TIMEOUT_S="6").wait_ready()
    first = server.worker_pid
    os.kill(first, signal.SIGSTOP)
    answer = server.generate()
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    eventually(lambda: not is_alive(first), "the hung worker to be killed", timeout_s=10)
    server.wait_ready()
    assert server.generate().status == 200


def test_sigterm_must_let_the_running_request_finish_and_refuse_all_others(launch):
    server = launch().wait_ready()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.call, "POST", "/v1/images/generations", LONG)
        eventually(lambda: server.state["queue"]["running"] == 1, "the request to run")
        waiting = pool.submit(server.generate)
        eventually(lambda: server.state["queue"]["waiting"] == 1, "the second request to wait")
        server.process.send_signal(signal.SIGTERM)
        refusal = waiting.result(timeout=5)
        assert (refusal.status, refusal.code) == (503, "draining")
        assert int(refusal.headers["retry-after"]) > 0
        state = server.call("GET", "/readyz")
        assert (state.status, state.json["phase"]) == (503, "draining")
        assert server.generate().code == "draining"
        assert not running.done(), "the long request was too short to show anything"
        assert len(running.result(timeout=60).images) == 1
    assert server.process.wait(timeout=10) == 0


def test_a_full_queue_must_answer_429(narrow):
    server = narrow
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.call, "POST", "/v1/images/generations", LONG)
        eventually(lambda: server.state["queue"]["running"] == 1, "the request to run")
        waiting = pool.submit(server.generate)
        eventually(lambda: server.state["queue"]["waiting"] == 1, "the second request to wait")
        answer = server.generate()
        assert (answer.status, answer.code) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert running.result().status == waiting.result().status == 200


def test_the_worker_must_end_when_the_server_is_killed(launch):
    server = launch()
    eventually(server.is_up, "the socket")
    worker = server.worker_pid
    server.stop(signal.SIGKILL)
    eventually(lambda: not is_alive(worker), "the orphaned worker to end", timeout_s=10)


def test_sigterm_during_the_start_must_end_the_server_with_status_0(launch):
    server = launch()
    eventually(server.is_up, "the socket")
    assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_server_began_must_end_it_with_status_0(launch, number):
    server = launch()
    eventually(lambda: catches(server.process.pid, signal.SIGTERM), "the signals to be caught", timeout_s=10)
    assert server.stop(number) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_signal_while_a_class_is_being_made_must_end_the_start_with_status_0():
    program = """
import os, signal, zops.cli.main as main

class Struck:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)

main.run = lambda argv: type("Owner", (), {"struck": Struck()})
main.main(["serve"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_weights_that_give_no_picture_must_never_become_ready(tiny_model, tmp_path):

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    weights = next((copy / "vae").glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    vouch(copy)
    server = start_server(copy, tmp_path / "serve")
    try:
        eventually(server.is_up, "the socket")
        state = eventually(lambda: server.state["phase"] == "failed" and server.state, "the failed start")
        assert "not a number" in state["reason"]
        assert server.call("GET", "/readyz").status == 503
    finally:
        stop_hard(server)

"""Instances as supervised processes, from start to stop; a tiny script stands for the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.host import free_port
from tests.support.instances import deployment
from tests.support.waiting import eventually
from zops.errors import HostShort, LockHeld, RuntimeUnreachable, ZopsError
from zops.events import Event, Warned, silent
from zops.host.paths import state_dir
from zops.runtime.base import Deployment, drift
from zops.runtime.process import ProcessRuntime
from zops.runtime.supervisor import Identity, RotatingLog, read_identity, read_status

ROOT = Path(__file__).parent.parent.parent

# Says what it sees; on SIGTERM says so and ends. `mode` is what the test wants it to do wrong.
SERVER = """
import json, os, signal, subprocess, sys
mode = sys.argv[1]
def stop(*_):
    print("stopping", flush=True)
    if mode != "stubborn":
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
if mode == "parent":
    child = subprocess.Popen(["sleep", "1000"])
    print("child", child.pid, flush=True)
print("environment", json.dumps(dict(os.environ)), flush=True)
if mode == "broken":
    sys.exit(3)
while True:
    signal.pause()
"""


@pytest.fixture
def make_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProcessRuntime]]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(mode: str = "good") -> ProcessRuntime:
        return ProcessRuntime(argv=(sys.executable, str(script), mode))

    yield make
    for instance in make().instances():
        make().down(instance.name, silent)


@pytest.fixture
def wanted(tmp_path: Path) -> Deployment:
    return deployment(tmp_path, runtime="process", serve={"port": free_port()})


def place(name: str = "demo") -> Path:
    return state_dir() / "instances" / name


def child_of(name: str = "demo") -> Identity:
    child = read_status(place(name)).child
    assert child
    return child


def lines(runtime: ProcessRuntime, word: str) -> list[str]:
    return [line for line in runtime.logs("demo") if line.startswith(word)]


def seen_environment(runtime: ProcessRuntime) -> dict[str, str]:
    (line,) = eventually(lambda: lines(runtime, "environment"), "the server's first line")
    return json.loads(line.partition(" ")[2])


def test_up_must_start_an_instance_that_another_command_finds(make_runtime, wanted: Deployment) -> None:
    started = make_runtime().up(wanted, silent)
    assert started.state == "running"
    assert child_of().alive
    found = make_runtime().find("demo")
    assert found == started
    assert make_runtime().instances() == [found]
    assert drift(wanted, found) == []
    assert (found.runtime, found.model, found.url, found.restarts) == ("process", wanted.spec.model, wanted.url, 0)
    assert found.snapshot == str(wanted.snapshot)
    assert found.started_at.endswith("Z")


def test_the_instance_must_outlive_the_command_that_started_it(make_runtime, wanted: Deployment, tmp_path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.support.instances import deployment\n"
        "from zops.events import silent\nfrom zops.runtime.process import ProcessRuntime\n"
        f"wanted = deployment(Path({str(tmp_path)!r}), runtime='process', serve={{'port': {wanted.spec.serve.port}}})\n"
        f"ProcessRuntime(argv=(sys.executable, {str(tmp_path / 'server.py')!r}, 'good')).up(wanted, silent)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, start_new_session=True)
    assert make_runtime().find("demo").state == "running"
    assert make_runtime().up(wanted, silent).restarts == 0


def test_up_again_must_leave_a_running_instance_alone(make_runtime, wanted: Deployment) -> None:
    make_runtime().up(wanted, silent)
    before = child_of()
    events: list[Event] = []
    make_runtime().up(wanted, events.append)
    assert child_of() == before
    assert events == []


def test_a_changed_deployment_must_be_started_anew(make_runtime, wanted: Deployment, tmp_path: Path) -> None:
    make_runtime().up(wanted, silent)
    before = child_of()
    changed = deployment(tmp_path, runtime="process", serve={"port": wanted.spec.serve.port, "max_queue": 3})
    started = make_runtime().up(changed, silent)
    assert not before.alive
    assert child_of().alive
    assert drift(changed, started) == []


def test_the_server_must_see_its_settings_and_none_of_the_operators_keys(
    make_runtime, wanted: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "ZOPS_BACKUP_TO", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    runtime = make_runtime()
    runtime.up(wanted, silent)
    seen = seen_environment(runtime)
    assert "secret" not in seen.values()
    assert seen["ZOPS_SNAPSHOT"] == str(wanted.snapshot)
    assert seen["ZOPS_CACHE_DIR"] == seen["HF_HOME"] == str(wanted.spec.cache.dir)
    assert (seen["ZOPS_SERVE_HOST"], seen["ZOPS_SERVE_PORT"]) == ("127.0.0.1", str(wanted.spec.serve.port))
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert Path(seen["ZOPS_FILE"]).read_text().startswith("#")
    assert place().stat().st_mode & 0o077 == 0


def test_a_server_that_dies_must_be_started_again(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    before = child_of()
    os.kill(before.pid, signal.SIGKILL)
    eventually(lambda: (i := runtime.find("demo")) and i.state == "running" and i.restarts == 1, "the restart")
    assert child_of().alive
    assert child_of() != before
    assert any("ended with status 137" in line for line in runtime.logs("demo"))


def test_a_server_that_cannot_run_must_be_tried_again_ever_more_slowly(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime("broken")
    runtime.up(wanted, silent)
    found = eventually(lambda: (i := runtime.find("demo")).restarts >= 2 and i, "the second restart")
    assert found.state in {"restarting", "running"}
    pauses = [line.split()[-2] for line in runtime.logs("demo") if "starting it again in" in line]
    assert pauses[:2] == ["0.5", "1"]
    eventually(lambda: read_status(place()).exit_code == 3, "its exit code")
    assert runtime.down("demo", silent)


def test_a_dead_server_must_leave_no_process_of_its_own(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime("parent")
    runtime.up(wanted, silent)
    (line,) = eventually(lambda: lines(runtime, "child"), "the server's child")
    worker = Identity.of(int(line.split()[1]))
    assert worker
    os.kill(child_of().pid, signal.SIGKILL)
    eventually(lambda: not worker.alive, "the end of the worker")


def test_a_killed_supervisor_must_take_its_server_with_it_and_show_as_exited(make_runtime, wanted) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    seen_environment(runtime)  # from here on it writes nothing, so no broken pipe ends it
    child, supervisor = child_of(), read_identity(place() / "pid")
    os.kill(supervisor.pid, signal.SIGKILL)
    eventually(lambda: not child.alive, "the end of the server")
    eventually(lambda: runtime.find("demo").state == "exited", "the state")
    assert runtime.up(wanted, silent).state == "running"


def ticks_since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")


def test_a_recycled_process_number_must_not_be_mistaken(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    supervisor = json.loads((place() / "pid").read_text())
    os.kill(supervisor["pid"], signal.SIGKILL)
    eventually(lambda: runtime.find("demo").state == "exited", "the end")
    # What begins in the same hundredth of a second cannot be told apart; no number comes back that soon.
    eventually(lambda: ticks_since_boot() > supervisor["started"] + 1, "another tick of the clock")
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        (place() / "pid").write_text(json.dumps(supervisor | {"pid": stranger.pid}))
        assert runtime.find("demo").state == "exited"
        assert runtime.down("demo", silent)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_down_must_let_the_server_finish_and_leave_nothing(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    seen_environment(runtime)
    child, supervisor = child_of(), read_identity(place() / "pid")
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(runtime.logs("demo", follow=True)))
    reader.start()
    eventually(lambda: log, "the first line")
    assert runtime.down("demo", silent)
    reader.join(10)
    assert "stopping" in log
    assert not child.alive
    assert not supervisor.alive
    assert not place().exists()
    assert runtime.instances() == []
    assert not runtime.down("demo", silent)


def test_a_server_that_will_not_stop_must_be_killed_after_its_grace(make_runtime, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zops.runtime.base.STOP_GRACE_S", 0.5)
    stubborn = deployment(tmp_path, runtime="process", serve={"port": free_port(), "request_timeout_s": 0.5})
    runtime = make_runtime("stubborn")
    runtime.up(stubborn, silent)
    seen_environment(runtime)
    child = child_of()
    assert runtime.down("demo", silent)
    assert not child.alive


def test_a_taken_port_must_be_refused_and_leave_nothing(make_runtime, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        taken = deployment(tmp_path, runtime="process", serve={"port": port})
        with pytest.raises(HostShort, match=f"port {port} on 127.0.0.1 is already taken") as raised:
            make_runtime().up(taken, silent)
    assert raised.value.code == "port-taken"
    assert make_runtime().instances() == []
    assert not place().exists()


def test_a_replacement_that_cannot_start_must_leave_the_running_one(make_runtime, wanted, tmp_path: Path) -> None:
    make_runtime().up(wanted, silent)
    before = child_of()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        moved = deployment(tmp_path, runtime="process", serve={"port": holder.getsockname()[1]})
        with pytest.raises(HostShort):
            make_runtime().up(moved, silent)
    assert child_of() == before
    assert before.alive


def test_a_replacement_that_fails_must_bring_the_previous_one_back(make_runtime, wanted, tmp_path: Path) -> None:
    make_runtime().up(wanted, silent)
    changed = deployment(tmp_path, runtime="process", serve={"port": wanted.spec.serve.port, "max_queue": 3})
    broken = ProcessRuntime(argv=("/nowhere/python",))
    events: list[Event] = []
    with pytest.raises(ZopsError, match="could not be started: cannot start /nowhere/python") as raised:
        broken.up(changed, events.append)
    assert raised.value.code == "start-failed"
    assert any(isinstance(event, Warned) for event in events)
    found = make_runtime().find("demo")
    assert found.state == "running"
    assert drift(wanted, found) == []


def test_what_cannot_be_started_must_leave_nothing(wanted: Deployment, make_runtime) -> None:
    with pytest.raises(ZopsError, match="cannot start"):
        ProcessRuntime(argv=("/nowhere/python",)).up(wanted, silent)
    assert make_runtime().instances() == []
    assert not place().exists()


def test_a_gpu_that_the_host_does_not_have_must_be_refused(make_runtime, tmp_path: Path) -> None:
    with pytest.raises(HostShort) as raised:
        make_runtime().up(deployment(tmp_path, runtime="process", gpus=[63]), silent)
    assert raised.value.code == "gpu-missing"
    assert not place().exists()


def test_two_commands_at_once_must_not_start_two(make_runtime, wanted: Deployment) -> None:
    waits, may_go = threading.Event(), threading.Event()

    def deploy() -> None:
        with make_runtime().claim("demo", silent):
            waits.set()
            may_go.wait(30)

    other = threading.Thread(target=deploy)
    other.start()
    assert waits.wait(10)
    for heal in ("restart", "recreate", "stop"):
        with pytest.raises(LockHeld):
            getattr(make_runtime(), heal)("demo", silent)
    told: list[Event] = []

    def report(event: Event) -> None:
        told.append(event)
        if isinstance(event, Warned):
            assert not place().exists()
            may_go.set()

    make_runtime().up(wanted, report)
    other.join(10)
    assert isinstance(told[0], Warned)
    assert "waiting for" in told[0].text


def test_a_state_directory_that_cannot_be_written_must_be_named(make_runtime, wanted, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOPS_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(HostShort) as raised:
        make_runtime().up(wanted, silent)
    assert raised.value.code == "state-not-writable"
    assert "ZOPS_STATE_DIR" in raised.value.hint


def test_the_log_of_an_unknown_instance_must_say_so(make_runtime) -> None:
    with pytest.raises(ZopsError) as raised:
        list(make_runtime().logs("nobody"))
    assert raised.value.code == "instance-missing"


def test_the_last_lines_must_be_the_last_lines(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    seen_environment(runtime)
    everything = list(runtime.logs("demo"))
    assert list(runtime.logs("demo", tail=1)) == everything[-1:]
    assert list(runtime.logs("demo", tail=0)) == []


def test_a_log_must_be_rotated_and_read_in_order(tmp_path: Path) -> None:
    from zops.runtime.logfile import read_lines

    with closing(RotatingLog(tmp_path / "log", limit_bytes=20, files=3)) as log:
        for number in range(12):
            log.write(f"line {number:02}\n".encode())
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 20 for path in tmp_path.glob("log*"))
    assert list(read_lines(tmp_path / "log")) == [f"line {number:02}" for number in range(6, 12)]
    assert list(read_lines(tmp_path / "log", tail=3)) == ["line 09", "line 10", "line 11"]


@pytest.mark.parametrize("files", [1, 3])
def test_following_must_not_lose_lines_when_the_log_is_rotated(tmp_path: Path, files: int) -> None:
    from zops.runtime.logfile import read_lines

    log = RotatingLog(tmp_path / "log", limit_bytes=20, files=files)
    log.write(b"line 00\n")
    left = list(range(1, 8))

    def write_one() -> bool:
        if left:
            log.write(f"line {left.pop(0):02}\n".encode())
        return bool(left)

    with closing(log):
        assert list(read_lines(tmp_path / "log", going_on=write_one)) == [f"line {number:02}" for number in range(8)]


def test_broken_files_in_the_state_directory_must_not_hide_the_others(make_runtime, wanted: Deployment) -> None:
    make_runtime().up(wanted, silent)
    for name, text in (("broken", "{"), ("odd", "[]"), ("poor", "{}")):
        place(name).mkdir()
        (place(name) / "instance.json").write_text(text)
    assert {instance.name for instance in make_runtime().instances()} == {"demo", "poor"}


def test_the_state_directory_must_follow_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_dir({"ZOPS_STATE_DIR": "/srv/state"}) == Path("/srv/state")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/zops")
    assert state_dir({}) == Path.home() / ".local" / "state" / "zops"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_dir({"XDG_STATE_HOME": "/x"}) == Path("/var/lib/zops")


# --- healing


def started(runtime: ProcessRuntime, wanted: Deployment) -> Identity:
    """Bring it up and wait until it listens to signals."""
    runtime.up(wanted, silent)
    eventually(lambda: lines(runtime, "environment"), "the server's first line")
    return child_of()


def test_a_restart_must_start_the_same_once_more(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    child = started(runtime, wanted)
    before, record = runtime.find("demo"), (place() / "instance.json").read_text()
    after = runtime.restart("demo", silent)
    assert not child.alive
    assert (after.state, after.id != before.id) == ("running", True)
    assert (place() / "instance.json").read_text() == record
    assert drift(wanted, after) == []
    assert lines(runtime, "stopping"), "it was not asked to stop"


@pytest.mark.parametrize("hung", ["stopped", "stubborn"])
def test_a_restart_must_kill_what_hangs_within_the_grace(make_runtime, wanted: Deployment, hung: str) -> None:
    runtime = make_runtime("stubborn")
    child = started(runtime, wanted)
    if hung == "stopped":
        os.kill(child.pid, signal.SIGSTOP)
    began = time.monotonic()
    after = runtime.restart("demo", silent, grace_s=0.2)
    assert time.monotonic() - began < 10, "it got the grace that it was made with"
    assert not child.alive
    assert after.state == "running"
    runtime.stop("demo", silent, grace_s=0.1)


def test_a_stopped_process_must_stay_so_until_it_is_started(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    child = started(runtime, wanted)
    stopped = runtime.stop("demo", silent)
    assert (stopped.state, stopped.exit_code, child.alive) == ("exited", 0, False)
    assert make_runtime().find("demo").state == "exited"
    assert runtime.restart("demo", silent).state == "running"
    assert runtime.stop("demo", silent).state == "exited"
    assert runtime.up(wanted, silent).state == "running"


def test_a_process_that_was_killed_to_be_stopped_must_tell_so(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime("stubborn")
    started(runtime, wanted)
    assert runtime.stop("demo", silent, grace_s=0.1).exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize("act", ["restart", "recreate", "stop"])
def test_what_is_not_there_must_not_be_healed(make_runtime, act: str) -> None:
    with pytest.raises(ZopsError) as raised:
        getattr(make_runtime(), act)("demo", silent)
    assert raised.value.code == "instance-missing"
    assert not place().exists()


# --- questions from inside

ANSWERER = """
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"slow":
            time.sleep(30)
        while body == b"drip":
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 99999\\r\\n\\r\\n")
            self.wfile.flush()
            time.sleep(0.1)
        said = b"\\n".join([self.path.encode(), self.headers["Authorization"].encode(), body, bytes(range(256))])
        self.send_response(418)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["ZOPS_SERVE_PORT"])), Handler)
print("listens", flush=True)
server.serve_forever()
"""


@pytest.fixture
def answering(make_runtime, tmp_path: Path, wanted: Deployment) -> ProcessRuntime:
    (tmp_path / "answerer.py").write_text(ANSWERER)
    runtime = ProcessRuntime(argv=(sys.executable, str(tmp_path / "answerer.py")))
    runtime.up(wanted, silent)
    eventually(lambda: lines(runtime, "listens"), "the socket")
    return runtime


def test_a_question_must_arrive_as_it_was_put_and_its_answer_byte_by_byte(answering: ProcessRuntime) -> None:
    status, body = answering.ask("demo", "POST", "/v1/x?y=1", b"words", timeout_s=20, key="zk-1")
    assert status == 418
    assert body == b"/v1/x?y=1\nBearer zk-1\nwords\n" + bytes(range(256))


@pytest.mark.parametrize("body", [b"slow", b"drip"])
def test_a_question_without_an_end_of_its_answer_must_end_in_time(answering: ProcessRuntime, body: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeUnreachable) as raised:
        answering.ask("demo", "POST", "/", body, timeout_s=0.5)
    assert raised.value.code == "instance-timeout"
    assert time.monotonic() - began < 5


def test_a_question_where_nobody_listens_must_say_so(make_runtime, wanted: Deployment) -> None:
    runtime = make_runtime()
    runtime.up(wanted, silent)
    with pytest.raises(RuntimeUnreachable) as raised:
        runtime.ask("demo", "GET", "/livez", timeout_s=5)
    assert raised.value.code == "instance-unreachable"
    assert "refused" in raised.value.message
    with pytest.raises(ZopsError) as missing:
        runtime.ask("other", "GET", "/livez", timeout_s=5)
    assert missing.value.code == "instance-missing"


def test_what_asks_must_import_little() -> None:
    code = "import sys, zops.serving.ask; print(*(m for m in sys.modules if m.startswith('zops')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert set(done.stdout.split()) == {"zops", "zops.serving", "zops.serving.ask"}

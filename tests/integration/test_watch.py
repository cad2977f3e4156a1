"""`zops watch` as a process, over scripted instances of the process runtime: what it sees, does, and leaves alone."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import ROOT, free_port
from tests.support.instance import DIGEST
from tests.support.instances import deployment
from tests.support.waiting import eventually
from tests.support.watching import Watching, watching
from zops.cache.manifest import FileEntry, Manifest, write_manifest
from zops.errors import UsageError
from zops.events import silent
from zops.host.fences import Fence, as_json, read_boot_id
from zops.runtime.base import Instance
from zops.runtime.process import ProcessRuntime
from zops.runtime.supervisor import read_status
from zops.watch.page import serve_page

INTERVAL_S = 0.4
QUICK: dict[str, Any] = {
    "interval_s": INTERVAL_S,
    "first_pause_s": 0.2,
    "longest_pause_s": 0.4,
    "canary_every_s": 0,
    "listen": "127.0.0.1:0",
}


class Puppet:
    """A scripted instance of the process runtime; `says` is what it does from now on."""

    def __init__(self, root: Path, name: str = "demo", **spec: Any) -> None:
        self.root, self.name = root, name
        self.control = root / f"{name}.json"
        self.runtime = ProcessRuntime(argv=(sys.executable, "-m", "tests.support.puppet", str(self.control)))
        wanted = deployment(root / f"of-{name}", name=name, runtime="process", serve={"port": free_port()})
        self.deployment = replace(wanted, manifest_digest=DIGEST)
        self.says()
        self.runtime.up(self.deployment, silent)

    def says(self, **what: Any) -> None:
        """Make it behave."""
        fresh = self.control.with_suffix(".new")
        fresh.write_text(json.dumps(what))
        fresh.replace(self.control)

    @property
    def now(self) -> Instance:
        """The instance as its runtime knows it."""
        found = self.runtime.find(self.name)
        assert found
        return found

    def die(self) -> None:
        """Kill server and supervisor, as a crash of the host's session would."""
        child = read_status(self.root / "state" / "instances" / self.name).child
        os.kill(int(self.now.id), signal.SIGKILL)
        assert child
        os.kill(child.pid, signal.SIGKILL)
        eventually(lambda: not child.alive, "the end of the child")

    def serves(self) -> bool:
        """Tell whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.deployment.url}/livez", timeout=1) as response:
                return response.status == 200
        except OSError:
            return False


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One directory for everything: the watch below it uses the same state and locks."""
    made = tmp_path / "host"
    made.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ZOPS_STATE_DIR", str(made / "state"))
    monkeypatch.setenv("ZOPS_LOCK_DIR", str(made / "locks"))
    return made


@pytest.fixture
def puppets(root: Path) -> Iterator[Callable[..., Puppet]]:
    made: list[Puppet] = []

    def make(name: str = "demo") -> Puppet:
        made.append(Puppet(root, name))
        eventually(made[-1].serves, f"{name} serves")
        return made[-1]

    yield make
    for puppet in made:
        puppet.runtime.down(puppet.name, silent)


@contextmanager
def watch_over(root: Path, *argv: str, **settings: Any) -> Iterator[Watching]:
    # So long an instance that does not answer may still be starting.
    serve = {"startup_timeout_s": 3}
    with watching(root, *argv, runtime="process", serve=serve, watch=QUICK | settings) as watch:
        yield watch


def page_of(watch: Watching) -> str:
    note = eventually(lambda: [line for line in watch.errors.splitlines() if "metrics: " in line], "the page's address")
    return json.loads(note[0])["note"].partition(": ")[2].removesuffix("/metrics")


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_killed_instance_must_be_named_within_two_intervals_and_serve_again(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root) as watch:
        watch.expect(0, "verdict", verdict="ok")
        died_at = time.time()
        puppet.die()
        verdict = watch.expect(died_at, "verdict", verdict="failed")
        healing = watch.expect(died_at, "healing")
        healed = watch.expect(died_at, "healed")
        assert puppet.serves()
        assert verdict["seconds_at"] - died_at <= 2 * INTERVAL_S + 1.0, "a second for two busy cores"
        assert (verdict["code"], verdict["layer"], verdict["instance"]) == ("exited", "running", "demo")
        assert (healing["action"], healing["code"], healing["attempt"]) == ("restart", "exited", 1)
        assert healed["fault_seconds"] >= healed["seconds"] > 0
        status, metrics = fetch(f"{page_of(watch)}/metrics")
        assert status == 200
        assert 'zops_watch_heals_total{instance="demo",runtime="process",action="restart",result="done"} 1' in metrics
        assert 'zops_watch_instance_verdict{instance="demo",runtime="process",layer="",code=""} 0' in metrics
        assert fetch(f"{page_of(watch)}/livez")[0] == 200
        assert fetch(f"{page_of(watch)}/other")[0] == 404


def test_an_instance_that_hangs_must_neither_delay_the_others_nor_live_on(root, puppets) -> None:
    stuck, sound = puppets("stuck"), puppets("sound")
    with watch_over(root) as watch:
        for name in ("stuck", "sound"):
            watch.expect(0, "verdict", verdict="ok", instance=name)
        hung_at, was = time.time(), stuck.now.id
        stuck.says(hang=["/livez"])
        watch.expect(hung_at, "verdict", instance="stuck", code="hung")
        sound.die()
        watch.expect(hung_at, "healed", instance="sound")
        watch.expect(hung_at, "healing", instance="stuck")
        stuck.says()
        watch.expect(hung_at, "healed", instance="stuck")
        assert stuck.now.id != was


def test_an_image_that_takes_long_must_delay_no_other_instance(root, puppets) -> None:
    slow, sound = puppets("slow"), puppets("sound")
    slow.says(slow_s=60)
    with watch_over(root, canary_every_s=0.1) as watch:
        watch.expect(0, "verdict", verdict="ok", instance="sound")
        sound.die()
        watch.expect(0, "healed", instance="sound")
        assert watch.since(0, "verdict", instance="slow") == [], "its image is still being made"


def test_one_slow_answer_must_heal_nothing(root, puppets) -> None:
    puppet = puppets()
    was = puppet.now.id
    with watch_over(root, failures=3, of=3) as watch:
        began = watch.expect(0, "verdict", verdict="ok")["seconds_at"]
        puppet.says(hang=["/livez"])
        page = page_of(watch)
        eventually(lambda: _last_probe_took(page) > 0.1, "a probe that had to wait")
        puppet.says()
        eventually(lambda: _last_probe_took(page) < 0.1, "a quick one again")
        assert watch.since(began, "healing") == []
        assert [one["verdict"] for one in watch.since(0, "verdict")] == ["ok"]
    assert puppet.now.id == was


def _last_probe_took(page: str) -> float:
    lines = fetch(f"{page}/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith("zops_watch_probe_seconds{")).split()[-1])


def test_an_instance_that_was_stopped_on_purpose_must_be_left_alone(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root) as watch:
        watch.expect(0, "verdict", verdict="ok")
        stopped_at = time.time()
        puppet.runtime.stop("demo", silent, grace_s=10)
        told = watch.expect(stopped_at, "verdict", verdict="failed")
        assert told["code"] == "stopped"
        page = page_of(watch)
        probed = lambda: float(_metric(page, "zops_watch_last_probe_timestamp_seconds"))  # noqa: E731 - asked twice
        first = probed()
        eventually(lambda: probed() > first + 2 * INTERVAL_S, "more probes")
        assert watch.since(0, "healing") == []
    assert puppet.now.state == "exited"


def _metric(page: str, name: str) -> str:
    lines = fetch(f"{page}/metrics")[1].splitlines()
    return next(line for line in lines if line.startswith((f"{name}{{", f"{name} "))).split()[-1]


def test_nothing_must_be_healed_while_somebody_deploys(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root) as watch:
        watch.expect(0, "verdict", verdict="ok")
        with puppet.runtime.claim("demo", silent):
            began = time.time()
            puppet.die()
            held = watch.expect(began, "held-off")
            assert f"process {os.getpid()}" in held["because"]
            assert not puppet.serves()
            assert watch.since(began, "healing") == []
        watch.expect(began, "healed")
        assert len(watch.since(began, "held-off")) == 1


def test_a_dry_run_must_say_what_it_would_do_once_and_touch_nothing(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root, "--dry-run", canary_every_s=0.1) as watch:
        watch.expect(0, "verdict", verdict="ok")
        began = time.time()
        puppet.die()
        would = watch.expect(began, "would-heal")
        assert (would["action"], would["code"]) == ("restart", "exited")
        page = page_of(watch)
        first = float(_metric(page, "zops_watch_last_probe_timestamp_seconds"))
        eventually(
            lambda: float(_metric(page, "zops_watch_last_probe_timestamp_seconds")) > first + 2 * INTERVAL_S, "probes"
        )
        assert len(watch.since(began, "would-heal")) == 1
        assert watch.since(0, "healing") == watch.since(0, "warning") == []
    assert not puppet.serves()


def test_a_second_watch_must_be_refused_unless_it_touches_nothing(root, puppets) -> None:
    puppets()
    with watch_over(root) as watch:
        watch.expect(0, "verdict", verdict="ok")

        def second(*argv: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "zops", "watch", "--output", "json", *argv],
                cwd=root, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip

        done = second()
        error = json.loads(done.stderr.splitlines()[-1])["error"]
        assert (done.returncode, error["code"]) == (7, "watch-running")
        assert f"process {watch.process.pid}" in error["message"]
        assert second("--dry-run", "--once").returncode == 0


def test_what_cannot_be_healed_must_be_given_up_loudly_and_stay_so_after_a_new_start(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root, budget=2) as watch:
        watch.expect(0, "verdict", verdict="ok")
        puppet.says(hang=["/livez"])
        gave_up = watch.expect(0, "gave-up")
        assert (gave_up["code"], gave_up["heals"]) == ("hung", 2)
        assert gave_up["retry_at"]
        eventually(lambda: "gave-up demo" in watch.errors, "a line for people")
        assert [one["action"] for one in watch.since(0, "healing")] == ["restart", "recreate"]
        eventually(lambda: _metric(page_of(watch), "zops_watch_gave_up") == "1", "the metric")
    with watch_over(root, budget=2) as watch:
        watch.expect(0, "gave-up")
        assert watch.since(0, "healing") == []
        # A person who made a new one gave it a new chance.
        puppet.runtime.down("demo", silent)
        puppet.says()
        puppet.runtime.up(puppet.deployment, silent)
        watch.expect(0, "verdict", verdict="ok")


def test_a_black_image_must_be_confirmed_healed_and_proved_by_a_sound_one(root, puppets) -> None:
    puppet = puppets()
    with watch_over(root, canary_every_s=0.5) as watch:
        watch.expect(0, "verdict", verdict="ok")
        began = time.time()
        puppet.says(black=True)
        assert watch.expect(began, "healing")["code"] == "canary-black"
        puppet.says()
        watch.expect(began, "healed")


def test_a_canary_that_a_full_queue_refused_must_say_nothing(root, puppets) -> None:
    puppet = puppets()
    puppet.says(refuse=True)
    with watch_over(root, canary_every_s=0.1) as watch:
        watch.expect(0, "verdict", verdict="ok")
        page = page_of(watch)
        eventually(lambda: _metric(page, "zops_watch_last_canary_timestamp_seconds"), "a canary was tried")
        first = float(_metric(page, "zops_watch_last_canary_timestamp_seconds"))
        eventually(
            lambda: float(_metric(page, "zops_watch_last_canary_timestamp_seconds")) > first + 3 * INTERVAL_S, "more"
        )
        assert [one["verdict"] for one in watch.since(0, "verdict")] == ["ok"]
        assert "zops_watch_canary_seconds{" not in fetch(f"{page}/metrics")[1]


def test_no_canary_must_be_made_while_the_queue_is_full(root, puppets) -> None:
    puppet = puppets()
    puppet.says(readiness={"queue": {"waiting": 4, "running": 1, "limit": 4, "idle_s": 0.0}}, black=True)
    with watch_over(root, canary_every_s=0.1) as watch:
        began = watch.expect(0, "verdict", verdict="ok")["seconds_at"]
        page = page_of(watch)
        eventually(
            lambda: float(_metric(page, "zops_watch_last_probe_timestamp_seconds")) > began + 3 * INTERVAL_S, "probes"
        )
        assert "zops_watch_last_canary_timestamp_seconds{" not in fetch(f"{page}/metrics")[1]


def test_a_heal_that_was_interrupted_must_be_finished_by_the_next_watch(root, puppets) -> None:
    puppet = puppets()
    was = puppet.now.id
    puppet.runtime.stop("demo", silent, grace_s=10)
    begun = {"at": time.time(), "action": "restart", "code": "hung", "problem_since": time.time() - 5}
    memory = {"id": was, "heals": [begun | {"done_at": None, "recovered_at": None}]}
    (root / "state" / "watch").mkdir(parents=True)
    (root / "state" / "watch" / "heals.json").write_text(json.dumps({"instances": {"process/demo": memory}}))
    with watch_over(root) as watch:
        assert watch.expect(0, "healing")["because"] == "a heal was interrupted"
        watch.expect(0, "healed")
    assert puppet.serves()


@pytest.mark.parametrize("there", [True, False])
def test_another_snapshot_must_be_mended_only_where_the_host_has_the_right_one(root, puppets, there) -> None:
    puppet = puppets()
    index = hashlib.sha256(b"{}").hexdigest()
    manifest = Manifest("zops/synthetic-tiny", "seed-0", (FileEntry("model_index.json", 2, index),))
    write_manifest(Path(puppet.now.snapshot), manifest)
    if not there:
        Path(puppet.now.snapshot, "model_index.json").unlink()
    record = root / "state" / "instances" / "demo" / "instance.json"
    body = json.loads(record.read_text())
    record.write_text(json.dumps(body | {"manifest": manifest.digest}))
    with watch_over(root) as watch:
        told = watch.expect(0, "healing" if there else "held-off")
        assert (told["action"], told["code"]) == ("recreate", "manifest-differs")
        assert bool(watch.since(0, "healing")) is there


def test_a_fenced_gpu_s_instance_must_go_down_and_not_come_back(root, puppets, monkeypatch) -> None:
    puppet = puppets()
    record = root / "state" / "instances" / "demo" / "instance.json"
    body = json.loads(record.read_text())
    record.write_text(json.dumps(body | {"traits": body["traits"] | {"gpus": [3]}}))
    fences = root / "state" / "fences"
    fences.mkdir()
    fence = Fence("GPU-dead", "0000:3b:00", 3, "Xid 79: the GPU has fallen off the bus", "replace", 1.0, read_boot_id())
    (fences / "GPU-dead.json").write_text(json.dumps(as_json(fence)))
    with watch_over(root) as watch:
        assert watch.expect(0, "gpu-fenced")["gpu"] == "GPU-dead"
        watch.expect(0, "instance-fenced", result="stopped")
        eventually(lambda: puppet.now.state == "exited", "the instance is down")
        watch.expect(0, "verdict", code="stopped")
        done = subprocess.run(
            [sys.executable, "-m", "zops", "watch", "--unfence", "GPU-dead", "--output", "json"],
            cwd=root, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert json.loads(done.stdout)["lifted_at"]
        watch.expect(0, "fence-lifted")
        assert watch.since(0, "healing") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_must_end_it_at_once_in_the_middle_of_a_hanging_probe(root, puppets, number) -> None:
    puppet = puppets()
    puppet.says(hang=["/livez"])
    with watch_over(root, interval_s=60) as watch:
        watch.expect(0, "instance-found")
        began = time.monotonic()
        watch.process.send_signal(number)
        assert watch.process.wait(10) == 0
        assert time.monotonic() - began < 2
        assert watch.since(0, "watch-stopped")
        assert "Traceback" not in watch.errors


def test_once_must_judge_heal_and_end(root, puppets) -> None:
    puppet = puppets()
    puppet.die()
    (root / "zops.yaml").write_text(json.dumps({"runtime": "process", "watch": QUICK}))

    def once() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-m", "zops", "watch", "--once", "--output", "json"],
            cwd=root, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.returncode, [json.loads(line)["event"] for line in done.stdout.splitlines()]

    status, events = once()
    assert (status, "healing" in events) == (1, True)
    eventually(puppet.serves, "it serves again")
    status, events = once()
    assert (status, "healing" in events) == (0, False)


def test_a_cluster_must_be_refused_in_one_clear_line(root) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zops", "watch", "--runtime", "kubernetes", "--output", "json"],
        cwd=root, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == "watch-elsewhere"


def test_an_engine_that_does_not_answer_must_be_said_once_and_hide_nothing(root, puppets) -> None:
    puppet = puppets()
    with watching(root, runtime="docker", engine=f"unix://{root}/nothing.sock", watch=QUICK) as watch:
        watch.expect(0, "engine-unreachable", runtime="docker")
        watch.expect(0, "verdict", verdict="ok", instance="demo")
        began = time.time()
        puppet.die()
        watch.expect(began, "healed", instance="demo")
        assert len(watch.since(0, "engine-unreachable")) == 1


class Receiver:
    """A webhook on the loopback; `status` is what it answers, `hang` that it does not."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.attempts = 0
        self.status = 200
        self.hang = threading.Event()
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.attempts += 1
                if outer.hang.is_set():
                    outer.over.wait(30)
                if outer.status == 200:
                    outer.got.append(body)
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/SECRET"

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def test_the_webhook_must_get_every_event_and_its_address_must_never_be_shown(root, puppets, receiver) -> None:
    puppet = puppets()
    (root / "hook").write_text(receiver.url + "\n")
    with watch_over(root, webhook_file=str(root / "hook")) as watch:
        watch.expect(0, "verdict", verdict="ok")
        puppet.die()
        watch.expect(0, "healed")
        eventually(lambda: "healed" in [one["event"] for one in receiver.got], "the webhook heard of it")
        kinds = [one["event"] for one in receiver.got]
        assert kinds == [one["event"] for one in watch.events][: len(kinds)]
        metrics = fetch(f"{page_of(watch)}/metrics")[1]
        assert 'zops_watch_webhook_events_total{result="sent"}' in metrics
        assert "SECRET" not in watch.errors + json.dumps(watch.events) + metrics
        assert b"SECRET" not in Path(f"/proc/{watch.process.pid}/cmdline").read_bytes()


def test_a_webhook_that_answers_500_must_be_tried_again_and_a_refusal_must_not(root, receiver, monkeypatch) -> None:
    receiver.status = 500
    monkeypatch.setenv("ZOPS_WATCH_WEBHOOK", receiver.url)
    with watch_over(root) as watch:
        eventually(lambda: receiver.attempts >= 2, "a second attempt")
        receiver.status = 200
        eventually(lambda: receiver.got, "the event came through")
        assert receiver.got[0]["event"] == "watch-started"
        receiver.status = 404
        page = page_of(watch)
        before = receiver.attempts
        (root / "state" / "fences").mkdir(parents=True)
        fence = Fence("GPU-x", "", 0, "why", "replace", 1.0, read_boot_id())
        (root / "state" / "fences" / "GPU-x.json").write_text(json.dumps(as_json(fence)))
        eventually(lambda: 'result="failed"} 1' in fetch(f"{page}/metrics")[1], "it was refused")
        assert receiver.attempts == before + 1


@pytest.mark.parametrize("fault", ["down", "hangs"])
def test_a_webhook_that_is_down_or_slow_must_delay_no_heal(root, puppets, receiver, monkeypatch, fault) -> None:
    puppet = puppets()
    if fault == "hangs":
        receiver.hang.set()
    url = receiver.url if fault == "hangs" else f"http://127.0.0.1:{free_port()}/x"
    monkeypatch.setenv("ZOPS_WATCH_WEBHOOK", url)
    with watch_over(root) as watch:
        watch.expect(0, "verdict", verdict="ok")
        puppet.die()
        watch.expect(0, "healed")
        began = time.monotonic()
        watch.process.send_signal(signal.SIGTERM)
        assert watch.process.wait(10) == 0
        assert time.monotonic() - began < 2


def test_a_full_disk_and_a_broken_memory_must_end_nothing(root, puppets) -> None:
    puppet = puppets()
    (root / "state" / "watch").mkdir(parents=True)
    (root / "state" / "watch" / "heals.json").write_text("{broken")
    with watch_over(root, "--events", "/dev/full") as watch:
        assert "makes no sense" in watch.expect(0, "warning")["text"]
        watch.expect(0, "verdict", verdict="ok")
        puppet.die()
        watch.expect(0, "healed")


def test_a_page_that_cannot_be_served_must_be_an_error_at_the_start(root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [sys.executable, "-m", "zops", "watch", "--listen", f"127.0.0.1:{taken.getsockname()[1]}",
             "--runtime", "process", "--output", "json"],
            cwd=root, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 6
    assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == "port-unusable"


def test_the_page_must_say_when_the_loop_stands_still() -> None:
    age_s = 0.0
    with serve_page("127.0.0.1:0", metrics=lambda: "zops_watch_dry_run 0\n", age_s=lambda: age_s, interval_s=2) as url:
        assert fetch(f"{url}/livez")[0] == 200
        age_s = 6.1
        status, body = fetch(f"{url}/livez")
        assert (status, json.loads(body)) == (503, {"status": "stuck", "loop_age_s": 6.1})


@pytest.mark.parametrize("address", ["nothing", "127.0.0.1:99999", ":80", "127.0.0.1:x"])
def test_an_address_that_is_none_must_be_a_usage_error(address) -> None:
    with pytest.raises(UsageError), serve_page(address, metrics=str, age_s=float, interval_s=1):
        pass

"""`zops key` as it is typed, and what other commands do with a key."""

import json
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.instance import running
from tests.support.serving import clean_environment
from zops.errors import UsageError
from zops.health.canary import paint
from zops.health.client import Client
from zops.health.probes import check_instance
from zops.runtime.base import Instance
from zops.spec.keys import read_keys


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


def listed(directory):
    return [path.name for path in directory.iterdir()]


def zops(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "zops", "key", *arguments],
        env=clean_environment(**environ),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_key_must_be_printed_once_and_alone_on_stdout(keys):
    file = keys / "keys.yaml"
    done = zops("new", "web", "--file", str(file), "--rate", "5", "--images", "9", "--max-waiting", "2")
    assert done.returncode == 0, done.stderr
    key = done.stdout.strip()
    assert key.startswith("zops_")
    assert key not in done.stderr
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    made = read_keys(file)["web"]
    assert (made.requests_per_minute, made.images_per_minute, made.max_waiting) == (5, 9, 2)


def test_the_file_must_come_from_the_environment_too_and_lists_be_json(keys):
    file = str(keys / "keys.yaml")
    for name in ("web", "shop"):
        assert zops("new", name, "--expires", "2020-01-01", ZOPS_SERVE_API_KEYS=file).returncode == 0
    listed = json.loads(zops("list", "--output", "json", ZOPS_SERVE_API_KEYS=file).stdout)
    assert [(entry["name"], entry["expired"]) for entry in listed] == [("web", True), ("shop", True)]
    assert "sha256" not in str(listed)


def test_the_last_key_must_not_be_removed_in_silence(keys):
    file = keys / "keys.yaml"
    zops("new", "web", "--file", str(file))
    done = zops("remove", "web", "--file", str(file))
    assert done.returncode == 0
    assert "nobody gets in" in done.stderr
    assert read_keys(file) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("new", "a b"), "no name of a key"),
        (("new", "web", "--rate", "0"), "range"),
        (("new", "web", "--expires", "soon"), "soon"),
        (("remove", "web"), "no such file"),
        (("list",), "zops key new"),
    ],
)
def test_a_mistake_must_be_told_with_status_2(keys, arguments, said):
    done = zops(*arguments, "--file", str(keys / "keys.yaml"))
    assert done.returncode == 2
    assert said in done.stderr
    assert listed(keys) == []


def test_two_at_a_time_must_lose_no_key(keys):
    file = str(keys / "keys.yaml")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "zops", "key", "new", f"k{n}", "--file", file],
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for n in range(4)
    ]
    assert [process.wait(60) for process in started] == [0] * 4
    assert sorted(read_keys(keys / "keys.yaml")) == ["k0", "k1", "k2", "k3"]
    assert listed(keys) == ["keys.yaml"]


# --- the client's side


@pytest.fixture
def seen():
    """A server that says 401 to whatever comes, and what it was sent."""
    found = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments):
            pass

        def do_POST(self):
            found.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": {"message": "no", "type": "authentication_error", "code": "x"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("key", "code"), [("zops_x\n", "api-key-refused"), ("", "api-key-missing")])
def test_the_key_must_come_from_the_environment_and_a_refusal_say_what_to_do(seen, monkeypatch, key, code):
    url, found = seen
    monkeypatch.setenv("ZOPS_API_KEY", key)
    with pytest.raises(UsageError) as raised:
        paint(url, edge=16, timeout_s=5)
    assert raised.value.code == code
    assert "ZOPS_API_KEY" in raised.value.hint
    assert found == ([f"Bearer {key.strip()}"] if key else [None])


@pytest.mark.parametrize("key", ["zops_a\nX: y", "a b", "caf\xe9"])
def test_a_key_that_is_none_must_be_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("ZOPS_API_KEY", key)
    with pytest.raises(UsageError) as raised:
        Client("http://127.0.0.1:1")
    assert raised.value.code == "api-key-refused"
    assert key not in raised.value.message


def test_an_instance_must_not_be_failed_for_a_key_that_we_lack(monkeypatch):
    monkeypatch.delenv("ZOPS_API_KEY", raising=False)
    with running() as (url, behaviour):
        behaviour.refusal = (
            401,
            {"error": {"message": "no", "type": "authentication_error", "code": "missing_api_key"}},
        )
        instance = Instance(
            name="demo", id="1", runtime="process", state="running", url=url, model="m", snapshot="s",
            manifest_digest="a" * 64, spec_digest="d", traits={"gpus": "none"},
        )  # fmt: skip
        health = check_instance(instance, deep=True)
    assert [(probe.layer, probe.verdict) for probe in health.probes][-1] == ("canary", "degraded")
    assert "zops key new" in health.probes[-1].remedy

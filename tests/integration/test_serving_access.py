"""Keys, jobs and repeated requests against a running `zops serve` with the tiny model."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest

from tests.support.serving import ENDLESS, LONG, Server, clean_environment, start_server, stop_hard
from tests.support.waiting import eventually
from zops.spec.keys import add_key, remove_key

IMAGE = {"prompt": "a cat", "size": "64x64", "seed": 3}
GENERATIONS = "/v1/images/generations"


@dataclass
class Keyed:
    """A server that wants keys, and the two that it knows."""

    server: Server
    file: object
    web: str
    shop: str

    def call(self, method, path, body=None, *, key=None, **headers):
        authorization = {"Authorization": f"Bearer {self.web if key is None else key}"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.server.call(method, path, body, headers=authorization | named)


@pytest.fixture(scope="module")
def keyed(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("keyed")
    (directory / "keys").mkdir()
    file = directory / "keys" / "keys.yaml"
    web, shop = (add_key(file, name) for name in ("web", "shop"))
    server = start_server(tiny_model, directory, ZOPS_SERVE_API_KEYS=str(file))
    try:
        server.wait_ready()
        yield Keyed(server, file, web, shop)
    finally:
        stop_hard(server)


def test_only_a_key_must_get_images_and_never_be_in_the_log(keyed):
    assert keyed.call("POST", GENERATIONS, IMAGE).status == 200
    wrong = keyed.call("POST", GENERATIONS, IMAGE, key="zops_wrong")
    assert (wrong.status, wrong.code) == (401, "invalid_api_key")
    log = keyed.server.log.read_text()
    assert '"client": "web"' in log
    assert keyed.web not in log
    assert "zops_wrong" not in log


def test_a_key_must_be_good_and_bad_while_the_server_runs(keyed):
    new = add_key(keyed.file, "new")
    eventually(lambda: keyed.call("GET", "/v1/models", key=new).status == 200, "the new key")
    remove_key(keyed.file, "new")
    eventually(lambda: keyed.call("GET", "/v1/models", key=new).status == 401, "its end")
    assert keyed.call("GET", "/v1/models").status == 200


def test_the_commands_must_use_the_key_of_the_environment(keyed, tmp_path):
    arguments = [sys.executable, "-m", "zops", "generate", "a kite", "-o", "kite.png", "--size", "64x64", "--url"]
    for key, status in ((keyed.web, 0), ("", 2)):
        done = subprocess.run(
            [*arguments, keyed.server.url],
            env=clean_environment(ZOPS_API_KEY=key),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        (tmp_path / "kite.png").unlink(missing_ok=True)
    assert "ZOPS_API_KEY" in done.stderr


def test_a_job_must_be_made_watched_and_fetched(keyed):
    asked = keyed.call("POST", GENERATIONS, IMAGE, Prefer="respond-async")
    assert asked.status == 202
    job = keyed.call("GET", asked.headers["location"] + "?wait=30").json
    assert (job["status"], job["progress"]) == ("succeeded", 1.0)
    plain = keyed.call("POST", GENERATIONS, IMAGE).json
    assert job["result"]["data"][0]["b64_json"] == plain["data"][0]["b64_json"]
    stolen = keyed.call("GET", asked.headers["location"], key=keyed.shop)
    assert (stolen.status, stolen.code) == (404, "job_not_found")


def test_a_job_must_show_its_progress_and_leave_the_worker_when_it_is_cancelled(keyed):
    location = keyed.call("POST", GENERATIONS, ENDLESS, Prefer="respond-async").headers["location"]
    eventually(lambda: keyed.call("GET", location).json["progress"] > 0, "progress", timeout_s=20)
    assert keyed.call("GET", location).json["status"] == "running"
    assert keyed.call("POST", f"{location}/cancel").json["status"] == "cancelled"
    eventually(lambda: keyed.server.state["queue"]["running"] == 0, "a free worker", timeout_s=10)


def test_a_request_that_broke_off_must_be_answered_at_its_second_try(keyed):
    body, headers = json.dumps(LONG), {"Authorization": f"Bearer {keyed.web}", "Idempotency-Key": "order-1"}
    headers["Content-Type"] = "application/json"
    before = images_of(keyed)
    raw = http.client.HTTPConnection("127.0.0.1", keyed.server.port)
    raw.request("POST", GENERATIONS, body, headers)
    eventually(lambda: keyed.server.state["queue"]["running"] == 1, "the request to run")
    raw.close()
    again = keyed.call("POST", GENERATIONS, LONG, Idempotency_Key="order-1")
    assert (again.status, again.headers["idempotent-replayed"]) == (200, "true")
    assert images_of(keyed) == before + 1
    other = keyed.call("POST", GENERATIONS, IMAGE, Idempotency_Key="order-1")
    assert (other.status, other.code) == (409, "idempotency_conflict")


def images_of(keyed) -> float:
    page = keyed.server.call("GET", "/metrics").body.decode()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("zops_images_total"))


def test_no_client_must_be_able_to_name_more_series_than_there_are_keys(keyed):
    for n in range(20):
        keyed.call("POST", GENERATIONS, IMAGE | {"size": "1x1"}, key=f"zops_{n}")
    page = keyed.server.call("GET", "/metrics").body.decode()
    named = {line.split('client="')[1].split('"')[0] for line in page.splitlines() if 'client="' in line}
    assert named <= {"web", "shop", "new"}


def test_a_file_that_breaks_must_lock_nobody_out(keyed):
    whole = keyed.file.read_bytes()
    keyed.file.write_text("keys: {")
    try:
        stale = "zops_api_keys_stale 1.0"

        def noticed():
            assert keyed.call("GET", "/v1/models").status == 200
            return stale in keyed.server.call("GET", "/metrics").body.decode()

        eventually(noticed, "the broken file to be seen")
    finally:
        keyed.file.write_bytes(whole)
    eventually(
        lambda: (keyed.call("GET", "/v1/models"), keyed.server.call("GET", "/metrics"))[1].body.count(b"stale 0.0"),
        "the mended file to be seen",
    )


def test_a_stop_must_not_wait_for_jobs_that_wait_and_finish_the_one_that_runs(tiny_model, tmp_path):
    server = start_server(tiny_model, tmp_path)
    try:
        server.wait_ready()
        ask = {"headers": {"Prefer": "respond-async"}}
        running, waiting = (server.call("POST", GENERATIONS, LONG, **ask).headers["location"] for _ in range(2))
        eventually(lambda: server.call("GET", running).json["status"] == "running", "the first to run")
        polled = []
        polls = [
            threading.Thread(target=lambda place=place: polled.append(server.call("GET", f"{place}?wait=30").json))
            for place in (waiting, running)
        ]
        for poll in polls:
            poll.start()
        os.kill(server.process.pid, signal.SIGTERM)
        for poll in polls:
            poll.join(30)
        assert server.process.wait(timeout=30) == 0
        found = {job["id"]: (job["status"], (job["error"] or {}).get("code")) for job in polled}
        assert found[running.rpartition("/")[2]] == ("succeeded", None)
        assert found[waiting.rpartition("/")[2]] == ("failed", "draining")
    finally:
        stop_hard(server)


def test_a_server_must_not_start_without_the_keys_that_it_was_told_of(tiny_model, tmp_path):
    server = start_server(tiny_model, tmp_path, ZOPS_SERVE_API_KEYS=str(tmp_path / "none.yaml"))
    try:
        assert server.process.wait(timeout=30) == 2
    finally:
        stop_hard(server)
    assert "keys-invalid" in server.log.read_text()


@pytest.mark.parametrize(("published", "said"), [({}, True), ({"ZOPS_PUBLISHED": "127.0.0.1"}, False)])
def test_a_server_for_everybody_must_say_so_unless_only_this_host_reaches_it(tiny_model, tmp_path, published, said):
    server = start_server(tiny_model, tmp_path, ZOPS_SERVE_HOST="0.0.0.0", **published)
    try:
        eventually(server.is_up, "the socket", timeout_s=30)
        assert ("no serve.api_keys" in server.log.read_text()) is said
    finally:
        stop_hard(server)

"""A real `zops serve` as a process, and a client for it that shows answers as they are."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.host import free_port
from tests.support.waiting import eventually

START_TIMEOUT_S = 60
# Takes the tiny model a minute or more, in steps between which it can be cancelled; not to be waited for.
ENDLESS = {"prompt": "a long one", "n": 4, "size": "512x512", "num_inference_steps": 200, "seed": 1}
# Takes a second or more on any CPU: time to do something meanwhile.
LONG = ENDLESS | {"n": 1, "num_inference_steps": 16}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json["error"]["code"]

    @property
    def images(self):
        assert self.status == 200, self.body[:500]
        return [base64.b64decode(item["b64_json"]) for item in self.json["data"]]


@dataclass
class Server:
    """One `zops serve`; `log` is its stderr."""

    process: subprocess.Popen
    port: int
    log: Path
    url: str = field(init=False)

    def __post_init__(self):
        self.url = f"http://127.0.0.1:{self.port}"

    def call(self, method, path, body=None, *, headers=None, timeout_s=60) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def generate(self, **fields) -> Answer:
        return self.call("POST", "/v1/images/generations", {"prompt": "a cat", "size": "64x64"} | fields)

    @contextmanager
    def endless_request(self):
        """Have the worker busy; leaving goes away without an answer, as clients do, and waits until that was seen."""
        body = json.dumps(ENDLESS).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port)) as raw:
            raw.sendall(head + body)
            eventually(lambda: self.state["queue"]["running"] == 1, "the request to run")
            yield
        eventually(lambda: self.state["queue"]["running"] == 0, "the worker to be free", timeout_s=5)

    @property
    def state(self):
        return self.call("GET", "/readyz").json

    @property
    def worker_pid(self):
        return self.state["workers"][0]["pid"]

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", "/livez").status == 200
        except OSError:
            return False

    def wait_ready(self):
        eventually(self.is_up, f"the socket\n{self.log.read_text()}", timeout_s=START_TIMEOUT_S)
        eventually(
            lambda: self.call("GET", "/readyz").status == 200,
            f"readiness\n{self.log.read_text()}",
            timeout_s=START_TIMEOUT_S,
        )
        return self

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ZOPS_", "HF_", "MODELSCOPE_"))}
    return kept | more


def start_server(snapshot: Path, directory: Path, port: int | None = None, **environ: str) -> Server:
    """Start a server on the tiny model; it is not ready yet."""
    directory.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    log = directory / f"serve-{port}.log"
    settings = {
        "ZOPS_MODEL": "zops/synthetic-tiny",
        "ZOPS_GPUS": "none",
        "ZOPS_SNAPSHOT": str(snapshot),
        "ZOPS_SERVE_PORT": str(port),
        "ZOPS_SERVE_WARMUP_SIZE": "64",
        "ZOPS_OUTPUT": "json",
        # Threads that wait for each other by spinning make the tiny model ten times slower on cores that are shared.
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "zops", "serve"],
            env=clean_environment(**(settings | environ)),
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    return Server(process, port, log)


def stop_hard(server: Server) -> None:
    """End a server whatever state a test left it in."""
    server.process.kill()
    server.process.wait()

"""A loopback engine that speaks as much of Docker's API as reading does, for fleets of hosts that are not there."""

import json
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.instance import DIGEST


def container(name: str, url: str, *, state: str = "running") -> dict[str, Any]:
    """Return what an engine says of an instance of ours."""
    labels = {
        "io.zops.deployment": name,
        "io.zops.manifest": DIGEST,
        "io.zops.url": url,
        "io.zops.traits": json.dumps({"gpus": "none", "serve": {"warmup_size": 32, "request_timeout_s": 5}}),
    }
    return {
        "Id": f"{name:0<64}",
        "Name": f"/zops-{name}",
        "Image": "sha256:1",
        "RestartCount": 0,
        "Config": {"Labels": labels, "Image": "zops-inference:test"},
        "State": {"Status": state, "ExitCode": 1, "StartedAt": "2026-01-01T00:00:00.5Z", "OOMKilled": False},
    }


@contextmanager
def engine(*containers: dict[str, Any], inside: str = "") -> Iterator[tuple[str, list[str]]]:
    """Run an engine; yields its tcp:// address and the list of what was asked.

    Args:
        containers: see `container`.
        inside: address of what a question from inside any of them reaches.
    """
    asked: list[str] = []
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            parts = self.path.partition("?")[0].strip("/").split("/")
            by_id = {one["Id"]: one for one in containers}
            match parts:
                case [*_, "version"]:
                    self.say({"ApiVersion": "1.41", "Version": "28"})
                case [_, "containers", "json"]:
                    self.say([{"Id": one["Id"]} for one in containers])
                case [_, "containers", found, "json"] if found in by_id:
                    self.say(by_id[found])
                case [_, "exec", found, "json"]:
                    self.say({"ExitCode": 0 if found in answers else 1})
                case _:
                    self.say({"message": "no such thing"}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
            asked.append(self.path)
            if self.path.endswith("/start"):
                out = answers[self.path.split("/")[-2]]
                self.send_response(200)
                self.end_headers()
                # docker-py reads what follows from the socket itself and misses what comes with the headers; a real
                # program takes longer than this to start.
                time.sleep(0.1)
                self.wfile.write(struct.pack(">BxxxL", 1, len(out)) + out)
                return
            environment = dict(line.partition("=")[::2] for line in body["Env"])
            answers[str(len(answers))] = ask(inside, environment)
            self.say({"Id": str(len(answers) - 1)}, 201)

        def say(self, body: object, status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, environment: dict[str, str]) -> bytes:
    """Do what `python -m zops.serving.ask` does inside a container."""
    question = json.loads(environment["ZOPS_ASK"])
    body = environment.get("ZOPS_ASK_BODY")
    request = urllib.request.Request(
        url + question["path"], method=question["method"], data=body.encode() if body else None
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.status).encode() + b"\n" + bytes(answer.read())
    except urllib.error.HTTPError as error:
        return str(error.code).encode() + b"\n" + error.read()

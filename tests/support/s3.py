"""A bucket on moto's real server, and a proxy in front of it that fails on purpose."""

import http.client
import http.server
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

BUCKET = "archives"
SECRET = "very-secret"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose address or headers contain `text`.

    `what`: status (500), refuse (403), stall, cut (half an answer), drop (no answer), flip (a byte of the answer),
    corrupt (a byte of what is sent), whole (everything, whatever range was asked for), etag (another name for it).
    """

    what: str
    method: str = "GET"
    text: str = ""
    times: int = 1_000_000


@dataclass
class Proxy:
    """Forwards to a server, but for the faults."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: deque = field(default_factory=lambda: deque(maxlen=10_000))

    def __enter__(self) -> Self:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - the names are the library's

            def log_message(self, *_args: object) -> None:
                pass

        self.released = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, what: str, method: str = "GET", text: str = "", times: int = 1_000_000) -> Fault:
        self.faults.append(Fault(what, method, text, times))
        return self.faults[-1]

    def due(self, handler: http.server.BaseHTTPRequestHandler) -> str:
        told = f"{handler.path} {handler.headers}"
        for fault in self.faults:
            if fault.times > 0 and fault.method == handler.command and fault.text in told:
                fault.times -= 1
                return fault.what
        return ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        fault = self.due(handler)
        self.requests.append((handler.command, handler.path, fault))
        if fault == "stall":
            self.released.wait(30)
        if fault in {"stall", "drop"}:
            handler.close_connection = True
            return
        if fault in {"status", "refuse"}:
            handler.send_response(500 if fault == "status" else 403)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        headers = {k: v for k, v in handler.headers.items() if fault != "whole" or k.lower() != "range"}
        if fault == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, sent, content = self.forward(handler.command, handler.path, body, headers)
        if fault == "flip" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "etag":
            content = content.replace(b"-", b"_")
        handler.send_response(status)
        for name, value in sent:
            if name.lower() not in {"connection", "transfer-encoding", "content-length", "date", "server"}:
                handler.send_header(name, value)
        length = len(content) if handler.command != "HEAD" else dict(sent).get("content-length", "0")
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault == "cut":
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
            return
        with suppress(ConnectionError):  # who asked may have lost patience
            handler.wfile.write(content)

    def forward(self, method: str, path: str, body: bytes, headers: dict) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, [(k.lower(), v) for k, v in answer.getheaders()], content
        finally:
            connection.close()


def serve_bucket():
    """Yield the address of moto's server with an empty bucket, and boto's client of it; a generator for a fixture."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
    )
    client.create_bucket(Bucket=BUCKET)
    yield endpoint, client
    client.close()
    server.stop()


def settings(endpoint: str, home: Path) -> dict[str, str]:
    """Return the variables by which a process finds an endpoint, credentials, and a home of its own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HOME": str(home),
        "ZOPS_STATE_DIR": str(home / "state"),
    }


def use_endpoint(monkeypatch, environ, endpoint: str, home) -> None:
    """Let this process find an endpoint and credentials as an operator's would, and nothing of this machine's."""
    for name in [name for name in environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in settings(endpoint, home).items():
        monkeypatch.setenv(name, value)

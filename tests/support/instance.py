"""A loopback server that speaks the instance's HTTP API, well or badly: the outermost edge of client and probes."""

import base64
import json
import os
import signal
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIGEST = "a" * 64
SIGNATURE_OF_PNG = b"\x89PNG\r\n\x1a\n"


def png(
    width: int, height: int, pixel: Callable[[int, int], bytes], *, filters: bytes = b"\x00", colour: int = 2
) -> bytes:
    """Encode an image by the book; line y uses filter `filters[y % len]`."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    raw, above = bytearray(), bytes(width * channels)
    for y in range(height):
        line = b"".join(pixel(x, y) for x in range(width))
        kind = filters[y % len(filters)]
        raw.append(kind)
        for i, value in enumerate(line):
            left = line[i - channels] if i >= channels else 0
            corner = above[i - channels] if i >= channels else 0
            p = left + above[i] - corner
            paeth = min((abs(p - left), 0, left), (abs(p - above[i]), 1, above[i]), (abs(p - corner), 2, corner))[2]
            raw.append((value - (0, left, above[i], (left + above[i]) // 2, paeth)[kind]) & 255)
        above = line
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return SIGNATURE_OF_PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(raw))) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    """Encode one chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def picture(width: int, height: int) -> bytes:
    """Return a PNG that shows something."""
    return png(
        width, height, lambda x, y: bytes((x * 7 % 256, y * 11 % 256, (x * y) % 256)), filters=b"\x00\x01\x02\x03\x04"
    )


@dataclass
class Behaviour:
    """How the server answers; tests change it while it runs."""

    live: int = 200
    ready: int = 200
    readiness: dict[str, Any] = field(default_factory=lambda: {"status": "ready", "phase": "ready", "reason": ""})
    info: dict[str, Any] = field(
        default_factory=lambda: {"model": "zops/synthetic-tiny", "manifest_digest": DIGEST, "device": "cpu"}
    )
    """What it says of itself in /v1/zops/info and /readyz: as little as the oldest servers do."""
    image: Callable[[int, int], bytes] = picture
    refusal: tuple[int, Any] | None = None
    hang: set[str] = field(default_factory=set)
    """Paths that are never answered."""
    drip: set[str] = field(default_factory=set)
    """Paths that are answered a byte at a time, for ever."""
    raw: dict[str, bytes] = field(default_factory=dict)
    """Paths that are answered with these bytes and status 200."""
    receipt: dict[str, Any] = field(default_factory=lambda: {"forwards": 8, "batch_size": 1})
    """What the receipt of every image says beside its seed."""
    on_request: dict[str, Callable[[], object]] = field(default_factory=dict)
    """What happens when a path is asked for, before it is answered."""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running(port: int = 0) -> Iterator[tuple[str, Behaviour]]:
    """Run the server on a port (0: any free one); yields its URL and its behaviour."""
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            behaviour.requests.append((self.path, body))
            behaviour.on_request.get(self.path, lambda: None)()
            if self.path in behaviour.hang:
                behaviour.over.wait(30)
                self.close_connection = True
            elif self.path in behaviour.drip:
                self.drip()
            elif self.path in behaviour.raw:
                self.send(200, behaviour.raw[self.path])
            else:
                status, content = route(behaviour, self.path, body)
                self.send(status, json.dumps(content).encode())

        def send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def drip(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            try:
                while not behaviour.over.wait(0.02):
                    self.wfile.write(b" ")
            except OSError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        behaviour.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def route(behaviour: Behaviour, path: str, body: Any) -> tuple[int, Any]:
    """Return status and body of one request."""
    if path == "/livez":
        return behaviour.live, {"status": "live"}
    if path == "/readyz":
        return behaviour.ready, behaviour.info | behaviour.readiness
    if path == "/v1/zops/info":
        return 200, behaviour.info
    if path != "/v1/images/generations":
        return 404, {
            "error": {"message": "there is no such path", "type": "invalid_request_error", "code": "not_found"}
        }
    if behaviour.refusal:
        return behaviour.refusal
    width, height = (int(edge) for edge in body.get("size", "64x64").split("x"))
    seeds = range(body.get("seed", 1), body.get("seed", 1) + body.get("n", 1))
    data = [
        {
            "b64_json": base64.b64encode(behaviour.image(width, height)).decode(),
            "receipt": behaviour.receipt | {"seed": seed},
        }
        for seed in seeds
    ]
    return 200, {"created": 0, "data": data}


if __name__ == "__main__":
    # As an instance of its own: where `zops serve` would stand.
    with running(int(os.environ["ZOPS_SERVE_PORT"])):
        signal.sigwait({signal.SIGTERM, signal.SIGINT})

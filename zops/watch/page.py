"""The watch's own HTTP server: /metrics for Prometheus, and /livez, which fails when the loop stands still."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import Any

from zops.errors import HostShort, UsageError

# A client that sends nothing must not keep a thread for ever.
CLIENT_TIMEOUT_S = 5.0
ROUNDS_MISSED = 3
"""So many intervals without a round, and the loop counts as dead."""


@contextmanager
def serve_page(
    address: str, *, metrics: Callable[[], str], age_s: Callable[[], float], interval_s: float
) -> Iterator[str]:
    """Serve until the block ends; yields the URL.

    Args:
        address: HOST:PORT to listen on; port 0 is any free one.
        metrics: returns the text of /metrics.
        age_s: returns the seconds since the loop last came round.
        interval_s: how often it should.

    Raises:
        UsageError: when the address is none.
        HostShort: when it cannot be listened on.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")

    class Handler(BaseHTTPRequestHandler):
        """Answers GET from memory."""

        timeout = CLIENT_TIMEOUT_S
        server_version = "zops-watch"
        sys_version = ""

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
            """Say nothing: a scrape is no event."""

        def do_GET(self) -> None:
            """Answer."""
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._send(200, "text/plain; version=0.0.4; charset=utf-8", metrics())
            elif path == "/livez":
                age = age_s()
                alive = age <= ROUNDS_MISSED * interval_s
                body = {"status": "live" if alive else "stuck", "loop_age_s": round(age, 3)}
                self._send(200 if alive else 503, "application/json", json.dumps(body))
            else:
                self._send(404, "text/plain; charset=utf-8", "there are /metrics and /livez\n")

        def _send(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = _listen(host, port, Handler)
    threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Waiting for a client that hangs would keep the watch from ending.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away in the middle is its own affair."""


class _Server6(_Server):
    address_family = AF_INET6


def _listen(host: str, port: str, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    if not port.isdecimal() or int(port) > 65535 or not host:
        raise UsageError(f"--listen {host}:{port}: must be HOST:PORT", hint="for example --listen 127.0.0.1:9465")
    kind = _Server6 if ":" in host else _Server
    assert _Server.address_family == AF_INET, "names without a colon are of IPv4"
    try:
        return kind((host, int(port)), handler)
    except OSError as error:
        raise HostShort(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            code="port-unusable",
            hint="choose another: --listen HOST:PORT, or none: --listen ''",
        ) from error

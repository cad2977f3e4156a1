"""What one connection may cost, tried over raw sockets against the server that `zops serve` runs."""

import asyncio
import contextlib
import io
import socket
import threading
import time

import pytest
import uvicorn

from tests.support.front import Front, loggers, put_back
from tests.support.waiting import eventually
from zops.serving import body as body_module
from zops.serving.connection import HTTP_SETTINGS, bounded_by

GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
BIG = 64 << 20


class Server:
    """The HTTP process on a loopback port, its event loop in a thread."""

    def __init__(self, front, settings, limits):
        self.front = front
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        protocol = bounded_by(front.metrics, **limits)
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            http=protocol,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
            **settings,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.run)

    async def app(self, scope, receive, send):
        """The application, and beside it an answer that is larger than what kernels buffer."""
        if scope["path"] != "/big":
            await self.front.app(scope, receive, send)
            return
        head = [(b"content-length", str(BIG).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": bytes(BIG)})

    def run(self):
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def dropped(self, reason):
        return self.front.count("zops_connections_dropped_total", reason=reason)

    @property
    def open(self):
        return len(self.server.server_state.connections)


@contextlib.contextmanager
def serving(directory, settings=None, **limits):
    before = loggers()
    server = Server(Front(directory, log=io.StringIO()), HTTP_SETTINGS | (settings or {}), limits)
    server.thread.start()
    try:
        eventually(lambda: server.server.started, "the server")
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(10)
        server.listener.close()
        put_back(before)
        assert not server.thread.is_alive()


def everything(raw) -> bytes:
    """Read until the other side ends."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := raw.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answer(raw) -> bytes:
    """Read one answer of a connection that stays open."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += raw.recv(4096)
    head, _, rest = found.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(rest) < length:
        rest += raw.recv(4096)
    return head + b"\r\n\r\n" + rest


def drip(raw, data=b"x") -> bytes:
    """Send a little again and again until the other side has had enough; return what it said."""
    raw.settimeout(0.02)
    said = b""
    for _ in range(250):
        try:
            raw.sendall(data)
        except OSError:
            return said
        try:
            part = raw.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return said
        if not part:
            return said
        said += part
    pytest.fail("it is still patient")


def test_headers_that_drip_must_end_in_time_while_others_are_served(tmp_path):
    with serving(tmp_path, head_timeout_s=0.3) as server, server.connect() as slow, server.connect() as quick:
        slow.sendall(b"GET /livez HTTP/1.1\r\n")
        began = time.monotonic()
        quick.sendall(GET)
        assert answer(quick).startswith(b"HTTP/1.1 200")
        assert drip(slow, b"x: y\r\n").startswith(b"HTTP/1.1 408")
        assert 0.2 < time.monotonic() - began < 3
        assert server.dropped("head_timeout") == 1


def test_a_connection_that_never_says_a_word_must_end(tmp_path):
    with serving(tmp_path, head_timeout_s=0.2) as server, server.connect() as raw:
        assert everything(raw) == b""
        assert server.dropped("head_timeout") == 1


def test_the_second_request_of_a_connection_must_have_its_time_too(tmp_path):
    with serving(tmp_path, head_timeout_s=0.3) as server, server.connect() as raw:
        raw.sendall(GET)
        assert answer(raw).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /livez HT")
        assert everything(raw).startswith(b"HTTP/1.1 408")


def test_an_idle_connection_must_end_by_itself_and_count_as_no_offence(tmp_path):
    with serving(tmp_path, {"timeout_keep_alive": 0.8}, head_timeout_s=0.3) as server, server.connect() as raw:
        raw.sendall(GET)
        answer(raw)
        assert everything(raw) == b""
        assert server.dropped("head_timeout") == 0


def test_a_body_that_nobody_reads_must_end_in_time(tmp_path):
    with serving(tmp_path, body_timeout_s=0.3) as server, server.connect() as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n")
        assert drip(raw).startswith(b"HTTP/1.1 200")
        eventually(lambda: server.dropped("body_timeout") == 1, "the drop")
        assert server.open == 0


def test_a_body_that_drips_must_be_answered_with_the_envelope(tmp_path, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.3)
    with serving(tmp_path, body_timeout_s=1.0) as server, server.connect() as raw:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
        said = drip(raw, b" ")
        assert said.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_too_slow"' in said
        assert server.front.scheduler.submitted == []


def test_a_client_that_does_not_read_must_not_keep_its_answer_in_memory(tmp_path):
    with serving(tmp_path, write_window_s=0.3) as server, server.connect() as raw:
        raw.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        eventually(lambda: server.dropped("slow_reader") == 1, "the drop")
        eventually(lambda: server.open == 0, "the connection to be forgotten")
        assert len(everything(raw)) < BIG


def test_a_client_that_reads_slowly_but_steadily_must_get_everything(tmp_path):
    with serving(tmp_path, write_window_s=0.2) as server, server.connect() as raw:
        raw.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        size, waited = 0, threading.Event()
        while part := raw.recv(2 << 20):
            size += len(part)
            waited.wait(0.01)
        assert size > BIG
        assert server.dropped("slow_reader") == 0


def test_one_connection_too_many_must_take_the_place_of_the_oldest_idle_one(tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, max_connections=3))
        oldest, *others = [stack.enter_context(server.connect()) for _ in range(3)]
        eventually(lambda: server.open == 3, "three connections")
        late = stack.enter_context(server.connect())
        assert everything(oldest) == b""
        for raw in (*others, late):
            raw.sendall(GET)
            assert answer(raw).startswith(b"HTTP/1.1 200")
        assert server.dropped("too_many") == 1


def test_one_connection_too_many_must_be_refused_where_all_others_are_at_work(tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, max_connections=2))
        server.front.scheduler.hold = True
        body = b'{"prompt": "a", "size": "16x16"}'
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        for _ in range(2):
            stack.enter_context(server.connect()).sendall(head + body)
        eventually(lambda: len(server.front.scheduler.submitted) == 2, "two requests")
        late = stack.enter_context(server.connect())
        assert everything(late).startswith(b"HTTP/1.1 503")
        assert all(making.state == "queued" for making in server.front.scheduler.submitted)


BAD = {
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello TLS\r\n\r\n",
    "nothing but noise": bytes(range(256)) * 4 + b"\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a negative length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "another encoding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a split header": b"GET / HTTP/1.1\r\nHost: a\r\n folded: yes\r\nx\x00y: 1\r\n\r\n",
    "a target with control characters": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bytes_that_are_no_http_must_get_a_400_and_nothing_else(tmp_path, data):
    with serving(tmp_path) as server, server.connect() as raw:
        raw.sendall(data)
        said = everything(raw)
        assert said.startswith(b"HTTP/1.1 400")
        assert said.count(b"HTTP/1.1") == 1
        with server.connect() as next_one:
            next_one.sendall(GET)
            assert answer(next_one).startswith(b"HTTP/1.1 200")
    assert "traceback" not in server.front.log.getvalue()
    assert server.front.scheduler.submitted == []


def test_a_body_that_turns_to_noise_must_get_a_400_and_no_image(tmp_path):
    with serving(tmp_path) as server, server.connect() as raw:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head + b'5\r\n{"pro\r\n')
        raw.sendall(b"zz\r\nnoise\r\n")
        assert everything(raw).startswith(b"HTTP/1.1 400")
    assert "traceback" not in server.front.log.getvalue()
    assert server.front.scheduler.submitted == []


def test_noise_behind_an_answer_must_not_tear_it(tmp_path, caplog):
    with serving(tmp_path) as server, server.connect() as raw:
        head = b"GET /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head)
        assert answer(raw).startswith(b"HTTP/1.1 200")
        raw.sendall(b"zz\r\n")
        assert everything(raw) == b""
    assert "Fatal error" not in caplog.text  # what asyncio says of a protocol that raised
    assert "traceback" not in server.front.log.getvalue()


@pytest.mark.parametrize("pieces", [1, 20])
def test_headers_beyond_all_bounds_must_be_refused_however_they_come(tmp_path, pieces):
    head = b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"a" * 1000) for n in range(20))
    step = len(head) // pieces + 1
    with serving(tmp_path) as server, server.connect() as raw:
        for start in range(0, len(head), step):
            with contextlib.suppress(OSError):
                raw.sendall(head[start : start + step])
                if pieces > 1:
                    threading.Event().wait(0.005)
        with contextlib.suppress(OSError):
            raw.sendall(b"\r\n")
        raw.settimeout(3)
        assert raw.recv(4096)[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 431"}
        assert server.front.scheduler.submitted == []


def test_requests_sent_in_one_go_must_be_answered_in_their_order(tmp_path):
    with serving(tmp_path) as server, server.connect() as raw:
        raw.sendall(
            GET
            + b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n"
            + GET.replace(b"a\r\n\r\n", b"a\r\nConnection: close\r\n\r\n")
        )
        said = everything(raw)
        assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]
        assert server.dropped("head_timeout") == 0

"""One client's connection: uvicorn's HTTP/1.1, with an end to everything that a client can draw out.

uvicorn has a limit for an idle connection and, nearly, one for the size of headers. What it lacks, and what is added:
a time for headers, a time for bodies that nobody reads any more, a pace at which answers must be read, a number of
connections. Sizes and numbers of headers are `serving.gate`'s, where a refusal can have the envelope of errors.
"""

import asyncio
import logging
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from zops.serving.metrics import Metrics

HEAD_TIMEOUT_S = 10.0
"""From the first byte of a request (or the opening of the connection) to the end of its headers."""
BODY_TIMEOUT_S = 35.0
"""For the whole body. Whoever reads it gives up after 30 s with an answer; this is for bodies that nobody reads."""
IDLE_TIMEOUT_S = 75.0
"""Between two requests. Longer than the 60 s of nginx and of the clouds' load balancers, so that it is never the server
that closes just when a proxy sends on."""
WRITE_WINDOW_S = 20.0
MIN_READ_BYTES_PER_S = 16 << 10
"""A client that reads an answer more slowly than this over a window, a tenth of a weak mobile link, is cut off."""
MAX_CONNECTIONS = 512
"""Half of the 1024 descriptors that a process usually may have."""
MAX_HEAD_BYTES = 16 << 10

Reason = Literal["head_timeout", "body_timeout", "slow_reader", "too_many"]
# An answer for whom there is no request yet, and nothing to gain from a parser.
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"
_LOG = logging.getLogger("zops.serving")


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines. `bounded_by` makes the class that counts into a server's metrics."""

    metrics: Metrics | None = None
    head_timeout_s = HEAD_TIMEOUT_S
    body_timeout_s = BODY_TIMEOUT_S
    write_window_s = WRITE_WINDOW_S
    max_connections = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited: Reason | None = None
        self._pace: asyncio.TimerHandle | None = None

    # --- what the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn declares it
        """Begin; where there are too many connections, the oldest idle one makes room, or this one is refused."""
        super().connection_made(transport)
        self.opened = self.loop.time()
        # Whatever is not in the kernel's hands yet counts as unread, be it a single byte.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.max_connections and not self._make_room():
            self._drop("too_many", _TOO_MANY)
            return
        self._await("head_timeout", self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._await(None)
        if self._pace:
            self._pace.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, and see what is still to come."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._look(fresh=True)

    def pause_writing(self) -> None:
        """Watch the pace of the reader from now on."""
        super().pause_writing()
        if self._pace is None:
            self._watch_pace()

    def resume_writing(self) -> None:
        """The reader has everything."""
        super().resume_writing()
        if self._pace:
            self._pace.cancel()
            self._pace = None

    # --- what uvicorn calls

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._look(fresh=False)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP; nothing when an answer is under way, for it would be torn in two."""
        self._await(None)
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            super().send_400_response(msg)
        else:
            self.transport.close()
        if not self._is_idle:
            # The request that was being read is nobody's any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    # --- deadlines

    def _look(self, *, fresh: bool) -> None:
        """Set the deadline for what the client owes: headers, a body, or nothing."""
        if self.transport.is_closing():
            self._await(None)
        elif self.conn.their_state is h11.SEND_BODY:
            self._await("body_timeout", self.body_timeout_s)
        elif self.conn.their_state is h11.IDLE and (fresh or self.conn.trailing_data[0]):
            self._await("head_timeout", self.head_timeout_s)
        else:
            self._await(None)

    def _await(self, reason: Reason | None, seconds: float = 0.0) -> None:
        """Wait for one thing; a deadline that runs for it already goes on, however often a few bytes of it come."""
        if reason == self._awaited:
            return
        if self._deadline:
            self._deadline.cancel()
        self._awaited = reason
        self._deadline = self.loop.call_later(seconds, self._too_late) if reason else None

    def _too_late(self) -> None:
        reason, self._deadline = self._awaited, None
        answerable = self.conn.our_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._drop(reason or "head_timeout", _TOO_LATE if reason == "head_timeout" and answerable else b"")

    def _watch_pace(self) -> None:
        before = self.transport.get_write_buffer_size()
        self._pace = self.loop.call_later(self.write_window_s, self._judge_pace, before)

    def _judge_pace(self, before: int) -> None:
        read = before - self.transport.get_write_buffer_size()
        if read < MIN_READ_BYTES_PER_S * self.write_window_s:
            self._drop("slow_reader")
        else:
            self._watch_pace()

    @property
    def _is_idle(self) -> bool:
        """Whether no request of this connection is being read or answered."""
        # uvicorn declares it without None, and begins with it.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _make_room(self) -> bool:
        """Drop the oldest connection that waits for nothing but its next request; tell whether there was one."""
        idle = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        idle = [other for other in idle if other._is_idle and not other.transport.is_closing()]  # noqa: SLF001 - our own class
        if not idle:
            return False
        min(idle, key=lambda other: other.opened)._drop("too_many")  # noqa: SLF001 - our own class
        return True

    def _drop(self, reason: Reason, last_words: bytes = b"") -> None:
        """Close the connection now, without waiting for whoever does not read."""
        if self.metrics:
            self.metrics.connections_dropped.labels(reason).inc()
        self._await(None)
        if last_words:
            self.transport.write(last_words)
            self.transport.close()
        else:
            self.transport.abort()


def bounded_by(metrics: Metrics, **limits: float) -> type[BoundedProtocol]:
    """Return the protocol for a server, for uvicorn's `http=`.

    Args:
        metrics: where dropped connections are counted.
        limits: class attributes of `BoundedProtocol` to set otherwise; for tests.
    """
    return type("BoundedProtocol", (BoundedProtocol,), {"metrics": metrics} | limits)


HTTP_SETTINGS: dict[str, Any] = {
    "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
    "timeout_keep_alive": int(IDLE_TIMEOUT_S),
    "ws": "none",
}
"""Settings of uvicorn that go with the protocol."""

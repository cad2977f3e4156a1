"""`Idempotency-Key`: a request that is sent again is answered again, and made once.

A client whose connection broke does not know whether its images were made. With a key of its own choosing it may send
the same request again: while the first runs it waits for the same answer, afterwards it gets that answer once more.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zops.serving.body import MAX_BODY_BYTES, read_body
from zops.serving.errors import ApiError
from zops.serving.gate import IMAGE_PATHS
from zops.serving.metrics import Metrics
from zops.serving.request import Limits

KEEP_S = 600.0
MAX_ENTRIES = 1000
MAX_BYTES = 128 << 20
REPLAYED = (b"idempotent-replayed", b"true")
_KEY = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_BOUNDARY = re.compile(rb'boundary="?([^";]{1,200})')
# Headers that belong to one answer and not to its repetition.
_OWN = frozenset({b"x-request-id", b"retry-after", b"date"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = field(repr=False)

    @property
    def final(self) -> bool:
        """Whether sending the request again cannot give another answer: images, a job, or the client's own mistake."""
        return self.status < 400 or (self.status < 500 and self.status not in {401, 408, 409, 429, 499})


@dataclass(slots=True, eq=False)
class _Entry:
    """A key that was used: by which request, and what that was answered, once it was."""

    fingerprint: bytes
    answer: "asyncio.Future[Answer | None]"
    """None when there is no answer that could be given again."""
    ended: float | None = None


class Answers:
    """The answers that may be asked for again, by client and key. Bounded in number, bytes and time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.size_bytes = 0
        self._clock = clock
        self._entries: dict[tuple[str, bytes], _Entry] = {}

    def __len__(self) -> int:
        """Return the number of keys that are remembered."""
        return len(self._entries)

    def find(self, owner: tuple[str, bytes], fingerprint: bytes) -> _Entry | None:
        """Return what is known of a key of a client.

        Raises:
            ApiError: idempotency_conflict when it was used for another request.
        """
        self._forget_old()
        entry = self._entries.get(owner)
        if entry and entry.fingerprint != fingerprint:
            raise ApiError("idempotency_conflict", "this Idempotency-Key was used for another request; take a new one")
        return entry

    def open(self, owner: tuple[str, bytes], fingerprint: bytes) -> _Entry:
        """Note that a key is in use now.

        Raises:
            ApiError: queue_full when as many keys as are remembered are all in use.
        """
        self._make_room(0)
        if len(self._entries) >= MAX_ENTRIES:
            raise ApiError("queue_full", "too many requests with an Idempotency-Key are open", retry_after_s=1)
        entry = self._entries[owner] = _Entry(fingerprint, asyncio.get_running_loop().create_future())
        return entry

    def close(self, owner: tuple[str, bytes], entry: _Entry, answer: Answer | None) -> None:
        """Tell whoever waits what was answered, and keep it if it is final."""
        entry.ended = self._clock()
        entry.answer.set_result(answer)
        # Those that ended stand in the order in which they did.
        del self._entries[owner]
        if answer and answer.final and len(answer.body) <= MAX_BYTES:
            self._make_room(len(answer.body))
            self._entries[owner] = entry
            self.size_bytes += len(answer.body)
            asyncio.get_running_loop().call_later(KEEP_S, self._forget_old)

    def _make_room(self, size: int) -> None:
        for owner, entry in list(self._entries.items()):
            if len(self._entries) < MAX_ENTRIES and self.size_bytes + size <= MAX_BYTES:
                break
            if entry.ended is not None:
                self._forget(owner)

    def _forget_old(self) -> None:
        for owner, entry in list(self._entries.items()):
            if entry.ended is not None and self._clock() - entry.ended > KEEP_S:
                self._forget(owner)

    def _forget(self, owner: tuple[str, bytes]) -> None:
        answer = self._entries.pop(owner).answer.result()
        self.size_bytes -= len(answer.body) if answer else 0


class Idempotency:
    """ASGI middleware behind the gate. Its requests run to their end even when their client goes away meanwhile.

    Args:
        app: what answers.
        metrics: where repetitions are counted.
        limits: what tells how large a body may be.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits) -> None:
        self.answers = Answers()
        self._app = app
        self._metrics = metrics
        self._max_bytes = {
            "/v1/images/generations": MAX_BODY_BYTES,
            "/v1/images/edits": MAX_BODY_BYTES + limits.max_upload_bytes,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or repeat an answer."""
        keys = [value for name, value in scope.get("headers", ()) if name == b"idempotency-key"]
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in IMAGE_PATHS or not keys:
            await self._app(scope, receive, send)
            return
        if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
            raise ApiError("invalid_idempotency_key", "Idempotency-Key must be 1 to 255 printable ASCII characters")
        owner = (scope["state"]["client"], keys[0])
        body = await read_body(Request(scope, receive), self._max_bytes[scope["path"]])
        fingerprint = fingerprint_of(scope, body)
        while entry := self.answers.find(owner, fingerprint):
            answer = await asyncio.shield(entry.answer)
            # What is not final was the other request's bad luck: this one tries for itself, and is the one to wait for.
            if answer and answer.final:
                await self._repeat(answer, send)
                return
        entry = self.answers.open(owner, fingerprint)
        run = _Run(body, receive, send)
        try:
            await self._app(scope, run.receive, run.send)
        finally:
            self.answers.close(owner, entry, run.answer)

    async def _repeat(self, answer: Answer, send: Send) -> None:
        self._metrics.replays.inc()
        headers = [header for header in answer.headers if header[0].lower() not in _OWN]
        await send({"type": "http.response.start", "status": answer.status, "headers": [*headers, REPLAYED]})
        await send({"type": "http.response.body", "body": answer.body})


class _Run:
    """One request whose body was read already and whose answer is kept, unless it is a stream."""

    def __init__(self, body: bytes, receive: Receive, send: Send) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._send = send
        self._started: Message | None = None
        self._parts: list[bytes] = []
        self._ended = False
        self._streams = asyncio.Event()

    @property
    def answer(self) -> Answer | None:
        """The whole answer; None for a stream and for an answer that broke off."""
        if self._started is None or not self._ended or self._streams.is_set():
            return None
        return Answer(self._started["status"], tuple(self._started.get("headers", ())), b"".join(self._parts))

    async def receive(self) -> Message:
        """Give the body, and then the client's leaving only where the answer is a stream: nobody can repeat one."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._streams.wait()
        return await self._receive()

    async def send(self, message: Message) -> None:
        """Pass the answer on and keep it."""
        if message["type"] == "http.response.start":
            self._started = message
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            if any(kind.startswith(b"text/event-stream") for kind in kinds):
                self._streams.set()
        elif message["type"] == "http.response.body" and not self._streams.is_set():
            self._parts.append(message.get("body", b""))
            self._ended = not message.get("more_body", False)
        await self._send(message)


def fingerprint_of(scope: Scope, body: bytes) -> bytes:
    """Return what is equal only for the same request: a hash of its path, media type and body.

    Clients draw a new boundary for each form they send, so a boundary is no difference.
    """
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    boundary = _BOUNDARY.search(kind)
    if boundary:
        kind, body = kind.replace(boundary[1], b""), body.replace(boundary[1], b"")
    digest = hashlib.sha256()
    for part in (scope["path"].encode(), kind, body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()

"""Clients of the soak: each does one thing after the other, good or bad, and judges what it is answered."""

import base64
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.serving.recipes import GENERATIONS, MOST_PICTURES, Golden, Recipe, pixels_of
from benchmarks.serving.refusals import MALFORMED, TOO_BIG, Refusal
from tests.support.serving import ENDLESS, Answer

PATIENCE_S = 180.0
"""A client that is not answered for so long was lost."""
LEFT = 0
"""In place of a status: the client went away of its own will."""
BUSY = {(429, "queue_full"), (503, "not_ready"), (503, "worker_lost")}
"""What a good request may be answered instead of images while workers are killed and the queue is short."""
TOO_LATE_S = 15.0
"""Within it the server ends a connection on which nothing comes (documented: 10 s)."""


class BrokenPromiseError(Exception):
    """Raised by a client that was not answered as the documentation says."""


@dataclass(frozen=True)
class Ending:
    """How one call ended; `status` is LEFT when the client went away."""

    kind: str
    began: float
    ended: float
    status: int
    code: str = ""
    fault: str = ""
    pictures: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(frozen=True)
class Keys:
    """The API keys of the soak."""

    good: tuple[str, ...]
    limited: str
    """A key that may send 30 requests a minute."""
    narrow: str
    """A key that may have one request open."""


@dataclass
class Client:
    """One client on a thread of its own."""

    port: int
    golden: Golden
    keys: Keys
    dice: random.Random
    stop: threading.Event
    endings: list[Ending] = field(default_factory=list)
    _line: http.client.HTTPConnection | None = None
    _began: float = 0.0

    def run(self) -> None:
        """Do one thing after the other until the load ends."""
        weights = [weight for _, weight in KINDS.values()]
        while not self.stop.is_set():
            [(kind, (act, _))] = self.dice.choices(list(KINDS.items()), weights)
            ending = self._play(kind, act)
            self.endings.append(ending)
            if ending.status in {429, 503}:
                self.stop.wait(self.dice.uniform(0.2, 1.5))
        self._hang_up()

    def _play(self, kind: str, act: "Act") -> Ending:
        self._began = began = time.monotonic()
        try:
            status, code, pictures = act(self)
        except BrokenPromiseError as error:
            self._hang_up()
            return Ending(kind, self._began, time.monotonic(), -1, fault=str(error))
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self._hang_up()
            seconds = time.monotonic() - began
            return Ending(kind, self._began, time.monotonic(), -1, fault=f"{type(error).__name__}: {error} after {seconds:.1f} s")
        return Ending(kind, self._began, time.monotonic(), status, code, pictures=pictures)

    # --- the means

    @property
    def key(self) -> str:
        """One of the good keys."""
        return self.dice.choice(self.keys.good)

    @property
    def recipe(self) -> Recipe:
        """Anything that can be asked for."""
        return self.dice.choice(self.golden.recipes)

    @property
    def count(self) -> int:
        """How many pictures to ask for: mostly one."""
        return self.dice.choice((1, 1, 1, 2, MOST_PICTURES))

    def call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, *, key: str = "") -> Answer:
        """Send a request over the client's own connection, which is kept, and read the whole answer."""
        if self._line is None:
            self._line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        self._line.request(method, path, body, {"Authorization": f"Bearer {key or self.key}"} | (headers or {}))
        answer = self._line.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        if answer.will_close or self.dice.random() < 0.1:
            self._hang_up()
        return found

    def ask(self, recipe: Recipe, count: int, headers: dict[str, str] | None = None, *, key: str = "", **more: object) -> Answer:
        """Ask for pictures of a recipe."""
        path, body, kind = recipe.request(count, **more)
        return self.call("POST", path, body, kind | (headers or {}), key=key)

    def open(self, *, receive_bytes: int | None = None) -> socket.socket:
        """Return a connection to do unusual things with."""
        raw = socket.socket()
        if receive_bytes:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.settimeout(PATIENCE_S)
        raw.connect(("127.0.0.1", self.port))
        return raw

    def raw_request(self, recipe: Recipe, count: int, **more: object) -> bytes:
        """Return the bytes of a request."""
        path, body, kind = recipe.request(count, **more)
        return self.head(path, len(body), kind["Content-Type"]) + body

    def head(self, path: str, length: int, kind: str = "application/json") -> bytes:
        """Return the bytes of a request's headers."""
        lines = (f"POST {path} HTTP/1.1", "Host: soak", f"Authorization: Bearer {self.key}",
                 f"Content-Type: {kind}", f"Content-Length: {length}", "", "")  # fmt: skip
        return "\r\n".join(lines).encode()

    def pause(self, least_s: float, most_s: float) -> None:
        """Let time pass."""
        time.sleep(self.dice.uniform(least_s, most_s))

    def _hang_up(self) -> None:
        if self._line:
            self._line.close()
            self._line = None

    # --- judging

    def settle(self, answer: Answer, recipe: Recipe, count: int, *, busy: set[tuple[int, str]] = BUSY) -> tuple[int, str, int]:
        """Judge the answer to a good request: right pictures, or a refusal that may be."""
        if answer.status == 200:
            self.compare(recipe, count, [(i, image) for i, image in enumerate(answer.images)])
            return 200, "", count
        return self.refused(answer, busy)

    def refused(self, answer: Answer, allowed: set[tuple[int, str]]) -> tuple[int, str, int]:
        """Judge a refusal."""
        found = answer.status, answer.code
        if found not in allowed:
            raise BrokenPromiseError(f"answered {found}, not one of {sorted(allowed)}: {answer.body[:200]!r}")
        if answer.json["error"]["request_id"] != answer.headers.get("x-request-id"):
            raise BrokenPromiseError(f"{found} without its request id")
        if found[0] in {429, 503} and not int(answer.headers.get("retry-after", 0)) >= 1:
            raise BrokenPromiseError(f"{found} without Retry-After")
        return *found, 0

    def compare(self, recipe: Recipe, count: int, images: list[tuple[int, bytes]]) -> None:
        """Compare pictures, each with its index, with the right ones."""
        if sorted(index for index, _ in images) != list(range(count)):
            raise BrokenPromiseError(f"{count} pictures were asked for, these came: {[index for index, _ in images]}")
        for index, image in images:
            if fault := self.golden.fault(recipe, index, image):
                raise BrokenPromiseError(fault)


Act = Callable[[Client], tuple[int, str, int]]
"""Does one thing; returns the status that ended it, the code of a refusal, and how many pictures were right."""


def good(client: Client) -> tuple[int, str, int]:
    recipe, count = client.recipe, client.count
    return client.settle(client.ask(recipe, count), recipe, count)


def formats(client: Client) -> tuple[int, str, int]:
    recipe = client.recipe
    answer = client.ask(recipe, 1, output_format=client.dice.choice(("jpeg", "webp")))
    if answer.status != 200:
        return client.refused(answer, BUSY)
    if (found := pixels_of(answer.images[0]).shape) != (recipe.height, recipe.width, 3):
        raise BrokenPromiseError(f"the picture is {found}")
    return 200, "", 1


def streams(client: Client) -> tuple[int, str, int]:
    recipe, count = client.recipe, client.count
    answer = client.ask(recipe, count, stream=True, partial_images=2)
    if answer.status != 200:
        return client.refused(answer, BUSY)
    events = [json.loads(part.split(b"data: ", 1)[1]) for part in answer.body.split(b"\n\n") if b"data: " in part]
    if not events:
        raise BrokenPromiseError("a stream without an event")
    if error := events[-1].get("error"):
        # The status went out before the worker was lost.
        if (503, error["code"]) not in BUSY:
            raise BrokenPromiseError(f"a stream ended with {error}")
        return 503, error["code"], 0
    done = [event for event in events if event["type"].endswith(".completed")]
    client.compare(recipe, count, [(event["image_index"], base64.b64decode(event["b64_json"])) for event in done])
    for event in events:
        pixels_of(base64.b64decode(event["b64_json"]))
    return 200, "", count


def urls(client: Client) -> tuple[int, str, int]:
    recipe, count, key = client.recipe, client.count, client.key
    answer = client.ask(recipe, count, key=key, response_format="url")
    if answer.status != 200:
        return client.refused(answer, BUSY)
    images = []
    for index, item in enumerate(answer.json["data"]):
        path = "/v1" + item["url"].partition("/v1")[2]
        image = client.call("GET", path, key=key)
        if image.status == 404 and image.code == "result_expired":
            return 404, image.code, 0
        images.append((index, image.body))
    client.compare(recipe, count, images)
    return 200, "", count


def jobs(client: Client) -> tuple[int, str, int]:
    recipe, count, key = client.recipe, client.count, client.key
    accepted = client.ask(recipe, count, {"Prefer": "respond-async"}, key=key)
    if accepted.status != 202:
        return client.refused(accepted, BUSY)
    path = accepted.headers["location"]
    if client.dice.random() < 0.2:
        job = client.call("POST", f"{path}/cancel", key=key).json
        expected = {"cancelled", "succeeded", "failed"}
    else:
        expected = {"succeeded", "failed"}
        job = {"status": "queued"}
        while job["status"] in {"queued", "running"}:
            if time.monotonic() > client._began + PATIENCE_S:  # noqa: SLF001 - the functions of this module are the client's
                raise BrokenPromiseError(f"the job does not end: {job}")
            job = client.call("GET", f"{path}?wait=10", key=key).json
    client.call("DELETE", path, key=key)
    if job["status"] not in expected:
        raise BrokenPromiseError(f"the job ended as {job}")
    if job["status"] == "failed":
        if (503, job["error"]["code"]) not in BUSY:
            raise BrokenPromiseError(f"the job failed: {job['error']}")
        return 503, job["error"]["code"], 0
    if job["status"] == "succeeded":
        items = enumerate(job["result"]["data"])
        client.compare(recipe, count, [(index, base64.b64decode(item["b64_json"])) for index, item in items])
        return 200, "", count
    return 409, "cancelled", 0


def repeats(client: Client) -> tuple[int, str, int]:
    """Send the same twice, the first time sometimes without waiting for the answer."""
    recipe, key = client.recipe, client.key
    headers = {"Idempotency-Key": f"soak-{client.dice.getrandbits(64)}"}
    path, body, kind = recipe.request(1)
    sent = {"Authorization": f"Bearer {key}", "Content-Length": str(len(body))} | kind | headers
    first = None
    if client.dice.random() < 0.5:
        with client.open() as raw:
            lines = [f"POST {path} HTTP/1.1", "Host: soak", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
            raw.sendall("\r\n".join(lines).encode() + body)
            client.pause(0, 0.2)
    else:
        first = client.call("POST", path, body, kind | headers, key=key)
    again = client.call("POST", path, body, kind | headers, key=key)
    if first and first.status == 200 and (again.body != first.body or again.headers.get("idempotent-replayed") != "true"):
        raise BrokenPromiseError("the second answer is not the first one")
    return client.settle(again, recipe, 1)


def limited(client: Client) -> tuple[int, str, int]:
    recipe = client.recipe
    answer = client.ask(recipe, 1, key=client.keys.limited)
    return client.settle(answer, recipe, 1, busy=BUSY | {(429, "rate_limit_exceeded")})


def narrow(client: Client) -> tuple[int, str, int]:
    recipe = client.recipe
    return client.settle(client.ask(recipe, 1, key=client.keys.narrow), recipe, 1)


def too_big(client: Client) -> tuple[int, str, int]:
    return _refuse(client, client.dice.choice(TOO_BIG))


def malformed(client: Client) -> tuple[int, str, int]:
    return _refuse(client, client.dice.choice(MALFORMED))


def _refuse(client: Client, refusal: Refusal) -> tuple[int, str, int]:
    answer = client.call(refusal.method, refusal.path, refusal.body, dict(refusal.headers))
    return client.refused(answer, {(refusal.status, refusal.code)})


def wrong_keys(client: Client) -> tuple[int, str, int]:
    wrong, code = client.dice.choice((("Bearer zops_wrong", "invalid_api_key"), ("Basic YTpi", "missing_api_key")))
    path, body, kind = client.recipe.request(1)
    answer = client.call("POST", path, body, kind | {"Authorization": wrong})
    return client.refused(answer, {(401, code)})


def looks(client: Client) -> tuple[int, str, int]:
    path = client.dice.choice(("/v1/models", "/v1/zops/info", "/metrics", "/livez", "/openapi.json", "/"))
    answer = client.call("GET", path)
    if answer.status != 200:
        raise BrokenPromiseError(f"{path} answered {answer.status}")
    return 200, "", 0


def slow_readers(client: Client) -> tuple[int, str, int]:
    """Read an answer in small pieces with pauses, steadily enough for the server's patience."""
    recipe, count = client.recipe, MOST_PICTURES
    with client.open(receive_bytes=4096) as raw:
        raw.sendall(client.raw_request(recipe, count))
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        body = b""
        while part := answer.read(8192):
            body += part
            time.sleep(0.05)
        return client.settle(Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, body), recipe, count)


def slow_senders(client: Client) -> tuple[int, str, int]:
    """Send a request in pieces with pauses."""
    recipe = client.recipe
    data = client.raw_request(recipe, 1)
    with client.open() as raw:
        step = max(1, len(data) // 8)
        for start in range(0, len(data), step):
            raw.sendall(data[start : start + step])
            client.pause(0, 0.2)
        return client.settle(_read(raw), recipe, 1)


def stuck_senders(client: Client) -> tuple[int, str, int]:
    """Send headers and no body: the server must give up within its 30 s."""
    with client.open() as raw:
        raw.sendall(client.head(GENERATIONS, 1000) + b"{")
        return client.refused(_read(raw), {(408, "body_too_slow")})


def silent(client: Client) -> tuple[int, str, int]:
    """Open a connection, perhaps send half a line, and wait to be thrown out."""
    with client.open() as raw:
        started = client.dice.random() < 0.5
        if started:
            raw.sendall(b"POST /v1/images/gen")
        began, said = time.monotonic(), b""
        while part := raw.recv(4096):
            said += part
        if time.monotonic() - began > TOO_LATE_S:
            raise BrokenPromiseError("a connection that says nothing is kept")
        if started != said.startswith(b"HTTP/1.1 408"):
            raise BrokenPromiseError(f"half a line was answered {said[:60]!r}")
    return (408, "", 0) if started else (LEFT, "", 0)


def leaves_before(client: Client) -> tuple[int, str, int]:
    """Go away before the request is whole."""
    data = client.raw_request(client.recipe, 1)
    with client.open() as raw:
        raw.sendall(data[: client.dice.randrange(len(data))])
        client.pause(0, 0.1)
        _slam(client, raw)
    return LEFT, "", 0


def leaves_amid(client: Client) -> tuple[int, str, int]:
    """Go away while the picture is made, some of them long ones."""
    body = json.dumps(ENDLESS).encode()
    data = client.head(GENERATIONS, len(body)) + body
    if client.dice.random() < 0.7:
        data = client.raw_request(client.recipe, client.count, stream=client.dice.random() < 0.5)
    with client.open() as raw:
        raw.sendall(data)
        client.pause(0, 1.0)
        _slam(client, raw)
    return LEFT, "", 0


def leaves_after(client: Client) -> tuple[int, str, int]:
    """Go away after the first bytes of the answer."""
    with client.open(receive_bytes=4096) as raw:
        raw.sendall(client.raw_request(client.recipe, MOST_PICTURES))
        raw.recv(100)
        _slam(client, raw)
    return LEFT, "", 0


def half_open(client: Client) -> tuple[int, str, int]:
    """Close our half after the request, and leave without a close the server could take for an answer's end."""
    with client.open() as raw:
        raw.sendall(client.raw_request(client.recipe, 1))
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(TOO_LATE_S)
        while raw.recv(4096):
            pass
    return LEFT, "", 0


def _slam(client: Client, raw: socket.socket) -> None:
    """Close a connection, half the time by a reset."""
    if client.dice.random() < 0.5:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def _read(raw: socket.socket) -> Answer:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


KINDS: dict[str, tuple[Act, float]] = {
    "good": (good, 30), "formats": (formats, 4), "stream": (streams, 8), "url": (urls, 4), "job": (jobs, 6),
    "repeat": (repeats, 5), "limited key": (limited, 3), "narrow key": (narrow, 3), "too big": (too_big, 8),
    "malformed": (malformed, 8), "wrong key": (wrong_keys, 3), "look": (looks, 4), "slow reader": (slow_readers, 4),
    "slow sender": (slow_senders, 4), "stuck sender": (stuck_senders, 0.3), "silent": (silent, 0.7),
    "leaves before": (leaves_before, 3), "leaves amid": (leaves_amid, 6), "leaves after": (leaves_after, 3),
    "half open": (half_open, 2),
}  # fmt: skip
"""What a client does, and how often, relative to the rest. Edits are recipes: good requests as all others."""

"""One client of the soak: what it has to ask with, and how it judges what it is answered."""

import http.client
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.serving.recipes import MOST_PICTURES, Golden, Recipe
from tests.support.serving import Answer

PATIENCE_S = 180.0
"""A client that is not answered for so long was lost."""
LEFT = 0
"""In place of a status: the client went away of its own will."""
Outcome = tuple[int, str, int]
"""The status that ended a call, the code of a refusal, and how many pictures came and were right."""
BUSY = {(429, "queue_full"), (503, "not_ready"), (503, "worker_lost")}
"""What a good request may be answered instead of images while workers are killed and the queue is short."""


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
    """One client on a thread of its own; `acts` are what it does, and how often, relative to each other."""

    port: int
    golden: Golden
    keys: Keys
    dice: random.Random
    stop: threading.Event
    acts: "Mapping[str, tuple[Act, float]]"
    endings: list[Ending] = field(default_factory=list)
    began: float = 0.0
    """When the present call did."""
    _line: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Do one thing after the other until the load ends."""
        weights = [weight for _, weight in self.acts.values()]
        while not self.stop.is_set():
            [(kind, (act, _))] = self.dice.choices(list(self.acts.items()), weights)
            ending = self._play(kind, act)
            self.endings.append(ending)
            if ending.status in {429, 503}:
                self.stop.wait(self.dice.uniform(0.2, 1.5))
        self._hang_up()

    def _play(self, kind: str, act: "Act") -> Ending:
        self.began = time.monotonic()
        try:
            status, code, pictures = act(self)
        except BrokenPromiseError as error:
            fault = str(error)
        except Exception as error:  # noqa: BLE001 - no answer, or one that cannot be read: the server's fault or ours
            fault = f"{type(error).__name__}: {error}"
        else:
            return Ending(kind, self.began, time.monotonic(), status, code, pictures=pictures)
        self._hang_up()
        return Ending(kind, self.began, time.monotonic(), -1, fault=fault)

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

    def call(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, *, key: str = ""
    ) -> Answer:
        """Send a request over the client's own connection, which is kept, and read the whole answer."""
        if self._line is None:
            self._line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        self._line.request(method, path, body, {"Authorization": f"Bearer {key or self.key}"} | (headers or {}))
        answer = self._line.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        if answer.will_close or self.dice.random() < 0.1:
            self._hang_up()
        return found

    def ask(
        self, recipe: Recipe, count: int, headers: dict[str, str] | None = None, *, key: str = "", **more: object
    ) -> Answer:
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

    def settle(self, answer: Answer, recipe: Recipe, count: int, *, busy: set[tuple[int, str]] = BUSY) -> Outcome:
        """Judge the answer to a good request: right pictures, or a refusal that may be."""
        if answer.status == 200:
            self.compare(recipe, count, [(i, image) for i, image in enumerate(answer.images)])
            return 200, "", count
        return self.refused(answer, busy)

    def refused(self, answer: Answer, allowed: set[tuple[int, str]]) -> Outcome:
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


Act = Callable[[Client], Outcome]
"""Does one thing."""

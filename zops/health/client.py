"""HTTP client of a running instance: alive, ready, what it serves, and images.

An instance that wants an API key gets the one in the environment variable ZOPS_API_KEY: never an argument, which every
user of the host could read, and never a file of ours, for secrets have better places.

Whatever goes wrong on the way becomes a `ZopsError` that names the address and the command to go on with. Every answer
is bounded in time and in bytes: the other side may hang, drip, or not be zops at all.
"""

import base64
import binascii
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import urllib3

from zops.errors import NotReady, RuntimeUnreachable, UsageError, ZopsError

# Ten images of 2048 x 2048 as PNG in base64 are below 200 MB.
MAX_ANSWER_BYTES = 512 << 20
# How much of a stranger's answer is repeated to the operator.
MAX_QUOTE = 200
CONNECT_TIMEOUT_S = 3.0
KEY_VARIABLE = "ZOPS_API_KEY"
KEY_CODES = frozenset({"api-key-missing", "api-key-refused"})
"""Codes of errors that say something of the caller and nothing of the instance."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """What /readyz says: `phase` and `reason` tell where the start stands, `facts` is the whole body."""

    ready: bool
    phase: str
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One image: its encoded bytes and the receipt of how it was made."""

    data: bytes
    receipt: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GeneratedImages:
    """The answer to one request; `seconds` is what the whole request took as the client saw it."""

    images: tuple[GeneratedImage, ...]
    seconds: float


class Ask(Protocol):
    """Puts a question to an instance by another way than its address: `Runtime.ask` with a name bound to it."""

    def __call__(
        self, method: str, path: str, body: bytes | None = None, *, timeout_s: float, key: str = ""
    ) -> tuple[int, bytes]:
        """Return status and body of the answer; raise `RuntimeUnreachable` where there is none in time."""
        ...


class Client:
    """Talks to one instance.

    Args:
        url: address of the instance, for example http://127.0.0.1:8000.
        timeout_s: seconds that one request may take from its first byte to its last.
        key: API key; the one in `ZOPS_API_KEY` by default, none when that is empty.
        ask: the way to the instance, where its address is not reached from here; the address only names it then.
    """

    def __init__(self, url: str, timeout_s: float = 120.0, *, key: str | None = None, ask: Ask | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"{url!r} is no address of an instance", hint="for example --url http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._key = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            hint = f"put the very key that zops key new printed into {KEY_VARIABLE}"
            raise UsageError(f"what {KEY_VARIABLE} holds is no API key", code="api-key-refused", hint=hint)
        self._way = ask
        self._pool = urllib3.PoolManager(retries=False, maxsize=1)

    def live(self) -> bool:
        """Tell whether the HTTP process answers and says that it lives.

        Raises:
            RuntimeUnreachable: when nothing answers in time.
        """
        status, _ = self._ask("GET", "/livez")
        return status == 200

    def ready(self) -> Readiness:
        """Return how far the instance is.

        Raises:
            RuntimeUnreachable: when nothing answers in time.
            ZopsError: when what answers is not zops.
        """
        status, raw = self._ask("GET", "/readyz")
        if status not in {200, 503}:
            raise self._refusal(status, raw)
        body = self._json(status, raw)
        return Readiness(
            ready=status == 200,
            phase=str(body.get("phase") or ("ready" if status == 200 else "unready")),
            reason=str(body.get("reason") or ""),
            facts=body,
        )

    def info(self) -> Mapping[str, Any]:
        """Return what the instance serves and on what, as documented in docs/reference/http-api.md.

        Raises:
            RuntimeUnreachable: when nothing answers in time.
            ZopsError: when the instance refuses or what answers is not zops.
        """
        status, raw = self._ask("GET", "/v1/zops/info")
        if status != 200:
            raise self._refusal(status, raw)
        return self._json(status, raw)

    def generate(
        self,
        prompt: str,
        *,
        size: str | None = None,
        seed: int | None = None,
        n: int = 1,
        forwards: int | None = None,
        output_format: str = "png",
    ) -> GeneratedImages:
        """Make images. What is None is left to the server.

        Args:
            prompt: what to show.
            size: WIDTHxHEIGHT in pixels.
            seed: seed of the first image.
            n: number of images.
            forwards: passes of the transformer an image.
            output_format: png, jpeg or webp.

        Raises:
            UsageError: when the server finds the request impossible; the message is the server's.
            NotReady: when the instance is not ready yet, naming its phase.
            RuntimeUnreachable: when nothing answers in time.
            ZopsError: when generation failed or the answer makes no sense.
        """
        request = {
            "prompt": prompt,
            "size": size,
            "seed": seed,
            "n": n,
            "num_inference_steps": forwards,
            "output_format": output_format,
            "response_format": "b64_json",
        }
        began = time.monotonic()
        body = json.dumps({key: value for key, value in request.items() if value is not None}).encode()
        status, raw = self._ask("POST", "/v1/images/generations", body)
        if status != 200:
            raise self._refusal(status, raw)
        images = self._images(self._json(status, raw))
        if len(images) != n:
            raise self._stranger(f"{len(images)} images came for {n} asked")
        return GeneratedImages(images, time.monotonic() - began)

    def _images(self, body: Mapping[str, Any]) -> tuple[GeneratedImage, ...]:
        try:
            return tuple(
                GeneratedImage(base64.b64decode(item["b64_json"], validate=True), item.get("receipt") or {})
                for item in body["data"]
            )
        except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
            raise self._stranger("its answer holds no images") from None

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send one request and read the whole answer within the time and size that are allowed."""
        if self._way:
            return self._way(method, path, body, timeout_s=self.timeout_s, key=self._key)
        deadline = time.monotonic() + self.timeout_s
        timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, self.timeout_s), read=self.timeout_s)
        headers = {"Accept": "application/json", "User-Agent": "zops"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=body,
                headers=headers,
                timeout=timeout,
                preload_content=False,
                redirect=False,
            )
            try:
                return response.status, self._read(response, deadline)
            finally:
                response.close()
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        # read1 returns after each arrival, so that a server that drips cannot stretch the time for ever.
        parts, size = [], 0
        while part := response.read1(1 << 20):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise self._stranger(f"its answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise self._timeout()
        return b"".join(parts)

    def _json(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise self._stranger(f"HTTP {status} without a JSON object")
        return body

    def _refusal(self, status: int, raw: bytes) -> ZopsError:
        """Turn an HTTP error, usually with the envelope of the Images API, into an error for people."""
        try:
            body = json.loads(raw)
            envelope = body.get("error") if isinstance(body, dict) else None
        except (ValueError, RecursionError):
            body, envelope = {}, None
        if not isinstance(envelope, dict):
            envelope = {}
        said = str(envelope.get("message") or "").rstrip(".")[:MAX_QUOTE]
        facts: dict[str, Any] = {"status": status, "param": envelope.get("param"), "server_code": envelope.get("code")}
        if status == 503:
            phase = str(body.get("phase") or envelope.get("phase") or "") if isinstance(body, dict) else ""
            text = said or (f"it is in phase {phase}" if phase else "it does not say why")
            hint = "wait for it with: zops health --wait; watch it with: zops logs"
            return NotReady(f"the instance at {self.url} is not ready: {text}", hint=hint, phase=phase, **facts)
        if status == 401:
            return self._unauthorized(said, facts)
        if envelope.get("type") == "invalid_request_error" or status in {400, 413, 422}:
            return UsageError(said or f"the instance refused the request with HTTP {status}", code="refused", **facts)
        if status == 429:
            hint = "try again later, or raise serve.max_queue"
            if envelope.get("code") == "rate_limit_exceeded":
                hint = "try again later, or give the key a higher limit in the file of serve.api_keys"
            return ZopsError(f"the instance at {self.url} is busy: {said}", code="instance-busy", hint=hint, **facts)
        text = said or "no reason given"
        return ZopsError(
            f"the instance at {self.url} answered HTTP {status}: {text}",
            code="instance-failed",
            hint="see why with: zops logs",
            **facts,
        )

    def _unauthorized(self, said: str, facts: Mapping[str, Any]) -> UsageError:
        hint = f"put a key into the environment variable {KEY_VARIABLE}; make one with: zops key new NAME --file FILE"
        if self._key:
            return UsageError(
                f"the instance at {self.url} refuses the API key in {KEY_VARIABLE}: {said or 'no reason given'}",
                code="api-key-refused",
                hint=hint,
                **facts,
            )
        return UsageError(f"the instance at {self.url} wants an API key", code="api-key-missing", hint=hint, **facts)

    def _stranger(self, text: str) -> ZopsError:
        hint = "check --url; see who listens with: zops doctor --only port"
        return ZopsError(f"what answers at {self.url} is not zops: {text}", code="instance-stranger", hint=hint)

    def _timeout(self) -> RuntimeUnreachable:
        return RuntimeUnreachable(
            f"the instance at {self.url} did not answer within {self.timeout_s:g} s",
            code="instance-timeout",
            hint="see what it does with: zops health; zops logs",
        )

    def _unreachable(self, error: urllib3.exceptions.HTTPError) -> RuntimeUnreachable:
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            return self._timeout()
        if isinstance(error, urllib3.exceptions.NewConnectionError):
            why = "connection refused" if "refused" in str(error) else "no connection"
        elif isinstance(error, urllib3.exceptions.ConnectTimeoutError):
            why = "no connection in time"
        else:
            why = "the connection broke"
        return RuntimeUnreachable(
            f"nothing answers at {self.url}: {why}",
            code="instance-unreachable",
            hint="start it with: zops up; if it runs, see why with: zops logs",
        )

"""The gate in front of the API: headers within bounds, an API key where one is wanted, and what it may ask for."""

from collections.abc import Iterable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zops.serving.body import discard_body
from zops.serving.errors import ApiError
from zops.serving.keys import KeyRing
from zops.serving.metrics import Metrics
from zops.serving.rates import Allowance, Rates

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10
"""Of the path, the query and all headers together."""
IMAGE_PATHS = frozenset({"/v1/images/generations", "/v1/images/edits"})
"""POST to these costs a worker's time: they are what rates limit, and what clients are counted by."""
# Beneath /v1/ and still for everybody: they tell no more than the probes do.
OPEN_PATHS = frozenset({"/v1/health/live", "/v1/health/ready", "/v1/zops/info"})


def is_guarded(path: str) -> bool:
    """Tell whether a path wants an API key: all of /v1/ does, but not probes, metrics, the page and OpenAPI."""
    return path.startswith("/v1/") and path not in OPEN_PATHS


class Gate:
    """ASGI middleware that lets requests in and gives them their client's `Allowance`.

    Behind it `request.state.allowance` is there, `request.state.client` is the name of the API key ("" without a file
    of keys), and for image paths `request.state.place` is one of the client's places, which a job may keep.

    Args:
        app: what is behind the gate.
        keys: the keys that are good; None lets everybody in.
        metrics: where refusals are counted.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._rates = Rates()
        self._names: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, or answer why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        makes_images = scope["method"] == "POST" and scope["path"] in IMAGE_PATHS
        allowance, inside = None, False
        try:
            check_head(scope)
            allowance = reply.allowance = self._admit(scope)
            if not makes_images:
                await self._app(scope, receive, reply.send)
                return
            allowance.take_request()
            with allowance.take_place() as place:
                scope["state"]["place"] = place
                inside = True
                await self._app(scope, receive, reply.send)
        except ApiError as error:
            if reply.status:
                raise
            if makes_images:
                self._metrics.requests.labels(str(error.status)).inc()
                self._metrics.refused.labels(error.code).inc()
            if not inside and not any(name == b"expect" for name, _ in scope["headers"]):
                await discard_body(receive)  # but who waits for "100 Continue" sends nothing yet
            await _answer(error, scope, receive, reply.send)
        finally:
            if makes_images and allowance and allowance.client:
                self._metrics.client_requests.labels(allowance.client, str(reply.status or 499)).inc()

    def _admit(self, scope: Scope) -> Allowance:
        state = scope.setdefault("state", {})
        allowance = Allowance()
        if self._keys and is_guarded(scope["path"]):
            client = self._keys.identify(value for name, value in scope["headers"] if name == b"authorization")
            allowance = self._rates.allowance(client)
        self._tell()
        state["client"], state["allowance"] = allowance.client, allowance
        return allowance

    def _tell(self) -> None:
        """Publish the state of the keys, and forget those that are gone."""
        if self._keys is None:
            return
        self._metrics.api_keys_stale.set(int(bool(self._keys.fault)))
        names = self._keys.names
        if names is not self._names:
            self._metrics.api_keys.set(len(names))
            self._rates.forget_all_but(names)
            for gone in self._names - names:
                self._metrics.client_requests.remove_by_labels({"client": gone})
            self._names = names


def check_head(scope: Scope) -> None:
    """Refuse headers beyond all bounds; h11 bounds only those that come in pieces.

    Raises:
        ApiError: headers_too_large.
    """
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    count = len(scope["headers"])
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in headers)
    if count > MAX_HEADERS or size > MAX_HEADER_BYTES:
        limit = f"the limits are {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes"
        raise ApiError("headers_too_large", f"the request has {count} headers and {size} bytes of them; {limit}")


class _Reply:
    """Sends an answer on, with what the client has left in its headers, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self.allowance: Allowance | None = None
        self._send = send

    async def send(self, message: Message) -> None:
        """Send one message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.allowance and (left := self.allowance.headers()):
                more = [(name.encode(), value.encode()) for name, value in left.items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = error.headers()
    if error.status == 401:
        wrong = ', error="invalid_token"' if error.code == "invalid_api_key" else ""
        headers["WWW-Authenticate"] = f'Bearer realm="zops"{wrong}'
    request_id = scope.get("state", {}).get("request_id")
    await JSONResponse(error.body(request_id), error.status, headers)(scope, receive, send)

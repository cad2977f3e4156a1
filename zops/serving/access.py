"""A request id on every answer, and one log line for every request; no header's value, and no prompt unless asked."""

import json
import logging
import re
import sys
import time
import uuid
from typing import IO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Probes come every few seconds; one is logged only when its answer is another than the last, or a bad first one.
QUIET_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/health", "/v1/health/live", "/v1/health/ready", "/metrics"})
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Whoever knows the name of a result can fetch it where no keys are asked for, so the log has no more than its start.
_RESULT = re.compile(r"^(/v1/(?:images|jobs)/[a-z]+_[\w-]{8})[\w-]+")


class AccessLog:
    """ASGI middleware, the outermost: gives each request its id and logs how it was answered."""

    def __init__(self, app: ASGIApp, log: logging.Logger) -> None:
        self._app = app
        self._log = log
        self._probed: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._write(scope, request_id, status, time.monotonic() - began)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        if scope["path"] in QUIET_PATHS:
            last, self._probed[scope["path"]] = self._probed.get(scope["path"], 200), status
            if status == last:
                return
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            # Hostile text: as JSON it stays on one line and in ASCII.
            "path": _RESULT.sub(r"\1...", scope["path"])[:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        # Left there by whoever knows it: the name of the API key, the seconds by phase, the prompt where it is wanted.
        state = scope["state"]
        fields |= {name: state[name] for name in ("client", "phases", "prompt") if state.get(name)}
        self._log.info("request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    """Take the client's X-Request-ID when it is harmless, else make one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode())
    return f"req_{uuid.uuid4().hex}"


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record with its fields and, for a bug, its traceback."""
        body: dict[str, object] = {"time": _utc(record.created), "level": record.levelname.lower()}
        body |= {"message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body)


class _Plain(logging.Formatter):
    """One line for people, `name=value` behind the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record with its fields and, for a bug, its traceback."""
        fields = " ".join(f"{name}={json.dumps(value)}" for name, value in getattr(record, "fields", {}).items())
        text = f"{_utc(record.created)} {record.levelname.lower()} {record.getMessage()} {fields}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03d}Z"


def set_up_log(*, as_json: bool, stream: IO[str] | None = None) -> logging.Logger:
    """Send the server's log, and uvicorn's own, to stderr; return the logger of requests."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _Plain())
    for name, level in (("zops.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    return logging.getLogger("zops.serving")

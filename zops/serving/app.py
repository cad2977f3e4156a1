"""The HTTP API: OpenAI's Images API with our extensions, the probes, and the metrics.

The contract is docs/reference/http-api.md. Nothing here touches the pipeline; requests go to the scheduler.
"""

import asyncio
import base64
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from zops import __version__
from zops.serving.errors import ERROR_CODES, ApiError
from zops.serving.messages import PHASES
from zops.serving.metrics import Metrics
from zops.serving.receipt import Receipt, encode
from zops.serving.request import MAX_BODY_BYTES, GenerationBody, ImageRequest, Limits, parse
from zops.serving.scheduler import Outcome, Scheduler

# Phases that /readyz can show; only `ready` goes with 200.
READY_PHASES = ("starting", *PHASES, "ready", "restarting", "failed", "draining")
PATHS = {
    "POST /v1/images/generations": "make images",
    "GET /v1/models": "the served model, as a list of one",
    "GET /v1/models/{model}": "the served model",
    "GET /v1/zops/info": "what is served and how; always 200",
    "GET /livez": "200 while the process and its event loop live",
    "GET /readyz": "200 once a warm-up image was made and looked at, else 503; the body tells the phase",
    "GET /healthz": "as /readyz",
    "GET /health": "as /readyz",
    "GET /v1/health/live": "as /livez",
    "GET /v1/health/ready": "as /readyz",
    "GET /metrics": "Prometheus metrics",
    "GET /openapi.json": "OpenAPI description of this API",
}
BODY_TIMEOUT_S = 30.0
CLIENT_GONE = 499
"""nginx's number for it; nobody receives it, the log and the metrics show it."""
# A client still sends while we refuse its body; reading on for a while lets it read the answer instead of a reset.
_DISCARD_BYTES = 16 * MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """What is served, by name and by content."""

    model: str
    revision: str
    manifest_digest: str
    snapshot: Path

    @property
    def snapshot_writable(self) -> bool:
        """Whether the snapshot's file system is mounted so that an instance could write to it."""
        return not os.statvfs(self.snapshot).f_flag & os.ST_RDONLY


def create_app(scheduler: Scheduler, limits: Limits, identity: Identity, metrics: Metrics) -> FastAPI:
    """Build the application around a scheduler that was begun."""
    app = FastAPI(title="zops", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app, metrics)
    _add_images(app, scheduler, limits, identity, metrics)
    _add_models(app, identity)
    _add_probes(app, scheduler, identity, metrics)
    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        if request.url.path == "/v1/images/generations":
            metrics.requests.labels(str(error.status)).inc()
            metrics.refused.labels(error.code).inc()
        return JSONResponse(error.body(), error.status, {**error.headers(), **(headers or {})})

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return answer(request, error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: ("not_found", "there is no such path"), 405: ("method_not_allowed", "the method is not allowed")}
        code, text = known.get(error.status_code, ("internal_error", "unexpected error"))
        return answer(request, ApiError(code, f"{text}: {request.method} {request.url.path[:200]}"), error.headers)

    async def on_bug(request: Request, _error: Exception) -> JSONResponse:
        return answer(request, ApiError("internal_error", "the server has a bug; its log has the traceback"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _add_images(app: FastAPI, scheduler: Scheduler, limits: Limits, identity: Identity, metrics: Metrics) -> None:
    schema = {"application/json": {"schema": GenerationBody.model_json_schema()}}

    @app.post(
        "/v1/images/generations",
        responses=_error_responses(),
        openapi_extra={"requestBody": {"required": True, "content": schema}},
    )
    async def generations(request: Request) -> Response:
        """Make images of a prompt."""
        began = time.monotonic()
        wanted = parse(await _read_body(request), limits, request.state.request_id)
        outcome = await _unless_gone(request, scheduler, wanted)
        if outcome is None:
            metrics.requests.labels(str(CLIENT_GONE)).inc()
            return Response(status_code=CLIENT_GONE)
        generated = time.monotonic()
        facts = scheduler.status.facts
        dtype = facts.dtype if facts else ""
        content = await asyncio.to_thread(_render, wanted, outcome, identity, dtype)
        ended = time.monotonic()
        seconds = {"queue": outcome.queue_s, "generate": outcome.done.seconds, "encode": ended - generated}
        for phase, value in seconds.items():
            metrics.phase_seconds.labels(phase).observe(value)
        metrics.request_seconds.observe(ended - began)
        metrics.images.labels(wanted.output_format).inc(len(outcome.done.images))
        metrics.requests.labels("200").inc()
        return Response(content, media_type="application/json")


async def _read_body(request: Request) -> bytes:
    body, discarded = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > MAX_BODY_BYTES or discarded:
                    discarded += len(chunk)
                    if discarded > _DISCARD_BYTES:
                        break
                else:
                    body += chunk
    except TimeoutError:
        raise ApiError("body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise ApiError("invalid_json", "the body broke off") from None
    if discarded:
        raise ApiError("body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _unless_gone(request: Request, scheduler: Scheduler, wanted: ImageRequest) -> Outcome | None:
    """Wait for the images; when the client goes away before, cancel their making and return None."""
    making = asyncio.ensure_future(scheduler.generate(wanted.job))
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        making.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await making
    except asyncio.CancelledError:
        if not gone:
            raise
        return None
    finally:
        watching.cancel()


def _render(wanted: ImageRequest, outcome: Outcome, identity: Identity, dtype: str) -> bytes:
    """Encode the images and build the answer; runs in a thread, the worker goes on meanwhile."""
    data = []
    for image in outcome.done.images:
        receipt = Receipt(
            model=identity.model,
            revision=identity.revision,
            manifest_digest=identity.manifest_digest,
            seed=image.seed,
            forwards=wanted.job.forwards,
            guidance_scale=wanted.job.guidance_scale,
            dtype=dtype,
            width=image.width,
            height=image.height,
        )
        began = time.monotonic()
        encoded = encode(image, receipt, wanted.output_format, wanted.quality)
        seconds = {
            "queue": outcome.queue_s,
            "generate": outcome.done.seconds / len(outcome.done.images),
            "encode": time.monotonic() - began,
        }
        data.append({"b64_json": base64.b64encode(encoded).decode(), "receipt": receipt.as_json(seconds)})
    body = {
        "created": int(time.time()),
        "data": data,
        "output_format": wanted.output_format,
        "size": f"{wanted.job.width}x{wanted.job.height}",
        "background": "opaque",
    }
    return json.dumps(body).encode()


def _add_models(app: FastAPI, identity: Identity) -> None:
    card = {"id": identity.model, "object": "model", "created": 0, "owned_by": identity.model.partition("/")[0]}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> dict[str, Any]:
        """Describe the served model."""
        if model != identity.model:
            raise ApiError("model_not_found", f"this server serves {identity.model} and no other model", param="model")
        return card


def _add_probes(app: FastAPI, scheduler: Scheduler, identity: Identity, metrics: Metrics) -> None:
    def facts() -> dict[str, Any]:
        return {
            "model": identity.model,
            "revision": identity.revision,
            "manifest_digest": identity.manifest_digest,
            **scheduler.snapshot(),
        }

    async def live() -> dict[str, str]:
        return {"status": "live"}

    async def ready() -> JSONResponse:
        status, code = ("ready", 200) if scheduler.ready else ("unready", 503)
        return JSONResponse({"status": status} | facts(), code, {} if scheduler.ready else {"Retry-After": "5"})

    for path in ("/livez", "/v1/health/live"):
        app.add_api_route(path, live, summary=PATHS[f"GET {path}"])
    for path in ("/readyz", "/healthz", "/health", "/v1/health/ready"):
        app.add_api_route(path, ready, summary=PATHS[f"GET {path}"], responses={503: {"description": "not ready"}})

    @app.get("/v1/zops/info")
    async def info() -> dict[str, Any]:
        """Tell what is served and how."""
        return facts() | {"snapshot_writable": identity.snapshot_writable}

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Show the metrics."""
        content, media_type = metrics.render()
        return Response(content, media_type=media_type)


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """Return, for OpenAPI, what each error status means."""
    codes: dict[int, list[str]] = {}
    for code, kind in ERROR_CODES.items():
        codes.setdefault(kind.status, []).append(code)
    return {status: {"description": ", ".join(names)} for status, names in sorted(codes.items())}

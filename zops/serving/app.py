"""The HTTP API as one application: OpenAI's Images API with our extensions, the probes, the metrics and the page.

The contract is docs/reference/http-api.md. Nothing here touches the pipeline; requests go to the scheduler.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from zops import __version__
from zops.serving.answers import error_answer
from zops.serving.errors import ApiError
from zops.serving.gate import IMAGE_PATHS
from zops.serving.images import Desk, add_images
from zops.serving.jobs import Jobs, add_jobs
from zops.serving.messages import PHASES
from zops.serving.metrics import Metrics
from zops.serving.probes import add_models, add_probes
from zops.serving.request import Limits
from zops.serving.security import describe_access
from zops.serving.studio import Identity, Studio
from zops.serving.surroundings import Surroundings
from zops.serving.web import add_page

if TYPE_CHECKING:
    from zops.serving.scheduler import Scheduler

__all__ = ["PATHS", "READY_PHASES", "Identity", "create_app"]

# Phases that /readyz can show; only `ready` goes with 200.
READY_PHASES = ("starting", *PHASES, "ready", "restarting", "failed", "draining")
PATHS = {
    "POST /v1/images/generations": "make images of a prompt",
    "POST /v1/images/edits": "make images of a prompt, beginning with an image",
    "GET /v1/images/{image}/content": "an image that was answered as a URL",
    "GET /v1/jobs/{job}": "a job, and its images once they are made",
    "POST /v1/jobs/{job}/cancel": "cancel a job",
    "DELETE /v1/jobs/{job}": "forget a job and its images",
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
    "GET /": "a page to try it",
    "GET /assets/{path}": "what the page consists of",
}


def create_app(
    scheduler: "Scheduler",
    limits: Limits,
    identity: Identity,
    metrics: Metrics,
    *,
    surroundings: Surroundings | None = None,
    keyed: bool = False,
) -> FastAPI:
    """Build the application around a scheduler that was begun.

    Args:
        scheduler: makes the images.
        limits: of requests.
        identity: what is served.
        metrics: where numbers go.
        surroundings: what sees GPUs and disk; by default one that does not look.
        keyed: whether the gate before it wants API keys.
    """
    surroundings = surroundings or Surroundings(identity.snapshot, ())
    app = FastAPI(
        title="zops",
        version=__version__,
        summary="OpenAI's Images API over Z-Image-Turbo",
        docs_url=None,
        redoc_url=None,
    )
    studio = Studio(scheduler, limits, identity, metrics)
    jobs = Jobs(metrics)
    _add_error_handlers(app, metrics)
    routers = (
        add_images(Desk(studio, metrics, jobs)),
        add_jobs(jobs),
        add_models(identity),
        add_probes(scheduler, limits, identity, metrics, surroundings),
    )
    for router in routers:
        app.router.routes.extend(router.routes)  # flat: an included router would hide its paths from `allowed_methods`
    add_page(app)
    describe_access(app, keyed=keyed)
    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        if request.url.path in IMAGE_PATHS:
            metrics.requests.labels(str(error.status)).inc()
            metrics.refused.labels(error.code).inc()
        response = error_answer(request, error)
        response.headers.update(headers or {})
        return response

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return answer(request, error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: ("not_found", "there is no such path"), 405: ("method_not_allowed", "the method is not allowed")}
        code, text = known.get(error.status_code, ("internal_error", "unexpected error"))
        headers = {"Allow": ", ".join(allowed_methods(app, request))} if error.status_code == 405 else error.headers
        return answer(request, ApiError(code, f"{text}: {request.method} {request.url.path[:200]}"), headers)

    async def on_bug(request: Request, _error: Exception) -> JSONResponse:
        return answer(request, ApiError("internal_error", "the server has a bug; its log has the traceback"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """Return all methods of a path; the router names only those of the first route that has it."""
    found = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE:
            found |= route.methods or set()
    return sorted(found)

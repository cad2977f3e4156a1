"""The paths that tell about the server: health, what is served, metrics."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from zops.serving.answers import Info, InfoLimits, Live, ModelCard, ModelList, Readiness, error_responses
from zops.serving.errors import ApiError
from zops.serving.metrics import Metrics
from zops.serving.request import Limits
from zops.serving.studio import Identity
from zops.serving.surroundings import Surroundings

if TYPE_CHECKING:
    from zops.serving.scheduler import Scheduler

LIVE_PATHS = ("/livez", "/v1/health/live")
READY_PATHS = ("/readyz", "/healthz", "/health", "/v1/health/ready")
_ERRORS = error_responses(405)


def add_models(identity: Identity) -> APIRouter:
    """Return the paths for models: there is one."""
    router = APIRouter(tags=["models"])
    owner = identity.model.partition("/")[0]
    card: ModelCard = {"id": identity.model, "object": "model", "created": 0, "owned_by": owner}

    @router.get("/v1/models", responses={200: {"model": ModelList}, **_ERRORS})
    async def models() -> JSONResponse:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}, **error_responses(404, 405)})
    async def model_card(model: str) -> JSONResponse:
        """Describe the served model."""
        if model != identity.model:
            raise ApiError("model_not_found", f"this server serves {identity.model} and no other model", param="model")
        return JSONResponse(card)

    return router


def add_probes(
    scheduler: "Scheduler", limits: Limits, identity: Identity, metrics: Metrics, surroundings: Surroundings
) -> APIRouter:
    """Return the paths for probes and for whoever watches."""
    router = APIRouter(tags=["operations"])
    told: InfoLimits = {
        "max_pixels": limits.max_pixels,
        "max_images": limits.max_images,
        "max_upload_bytes": limits.max_upload_bytes,
        "default_size": limits.default_size,
        "forwards": limits.forwards,
        "guidance_scale": limits.guidance_scale,
    }

    def facts() -> dict[str, Any]:
        return {
            "model": identity.model,
            "revision": identity.revision,
            "manifest_digest": identity.manifest_digest,
            **scheduler.snapshot(),
            "gpus": surroundings.gpus(),
            "snapshot": surroundings.snapshot(),
        }

    async def live() -> JSONResponse:
        """Tell that the process and its event loop live."""
        return JSONResponse({"status": "live"})

    async def ready() -> JSONResponse:
        """Tell whether a request would be served."""
        status, code = ("ready", 200) if scheduler.ready else ("unready", 503)
        return JSONResponse({"status": status} | facts(), code, {} if scheduler.ready else {"Retry-After": "5"})

    for path in LIVE_PATHS:
        router.add_api_route(path, live, responses={200: {"model": Live}, **_ERRORS})
    unready = {"model": Readiness, "description": "no request would be served: see phase and reason"}
    for path in READY_PATHS:
        router.add_api_route(path, ready, responses={200: {"model": Readiness}, 503: unready, **_ERRORS})

    @router.get("/v1/zops/info", responses={200: {"model": Info}, **_ERRORS})
    async def info() -> JSONResponse:
        """Tell what is served and how."""
        return JSONResponse(facts() | {"snapshot_writable": identity.snapshot_writable, "limits": told})

    exposition = {"text/plain": {"schema": {"type": "string"}}}

    @router.get("/metrics", responses={200: {"content": exposition}, **_ERRORS}, response_class=Response)
    async def metrics_page() -> Response:
        """Show the metrics."""
        metrics.tell_queue(scheduler.queue_facts())
        metrics.tell_surroundings(surroundings.gpus(), surroundings.snapshot())
        content, media_type = metrics.render()
        return Response(content, media_type=media_type)

    return router

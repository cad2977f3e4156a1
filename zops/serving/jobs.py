"""Jobs: requests for images whose client does not wait, and comes back for the answer.

They live in this process and end with it. A job is its client's alone, for everybody else there is no such job.
"""

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from zops.serving.answers import Error, ImagesAnswer, error_responses
from zops.serving.errors import ApiError
from zops.serving.making import Making
from zops.serving.metrics import Metrics
from zops.serving.rates import Place

KEEP_S = 600.0
MAX_JOBS = 1000
MAX_BYTES = 256 << 20
MAX_WAIT_S = 60.0
_PREFERS_ASYNC = re.compile(r"(^|,)\s*respond-async\s*($|[,;])", re.IGNORECASE)
_LOG = logging.getLogger("zops.serving")

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobAnswer(TypedDict):
    """A job as its client sees it."""

    id: str
    object: Literal["job"]
    status: Status
    progress: float
    created_at: int
    expires_at: int | None
    request_id: str
    result: ImagesAnswer | None
    error: Error | None


class JobDeleted(TypedDict):
    """A job that is no longer kept."""

    id: str
    object: Literal["job"]
    deleted: Literal[True]


@dataclass(slots=True, eq=False)
class Job:
    """One request that runs, or ran, without its client waiting."""

    id: str
    client: str
    request_id: str
    making: Making | None
    """None once the job has ended: it holds the images as they came from the worker."""
    place: Place | None
    created: float = field(default_factory=time.time)
    """Seconds since the epoch, as `expires` is."""
    expires: float | None = None
    status: Status = "queued"
    progress: float = 0.0
    result: bytes = field(default=b"", repr=False)
    error: dict[str, str | None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def look(self) -> None:
        """Bring status and progress up to date; a job whose images are made and not encoded yet is running."""
        if self.making:
            self.status = "queued" if self.making.state == "queued" else "running"
            self.progress = round(self.making.progress, 3)

    def cancel(self) -> None:
        """Stop the making; does nothing to a job that has ended."""
        if self.making:
            self.making.cancel()

    def body(self) -> bytes:
        """Return the job as JSON."""
        self.look()
        head = {
            "id": self.id,
            "object": "job",
            "status": self.status,
            "progress": self.progress,
            "created_at": int(self.created),
            "expires_at": int(self.expires) if self.expires else None,
            "request_id": self.request_id,
            "error": self.error,
        }
        # The result is JSON already, and large: it is not read to be written again.
        return b'%s, "result": %s}' % (json.dumps(head).encode()[:-1], self.result or b"null")


class Jobs:
    """All jobs of a server, bounded in number, bytes and time; the oldest that ended make room."""

    def __init__(
        self, metrics: Metrics, *, keep_s: float = KEEP_S, max_jobs: int = MAX_JOBS, max_bytes: int = MAX_BYTES
    ) -> None:
        self.size_bytes = 0
        self._metrics = metrics
        self._keep_s = keep_s
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return the number of jobs that are known, ended ones included."""
        return len(self._jobs)

    def accept(
        self, request: Request, making: Making, answer: Callable[[], Awaitable[tuple[bytes, Any]]], client: str
    ) -> Response:
        """Make a job of a request that is in the queue; return the answer that tells its client where to look.

        Args:
            request: what asked for it.
            making: what its images are made by; cancelled when the job is refused.
            answer: waits for the making and returns the body of the answer first.
            client: whose job it is.

        Raises:
            ApiError: queue_full when as many jobs as are kept are open.
        """
        self._make_room(1, 0)
        if len(self._jobs) >= self._max_jobs:
            making.cancel()
            raise ApiError("queue_full", f"{len(self._jobs)} jobs are open, the limit", retry_after_s=5)
        place: Place | None = getattr(request.state, "place", None)
        name = f"job_{secrets.token_urlsafe(24)}"
        job = Job(name, client, request.state.request_id, making, place.keep() if place else None)
        self._jobs[job.id] = job
        task = asyncio.ensure_future(self._run(job, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._metrics.requests.labels("202").inc()
        self._tell()
        headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
        return Response(job.body(), 202, headers, media_type="application/json")

    def find(self, name: str, client: str) -> Job:
        """Return a client's job.

        Raises:
            ApiError: job_not_found, also for the jobs of others.
        """
        job = self._jobs.get(name)
        if job is None or job.client != client:
            raise ApiError("job_not_found", "there is no such job; jobs that ended are kept for ten minutes")
        return job

    async def wait(self, job: Job, seconds: float) -> None:
        """Return when a job has ended or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await job.ended.wait()
        except TimeoutError:
            pass

    async def cancel(self, job: Job) -> None:
        """Cancel a job; does nothing to one that has ended."""
        job.cancel()
        # It ends at once, unless its images are made and only being encoded.
        await self.wait(job, MAX_WAIT_S)

    def forget(self, job: Job) -> None:
        """Keep a job no longer; one that is open is cancelled."""
        if self._jobs.pop(job.id, None) is None:
            return
        job.cancel()
        self.size_bytes -= len(job.result)
        self._tell()

    async def _run(self, job: Job, answer: Callable[[], Awaitable[tuple[bytes, Any]]]) -> None:
        try:
            result, _ = await answer()
            job.look()
            self._keep(job, result)
        except ApiError as error:
            self._fail(job, error)
        except asyncio.CancelledError:
            self._fail(job, ApiError("draining", "the server is stopping"))
            raise
        except Exception:  # noqa: BLE001 - logged with its traceback, and the client is told
            _LOG.exception("a job broke", extra={"fields": {"request_id": job.request_id}})
            self._fail(job, ApiError("internal_error", "the server has a bug; its log has the traceback"))
        finally:
            self._end(job)

    def _keep(self, job: Job, result: bytes) -> None:
        if job.id not in self._jobs:
            job.status = "cancelled"  # it was deleted while its images were encoded
            return
        if len(result) > self._max_bytes:
            raise ApiError(
                "result_expired", f"the answer is larger than the {self._max_bytes} bytes that jobs may keep"
            )
        self._make_room(0, len(result))
        job.status, job.progress, job.result = "succeeded", 1.0, result
        self.size_bytes += len(result)

    def _fail(self, job: Job, error: ApiError) -> None:
        job.look()
        job.status = "cancelled" if error.code == "cancelled" else "failed"
        if job.status == "failed":
            job.error = error.body(job.request_id)["error"]
            self._metrics.refused.labels(error.code).inc()

    def _end(self, job: Job) -> None:
        job.cancel()
        job.making = None
        job.expires = time.time() + self._keep_s
        job.ended.set()
        if job.place:
            job.place.give_back()
        if job.id in self._jobs:
            # Those that ended stand in the order in which they did.
            self._jobs[job.id] = self._jobs.pop(job.id)
            asyncio.get_running_loop().call_later(self._keep_s, self.forget, job)
        self._metrics.jobs_ended.labels(job.status).inc()
        self._tell()
        fields = {
            "request_id": job.request_id,
            "job": job.id[:12],
            "client": job.client,
            "status": job.status,
            "seconds": round(time.time() - job.created, 4),
        }
        _LOG.info("job", extra={"fields": fields})

    def _make_room(self, jobs: int, size: int) -> None:
        """Forget ended jobs, the oldest first, until so many more jobs and bytes fit, or none is left."""
        for job in list(self._jobs.values()):
            if len(self._jobs) + jobs <= self._max_jobs and self.size_bytes + size <= self._max_bytes:
                return
            if job.ended.is_set():
                self.forget(job)

    def _tell(self) -> None:
        self._metrics.jobs_open.set(sum(not job.ended.is_set() for job in self._jobs.values()))
        self._metrics.job_bytes.set(self.size_bytes)


def prefers_job(request: Request) -> bool:
    """Tell whether a client says `Prefer: respond-async`."""
    return any(_PREFERS_ASYNC.search(value) for value in request.headers.getlist("prefer"))


def add_jobs(jobs: Jobs) -> APIRouter:
    """Return the paths of jobs."""
    router = APIRouter(tags=["jobs"])
    errors = error_responses(401, 404, 405)
    shown: dict[int | str, dict[str, Any]] = {200: {"model": JobAnswer}}
    deleted: dict[int | str, dict[str, Any]] = {200: {"model": JobDeleted}}
    wait = {
        "name": "wait",
        "in": "query",
        "required": False,
        "description": "answer when the job has ended, or after so many seconds",
        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S},
    }

    def found(request: Request, job: str) -> Job:
        return jobs.find(job, getattr(request.state, "client", ""))

    @router.get(
        "/v1/jobs/{job}",
        responses=shown | errors | error_responses(422),
        openapi_extra={"parameters": [wait]},
    )
    async def show(request: Request, job: str) -> Response:
        """Show a job, and its images once they are made."""
        one = found(request, job)
        await jobs.wait(one, _wait_s(request))
        return Response(one.body(), media_type="application/json")

    @router.post("/v1/jobs/{job}/cancel", responses=shown | errors)
    async def cancel(request: Request, job: str) -> Response:
        """Cancel a job; one that has ended stays as it is."""
        one = found(request, job)
        await jobs.cancel(one)
        return Response(one.body(), media_type="application/json")

    @router.delete("/v1/jobs/{job}", responses=deleted | errors)
    async def delete(request: Request, job: str) -> Response:
        """Forget a job and its images; one that is open is cancelled."""
        one = found(request, job)
        jobs.forget(one)
        return JSONResponse({"id": one.id, "object": "job", "deleted": True})

    return router


def _wait_s(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_S:
        raise ApiError("invalid_type", f"wait: must be a number of seconds, 0 to {MAX_WAIT_S:g}", param="wait")
    return seconds

"""`zops serve` from the first check to the last answer: refuse early, start the workers, serve, drain."""

import asyncio
import contextlib
import errno
import importlib.util
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops.cache.manifest import Manifest, require_verified
from zops.errors import HostShort, SnapshotDamaged, UsageError, ZopsError
from zops.events import Finished, Report, Warned
from zops.serving.keys import KeyRing, published_address
from zops.spec import Spec
from zops.spec.keys import is_loopback

if TYPE_CHECKING:  # their imports cost time that the workers' start should not wait for
    from zops.serving.devices import Seat
    from zops.serving.messages import WorkerSettings
    from zops.serving.request import Limits

EXTRA = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "fastapi",
    "uvicorn",
    "PIL",
    "prometheus_client",
    "python_multipart",
    "tokenizers",
)
PIPELINE = "ZImagePipeline"
# Once the workers are done, clients get this long to read their answers.
READ_GRACE_S = 8.0


def serve(spec: Spec, snapshot: Path, report: Report, *, log_json: bool = False) -> None:
    """Serve a snapshot until SIGTERM or SIGINT; returns when every running request was answered.

    Raises:
        ZopsError: when the `serve` extra is not installed, or no worker could be started.
        SnapshotMissing: when there is no verified snapshot.
        SnapshotDamaged: when it changed since it was verified, or is no pipeline that can be served.
        UsageError: when the snapshot is of another model than the one asked for.
        SpecError: when the file of API keys is missing or broken.
        HostShort: when the port is taken.
    """
    require_extra()
    manifest = require_verified(snapshot)
    require_pipeline(snapshot)
    if manifest.model != spec.model:
        raise UsageError(
            f"the snapshot in {snapshot} is {manifest.model}, not {spec.model}",
            code="model-mismatch",
            hint=f"serve it with: --model {manifest.model}",
        )
    keys = open_keys(spec, report)
    with _listen(spec.serve.host, spec.serve.port) as listener:
        error = asyncio.run(_serve(spec, (snapshot, manifest), keys, listener, report, log_json=log_json))
    if error:
        raise error


def open_keys(spec: Spec, report: Report) -> KeyRing | None:
    """Return the API keys, None where the server is for everybody; that is said unless only this host reaches it.

    Raises:
        SpecError: when their file is missing or broken.
    """
    if spec.serve.api_keys is not None:
        return KeyRing(spec.serve.api_keys)
    address = published_address(spec.serve.host)
    if not is_loopback(address):
        text = f"no serve.api_keys: whoever reaches port {spec.serve.port} on {address} can make images"
        report(Warned(f"{text}; see docs/how-to/behind-a-product.md"))
    return None


def require_extra() -> None:
    """Check that what the container side needs is installed, without importing it.

    Raises:
        ZopsError: naming what is missing.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ZopsError(
            f"this installation cannot serve, it lacks {', '.join(missing)}",
            code="serve-extra-missing",
            hint="in the source checkout of zops: pip install '.[serve]'",
        )


def require_pipeline(snapshot: Path) -> None:
    """Check that the snapshot holds the one kind of pipeline that is served.

    Raises:
        SnapshotDamaged: naming what it holds instead.
    """
    try:
        index = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotDamaged(
            f"{snapshot}/model_index.json cannot be read: {error!r}", code="pipeline-unknown"
        ) from None
    if name != PIPELINE:
        raise SnapshotDamaged(f"the snapshot holds a {name}, only a {PIPELINE} is served", code="pipeline-unknown")


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before anything is loaded, so that it cannot be lost while the weights are read."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
        # Inherited by each connection. asyncio would set it, but not on sockets whose protocol number is left open, as
        # here; without it an answer waits 40 ms for the client's delayed acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        reasons = {errno.EADDRINUSE: "is taken by another program", errno.EACCES: "needs a privilege we lack"}
        reason = reasons.get(error.errno or 0, f"cannot be bound: {error.strerror or error}")
        raise HostShort(
            f"{host}:{port} {reason}",
            code="port-taken" if error.errno == errno.EADDRINUSE else "port-unusable",
            hint="stop that program, or choose another port with --port",
            host=host,
            port=port,
        ) from None
    with listener:
        yield listener


async def _serve(
    spec: Spec,
    served: tuple[Path, Manifest],
    keys: KeyRing | None,
    listener: socket.socket,
    report: Report,
    *,
    log_json: bool,
) -> ZopsError | None:
    """Run workers and HTTP server; return why no worker could be started, None after a stop that was asked for."""
    began = time.monotonic()
    snapshot, manifest = served
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    from zops.serving.devices import plan_workers, wanted_gpus  # noqa: PLC0415 - the signals come first
    from zops.serving.link import WorkerLink, start_worker  # noqa: PLC0415
    from zops.serving.request import Limits  # noqa: PLC0415

    limits = Limits.of(spec)
    settings = _worker_settings(spec, snapshot, plan_workers(spec), limits)
    # Before all else is imported: what the workers import takes longer, and goes on on other cores meanwhile.
    started = {index: start_worker(each) for index, each in enumerate(settings)}

    def start(index: int) -> WorkerLink:
        return started.pop(index, None) or start_worker(settings[index])

    from zops.serving.metrics import Metrics  # noqa: PLC0415
    from zops.serving.scheduler import Scheduler  # noqa: PLC0415
    from zops.serving.surroundings import Surroundings  # noqa: PLC0415

    metrics = Metrics(model=spec.model, revision=manifest.revision, manifest_digest=manifest.digest)
    scheduler = Scheduler(
        start,
        limits,
        metrics,
        workers=len(settings),
        max_batch=None if spec.serve.max_batch == "auto" else spec.serve.max_batch,
        wants_gpu=spec.gpus != "none",
        report=report,
    )
    surroundings = Surroundings(snapshot, wanted_gpus(spec))
    try:
        scheduler.begin()
        surroundings.begin()
        server = _http_server(scheduler, limits, served, keys, metrics, surroundings=surroundings, log_json=log_json)
        address = f"http://{spec.serve.host}:{spec.serve.port}"
        report(Finished("listen", f"listening on {address}", time.monotonic() - began))
        return await _until_stopped(server, scheduler, listener, stop)
    finally:
        surroundings.end()
        scheduler.close()


def _worker_settings(
    spec: Spec, snapshot: Path, seats: "tuple[Seat, ...]", limits: "Limits"
) -> "tuple[WorkerSettings, ...]":
    from zops.serving.messages import WorkerSettings  # noqa: PLC0415 - see _serve

    return tuple(
        WorkerSettings(
            snapshot=str(snapshot),
            model=spec.model,
            dtype=spec.serve.dtype,
            gpus=seat.gpus,
            forwards=limits.forwards,
            guidance_scale=limits.guidance_scale,
            warmup_size=spec.serve.warmup_size,
            threads=seat.threads,
            preset=spec.serve.preset,
            fp8_text=None if spec.serve.fp8_text == "auto" else spec.serve.fp8_text,
            force_preset=spec.serve.force_preset,
            verify_on_load=spec.serve.verify_on_load,
            kernels=str(spec.cache.kernels) if spec.cache.kernels else None,
            sizes=(limits.default_size,),
            parallel=spec.serve.parallel,
            cards=seat.cards,
        )
        for seat in seats
    )


def _http_server(
    scheduler: Any,
    limits: Any,
    served: tuple[Path, Manifest],
    keys: KeyRing | None,
    metrics: Any,
    *,
    surroundings: Any,
    log_json: bool,
) -> Any:
    import uvicorn  # noqa: PLC0415 - only once the worker is on its way

    from zops.serving.access import AccessLog, set_up_log  # noqa: PLC0415
    from zops.serving.app import Identity, create_app  # noqa: PLC0415
    from zops.serving.connection import HTTP_SETTINGS, bounded_by  # noqa: PLC0415
    from zops.serving.gate import Gate  # noqa: PLC0415
    from zops.serving.idempotency import Idempotency  # noqa: PLC0415

    class Server(uvicorn.Server):
        """uvicorn without its own signal handling: it would close the socket before the probes can say why."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    snapshot, manifest = served
    identity = Identity(manifest.model, manifest.revision, manifest.digest, snapshot)
    app = create_app(scheduler, limits, identity, metrics, surroundings=surroundings, keyed=keys is not None)
    gate = Gate(Idempotency(app, metrics, limits), keys, metrics)
    return Server(
        uvicorn.Config(
            AccessLog(gate, set_up_log(as_json=log_json)),
            http=bounded_by(metrics),
            **HTTP_SETTINGS,
            access_log=False,
            log_config=None,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=int(READ_GRACE_S),
        )
    )


async def _until_stopped(server: Any, scheduler: Any, listener: socket.socket, stop: asyncio.Event) -> ZopsError | None:
    """Serve until a signal or until the scheduler gave up; then drain, while probes and refusals are still answered."""
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({serving, stopping, scheduler.gave_up}, return_when=asyncio.FIRST_COMPLETED)
    scheduler.drain()
    await scheduler.drained()
    server.should_exit = True
    await serving
    stopping.cancel()
    return scheduler.gave_up.result() if scheduler.gave_up.done() else None

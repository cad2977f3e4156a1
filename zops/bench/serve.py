"""Images a second through HTTP, by number of clients; row 4, one GPU against all; and three ways to use two of them.

Against an instance that runs, or one of its own that is started as a process and removed at the end.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from zops.bench import parallel
from zops.bench.clients import Seen, batch_sizes, load_with
from zops.bench.generate import MAIN, SIZES, TINY_SIZES
from zops.bench.result import Better, Table
from zops.bench.run import Bench, Case
from zops.cache.manifest import require_verified
from zops.events import task
from zops.health.client import Client
from zops.health.waiting import wait_instance
from zops.host.gpu import read_gpus
from zops.runtime.base import Deployment
from zops.runtime.process import ProcessRuntime
from zops.spec import Spec

CLIENTS = (1, 4, 16, 32)
NAME = "zops-bench"
"""Of the instance that is started; one that an earlier run left is replaced."""
WARM_S, WINDOW_S = 3.0, 12.0
QUICK_WARM_S, QUICK_WINDOW_S = 1.0, 4.0
METHODS = {
    "images/s": "images answered within the window, a second of it; each client asks for the next when it has one",
    "latency": "from a client's request to its decoded answer, PNG in base64",
    "refused": "requests answered 429 within the window; the client asks again 0.2 s later",
    "failed": "requests that ended with another error within the window",
    "batch size": "images that were made together, from each image's receipt",
    "start": "from the start of the process to ready: imports, load, warm-up image",
}


def measure(bench: Bench) -> None:
    """Measure every number of clients, and several GPUs against one where there are several."""
    levels = [_case(bench, clients) for clients in CLIENTS]
    wanted = [case for case in levels if bench.wants("serve", case)]
    several = len(read_gpus().gpus) > 1
    with task(bench.report, "serve", "measuring an instance", total=len(wanted), unit="levels") as counter:
        if wanted:
            with bench.attempt("serve", {}, "measuring an instance"), _instance(bench, bench.request.spec) as url:
                for case in wanted:
                    _measure_level(bench, url, "serve", case)
                    counter.advance(1)
    if bench.wants("gpus", {}) or any(bench.wants("gpus", {"gpus": name}) for name in ("1", "all")):
        _compare_gpus(bench, several=several)
    _compare_ways(bench, several=several)


def _compare_ways(bench: Bench, *, several: bool) -> None:
    """Compare replicas, split and context; a tiny model on the CPU takes processes for GPUs."""
    sizes = TINY_SIZES if bench.small else SIZES
    shown = (sizes[0], sizes[MAIN]) if bench.request.quick else sizes
    if not any(
        bench.wants("parallel", {"parallel": way, "size": str(size)}) for way in parallel.WAYS for size in shown
    ):
        return
    if bench.request.url or not (several or (bench.small and not bench.on_gpu)):
        why = "the instance is not the bench's own" if bench.request.url else "fewer than two GPUs are visible"
        bench.skip("parallel", {"parallel": "split and context"}, why)
        return
    parallel.compare(bench, shown, _instance, lambda bench, url, case: _measure_level(bench, url, "parallel", case))


def _case(bench: Bench, clients: int) -> Case:
    return {"size": str(_size(bench)), "clients": str(clients)}


def _size(bench: Bench) -> int:
    return (TINY_SIZES if bench.small else SIZES)[0]


def _compare_gpus(bench: Bench, *, several: bool) -> None:
    """Measure the largest crowd on one GPU and on all."""
    if bench.request.url or not several:
        why = "the instance is not the bench's own" if bench.request.url else "fewer than two GPUs are visible"
        bench.skip("gpus", {"gpus": "all"}, why)
        return
    spec = bench.request.spec
    for name, gpus in (("1", (0,)), ("all", "all")):
        case = {"gpus": name, "size": str(_size(bench)), "clients": str(CLIENTS[-1])}
        if bench.wants("gpus", case):
            with bench.attempt("gpus", case, f"GPUs: {name}"):
                changed = spec.model_copy(update={"gpus": gpus})
                with _instance(bench, changed) as url:
                    _measure_level(bench, url, "gpus", case)


def _measure_level(bench: Bench, url: str, table: Table, case: Case) -> None:
    quick = bench.request.quick
    with bench.attempt(table, case, f"{case['clients']} clients, {case['size']} x {case['size']}"):
        seen = load_with(
            url,
            int(case["clients"]),
            int(case["size"]),
            warm_s=QUICK_WARM_S if quick else WARM_S,
            window_s=QUICK_WINDOW_S if quick else WINDOW_S,
            timeout_s=bench.request.spec.serve.request_timeout_s + 5,
        )
        _take(bench, table, case, seen)


def _take(bench: Bench, table: Table, case: Case, seen: Seen) -> None:
    figures: list[tuple[str, str, list[float], Better]] = [
        ("images/s", "images/s", [seen.images_per_s], "more"),
        ("refused", "requests", [float(seen.refused)], "neither"),
        ("failed", "requests", [float(len(seen.failed))], "less"),
    ]
    if seen.answers:
        figures.insert(1, ("latency", "s", [answer.seconds for answer in seen.answers], "less"))
        figures.append(("batch size", "images", batch_sizes(seen.answers), "neither"))
    for quantity, unit, samples, better in figures:
        bench.add(table, case, quantity, samples, unit=unit, better=better, method=METHODS[quantity])


@contextmanager
def _instance(bench: Bench, spec: Spec) -> Iterator[str]:
    """Hand out the address of the instance that was named, or of one that is started and removed afterwards.

    Raises:
        NotReady: when it does not become ready; it is removed all the same.
    """
    if bench.request.url:
        Client(bench.request.url).ready()
        yield bench.request.url
        return
    snapshot = bench.request.slim if bench.request.slim and bench.on_gpu else bench.request.full
    manifest = require_verified(snapshot)
    serve = spec.serve.model_copy(
        update={
            "host": "127.0.0.1",
            "port": _free_port(),
            "api_keys": None,
            # Who waits is measured, not who is sent away.
            "max_queue": max(spec.serve.max_queue, 2 * CLIENTS[-1]),
            "warmup_size": _size(bench),
        }
    )
    own = {"name": NAME, "model": manifest.model, "runtime": "process", "engine": "local", "serve": serve}
    deployment = Deployment(spec.model_copy(update=own), snapshot, manifest.revision, manifest.digest)
    runtime = ProcessRuntime()
    try:
        runtime.up(deployment, bench.report)
        started = wait_instance(runtime, deployment, bench.report)
        case = {"size": str(_size(bench)), "clients": "0"}
        if bench.result.find("serve", "start") is None:
            bench.add("serve", case, "start", [started], unit="s", better="less", method=METHODS["start"])
        yield deployment.url
    finally:
        runtime.down(NAME, bench.report)  # what it compiled is kept for the next time


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

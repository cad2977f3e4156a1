"""Replicas, split or context: two GPUs used in three ways, by size; which one helps is said of each size.

An instance of its own a way, asked by one client (how long one image takes) and by several (how many images a second).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from zops.bench.run import Bench, Case
from zops.events import Finished
from zops.spec import Spec

WAYS = ("replicas", "split", "context")
CARDS = 2
ALONE, CROWD = 1, 8
METHODS = {
    "against replicas": "images a second, or seconds an image the other way round, of replicas on as many GPUs = 1",
}

Open = Callable[[Bench, Spec], AbstractContextManager[str]]
Measure = Callable[[Bench, str, Case], None]


def compare(bench: Bench, sizes: tuple[int, ...], open_instance: Open, measure: Measure) -> None:
    """Measure every way at every size, and say which one helps.

    Args:
        bench: the run.
        sizes: edges of the images.
        open_instance: starts an instance of a specification.
        measure: asks it for images and takes the figures.
    """
    for way in WAYS:
        wanted = [case for case in _cases(way, sizes) if bench.wants("parallel", case)]
        if not wanted:
            continue
        text = f"{CARDS} GPUs as {way}"
        with (
            bench.attempt("parallel", {"parallel": way}, text),
            open_instance(bench, _changed(bench, way)) as url,
        ):
            for case in wanted:
                measure(bench, url, case)
    for size in sizes:
        _conclude(bench, size)


def _cases(way: str, sizes: tuple[int, ...]) -> list[Case]:
    return [{"parallel": way, "size": str(size), "clients": str(n)} for size in sizes for n in (ALONE, CROWD)]


def _changed(bench: Bench, way: str) -> Spec:
    """Return the specification with two GPUs used in one way; without GPUs they are processes and threads."""
    spec = bench.request.spec
    serve = {"parallel": way, "gpus_per_worker": CARDS, "workers": CARDS if way == "replicas" else 1}
    if not bench.on_gpu:
        # Eager, which a CPU gets, is computed by one card; the reference numbers of bf16 by as many as there are.
        serve |= {"preset": "bf16", "force_preset": True}
    gpus = tuple(range(CARDS)) if bench.on_gpu and spec.gpus == "all" else spec.gpus
    return spec.model_copy(update={"gpus": gpus, "serve": spec.serve.model_copy(update=serve)})


def _conclude(bench: Bench, size: int) -> None:
    """Add how each way compares with replicas, and say which is best for one image and for many."""
    said = []
    for clients, quantity, what in ((ALONE, "latency", "one image"), (CROWD, "images/s", "many")):
        base = {"size": str(size), "clients": str(clients)}
        found = {
            way: figure.value
            for way in WAYS
            if (figure := bench.result.find("parallel", quantity, parallel=way, **base)) and figure.value > 0
        }
        if "replicas" not in found or len(found) < 2:
            return
        gains = {
            way: value / found["replicas"] if quantity == "images/s" else found["replicas"] / value
            for way, value in found.items()
        }
        for way in gains.keys() - {"replicas"}:
            case = {"parallel": way, **base}
            method = METHODS["against replicas"]
            bench.add("parallel", case, "against replicas", [gains[way]], unit="x", better="more", method=method)
        best = max(gains, key=lambda way: gains[way])
        said.append(f"{best} for {what}" + (f" ({gains[best]:.2f} x replicas)" if best != "replicas" else ""))
    text = f"{size} x {size} on {CARDS} GPUs: {', '.join(said)}"
    bench.notes[f"parallel {size}"] = text
    bench.report(Finished(f"parallel/{size}", text, 0.0, changed=False))

"""Row 1: how a pipeline gets onto the device, against time and host memory. Each load runs in a fresh process."""

from typing import Any

from zops.bench.child import run_inside
from zops.bench.machine import weight_files
from zops.bench.pages import STATES, State, bring
from zops.bench.run import Bench, Case
from zops.events import task

WAYS = ("zops", "zops, verified", "device_map", "low_cpu_mem_usage=True", "low_cpu_mem_usage=False")
RUNS, QUICK_RUNS = 3, 1
# What a quick run keeps: warm, ours against the two that people use; cold, ours.
QUICK_WARM, QUICK_COLD = WAYS[:4], WAYS[:1]
TIMEOUT_S = 600.0
UNITS = {"time": "s", "tensors on the device": "s", "assembly": "s", "host memory": "GB", "GPU memory": "GB"}
METHODS = {
    "time": "wall clock from the call to the pipeline on the device; fresh process, after imports and CUDA's start",
    "tensors on the device": "the part of it from the first read to the last tensor",
    "assembly": "the part of it that puts the tensors into the models and the models into the pipeline",
    "host memory": "most anonymous memory (RssAnon) above what there was before, sampled each 10 ms",
    "GPU memory": "most memory that torch's allocator held",
}


def measure(bench: Bench) -> None:
    """Measure every way with warm and with cold page cache."""
    cases = [case for case in _cases(bench) if bench.wants("load", case)]
    with task(bench.report, "load", "measuring loads", total=len(cases), unit="cases") as counter:
        for case in cases:
            text = f"loading {case['weights']} weights by {case['way']}, {case['page cache']}"
            with bench.attempt("load", case, text):
                _measure_case(bench, case)
            counter.advance(1)


def _cases(bench: Bench) -> list[Case]:
    found: list[Case] = []
    for state in STATES:
        for weights in bench.request.snapshots:
            kept = (QUICK_WARM if state == "warm" else QUICK_COLD) if bench.request.quick else WAYS
            # Nobody asks how the recipe fares with what only zops makes.
            ways = kept if weights == "full" else tuple(way for way in kept if "low_cpu" not in way)
            found += [{"way": way, "weights": weights, "page cache": state} for way in ways]
    return found


def _measure_case(bench: Bench, case: Case) -> None:
    runs = [load_once(bench, case["way"], case["weights"], case["page cache"]) for _ in range(runs_of(bench))]  # type: ignore[arg-type] # one of STATES
    for quantity in runs[0]:
        if quantity in UNITS:
            samples = [each[quantity] for each in runs]
            bench.add("load", case, quantity, samples, unit=UNITS[quantity], better="less", method=METHODS[quantity])


def runs_of(bench: Bench) -> int:
    """Return how often each load is measured."""
    return QUICK_RUNS if bench.request.quick else RUNS


def load_once(bench: Bench, way: str, weights: str, state: State) -> dict[str, float]:
    """Bring the weights into a state of the page cache, load them in a fresh process, and return its figures.

    Raises:
        HostShort: when the page cache cannot be brought there.
        ZopsError: when the load failed.
    """
    snapshot = bench.request.snapshots[weights]
    bring(weight_files(snapshot), state)
    told: list[dict[str, Any]] = list(run_inside("load", {"snapshot": str(snapshot), "way": way}, timeout_s=TIMEOUT_S))
    figures: dict[str, float] = told[-1]["figures"]
    return figures

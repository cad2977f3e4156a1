"""One run of the bench: what is asked for, what is measured so far, and the four measurements in their order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from zops.bench.machine import describe_machine, describe_model
from zops.bench.result import Better, Figure, Result, Table, case_id
from zops.cache.layout import find, is_verified, meant
from zops.cache.manifest import read_manifest
from zops.errors import UsageError, ZopsError
from zops.events import Finished, Report, Warned, task
from zops.health.client import Client
from zops.spec import Spec

Part = Literal["load", "generate", "serve", "cache"]
# The cache comes last: it makes the page cache cold, which the others want warm.
PARTS: tuple[Part, ...] = ("load", "generate", "serve", "cache")
SMALL_MODEL = 100_000_000
"""Parameters below which a model is the synthetic tiny one, and images are tiny too."""

Case = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        spec: for the instance that `serve` starts.
        snapshot: the model; None only with `url`, whose instance tells what it serves.
        slim: the same model slim, None where there is none.
        only: texts, one of which a case's name must contain; empty for all cases.
        quick: fewer cases and runs: minutes become one, and noise more.
        url: an instance that runs, for `serve`; one is started where it is None.
    """

    spec: Spec
    snapshot: Path | None
    slim: Path | None = None
    only: tuple[str, ...] = ()
    quick: bool = False
    url: str | None = None

    @property
    def full(self) -> Path:
        """The snapshot, where there must be one."""
        assert self.snapshot, "all parts but serve are measured on a snapshot"
        return self.snapshot

    @property
    def snapshots(self) -> dict[str, Path]:
        """Return the snapshots by what their weights are: `full`, and `slim` where there is one."""
        return {"full": self.full} | ({"slim": self.slim} if self.slim else {})


@dataclass
class Bench:
    """A run as its measurements see it."""

    request: Request
    result: Result
    report: Report
    save: Callable[[Result], None] = lambda _result: None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether the model is a tiny one."""
        return int(self.result.model["parameters"]) < SMALL_MODEL

    @property
    def on_gpu(self) -> bool:
        """Whether this host has a GPU."""
        return bool(self.result.machine["gpus"])

    def wants(self, table: Table, case: Case) -> bool:
        """Tell whether a case is asked for."""
        name = case_id(table, case)
        return not self.request.only or any(text in name for text in self.request.only)

    def add(
        self,
        table: Table,
        case: Case,
        quantity: str,
        samples: Sequence[float],
        *,
        unit: str,
        better: Better,
        method: str,
    ) -> None:
        """Take a figure and save what there is."""
        self.result.add(Figure(table, dict(case), quantity, unit, tuple(samples), better, method))
        self.save(self.result)

    def skip(self, table: Table, case: Case, reason: str) -> None:
        """Take that a case was not measured, and say so."""
        self.report(Warned(f"{case_id(table, case)} was not measured: {reason}"))
        self.result.skip(table, case, reason)
        self.save(self.result)

    @contextmanager
    def attempt(self, table: Table, case: Case, text: str) -> Iterator[None]:
        """Report a case as a piece of work; one that fails with an error for people is skipped, the next may do."""
        name = case_id(table, case)
        try:
            with task(self.report, name, text, unit=""):
                yield
        except ZopsError as error:
            self.report(Finished(name, text, 0.0, changed=False))  # or a bar of it would stay
            self.skip(table, case, error.message)


def measure(
    request: Request, parts: Sequence[Part], report: Report, save: Callable[[Result], None] = lambda _result: None
) -> Result:
    """Measure parts and return the result; Ctrl-C ends it early and keeps what was measured (`complete` is False).

    Args:
        request: what is to be measured.
        parts: which of the four, in the order of `PARTS`.
        report: told of the progress.
        save: given the result as it grows, so that not even a crash loses it.

    Raises:
        SnapshotMissing: when there is no model.
        UsageError: when no case is left by `only`.
    """
    result = Result(describe_machine(request.snapshot), _model(request), quick=request.quick)
    bench = Bench(request, result, report, save)
    try:
        for part in (part for part in PARTS if part in parts):
            import_module(f"zops.bench.{part}").measure(bench)
    except KeyboardInterrupt:
        result.finish(complete=False)
    except BaseException:
        result.finish(complete=False)
        save(result)
        raise
    else:
        result.finish(complete=True)
        if not result.figures and not result.skipped:
            raise UsageError(
                f"no case is named like {', '.join(request.only) or 'anything'}",
                hint="a name is as the id in a result: load/zops/full/warm; --only warm takes all that have that in it",
            )
    save(result)
    return result


def _model(request: Request) -> Mapping[str, Any]:
    """Return the facts of the model: from the snapshot or, without one, from the instance that serves it."""
    if request.snapshot:
        return describe_model(request.snapshot)
    assert request.url, "one of them is there"
    told = Client(request.url).info()
    name = str(told.get("model") or "")
    size = {"parameters": 0 if "tiny" in name else SMALL_MODEL, "weight_bytes": 0}
    keys = ("revision", "manifest_digest", "device", "dtype")
    return {"model": name, "synthetic": "synthetic" in name, **{key: told.get(key) for key in keys}, **size}


def find_snapshots(spec: Spec, snapshot: Path | None, slim: Path | None) -> tuple[Path, Path | None]:
    """Return the full snapshot to measure, and its slim one where the cache has it.

    Raises:
        SnapshotMissing: when the cache has none.
        UsageError: when the slim snapshot is not one of this model.
    """
    chosen = snapshot.absolute() if snapshot else meant(spec.model_copy(update={"gpus": "none"})).path
    manifest = read_manifest(chosen)
    if slim:
        own = read_manifest(slim)
        if own is None or not own.derived or manifest is None or own.parent != manifest.digest:
            raise UsageError(
                f"{slim} is no slim snapshot of {chosen}", hint="make one with: zops cache slim, or leave --slim out"
            )
        return chosen, slim.absolute()
    if manifest is None:
        return chosen, None
    for each in find(spec.cache.dir, manifest.model):
        other = read_manifest(each.path)
        if other and other.derived and other.parent == manifest.digest and is_verified(each.path):
            return chosen, each.path
    return chosen, None

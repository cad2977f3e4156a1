"""The result of a bench: figures with how each was measured, on what, and what was left out; one JSON document.

Figures are flat and named, so that two documents are compared by name alone. Format: docs/reference/bench.md.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from zops import __version__
from zops.bench.statistics import Summary, summarise
from zops.errors import UsageError, ZopsError

FORMAT = 1
Better = Literal["less", "more", "neither"]
Table = Literal["load", "precision", "sizes", "serve", "gpus", "parallel", "cache", "roofline"]


@dataclass(frozen=True)
class Figure:
    """One thing that was measured, a number of times.

    Attributes:
        table: which table it belongs to.
        case: what was varied, in the order in which it is read: `{"way": "zops", "page cache": "warm"}`.
        quantity: what it is, for example `time` or `GPU memory`.
        unit: of the samples; bytes are in `GB` (10^9).
        samples: every measurement, in the order they were taken. Infinite PSNR means equal images.
        better: which direction is.
        method: how it was measured.
    """

    table: Table
    case: Mapping[str, str]
    quantity: str
    unit: str
    samples: tuple[float, ...]
    better: Better = "less"
    method: str = ""

    @property
    def id(self) -> str:
        """Its name, the same in every result: `load/zops/warm/time`."""
        return "/".join((case_id(self.table, self.case), self.quantity))

    @cached_property
    def summary(self) -> Summary:
        """What the samples say together."""
        return summarise(self.samples)

    @property
    def value(self) -> float:
        """The median."""
        return self.summary.median

    def as_json(self) -> dict[str, Any]:
        """Return it as documented, rounded to what a clock can tell."""
        found = self.summary
        return {
            "id": self.id,
            "table": self.table,
            "case": dict(self.case),
            "quantity": self.quantity,
            "unit": self.unit,
            "better": self.better,
            "value": _finite(found.median),
            "n": found.n,
            "least": _finite(found.least),
            "most": _finite(found.most),
            "p99": _finite(found.p99),
            "spread": _finite(found.spread),
            "samples": [_finite(sample) for sample in self.samples],
            "method": self.method,
        }


@dataclass(frozen=True)
class Skipped:
    """A case that was not measured, and why."""

    table: Table
    case: Mapping[str, str]
    reason: str

    @property
    def id(self) -> str:
        """Its name."""
        return case_id(self.table, self.case)

    def as_json(self) -> dict[str, Any]:
        """Return it as documented."""
        return {"id": self.id, "table": self.table, "case": dict(self.case), "reason": self.reason}


def case_id(table: Table, case: Mapping[str, str]) -> str:
    """Return the name of a case: its table and what was varied."""
    return "/".join((table, *case.values()))


@dataclass
class Result:
    """Everything that one run measured; grows while it runs.

    `complete` is False until the run reached its end: what was measured until then counts all the same.
    """

    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    zops: str = __version__
    quick: bool = False
    complete: bool = False
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic, repr=False)

    def add(self, figure: Figure) -> None:
        """Take a figure."""
        self.figures.append(figure)

    def skip(self, table: Table, case: Mapping[str, str], reason: str) -> None:
        """Take that a case was not measured."""
        self.skipped.append(Skipped(table, dict(case), reason))

    def finish(self, *, complete: bool) -> None:
        """Set how it ended and how long it took."""
        self.complete, self.seconds = complete, time.monotonic() - self._began

    def of(self, table: Table, quantity: str = "") -> list[Figure]:
        """Return the figures of a table, of one quantity where one is named."""
        return [f for f in self.figures if f.table == table and quantity in {"", f.quantity}]

    def find(self, table: Table, quantity: str, **case: str) -> Figure | None:
        """Return the first figure of a quantity whose case has these values."""
        wanted = {key.replace("_", " "): value for key, value in case.items()}
        found = (f for f in self.of(table, quantity) if wanted.items() <= f.case.items())
        return next(found, None)

    def as_json(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "format": FORMAT,
            "zops": self.zops,
            "created_at": self.created_at,
            "seconds": round(self.seconds, 1),
            "complete": self.complete,
            "quick": self.quick,
            "machine": dict(self.machine),
            "model": dict(self.model),
            "figures": [figure.as_json() for figure in self.figures],
            "skipped": [each.as_json() for each in self.skipped],
        }

    @classmethod
    def from_json(cls, body: Any, name: str = "the document") -> "Result":
        """Read a document; it may come from anywhere.

        Raises:
            ZopsError: `bench-result-invalid`, naming it and what is wrong.
        """
        try:
            if body["format"] != FORMAT:
                raise _invalid(name, f"it has format {body['format']!r}, this zops reads format {FORMAT}")
            return cls(
                machine=dict(body["machine"]),
                model=dict(body["model"]),
                created_at=datetime.fromisoformat(body["created_at"]).isoformat(timespec="seconds"),
                zops=str(body["zops"]),
                quick=bool(body["quick"]),
                complete=bool(body["complete"]),
                seconds=float(body["seconds"]),
                figures=[_figure(each) for each in body["figures"]],
                skipped=[Skipped(_table(e["table"]), _case(e["case"]), str(e["reason"])) for e in body["skipped"]],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _invalid(name, f"{type(error).__name__}: {error}") from None


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        UsageError: when there is none that can be read.
        ZopsError: `bench-result-invalid` when it is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _invalid(str(path), "it is no text") from None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid(str(path), "it is no JSON") from None
    return Result.from_json(body, str(path))


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, over one that is there.

    Raises:
        ZopsError: `file-not-written` when it cannot be.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise ZopsError(f"{path} cannot be written: {error.strerror}", code="file-not-written") from error
    finally:
        part.unlink(missing_ok=True)


def write_result(path: Path, result: Result) -> None:
    """Write a result file.

    Raises:
        ZopsError: when it cannot be written.
    """
    write_file(path, json.dumps(result.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def merged(results: Iterable[Result]) -> Result:
    """Return one result of several of the same host and model: of each table, the figures of the last that has it."""
    chosen: dict[Table, Result] = {}
    results = sorted(results, key=lambda result: result.created_at)
    for result in results:
        chosen |= dict.fromkeys({f.table for f in result.figures} | {s.table for s in result.skipped}, result)
    last = results[-1]
    whole = Result(last.machine, last.model, last.created_at, last.zops, quick=any(r.quick for r in results))
    whole.complete, whole.seconds = all(r.complete for r in results), sum(r.seconds for r in results)
    for table, result in chosen.items():
        whole.figures += [figure for figure in result.figures if figure.table == table]
        whole.skipped += [each for each in result.skipped if each.table == table]
    return whole


def _figure(body: Mapping[str, Any]) -> Figure:
    better = body["better"]
    if better not in get_args(Better):
        raise ValueError(f"better is {better!r}")
    samples = tuple(math.inf if sample is None else float(sample) for sample in body["samples"])
    if not samples or any(math.isnan(sample) for sample in samples):
        raise ValueError(f"{body['id']} has no samples, or ones that are no numbers")
    names = (str(body["quantity"]), str(body["unit"]))
    return Figure(_table(body["table"]), _case(body["case"]), *names, samples, better, str(body["method"]))


def _table(name: Any) -> Table:
    if name not in get_args(Table):
        raise ValueError(f"there is no table {name!r}")
    return name  # type: ignore[no-any-return] # it was just looked up


def _case(body: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in body.items()}


def _finite(value: float) -> float | None:
    """Return a number to six digits; JSON has no infinity, so that is null (PSNR of equal images)."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _invalid(name: str, why: str) -> ZopsError:
    return ZopsError(f"{name} is no result of zops bench: {why[:200]}", code="bench-result-invalid")

"""Which archives to keep: rules over what their names tell; nothing here touches a store but `prune`."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo

from zops.archive.chain import bases, is_complete
from zops.archive.names import ArchiveInfo
from zops.archive.store import Store
from zops.errors import UsageError
from zops.events import Report, silent, task

_PERIODS: dict[str, Callable[[datetime], object]] = {
    "daily": lambda at: at.date(),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: at.year,
}
_RULE = re.compile(r"(last|daily|weekly|monthly|yearly)=([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Keep:
    """How many archives of each model to keep: the last ones, and the last one of each of so many days, weeks, ...

    Periods in which no archive was made do not count, so a host that was off for a month loses nothing by it.
    """

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Read rules as `last=7,daily=7,weekly=4,monthly=6`.

        Raises:
            UsageError: when they are written in another way, come twice or keep nothing.
        """
        matches = [_RULE.fullmatch(part.strip()) for part in text.split(",")]
        counts = {match[1]: int(match[2]) for match in matches if match}
        if None in matches or len(counts) < len(matches) or not any(counts.values()):
            raise UsageError(
                f"{text!r} does not say what to keep",
                hint="write it as last=7,daily=7,weekly=4,monthly=6; at least one of them above 0",
            )
        return cls(**counts)

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name))


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an archive; without reasons to keep it, it goes."""

    archive: ArchiveInfo
    reasons: tuple[str, ...]
    removed: bool = False

    @property
    def kept(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)


def decide(
    archives: Sequence[ArchiveInfo],
    keep: Keep,
    *,
    models: Collection[str] | None = None,
    zone: tzinfo | None = None,
    bad: Collection[str] = (),
) -> tuple[Decision, ...]:
    """Decide about every archive of a store, the youngest first, so that one goes before what it builds on.

    An archive of several models stays when it must for any of them. The youngest good one of a model always stays, and
    so does all that one that stays builds on.

    Args:
        archives: all that the store lists.
        keep: the rules.
        models: whose archives may go; one that holds another model too stays. None for all of them.
        zone: whose days and weeks they are; the host's when None.
        bad: names of archives that are known to be damaged: they count for no rule, and go when nothing needs them.
    """
    youngest = sorted(archives, key=lambda info: (info.created, info.name), reverse=True)
    reasons: dict[str, list[str]] = {info.name: [] for info in youngest}
    for model in sorted({model for info in youngest for model, _ in info.snapshots}):
        held = [info for info in youngest if model in {m for m, _ in info.snapshots}]
        if models is not None and model not in models:
            for info in held:
                reasons[info.name].append(f"holds {model}")
            continue
        good = [info for info in held if info.name not in bad and is_complete(info, archives)]
        # Where nothing is known to be good, the best guess is everything that is not known to be bad.
        good = good or [info for info in held if info.name not in bad] or held[:1]
        for reason, info in _rules(good, keep, zone):
            if reason not in reasons[info.name]:
                reasons[info.name].append(reason)
    # From the youngest on, so that a base that is kept for another archive keeps its own base too.
    for info in youngest:
        if reasons[info.name]:
            for base in bases(info, archives):
                reasons[base.name].append(f"{info.name} builds on it")
    return tuple(Decision(info, tuple(reasons[info.name])) for info in youngest)


def prune(store: Store, decisions: Iterable[Decision], report: Report = silent) -> tuple[Decision, ...]:
    """Remove the archives that need not be kept, and return all decisions as they were carried out.

    Raises:
        SourceFailed, HostShort: when the store refuses; what was removed until then is.
    """
    decisions = tuple(decisions)
    done = []
    with task(report, "prune", f"pruning {store.location}", total=len(decisions), unit="archives") as progress:
        for decision in decisions:
            if not decision.kept:
                store.delete(decision.archive.name)
            done.append(Decision(decision.archive, decision.reasons, removed=not decision.kept))
            progress.advance(1)
    return tuple(done)


def _rules(youngest: Sequence[ArchiveInfo], keep: Keep, zone: tzinfo | None) -> Iterable[tuple[str, ArchiveInfo]]:
    """Yield each rule that keeps an archive of one model, with that archive."""
    yield "newest", youngest[0]
    for number, info in enumerate(youngest[: keep.last], 1):
        yield f"last {number}", info
    for name, period in _PERIODS.items():
        seen: list[object] = []
        for info in youngest:
            when = period(info.created.astimezone(zone))
            if when not in seen and len(seen) < getattr(keep, name):
                seen.append(when)
                yield f"{name} {len(seen)}", info


__all__ = ["Decision", "Keep", "decide", "prune"]

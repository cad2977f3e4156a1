"""What every part of the watch shares: its orders, its clock, and whom it tells."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zops.host.fences import Fence
from zops.spec import Spec
from zops.watch.case import Rhythm
from zops.watch.events import Occurrence, Tell
from zops.watch.healing import Policy
from zops.watch.metrics import Figures

# These answer from memory. Two of them that hang and the pauses between them are to fit into two intervals.
PROBE_TIMEOUT_S = 5.0
PROBE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Orders:
    """How the watch works. In a dry run, and without `heal`, it only says what it would do."""

    rhythm: Rhythm = field(default_factory=Rhythm)
    policy: Policy = field(default_factory=Policy)
    heal: bool = True
    dry_run: bool = False
    startup_timeout_s: float = 900.0
    request_timeout_s: float = 120.0

    @property
    def probe_timeout_s(self) -> float:
        """Longest time for one question."""
        return min(PROBE_TIMEOUT_S, max(PROBE_SHARE * self.rhythm.interval_s, 0.2))

    @property
    def touches(self) -> bool:
        """Whether anything is changed at all."""
        return self.heal and not self.dry_run


def orders_of(spec: Spec, *, interval_s: float | None = None, heal: bool = True, dry_run: bool = False) -> Orders:
    """Return the orders in a specification.

    Args:
        spec: the specification.
        interval_s: instead of `watch.interval_s`.
        heal: False: only report, whatever `watch.heal` says.
        dry_run: only say what would be done.
    """
    watch = spec.watch
    return Orders(
        rhythm=Rhythm(
            interval_s=interval_s or watch.interval_s,
            jitter=watch.jitter,
            canary_every_s=watch.canary_every_s,
            failures=watch.failures,
            of=watch.of,
        ),
        policy=Policy(
            first_pause_s=watch.first_pause_s,
            longest_pause_s=watch.longest_pause_s,
            quiet_s=watch.quiet_s,
            budget=watch.budget,
        ),
        heal=heal and watch.heal,
        dry_run=dry_run,
        startup_timeout_s=spec.serve.startup_timeout_s,
        request_timeout_s=spec.serve.request_timeout_s,
    )


@dataclass(frozen=True, slots=True)
class Station:
    """Orders, figures, the clock (seconds since the epoch), the fences that stand now, and whom to tell."""

    orders: Orders
    tell_event: Tell
    figures: Figures = field(default_factory=Figures)
    now: Callable[[], float] = time.time
    fences: Callable[[], tuple[Fence, ...]] = tuple

    def tell(self, kind: str, **facts: Any) -> None:
        """Tell that something happened; `facts` are those that the kind has."""
        self.figures.add("events_total", kind)
        self.tell_event(Occurrence(kind, self.now(), facts))

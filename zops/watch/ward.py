"""One instance under watch: asked, judged and, where it must be, healed. What is decided is in `case`."""

import random
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from zops.cache.manifest import read_manifest
from zops.errors import ZopsError
from zops.events import silent
from zops.health.probes import check_instance
from zops.health.verdict import Health
from zops.runtime.base import Instance, Runtime
from zops.watch.case import CANARY, Case, Change
from zops.watch.healing import OF_THE_SNAPSHOT, Action, Decision
from zops.watch.latch import Answer
from zops.watch.station import Station


class Ward:
    """An instance under watch.

    Args:
        case: what is known of it.
        runtime: where it runs; one that refuses to write where nothing may be touched.
        station: orders, clock and whom to tell.
        keep: writes down what was done.
        is_remote: whether the instance's address is another host's, so that it is asked from inside.
    """

    def __init__(
        self, case: Case, runtime: Runtime, station: Station, *, keep: Callable[[], None], is_remote: bool = False
    ) -> None:
        self.case = case
        self.due_at = 0.0
        self.busy = threading.Lock()
        """Held while it is visited."""
        self.is_settled = False
        """Whether everything was done about it that can be done now: what `--once` waits for."""
        self._runtime = runtime
        self._station = station
        self._keep = keep
        self._is_remote = is_remote
        self._held_off = ""

    @property
    def key(self) -> tuple[str, str]:
        """Runtime and name: what tells it from all others."""
        return self.case.runtime, self.case.name

    def visit(self) -> bool:
        """Probe once and do what follows from it; return whether the instance is still there.

        Raises:
            RuntimeUnreachable: when its engine cannot be talked to; nothing was judged.
        """
        now = self._station.now()
        instance = self._runtime.find(self.case.name)
        if instance is None:
            return False
        was = self.case.id
        if self.case.meet(instance.id):
            self._tell("instance-replaced", was=was)
        health, deep = self._examine(instance, now)
        answer = _answer(health, now)
        change = self.case.see(answer, deep=deep, patience_s=self._station.orders.startup_timeout_s)
        self._write_figures(health, now)
        if change:
            self._tell_change(change, health)
        self._act(instance, health, answer)
        self.due_at = now + self.case.pause_s(answer, random.random())  # noqa: S311 - spreads probes, guards nothing
        return True

    def put_off(self) -> None:
        """Plan the next probe after one that said nothing."""
        now = self._station.now()
        self.due_at = now + self.case.pause_s(None, random.random())  # noqa: S311 - as above

    # --- asking

    def _examine(self, instance: Instance, now: float) -> tuple[Health, bool]:
        """Return the health, and whether it says anything of a canary."""
        shallow = self._check(instance, deep=False)
        if shallow.verdict == "failed" or not self.case.wants_canary(now) or not self._may_paint(shallow):
            return shallow, False
        deep = self._check(instance, deep=True)
        probe = deep.probe(CANARY)
        self._station.figures.set("last_canary_timestamp_seconds", now, self.case.name, self.case.runtime)
        if probe is None:
            return deep, False
        said = not probe.evidence.get("skipped") and probe.code != "key-refused"
        if said:
            self._station.figures.set("canary_seconds", probe.seconds, self.case.name, self.case.runtime)
        return deep, said

    def _check(self, instance: Instance, *, deep: bool) -> Health:
        orders = self._station.orders
        serve = instance.traits.get("serve")
        limit = serve.get("request_timeout_s") if isinstance(serve, Mapping) else None
        return check_instance(
            instance,
            runtime=self._runtime,
            deep=deep,
            probe_timeout_s=orders.probe_timeout_s,
            canary_timeout_s=float(limit or orders.request_timeout_s),
            startup_timeout_s=orders.startup_timeout_s,
            ask=partial(self._runtime.ask, instance.name) if self._is_remote else None,
        )

    def _may_paint(self, health: Health) -> bool:
        """Tell whether a canary would disturb nobody: there is room in the queue, and nobody deploys."""
        ready = health.probe("ready")
        queue = ready.evidence.get("queue") if ready else None
        if isinstance(queue, Mapping):
            waiting, limit = queue.get("waiting"), queue.get("limit")
            if isinstance(waiting, int) and isinstance(limit, int) and waiting >= limit:
                return False
        if self._station.orders.dry_run:
            # A claim is a write, and a dry run has no hands.
            return True
        try:
            with self._runtime.claim(self.case.name, silent, timeout_s=0):
                return True
        except ZopsError:
            return False

    # --- doing

    def _act(self, instance: Instance, health: Health, answer: Answer) -> None:
        if self.case.interrupted and answer.code == "stopped" and not self._fenced_by(instance):
            # This watch, or the one before it, was ended between stopping it and starting it again.
            self._heal(instance, health, Decision("restart", "a heal was interrupted"))
            return
        decision = self.case.decide(self._station.now())
        if decision is None:
            self._held_off = ""
            self.is_settled = self.case.verdict is not None and not self.case.recovering and answer.gravity == 0
            return
        if decision.do == "give-up":
            self._give_up(decision)
        elif decision.do in {"restart", "recreate"}:
            self._heal(instance, health, decision)
        self.is_settled = True

    def _give_up(self, decision: Decision) -> None:
        if self.case.gave_up or self.case.problem is None:
            return
        self.case.gave_up = True
        self._tell(
            "gave-up",
            code=self.case.problem.code,
            reason=self.case.problem.reason,
            because=decision.why,
            heals=len(self.case.heals),
            retry_at=None if decision.until is None else _moment(decision.until),
        )

    def _heal(self, instance: Instance, health: Health, decision: Decision) -> None:
        action: Action = "recreate" if decision.do == "recreate" else "restart"
        if why := self._why_not(instance):
            self._hold_off(action, why)
            return
        if self._held_off and self.case.code in OF_THE_SNAPSHOT:
            # The host has it again, and what the instance saw of it may be older than that.
            self._held_off = ""
            self.case.look_again()
            return
        bad = health.first_bad
        facts = {
            "action": action,
            "code": self.case.problem.code if self.case.problem else health.code,
            "layer": bad.layer if bad else "",
            "reason": bad.reason if bad else (self.case.problem.reason if self.case.problem else ""),
            "because": decision.why,
            "evidence": bad.evidence if bad else {},
            "attempt": len(self.case.heals) + 1,
        }
        if not self._station.orders.touches:
            self._hold_off(action, "this watch only reports", "would-heal", facts)
            return
        self._carry_out(instance, action, facts)

    def _carry_out(self, instance: Instance, action: Action, facts: Mapping[str, Any]) -> None:
        began = self._station.now()
        try:
            with self._runtime.claim(instance.name, silent, timeout_s=0):
                self.case.begin(action, began)
                # Written down first: if this watch is ended in the middle, the next one knows.
                self._keep()
                self._tell("healing", **facts)
                self._carry_out_claimed(instance, action, facts)
        except ZopsError as error:
            # Somebody deploys, or nothing can be locked: nothing was touched.
            self._hold_off(action, error.message)

    def _carry_out_claimed(self, instance: Instance, action: Action, facts: Mapping[str, Any]) -> None:
        began = self._station.now()
        write = self._runtime.restart if action == "restart" else self._runtime.recreate
        try:
            healed = write(instance.name, silent)
        except ZopsError as error:
            self._end_heal(action, "failed")
            self._tell(
                "heal-failed",
                action=action,
                code=facts["code"],
                error_code=error.code,
                error=error.message,
                hint=error.hint,
                seconds=self._station.now() - began,
            )
        else:
            self._end_heal(action, "done", healed.id)

    def _end_heal(self, action: Action, result: str, instance_id: str = "") -> None:
        self._held_off = ""
        self.case.finish(self._station.now(), instance_id)
        self._keep()
        self._station.figures.add("heals_total", self.case.name, self.case.runtime, action, result)

    def _why_not(self, instance: Instance) -> str:
        """Return why this instance must not be healed now, empty when it may be."""
        if fence := self._fenced_by(instance):
            return f"its GPU {fence} is fenced"
        code = self.case.code
        if code in OF_THE_SNAPSHOT and not _host_has(instance):
            return f"{instance.snapshot} on this host is not what it must serve; see zops cache verify"
        return ""

    def _fenced_by(self, instance: Instance) -> str:
        if self._is_remote:
            return ""
        wanted = instance.traits.get("gpus", "none")
        return next((fence.name for fence in self._station.fences() if fence.hits(wanted)), "")

    def _hold_off(
        self, action: Action, because: str, kind: str = "held-off", facts: Mapping[str, Any] | None = None
    ) -> None:
        """Say once why nothing is done."""
        mark = f"{kind} {action} {self.case.code} {because}"
        if mark == self._held_off:
            return
        self._held_off = mark
        self._tell(kind, **(facts or {"action": action, "code": self.case.code, "because": because}))

    # --- telling

    def _tell_change(self, change: Change, health: Health) -> None:
        bad = health.first_bad
        self._tell(
            "verdict",
            verdict=change.verdict,
            was=change.was,
            layer=change.answer.layer,
            code=change.answer.code,
            reason=change.answer.reason,
            remedy=bad.remedy if bad else "",
            evidence=bad.evidence if bad else {},
        )
        heal = change.healed
        if heal:
            self._keep()
            figures, now = self._station.figures, self._station.now()
            figures.set("recovery_seconds", now - heal.at, self.case.name, self.case.runtime)
            self._tell(
                "healed",
                action=heal.action,
                code=heal.code,
                heals=len(self.case.heals),
                seconds=now - heal.at,
                fault_seconds=now - heal.problem_since,
            )

    def _write_figures(self, health: Health, now: float) -> None:
        case, figures = self.case, self._station.figures
        figures.set("last_probe_timestamp_seconds", now, case.name, case.runtime)
        seconds = sum(probe.seconds for probe in health.probes if probe.layer != CANARY)
        figures.set("probe_seconds", seconds, case.name, case.runtime)
        figures.set("gave_up", case.gave_up, case.name, case.runtime)
        if case.verdict:
            figures.judge(case.name, case.runtime, case.verdict, case.layer, case.code)

    def _tell(self, kind: str, **facts: Any) -> None:
        self._station.tell(kind, instance=self.case.name, runtime=self.case.runtime, id=self.case.id, **facts)


def _answer(health: Health, now: float) -> Answer:
    bad = health.first_bad
    if bad is None:
        return Answer(now, "ok")
    return Answer(now, bad.verdict, bad.code, bad.layer, bad.reason)


def _host_has(instance: Instance) -> bool:
    """Tell whether the snapshot that an instance mounts is on this host: its manifest, and every file in its size."""
    snapshot = Path(instance.snapshot)
    try:
        manifest = read_manifest(snapshot)
        return (
            manifest is not None
            and manifest.digest == instance.manifest_digest
            and all((snapshot / entry.path).stat().st_size == entry.size for entry in manifest.files)
        )
    except (ZopsError, OSError):
        return False


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")

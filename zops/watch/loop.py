"""The loop: finds instances, sends each its visitor when it is due, and never waits for any of them.

Each visit, each listing and each look at the GPUs has a thread of its own, a daemon: one that hangs delays nobody, and
nothing of it keeps the watch from ending.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zops.errors import RuntimeUnreachable, ZopsError
from zops.host.paths import state_dir
from zops.runtime.base import Instance, Runtime
from zops.watch.case import Case
from zops.watch.guard import Guard
from zops.watch.healing import WINDOW_S, Heal
from zops.watch.memory import Key, read_heals, write_heals
from zops.watch.station import Station
from zops.watch.ward import Ward

# How finely visits are timed.
TICK_S = 0.1
# Pauses between heals are counted over at most this; the budget over an hour.
KEEP_S = 24 * WINDOW_S


class Post:
    """One runtime under watch: its instances, and whether its engine answers.

    Args:
        name: of the runtime, as instances have it.
        runtime: the runtime; one that refuses to write where nothing may be touched.
        is_remote: whether it is another host's.
    """

    def __init__(self, name: str, runtime: Runtime, *, is_remote: bool = False) -> None:
        self.name = name
        self.runtime = runtime
        self.is_remote = is_remote
        self.busy = threading.Lock()
        """Held while its instances are listed."""
        self.due_at = 0.0
        self.lost_at: float | None = None
        """When its engine stopped answering."""
        self.listed = False
        """Whether it was asked once."""


class Watch:
    """Watches the instances of some runtimes until it is told to end.

    Args:
        posts: the runtimes.
        station: orders, clock and whom to tell.
        guard: of the GPUs; None where they are another host's.
        memory: the file of what was done; beside the state of this user by default.
    """

    def __init__(
        self, posts: Sequence[Post], station: Station, *, guard: Guard | None = None, memory: Path | None = None
    ) -> None:
        self._posts = posts
        self._station = station
        self._guard = guard
        self._memory = memory or state_dir() / "watch" / "heals.json"
        self._wards: dict[Key, Ward] = {}
        self._guard_busy = threading.Lock()
        self._guard_due_at = 0.0
        self._lock = threading.RLock()
        self._round_at = time.monotonic()
        self._said: set[str] = set()
        self._remembered, trouble = read_heals(self._memory)
        if trouble:
            self._warn_once(f"what was healed before is not known: {self._memory}: {trouble}")

    @property
    def age_s(self) -> float:
        """Seconds since the loop last came round."""
        return time.monotonic() - self._round_at

    def metrics(self) -> str:
        """Return the figures in Prometheus' text format."""
        self._station.figures.set("loop_age_seconds", round(self.age_s, 3))
        return self._station.figures.render()

    def run(self, *, once: bool = False) -> None:
        """Watch until the process is told to end, or, with `once`, until every verdict stands and was acted upon."""
        while not (once and self.is_settled):
            self.come_round()
            time.sleep(TICK_S)

    def come_round(self) -> None:
        """Send a visitor wherever one is due; returns at once."""
        now = self._station.now()
        self._round_at = time.monotonic()
        for post in self._posts:
            if now >= post.due_at:
                self._send(post.busy, self._list, post)
        if self._guard and now >= self._guard_due_at:
            self._send(self._guard_busy, self._look_at_gpus)
        for ward, post in self._due(now):
            self._send(ward.busy, self._visit, ward, post)

    @property
    def is_settled(self) -> bool:
        """Whether every runtime was asked, and everything was done about each instance that can be done now."""
        with self._lock:
            seen = all(post.listed for post in self._posts) and (self._guard is None or self._guard.has_looked)
            lost = {post.name for post in self._posts if post.lost_at is not None}
            return seen and all(ward.is_settled or ward.case.runtime in lost for ward in self._wards.values())

    @property
    def is_well(self) -> bool:
        """Whether every engine answers and every verdict is ok."""
        with self._lock:
            return all(post.lost_at is None for post in self._posts) and all(
                ward.case.verdict == "ok" for ward in self._wards.values()
            )

    # --- visits, each in a thread of its own

    def _due(self, now: float) -> list[tuple[Ward, Post]]:
        posts = {post.name: post for post in self._posts if post.lost_at is None}
        with self._lock:
            wards = list(self._wards.values())
        return [(ward, posts[ward.case.runtime]) for ward in wards if now >= ward.due_at and ward.case.runtime in posts]

    def _send(self, busy: threading.Lock, visit: Callable[..., None], *whom: object) -> None:
        """Start a visit unless the last one is still under way."""
        if not busy.acquire(blocking=False):
            return

        def run() -> None:
            try:
                visit(*whom)
            except Exception as error:  # noqa: BLE001 - a bug in one visit must not end the watch; it is told instead
                self._warn_once(f"a visit broke off: {type(error).__name__}: {error}")
            finally:
                busy.release()

        threading.Thread(target=run, name=visit.__name__, daemon=True).start()

    def _visit(self, ward: Ward, post: Post) -> None:
        ward.put_off()
        try:
            there = ward.visit()
        except RuntimeUnreachable as error:
            self._lose(post, error)
            return
        except ZopsError as error:
            self._warn_once(f"{ward.case.name} cannot be judged: {error.message}")
            return
        if not there:
            self._part(ward)

    def _list(self, post: Post) -> None:
        post.due_at = self._station.now() + self._station.orders.rhythm.interval_s
        try:
            instances = post.runtime.instances()
        except RuntimeUnreachable as error:
            self._lose(post, error)
            return
        except ZopsError as error:
            self._warn_once(f"the instances of {post.name} cannot be listed: {error.message}")
            return
        finally:
            post.listed = True
        self._find_again(post)
        for instance in instances:
            self._meet(instance, post)
        post.listed = True

    def _look_at_gpus(self) -> None:
        assert self._guard, "only sent where there is one"
        self._guard_due_at = self._station.now() + self._station.orders.rhythm.interval_s
        self._guard.look()
        if not self._guard.standing():
            return
        for post in self._posts:
            if not post.is_remote and post.lost_at is None:
                self._guard.clear(post.runtime, post.runtime.instances())

    # --- coming and going

    def _meet(self, instance: Instance, post: Post) -> None:
        with self._lock:
            key = (post.name, instance.name)
            if key in self._wards:
                return
            orders = self._station.orders
            known_id, heals = self._remembered.pop(key, ("", []))
            case = Case(instance.name, post.name, orders.rhythm, orders.policy, list(heals), id=known_id)
            self._wards[key] = Ward(case, post.runtime, self._station, keep=self._keep, is_remote=post.is_remote)
        self._tell_of("instance-found", instance, post, state=instance.state, url=instance.url)

    def _part(self, ward: Ward) -> None:
        with self._lock:
            self._wards.pop(ward.key, None)
        case = ward.case
        self._station.figures.forget(case.name, case.runtime)
        self._station.tell("instance-gone", instance=case.name, runtime=case.runtime, id=case.id)

    def _lose(self, post: Post, error: ZopsError) -> None:
        with self._lock:
            if post.lost_at is not None:
                return
            post.lost_at = self._station.now()
        self._station.figures.set("engine_reachable", 0, post.name)
        self._station.tell(
            "engine-unreachable", runtime=post.name, error_code=error.code, error=error.message, hint=error.hint
        )

    def _find_again(self, post: Post) -> None:
        with self._lock:
            lost_at, post.lost_at = post.lost_at, None
        self._station.figures.set("engine_reachable", 1, post.name)
        if lost_at is not None:
            self._station.tell("engine-reachable", runtime=post.name, seconds=self._station.now() - lost_at)

    def _tell_of(self, kind: str, instance: Instance, post: Post, **facts: object) -> None:
        self._station.tell(kind, instance=instance.name, runtime=post.name, id=instance.id, **facts)

    # --- memory

    def _keep(self) -> None:
        """Write down what was done to whom; in a dry run nothing was."""
        if self._station.orders.dry_run:
            return
        now = self._station.now()
        with self._lock:
            known = dict(self._remembered)
            for key, ward in self._wards.items():
                known[key] = (ward.case.id, [heal for heal in ward.case.heals if _young(heal, now)])
            trouble = write_heals(self._memory, known)
        if trouble:
            self._warn_once(f"what is healed cannot be written down: {self._memory}: {trouble}")

    def _warn_once(self, text: str) -> None:
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        self._station.tell("warning", text=text)


def _young(heal: Heal, now: float) -> bool:
    return now - heal.at < KEEP_S

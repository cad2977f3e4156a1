"""`zops watch` as a whole: puts the parts together, keeps a second watch away, and ends when it is told to."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

from zops.errors import LockHeld, RuntimeUnreachable, UsageError
from zops.events import silent
from zops.runtime.base import ReadOnly, Runtime
from zops.runtime.claim import claim
from zops.runtime.process import ProcessRuntime
from zops.runtime.select import is_remote, open_runtime
from zops.spec import Spec
from zops.watch.events import EventFile, Mailbox, Occurrence, Tell
from zops.watch.guard import Guard
from zops.watch.loop import Post, Watch
from zops.watch.page import serve_page
from zops.watch.station import Orders, Station
from zops.watch.webhook import Webhook, find_url

# What a watch that ends may spend on what it still has to say.
LAST_WORDS_S = 0.5
ONCE_WORDS_S = 15.0


def watch(
    spec: Spec,
    orders: Orders,
    tell: Tell,
    *,
    once: bool = False,
    listen: str = "",
    events: Path | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> bool:
    """Watch the instances of this host until the process is interrupted; return whether all of them were well.

    Args:
        spec: which engine, and where the webhook's URL is.
        orders: how.
        tell: gets every event.
        once: end when every verdict stands and was acted upon.
        listen: HOST:PORT of /metrics and /livez; none when empty.
        events: a file that gets every event as a line of JSON.
        said: is told where the page is.

    Raises:
        UsageError: `watch-elsewhere` for a runtime whose instances are watched by others.
        LockHeld: when another watch runs on this host.
        HostShort: when the page cannot be served there.
        SpecError: when what should be the webhook's URL is none.
    """
    if spec.runtime == "kubernetes":
        raise UsageError(
            "in a cluster its own probes restart what is unhealthy; zops watch is for docker and process",
            code="watch-elsewhere",
            hint="see what they say with: kubectl get pods",
        )
    # An interrupt is how a watch ends, whenever it comes.
    with suppress(KeyboardInterrupt):
        return _watch(spec, orders, tell, once=once, listen=listen, events=events, said=said)
    return not once


def _watch(
    spec: Spec,
    orders: Orders,
    tell: Tell,
    *,
    once: bool,
    listen: str,
    events: Path | None,
    said: Callable[[str], None],
) -> bool:
    url = find_url(spec.watch.webhook_file)
    with ExitStack() as stack:
        if not orders.dry_run:
            stack.enter_context(_alone())
        boxes = [Mailbox(tell, "tell")]
        if events:
            boxes.append(Mailbox(EventFile(events), "event-file"))
        webhook = Mailbox(Webhook(url), "webhook", size=256) if url else None
        boxes += [webhook] if webhook else []
        patience_s = ONCE_WORDS_S if once else LAST_WORDS_S
        stack.callback(lambda: [box.drain(patience_s if box is not webhook or once else 0) for box in boxes])
        loop, station = _set_up(spec, orders, boxes)

        def metrics() -> str:
            for result, count in (webhook.counts if webhook else {}).items():
                station.figures.set("webhook_events_total", count, result)
            return loop.metrics()

        if listen:
            page = serve_page(listen, metrics=metrics, age_s=lambda: loop.age_s, interval_s=orders.rhythm.interval_s)
            said(stack.enter_context(page))
        began = time.monotonic()
        try:
            loop.run(once=once)
        finally:
            station.tell("watch-stopped", seconds=time.monotonic() - began)
        return loop.is_well


def _set_up(spec: Spec, orders: Orders, boxes: list[Mailbox]) -> tuple[Watch, Station]:
    guards: list[Guard] = []

    def tell_all(occurrence: Occurrence) -> None:
        for box in boxes:
            box(occurrence)

    station = Station(orders, tell_all, fences=lambda: guards[0].standing() if guards else ())
    posts = _posts(spec, dry_run=orders.dry_run)
    if not all(post.is_remote for post in posts):
        guards.append(Guard(station))
    station.figures.set("dry_run", orders.dry_run)
    station.tell(
        "watch-started",
        interval_s=orders.rhythm.interval_s,
        heal=orders.heal,
        dry_run=orders.dry_run,
        runtimes=[post.name for post in posts],
    )
    return Watch(posts, station, guard=guards[0] if guards else None), station


def _posts(spec: Spec, *, dry_run: bool) -> list[Post]:
    def fit(runtime: Runtime) -> Runtime:
        return cast("Runtime", ReadOnly(runtime)) if dry_run else runtime

    posts = [Post("process", fit(ProcessRuntime()))]
    if spec.runtime == "docker":
        posts.insert(0, Post("docker", fit(open_runtime(spec)), is_remote=_is_elsewhere(spec)))
    return posts


def _is_elsewhere(spec: Spec) -> bool:
    try:
        return is_remote(spec)
    except RuntimeUnreachable:
        # Its post says so with each listing; nothing of it is known to be this host's.
        return True


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a second watch away; its lock lies where those of deployments do."""
    with ExitStack() as stack:
        try:
            stack.enter_context(claim("watch", "zops-watch", silent, timeout_s=0))
        except LockHeld as error:
            holder = error.message.partition(" by ")[2]
            raise LockHeld(
                f"another zops watch runs on this host: {holder}",
                code="watch-running",
                hint="use that one, or see what this one would do with: zops watch --dry-run",
                lock=error.details.get("lock"),
            ) from error
        yield

"""The doctor's checks of what lies beyond this host: the hub or mirror, and the time it thinks it is."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import zops
from zops.host.context import Context
from zops.host.doctor import Check, Finding, fail, ok, skipped, unseen, warn
from zops.host.hub import Silence

# S3 refuses requests whose time is further off than this (RequestTimeTooSkewed), and tokens begin to be refused.
REFUSED_SKEW_S = 15 * 60
NOTICED_SKEW_S = 30
# Without anybody to ask: a clock that stands before our own files were written breaks TLS.
CLOCK_TOLERANCE_S = 86_400
SYNCHRONISED = (Path("/run/systemd/timesync/synchronized"), Path("/run/chrony/chronyd.pid"), Path("/run/ntpd.pid"))
SET_CLOCK = ("timedatectl", "set-ntp", "true")


def _clock(context: Context) -> Finding:
    """The clock against the hub's, against the age of zops itself, and whether a time service keeps it."""
    now, written = time.time(), Path(zops.__file__).stat().st_mtime
    seen = {"now": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")}
    remedy = f"sudo {' '.join(SET_CLOCK)}"
    if now < written - CLOCK_TOLERANCE_S:
        reason = "the clock stands before zops was installed: certificates will be refused"
        return fail(reason, remedy, **seen).fixed_by(*SET_CLOCK)
    ahead = _ahead(context)
    if ahead is not None and abs(ahead) > NOTICED_SKEW_S:
        reason = f"the clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the hub's"
        judge = fail if abs(ahead) > REFUSED_SKEW_S else warn
        return judge(reason, remedy, **seen, ahead_s=round(ahead)).fixed_by(*SET_CLOCK)
    keeper = next((str(path) for path in SYNCHRONISED if path.exists()), None)
    if keeper:
        return ok("the clock is kept by a time service", **seen, seen=keeper)
    if ahead is not None:
        return ok(f"the clock and the hub's differ by {abs(ahead):.0f} s", **seen, ahead_s=round(ahead))
    return unseen("nothing here says whether the clock is synchronised, and no hub told its time")


def _ahead(context: Context) -> float | None:
    """Return how far our clock is ahead of the hub's, None where no hub is asked or none tells."""
    answer = context.hub if context.asks_hub else None
    return None if answer is None or isinstance(answer, Silence) else answer.ahead_s


def _hub(context: Context) -> Finding:
    """Whether the hub or mirror answers and takes our token, where the cache still lacks files."""
    need, source = context.need, context.spec.source
    if not context.asks_hub:
        why = "nothing is missing in the cache" if need.hub else f"source.kind is {source.kind}"
        return skipped(f"{why}, no hub is needed")
    answer = context.hub
    seen = {"url": need.hub, "token": bool(need.authorization)}
    # What can be had elsewhere, or perhaps in a minute, is no reason to stop.
    if isinstance(answer, Silence):
        remedy = f"curl -sS -m 5 -o /dev/null {need.hub}; behind a firewall set source.endpoint to a mirror"
        return warn(f"{source.kind} does not answer: {answer.reason}", remedy, **seen)
    seen |= {"status": answer.status, "seconds": round(answer.seconds, 3)}
    if answer.status < 400:
        return ok(f"{source.kind} answers in {answer.seconds:.1f} s", **seen)
    return _refused(context, answer.status, seen)


def _refused(context: Context, status: int, seen: Mapping[str, object]) -> Finding:
    need, source = context.need, context.spec.source
    if status in {401, 403}:
        variable = "MODELSCOPE_API_TOKEN" if source.kind == "modelscope" else "HF_TOKEN"
        what = "refuses our token" if need.authorization else "wants a token"
        judge = warn if need.has_other_source else fail
        remedy = f"set {variable} to a token that may read {context.spec.model}"
        return judge(f"{source.kind} {what} (HTTP {status})", remedy, **seen)
    if status == 404:
        remedy = "check model and source.endpoint with: zops config show --origin"
        return warn(f"{source.kind} does not know {context.spec.model} (HTTP 404)", remedy, **seen)
    return warn(f"{source.kind} answers with HTTP {status}", "try again later, or set source.endpoint", **seen)


NETWORK_CHECKS: tuple[Check, ...] = (Check("clock", "clock", _clock), Check("hub", "hub or mirror", _hub))

"""The doctor's questions about backups: is there a young one, and was one of them ever restored."""

from datetime import UTC, datetime, timedelta

from zops.archive.history import History, read_history_in_time
from zops.host.context import Context
from zops.host.doctor import Check, Finding, ok, skipped, warn


def _age(context: Context) -> Finding:
    """Looks at the date of the model's newest archive in `backup.to` against `backup.max_age_days`."""
    spec = context.spec
    history = _history(context)
    if isinstance(history, Finding):
        return history
    newest = history.newest
    if newest is None:
        return warn(f"{spec.model} was never backed up into {spec.backup.to}", "zops cache backup")
    age = datetime.now(UTC) - newest.created
    seen = {"archive": newest.location, "age_s": round(age.total_seconds())}
    reason = f"the newest archive of {spec.model} is {_told(age)} old"
    if age > timedelta(days=spec.backup.max_age_days):
        limit = f"more than backup.max_age_days ({spec.backup.max_age_days:g})"
        return warn(f"{reason}, {limit}", "zops cache backup", **seen)
    return ok(reason, **seen)


def _drill(context: Context) -> Finding:
    """Looks whether one of the model's archives in `backup.to` was ever restored by a drill, and how that ended."""
    spec = context.spec
    history = _history(context)
    if isinstance(history, Finding):
        return history
    if history.newest is None:
        return skipped(f"there is no archive of {spec.model} to drill")
    drilled = history.drilled
    if drilled is None:
        return warn(
            f"no archive of {spec.model} was ever drilled, so nobody knows that it restores", "zops cache drill"
        )
    seen = {"archive": history.drilled_name, "at": drilled.at.isoformat()}
    if not drilled.ok:
        return warn(
            f"the last drill found {history.drilled_name} damaged", "zops cache backup && zops cache drill", **seen
        )
    return ok(
        f"{history.drilled_name} was restored {_told(datetime.now(UTC) - drilled.at)} ago, every byte right", **seen
    )


def _history(context: Context) -> History | Finding:
    backup = context.spec.backup
    if not backup.to:
        return skipped("backup.to names no store")
    history = read_history_in_time(backup.to, context.spec.model)
    return skipped(f"{backup.to} does not answer") if history is None else history


def _told(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"


BACKUP_CHECKS: tuple[Check, ...] = (
    Check("backup-age", "age of the backup", _age),
    Check("backup-drill", "proof of the backup", _drill),
)

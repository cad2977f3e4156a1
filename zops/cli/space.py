"""`zops cache slim` and `prune`: a smaller cache, without anything that somebody needs going away."""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli.options import Loaded, confirm, with_spec
from zops.cli.output import Output, duration, size
from zops.errors import SnapshotMissing

if TYPE_CHECKING:
    from zops.cache.remove import Used
    from zops.cache.slim import Slimmed, SlimPlan

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


@click.command()
@click.argument("snapshot", required=False, type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Then verify it deeply and remove its parent.")
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@click.option("--yes", is_flag=True, help="Do not ask before the parent is removed.")
@with_spec
def slim(*, snapshot: Path | None, replace: bool, dry_run: bool, yes: bool, loaded: Loaded, out: Output) -> None:
    """Derive a snapshot whose transformer is bfloat16 already: a third smaller, faster to load, the same images.

    Casts as the loader does, to the bit, and hashes everything on its way in and out. Goes on where an earlier run
    stopped. From then on the slim snapshot is served wherever weights are loaded as bfloat16.

    \b
    Examples:
      zops cache slim --dry-run
      zops cache slim
      zops cache slim --replace --yes
    """
    from zops.cache import slim as slimming  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.cache.layout import choose  # noqa: PLC0415

    spec = loaded.spec
    parent = (
        snapshot.absolute() if snapshot else choose(spec.cache.dir, spec.model, spec.source.revision, full=True).path
    )
    there = slimming.is_slim(parent)
    if there:
        out.data(_slim_json(there, removed=0), f"{there.path}\nis slim already")
        return
    plan = slimming.plan_slim(parent)
    if dry_run:
        out.data(_plan_json(plan), _plan_text(plan))
        return
    if replace:
        slimming.check_replaceable(parent, _asking(loaded))
        confirm(out, f"Remove {parent} ({size(plan.manifest.size)}) once its slim snapshot is verified?", yes=yes)
    with out.progress() as report:
        result = slimming.slim(plan, report)
        removed = slimming.replace_parent(result, _asking(loaded), report) if replace else 0
    out.data(_slim_json(result, removed), _slim_text(result, removed))


def _age_in_seconds(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float:
    """Turn a length of time as people write it into seconds; without one, everything is old enough."""
    match = re.fullmatch(r"(\d+)([mhdw])", text or "0m")
    if match is None:
        raise click.BadParameter(f"{text!r} is no age; write it as 90m, 12h, 7d or 2w")
    return float(match[1]) * _SECONDS[match[2]]


@click.command()
@click.option("--keep", type=click.IntRange(min=1), default=1, metavar="N", help="Revisions to keep (default: 1).")
@click.option("--older-than", callback=_age_in_seconds, metavar="AGE", help="Only what is older: 90m, 12h, 7d, 2w.")
@click.option("--all", "every", is_flag=True, help="Every model in the cache, not only the configured one.")
@click.option("--all-layouts", is_flag=True, help="Also what another tool fetched.")
@click.option("--yes", is_flag=True, help="Remove it; without, it is only listed.")
@with_spec
def prune(
    *, keep: int, older_than: float, every: bool, all_layouts: bool, yes: bool, loaded: Loaded, out: Output
) -> None:
    """List what of the cache could go, and with --yes remove it.

    Leftovers of what was never completed, snapshots that a newer verified one of the model supersedes, and parents of
    verified slim ones. Never what an instance has mounted or serves, what zops.yaml means, or the only verified
    snapshot of a model.

    \b
    Examples:
      zops cache prune
      zops cache prune --yes
      zops cache prune --all --keep 2 --older-than 7d --yes
    """
    from zops.cache import prune as pruning  # noqa: PLC0415 - the cache's modules are loaded when needed

    spec, ask = loaded.spec, _asking(loaded)
    rules = pruning.Rules(keep, older_than, all_layouts)
    wanted = _wanted(loaded)
    items = pruning.plan_prune(spec.cache.dir, None if every else spec.model, rules, used=ask(), wanted=wanted)
    if yes:
        with out.progress() as report:
            items = pruning.prune(items, ask, report)
    freed = sum(item.size for item in items if item.state != "spared")
    body = {"dry_run": not yes, "freed_bytes": freed, "items": [item.as_json() for item in items]}
    rows = [(item.state, item.kind, size(item.size), item.reason, str(item.path)) for item in items]
    out.table(("STATE", "KIND", "SIZE", "WHY", "PATH"), rows, body, empty="there is nothing to prune")
    if freed:
        out.note(f"{size(freed)} freed" if yes else f"{size(freed)} could be freed; add --yes to remove it")


def _wanted(loaded: Loaded) -> list[Path]:
    from zops.cache.layout import meant  # noqa: PLC0415 - the cache's modules are loaded when needed

    with suppress(SnapshotMissing):
        return [meant(loaded.spec).path]
    return []


def _asking(loaded: Loaded) -> "Callable[[], Used]":
    from zops.runtime.usage import used_snapshots  # noqa: PLC0415 - docker-py costs 100 ms

    return partial(used_snapshots, loaded.spec)


def _plan_json(plan: "SlimPlan") -> dict[str, object]:
    return {
        "dry_run": True,
        "path": str(plan.target),
        "model": plan.manifest.model,
        "revision": plan.revision,
        "parent": str(plan.parent),
        "parent_digest": plan.manifest.digest,
        "manifest_digest": None,
        "cast": sorted(plan.recasts),
        "size_bytes": plan.size,
        "parent_size_bytes": plan.manifest.size,
        "seconds": None,
        "changed": False,
        "removed_bytes": 0,
    }


def _plan_text(plan: "SlimPlan") -> str:
    sizes = f"{size(plan.manifest.size)} -> {size(plan.size)}"
    return f"would write {plan.target}\n{len(plan.recasts)} of {len(plan.manifest.files)} files cast; {sizes}"


def _slim_json(result: "Slimmed", removed: int) -> dict[str, object]:
    return {
        "dry_run": False,
        "path": str(result.path),
        "model": result.manifest.model,
        "revision": result.manifest.revision,
        "parent": str(result.parent) if result.parent and not removed else None,
        "parent_digest": result.manifest.parent,
        "manifest_digest": result.manifest.digest,
        "cast": list(result.cast),
        "size_bytes": result.manifest.size,
        "parent_size_bytes": result.size_before,
        "seconds": round(result.seconds, 3),
        "changed": result.changed,
        "removed_bytes": removed,
    }


def _slim_text(result: "Slimmed", removed: int) -> str:
    sizes = f"{size(result.size_before)} -> {size(result.manifest.size)}"
    done = (
        f"{len(result.cast)} files cast; {sizes} ({duration(result.seconds)})"
        if result.changed
        else "was there already"
    )
    return f"{result.path}\n{done}" + (f"\nremoved its parent ({size(removed)})" if removed else "")

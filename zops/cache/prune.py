"""What of a cache could go: leftovers, snapshots that a newer verified one supersedes, parents of slim ones.

Nothing is judged by its name alone, and never goes: what an instance has mounted or serves, what the specification
means, and the last verified snapshot of a model. What another tool fetched goes only when that is asked for, and
nothing of huggingface_hub's layout, where snapshots share their files: that tool has a command of its own.
"""

import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zops.cache.incoming import Incoming, is_unfinished
from zops.cache.layout import INDEX, Snapshot, find, is_verified
from zops.cache.lock import hold
from zops.cache.manifest import SIDECAR, Manifest, read_manifest, require_verified, sidecar
from zops.cache.remove import PREFIX, SUFFIX, AskUsed, Used, remove_snapshot, users_of
from zops.cache.room import shortage_told
from zops.catalog import lookup
from zops.errors import SnapshotDamaged, SnapshotMissing, ZopsError
from zops.events import Report, task

Kind = Literal["leftover", "superseded", "slimmed"]
State = Literal["would", "removed", "spared"]

# Restores and syntheses begin anew when they were killed, and the SDKs give a file an hour at most: what nobody wrote
# to for so long, nobody is at work on.
IDLE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Item:
    """Something that could go: what it is, why, and what became of it."""

    path: Path
    kind: Kind
    model: str
    revision: str
    size: int
    reason: str
    """Why it could go or, for what is spared, why it stays."""
    state: State = "would"
    because_of: Path | None = None
    """The verified snapshot that makes this one superfluous."""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object documented in docs/reference/json.md."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "model": self.model,
            "revision": self.revision,
            "size_bytes": self.size,
            "state": self.state,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator asked for."""

    keep: int = 1
    """Verified revisions of each model that stay, the one that is served among them."""
    older_than_s: float = 0.0
    all_layouts: bool = False
    """Also what another tool fetched."""


def plan_prune(
    cache_dir: Path, model: str | None, rules: Rules, *, used: Used, wanted: Iterable[Path] = ()
) -> list[Item]:
    """Return what could go and what is spared; changes nothing.

    Args:
        cache_dir: root of the cache.
        model: owner/name, None for every model.
        rules: what to keep.
        used: what instances use.
        wanted: snapshots that the specification means.
    """
    meant = {path.resolve() for path in wanted}
    by_model: dict[str, list[Snapshot]] = {}
    for snapshot in find(cache_dir, model):
        if snapshot.model and snapshot.layout != "plain":
            by_model.setdefault(snapshot.model, []).append(snapshot)
    judged: list[tuple[Item, Snapshot | None]] = []
    for snapshots in by_model.values():
        judged += _judge(snapshots, rules.keep)
    judged += [(item, None) for item in _hidden(cache_dir, model)]
    return sorted(
        (_spare(item, snapshot, rules, used, meant) for item, snapshot in judged), key=lambda item: str(item.path)
    )


def prune(items: Iterable[Item], ask_used: AskUsed, report: Report) -> list[Item]:
    """Remove what could go, looking again before each; return every item with what became of it.

    Raises:
        HostShort: when something may not be removed.
        RuntimeUnreachable: when it cannot be told any more what instances use.
    """
    items = list(items)
    total = sum(item.size for item in items if item.state == "would")
    done = []
    with task(report, "prune", "removing", total=total) as counter:
        for item in items:
            if item.state == "would":
                done.append(_remove(item, ask_used, report))
                counter.advance(item.size)
            else:
                done.append(item)
    return done


def _remove(item: Item, ask_used: AskUsed, report: Report) -> Item:
    if item.because_of and not is_verified(item.because_of):
        return replace(item, state="spared", reason=f"{item.because_of} is not verified any more")
    try:
        if item.path.name.startswith(".") or not item.path.is_dir():
            _remove_leftover(item.path, report)
        else:
            remove_snapshot(item.path, ask_used, report)
    except ZopsError as error:
        if error.code not in {"snapshot-in-use", "snapshot-not-removable", "lock-held"}:
            raise
        return replace(item, state="spared", reason=error.message)
    return replace(item, state="removed")


def _remove_leftover(path: Path, report: Report) -> None:
    with shortage_told():
        if path.name == SIDECAR:
            with hold(path / "lock", report, timeout_s=0.0):
                Incoming(path.parent).discard()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Known:
    snapshot: Snapshot
    manifest: Manifest | None
    """None unless it is verified."""

    @property
    def family(self) -> str:
        """The digest that a snapshot and what was derived from it have in common."""
        assert self.manifest is not None
        return self.manifest.parent or self.manifest.digest


def _judge(snapshots: list[Snapshot], keep: int) -> Iterator[tuple[Item, Snapshot]]:
    """Yield what could go of one model's snapshots."""
    known = [_Known(snapshot, _manifest_if_verified(snapshot.path)) for snapshot in snapshots]
    families = _families(known)
    kept = families[: max(1, keep)]
    # The slim one where there is one, since its parent may go in the same run.
    newest = max(kept[0], key=lambda k: bool(k.manifest and k.manifest.derived)) if kept else None
    for each in known:
        path = each.snapshot.path
        if each.manifest is None:
            if not (path / INDEX).is_file() or (is_unfinished(path) and not _has_manifest(path)):
                yield _item(each, "leftover", "was never completed"), each.snapshot
            elif newest and _born(path) <= _born(newest.snapshot.path):
                yield _superseded(each, newest), each.snapshot
            continue
        if is_unfinished(path):
            left = replace(_item(each, "leftover", "what an unfinished repair fetched"), path=sidecar(path))
            yield replace(left, size=_size(sidecar(path))), each.snapshot
        if newest and not any(each in family for family in kept):
            yield _superseded(each, newest), each.snapshot
        elif slim := next((k for k in known if k.manifest and k.manifest.parent == each.manifest.digest), None):
            reason = f"its slim snapshot {slim.snapshot.path.name} is verified"
            yield replace(_item(each, "slimmed", reason), because_of=slim.snapshot.path), each.snapshot


def _superseded(each: _Known, newest: _Known) -> Item:
    reason = f"{newest.snapshot.path.name} is verified and {'newer' if not _is_pinned(newest) else 'what zops pins'}"
    return replace(_item(each, "superseded", reason), because_of=newest.snapshot.path)


def _families(known: list[_Known]) -> list[list[_Known]]:
    """Group the verified snapshots by what they were derived from, the best first, as `layout.choose` ranks them."""
    families: dict[str, list[_Known]] = {}
    for each in known:
        if each.manifest:
            families.setdefault(each.family, []).append(each)

    def rank(family: list[_Known]) -> tuple[bool, float]:
        return any(map(_is_pinned, family)), max(each.snapshot.path.stat().st_mtime for each in family)

    return sorted(families.values(), key=rank, reverse=True)


def _is_pinned(each: _Known) -> bool:
    commit = lookup(each.snapshot.model).commit
    return bool(commit) and each.manifest is not None and each.manifest.base_revision == commit


def _hidden(cache_dir: Path, model: str | None) -> Iterator[Item]:
    """Yield what killed removals, restores, syntheses and the SDKs left under names of their own."""
    for root in (cache_dir, cache_dir / "hub"):
        places = [*root.glob("models/*--*/snapshots/.*"), *root.glob("models/*--*/snapshots/*/**/*.incomplete")]
        places += root.glob("models--*/blobs/*.incomplete")
        for path in sorted(places):
            repository = path.relative_to(root).parts[1 if path.is_relative_to(root / "models") else 0]
            owner, _, name = repository.removeprefix("models--").partition("--")
            found = f"{owner}/{name}"
            if model in {None, found} and SIDECAR not in path.parts:
                reason = _leftover_reason(path)
                if reason:
                    yield Item(path, "leftover", found, "", _size(path), reason)


def _leftover_reason(path: Path) -> str:
    """Return why a hidden place is nobody's any more, empty when that cannot be said."""
    if path.name.startswith(PREFIX) and path.name.endswith(SUFFIX):
        return "a removal that was cut short"
    if time.time() - _touched(path) < IDLE_S:
        return ""
    if path.name.endswith(".incomplete"):
        return "part of a file that an SDK did not finish"
    if path.name.endswith((".restoring", SUFFIX)):
        return "a restore or synthesis that was cut short"
    return ""


def _spare(item: Item, snapshot: Snapshot | None, rules: Rules, used: Used, wanted: set[Path]) -> Item:
    """Return the item, spared where a rule says so."""
    whole = snapshot is not None and item.path == snapshot.path
    foreign = item.path.name.endswith(".incomplete") if snapshot is None else not _is_own(snapshot)
    users = users_of(item.path, used) if whole else ()
    reason = ""
    if users:
        reason = f"used by {', '.join(users)}"
    elif whole and item.path.resolve() in wanted:
        reason = "what the specification means"
    elif whole and snapshot and snapshot.layout == "huggingface":
        reason = "shares its files with other snapshots; remove it with: hf cache delete"
    elif foreign and not rules.all_layouts:
        reason = "fetched by another tool; --all-layouts includes it"
    elif snapshot and _is_held(snapshot.path):
        reason = "another zops works on it"
    elif (age := time.time() - _born(item.path)) < rules.older_than_s:
        reason = f"only {age / 3600:.1f} h old"
    return replace(item, state="spared", reason=reason) if reason else item


def _is_own(snapshot: Snapshot) -> bool:
    """Tell whether zops made or took over a snapshot: it is where zops puts its own, and has a sidecar."""
    return snapshot.layout == "modelscope" and sidecar(snapshot.path).is_dir()


def _is_held(snapshot: Path) -> bool:
    """Tell whether another process holds a snapshot's lock right now."""
    try:
        with (sidecar(snapshot) / "lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _item(each: _Known, kind: Kind, reason: str) -> Item:
    snapshot = each.snapshot
    return Item(snapshot.path, kind, snapshot.model, snapshot.revision, _size(snapshot.path), reason)


def _manifest_if_verified(path: Path) -> Manifest | None:
    with suppress(SnapshotMissing, SnapshotDamaged):
        return require_verified(path)
    return None


def _has_manifest(path: Path) -> bool:
    try:
        return read_manifest(path) is not None
    except SnapshotDamaged:
        return True


def _born(path: Path) -> float:
    """Return when something came into the cache, in seconds since the epoch; verifying it again makes no difference."""
    marks = (path, sidecar(path) / "manifest.json", sidecar(path) / "incoming.json")
    return max((mark.lstat().st_mtime for mark in marks if mark.exists()), default=0.0)


def _touched(path: Path) -> float:
    """Return when anything in a place was last written."""
    return max((each.lstat().st_mtime for each in (path, *path.rglob("*"))), default=0.0)


def _size(path: Path) -> int:
    """Return the bytes of all files in a place."""
    places = path.rglob("*") if path.is_dir() else [path]
    return sum(each.lstat().st_size for each in places if each.is_file() and not each.is_symlink())

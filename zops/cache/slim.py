"""A slim snapshot: the same model with the transformer's float32 weights as the bfloat16 that the loader makes of them.

Only the transformer is cast. It is three quarters of Z-Image-Turbo (24.6 of 32.8 GB) and its only float32 component;
the loader keeps none of its weights in float32. Other components are taken as they are, whatever their types: a VAE is
small, and a text encoder is another library's business.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from zops.cache.cast import Recast, recast
from zops.cache.derive import Derived, derive_file
from zops.cache.incoming import Incoming, is_unfinished, prune_empty
from zops.cache.lanes import Stopped
from zops.cache.layout import place
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import (
    FORMAT,
    SIDECAR,
    FileEntry,
    Manifest,
    clear_marker,
    damaged,
    quick_check,
    read_manifest,
    require_verified,
    sidecar,
    stat_key,
    sync_directory,
    write_json,
)
from zops.cache.remove import AskUsed, remove_snapshot, require_removable, require_unused
from zops.cache.room import check_room, shortage_told
from zops.cache.safetensors import read_header
from zops.cache.verify import INDEX_SUFFIX, SUFFIX, require_manifest, verify
from zops.errors import SnapshotDamaged, SnapshotMissing, UsageError
from zops.events import Report, Task, Warned, task

DERIVED = "bf16"
COMPONENT = "transformer"
CONFIG = f"{COMPONENT}/config.json"
# Classes of which diffusers keeps no weight in float32 when it loads in bfloat16 (`_keep_in_fp32_modules` is None).
CAST_WHOLE = frozenset({"ZImageTransformer2DModel"})
# What a killed run worked from; staged files of another parent are worth nothing.
RECORD = "slim.json"
# Each takes two threads and 10 MB; more files at once only make a disk seek.
MAX_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class SlimPlan:
    """What a slim snapshot will consist of, known before a byte is written."""

    parent: Path
    manifest: Manifest
    """The parent's."""
    target: Path
    recasts: Mapping[str, Recast] = field(repr=False)
    """Files whose weights are cast."""
    texts: Mapping[str, bytes] = field(repr=False)
    """Small files that say something else afterwards."""
    kept_wide: tuple[str, ...] = ()
    """Files with float32 weights that are taken as they are."""

    @property
    def revision(self) -> str:
        """The slim snapshot's revision."""
        return f"{self.manifest.revision}-{DERIVED}"

    def size_of(self, entry: FileEntry) -> int:
        """Return the size in bytes that a file of the parent will have."""
        if entry.path in self.recasts:
            return self.recasts[entry.path].size
        return len(self.texts[entry.path]) if entry.path in self.texts else entry.size

    @property
    def size(self) -> int:
        """Bytes of all files of the slim snapshot."""
        return sum(self.size_of(entry) for entry in self.manifest.files)


@dataclass(frozen=True, slots=True)
class Slimmed:
    """A slim snapshot. `changed` is False when it was there already; `parent` is None when that one is gone."""

    path: Path
    manifest: Manifest
    parent: Path | None
    size_before: int
    cast: tuple[str, ...]
    seconds: float
    changed: bool


def is_slim(snapshot: Path) -> Slimmed | None:
    """Return a snapshot as a slim one when it is one itself and verified, None for any other."""
    manifest = read_manifest(snapshot)
    if manifest is None or manifest.derived != DERIVED:
        return None
    require_verified(snapshot)
    return Slimmed(snapshot, manifest, None, manifest.size, (), 0.0, changed=False)


def plan_slim(parent: Path) -> SlimPlan:
    """Look at a snapshot and plan its slim one; reads headers and small files only.

    Raises:
        SnapshotMissing: when there is no snapshot or no manifest.
        SnapshotDamaged: when files are missing, have another size, or contradict their own headers.
        UsageError: when there is nothing to cast, or zops does not know how the loader would.
    """
    manifest = require_manifest(parent)
    bad = [f for f in quick_check(parent, manifest, None) if f.status in {"missing", "wrong-size"}]
    if bad:
        raise damaged(parent, bad)
    _require_cast_whole(parent)
    weights = [entry.path for entry in manifest.files if entry.path.endswith(SUFFIX)]
    recasts, kept = {}, []
    for path in weights:
        how = recast(parent / path) if path.startswith(f"{COMPONENT}/") else None
        if how:
            recasts[path] = how
        elif "F32" in read_header(parent / path).dtypes:
            kept.append(path)
    if not recasts:
        raise UsageError(
            f"the {COMPONENT} of {parent} has no float32 weights that could be cast",
            code="nothing-to-slim",
            hint="serve it as it is",
        )
    target = _target_of(parent, manifest)
    return SlimPlan(parent, manifest, target, recasts, _texts(parent, manifest, recasts), tuple(kept))


def slim(plan: SlimPlan, report: Report, *, lock_timeout_s: float = TIMEOUT_S) -> Slimmed:
    """Make the slim snapshot, or go on where a killed run stopped; one that is there and verified is left alone.

    Every file of the parent is hashed on its way and must be what the parent's manifest says; nothing of the slim
    snapshot can be seen before all of it was written, hashed and made durable.

    Raises:
        SnapshotDamaged: when a file of the parent is not what its manifest says; it counts as unverified from then on.
        HostShort: when space, inodes or write access lack; finished files are kept for the next run.
        UsageError: when another snapshot lies at the slim one's place.
        LockHeld: when another zops works on it.
    """
    began = time.monotonic()
    _require_own(plan)
    changed = False
    try:
        with hold(sidecar(plan.target) / "lock", report, timeout_s=lock_timeout_s), shortage_told():
            if not _is_there(plan):
                _make(plan, report)
                changed = True
            _tidy(plan)
    finally:
        prune_empty(plan.target)
    manifest = require_verified(plan.target)
    cast = tuple(sorted(plan.recasts))
    seconds = time.monotonic() - began
    return Slimmed(plan.target, manifest, plan.parent, plan.manifest.size, cast, seconds, changed)


def check_replaceable(parent: Path, ask_used: AskUsed) -> None:
    """Refuse, before hours of work, what `replace_parent` would refuse after them.

    Raises:
        ZopsError: when an instance uses the parent, or it is no directory that may be removed.
    """
    require_removable(parent)
    require_unused(parent, ask_used())


def replace_parent(slimmed: Slimmed, ask_used: AskUsed, report: Report) -> int:
    """Verify every byte of a slim snapshot, and then remove its parent; return the bytes that this freed.

    Raises:
        SnapshotDamaged: when the slim snapshot is not right; the parent stays.
        ZopsError: when an instance uses the parent; it stays.
        LockHeld: when another zops works on the parent.
    """
    if slimmed.parent is None or not slimmed.parent.is_dir():
        return 0
    parent = read_manifest(slimmed.parent)
    assert parent is not None
    assert parent.digest == slimmed.manifest.parent
    verify(slimmed.path, deep=True, report=report).require()
    remove_snapshot(slimmed.parent, ask_used, report)
    return parent.size


def _require_cast_whole(parent: Path) -> None:
    try:
        name = json.loads((parent / CONFIG).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "nothing"
    if name not in CAST_WHOLE:
        raise UsageError(
            f"{parent / CONFIG} names {name!r}, and zops does not know that all of that is loaded as bfloat16",
            code="slim-unknown-class",
            hint=f"zops slims {', '.join(sorted(CAST_WHOLE))}",
        )


def _target_of(parent: Path, manifest: Manifest) -> Path:
    """Return where the slim snapshot goes: beside its parent, or in our own layout where that is another tool's."""
    revision = f"{manifest.revision}-{DERIVED}"
    if parent.parent.name != "snapshots":
        return parent.with_name(f"{parent.name}-{DERIVED}")
    repository = parent.parent.parent
    if repository.name.startswith("models--"):
        return place(repository.parent, manifest.model, revision)
    return parent.with_name(revision)


def _texts(parent: Path, manifest: Manifest, recasts: Mapping[str, Recast]) -> dict[str, bytes]:
    """Return the indices with the new total, and the configuration with the new type where it names one."""
    texts = {}
    for entry in manifest.files:
        is_index = entry.path.startswith(f"{COMPONENT}/") and entry.path.endswith(INDEX_SUFFIX)
        if not is_index and entry.path != CONFIG:
            continue
        before = (parent / entry.path).read_bytes()
        if hashlib.sha256(before).hexdigest() != entry.sha256:
            raise _corrupt(parent, entry.path)
        body = json.loads(before)
        changed = _retotal(parent, body, recasts) if is_index else _retype(body)
        if changed:
            texts[entry.path] = (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
    return texts


def _retotal(parent: Path, index: dict[str, Any], recasts: Mapping[str, Recast]) -> bool:
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return False
    shards = {f"{COMPONENT}/{name}" for name in index["weight_map"].values()}
    headers = {shard: read_header(parent / shard) for shard in shards - set(recasts)}
    metadata["total_size"] = sum(recasts[shard].tensor_bytes for shard in shards & set(recasts)) + sum(
        header.file_size - header.data_offset for header in headers.values()
    )
    return True


def _retype(config: dict[str, Any]) -> bool:
    stale = [key for key in ("dtype", "torch_dtype") if config.get(key) == "float32"]
    for key in stale:
        config[key] = "bfloat16"
    return bool(stale)


def _require_own(plan: SlimPlan) -> None:
    """Refuse to write into a snapshot that is something else."""
    with suppress(SnapshotDamaged):
        there = read_manifest(plan.target)
        begun = (sidecar(plan.target) / RECORD).is_file()
        foreign = there.derived != DERIVED if there else not begun and _holds_files(plan.target)
        if foreign:
            raise UsageError(
                f"{plan.target} holds another snapshot", code="directory-not-empty", hint="move it out of the way"
            )


def _holds_files(target: Path) -> bool:
    return is_unfinished(target) or (target.is_dir() and any(p.name != SIDECAR for p in target.iterdir()))


def _is_there(plan: SlimPlan) -> bool:
    with suppress(SnapshotMissing, SnapshotDamaged):
        return require_verified(plan.target).parent == plan.manifest.digest
    return False


def _make(plan: SlimPlan, report: Report) -> None:
    incoming = Incoming(plan.target)
    parent = {"format": FORMAT, "parent": plan.manifest.digest}
    record = sidecar(plan.target) / RECORD
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != parent:
        incoming.discard()
        write_json(record, parent)
    for path in plan.kept_wide:
        report(Warned(f"{path} has float32 weights and stays as it is: only the {COMPONENT} is cast"))
    missing = [entry for entry in plan.manifest.files if incoming.checked(entry.path) is None]
    try:
        check_room(plan.target, sum(map(plan.size_of, missing)), len(missing), report)
        _derive(plan, missing, incoming, report)
    except BaseException:
        incoming.discard_if_empty()
        if not incoming.directory.exists():
            record.unlink(missing_ok=True)
        raise
    incoming.install(_manifest_of(plan, incoming))


def _tidy(plan: SlimPlan) -> None:
    """Remove what is of no use any more; a run that was killed right before may have left it."""
    if is_unfinished(plan.target):
        Incoming(plan.target).discard()
    for leftover in (sidecar(plan.target) / RECORD, *sidecar(plan.target).glob(".*.part")):
        leftover.unlink(missing_ok=True)
    # So that it counts as old as its parent wherever snapshots are compared by age.
    stat = plan.parent.stat()
    os.utime(plan.target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _derive(plan: SlimPlan, missing: list[FileEntry], incoming: Incoming, report: Report) -> None:
    """Make the missing files in staging, largest first, and record each that is done."""
    stop = threading.Event()
    text = f"slimming {plan.parent.name}"
    files_at_once = min(MAX_FILES_AT_ONCE, len(os.sched_getaffinity(0)))
    with task(report, "slim", text, total=sum(entry.size for entry in missing)) as counter:
        pool = ThreadPoolExecutor(files_at_once, thread_name_prefix="slim")
        try:
            ordered = sorted(missing, key=lambda entry: (-entry.size, entry.path))
            work = partial(_derive_one, plan, incoming, counter, stop)
            futures = [pool.submit(work, entry) for entry in ordered]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error and not isinstance(error, Stopped):
                raise error


def _derive_one(plan: SlimPlan, incoming: Incoming, counter: Task, stop: threading.Event, entry: FileEntry) -> None:
    def advance(count: int) -> None:
        if stop.is_set():
            raise Stopped
        counter.advance(count)

    advance(0)
    origin, target = plan.parent / entry.path, incoming.directory / entry.path
    if entry.path in plan.texts:
        derived = _write_text(target, plan.texts[entry.path], entry)
        advance(entry.size)
    else:
        derived = derive_file(origin, target, plan.recasts.get(entry.path), advance)
    if derived.origin_sha256 != entry.sha256:
        target.unlink()
        raise _corrupt(plan.parent, entry.path)
    incoming.remember(entry.path, (derived.sha256, stat_key(target)))


def _write_text(target: Path, text: bytes, entry: FileEntry) -> Derived:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync_directory(target.parent)
    return Derived(entry.sha256, hashlib.sha256(text).hexdigest())


def _corrupt(parent: Path, path: str) -> SnapshotDamaged:
    """Build the error for a bad file of the parent, which is not served again before it was verified anew."""
    with suppress(OSError):
        clear_marker(parent)
    return SnapshotDamaged(
        f"{path} of the snapshot in {parent} is not what its manifest says, so nothing is made from it",
        hint=f"repair it with: zops cache verify --deep --repair {parent}",
        files={path: "corrupt"},
    )


def _manifest_of(plan: SlimPlan, incoming: Incoming) -> Manifest:
    entries = []
    for entry in plan.manifest.files:
        known = incoming.checked(entry.path)
        assert known is not None, entry.path
        entries.append(FileEntry(entry.path, known[1][0], known[0]))
    return Manifest(
        plan.manifest.model,
        plan.revision,
        tuple(sorted(entries)),
        "local",
        f"{COMPONENT} of {plan.manifest.revision} cast to bfloat16",
        plan.manifest.digest,
        DERIVED,
    )


__all__ = ["SlimPlan", "Slimmed", "check_replaceable", "is_slim", "plan_slim", "replace_parent", "slim"]

"""Where snapshots lie: ModelScope's layouts, Hugging Face's, or a directory of its own.

Nothing here moves or changes what another tool owns; snapshots of every layout are found, and new ones are put where
ModelScope's SDK (1.38 and later) looks for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zops.cache.manifest import SIDECAR, Manifest, read_manifest, require_verified
from zops.catalog import lookup
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.spec import Spec

Layout = Literal["modelscope", "modelscope-legacy", "huggingface", "plain"]

INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One revision of a model on disk. `model` and `revision` are empty where neither layout nor manifest tells."""

    model: str
    revision: str
    layout: Layout
    path: Path


def find(cache_dir: Path, model: str | None = None) -> list[Snapshot]:
    """Return every snapshot in a cache, or those of one model, complete or not, in a stable order.

    A directory whose model nobody recorded counts for every model that is asked for.
    """
    found: dict[Path, Snapshot] = {}
    for snapshot in _scan(cache_dir):
        found.setdefault(snapshot.path, snapshot)
    return [s for s in sorted(found.values(), key=lambda s: str(s.path)) if model is None or s.model in {model, ""}]


def place(cache_dir: Path, model: str, revision: str) -> Path:
    """Return where zops puts a new snapshot: where ModelScope's own SDK looks for it."""
    return cache_dir / "models" / model.replace("/", "--", 1) / "snapshots" / revision


def choose(cache_dir: Path, model: str, revision: str | None = None, *, full: bool = False) -> Snapshot:
    """Return the best snapshot of a model: a verified one, then the catalog's commit, then the newest.

    A snapshot that was derived from one of the wanted revision (`zops cache slim`) counts as that revision once it is
    verified, and is preferred to its parent, since it loads faster into the same bits.

    Args:
        cache_dir: root of the cache.
        model: owner/name.
        revision: the revision that is wanted, None for any.
        full: prefer the parent, whose weights have all their bits.

    Raises:
        SnapshotMissing: when the cache has none (of that revision, when one is given).
    """
    found = [_Candidate(snapshot, _verified_manifest(snapshot.path)) for snapshot in find(cache_dir, model)]
    named = [c for c in found if revision is None or c.snapshot.revision == revision]
    digests = {c.manifest.digest: c for c in found if c.manifest}
    wanted = named + [c for c in found if c not in named and c.manifest and _is_derived(c.manifest, revision, named)]
    if not wanted:
        which = f"{model} at {revision}" if revision else model
        raise SnapshotMissing(f"there is no snapshot of {which} in {cache_dir}", hint="fetch one with: zops cache pull")
    commit = lookup(model).commit

    def rank(candidate: _Candidate) -> tuple[bool, bool, bool, int, bool]:
        manifest = candidate.manifest
        # As old as its parent, or a slimmed old revision would pass for newer than a new one.
        parent = digests.get(manifest.parent, candidate) if manifest else candidate
        return (
            manifest is not None,
            (candidate.snapshot.path / INDEX).is_file(),
            bool(commit) and commit in {candidate.snapshot.revision, manifest.base_revision if manifest else ""},
            max(c.snapshot.path.stat().st_mtime_ns for c in (candidate, parent)),
            bool(manifest and manifest.derived) != full,
        )

    return max(wanted, key=rank).snapshot


def meant(spec: Spec) -> Snapshot:
    """Return the snapshot that a specification means: the full one where weights are loaded as float32.

    Raises:
        SnapshotMissing: when the cache has none.
    """
    # "auto" is bfloat16 on a GPU and float32 without one, as the loader decides.
    full = spec.serve.dtype == "float32" or (spec.serve.dtype == "auto" and spec.gpus == "none")
    return choose(spec.cache.dir, spec.model, spec.source.revision, full=full)


@dataclass(frozen=True, slots=True)
class _Candidate:
    snapshot: Snapshot
    manifest: Manifest | None
    """None unless it is verified."""


def _is_derived(manifest: Manifest, revision: str | None, named: list[_Candidate]) -> bool:
    """Tell whether a verified snapshot was derived from what was asked for, be that still there or not."""
    parents = {c.manifest.digest for c in named if c.manifest}
    return bool(manifest.derived) and (manifest.parent in parents or manifest.base_revision == revision)


def _verified_manifest(snapshot: Path) -> Manifest | None:
    try:
        return require_verified(snapshot)
    except (SnapshotMissing, SnapshotDamaged):
        return None


def is_verified(snapshot: Path) -> bool:
    """Tell whether a snapshot is complete and untouched since it was verified, by a quick check."""
    return _verified_manifest(snapshot) is not None


def _scan(cache_dir: Path) -> Iterator[Snapshot]:
    if (cache_dir / INDEX).is_file():
        yield _described("", "", "plain", cache_dir)
        return
    for root in (cache_dir, cache_dir / "hub"):
        for repository in _directories(root / "models"):
            owner, separator, name = repository.name.partition("--")
            if separator:
                yield from _revisions(f"{owner}/{name}", "modelscope", repository)
            else:
                yield from _legacy(repository)
        for directory in _directories(root):
            if directory.name.startswith("models--"):
                owner, _, name = directory.name.removeprefix("models--").partition("--")
                yield from _revisions(f"{owner}/{name}" if name else owner, "huggingface", directory)
            elif directory.name not in {"models", "hub"}:
                yield from _legacy(directory)


def _revisions(model: str, layout: Layout, repository: Path) -> Iterator[Snapshot]:
    for revision in _directories(repository / "snapshots"):
        if any(revision.iterdir()):
            yield Snapshot(model, revision.name, layout, revision)


def _legacy(owner: Path) -> Iterator[Snapshot]:
    for directory in _directories(owner):
        if (directory / INDEX).is_file():
            # SDKs before 1.38 wrote a dot in a model's name as three underscores.
            model = f"{owner.name}/{directory.name.replace('___', '.')}"
            yield _described(model, "", "modelscope-legacy", directory)


def _described(model: str, revision: str, layout: Layout, path: Path) -> Snapshot:
    """Complete what the layout does not tell from the manifest; a damaged one tells nothing."""
    try:
        manifest = read_manifest(path)
    except SnapshotDamaged:
        manifest = None
    if manifest:
        model, revision = manifest.model, manifest.revision
    return Snapshot(model, revision, layout, path)


def _directories(parent: Path) -> list[Path]:
    try:
        return sorted(p for p in parent.iterdir() if p.is_dir() and p.name != SIDECAR and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []

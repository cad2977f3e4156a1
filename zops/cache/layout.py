"""Where snapshots lie: ModelScope's layouts, Hugging Face's, or a directory of its own.

Nothing here moves or changes what another tool owns; snapshots of every layout are found, and new ones are put where
ModelScope's SDK (1.38 and later) looks for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zops.cache.manifest import SIDECAR, read_manifest, require_verified
from zops.catalog import lookup
from zops.errors import SnapshotDamaged, SnapshotMissing

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


def choose(cache_dir: Path, model: str, revision: str | None = None) -> Snapshot:
    """Return the best snapshot of a model: a verified one, then the catalog's commit, then the newest.

    Raises:
        SnapshotMissing: when the cache has none (of that revision, when one is given).
    """
    candidates = [s for s in find(cache_dir, model) if revision is None or s.revision == revision]
    if not candidates:
        which = f"{model} at {revision}" if revision else model
        raise SnapshotMissing(f"there is no snapshot of {which} in {cache_dir}", hint="fetch one with: zops cache pull")
    commit = lookup(model).commit

    def rank(snapshot: Snapshot) -> tuple[bool, bool, bool, int]:
        return (
            is_verified(snapshot.path),
            (snapshot.path / INDEX).is_file(),
            bool(commit) and snapshot.revision == commit,
            snapshot.path.stat().st_mtime_ns,
        )

    return max(candidates, key=rank)


def is_verified(snapshot: Path) -> bool:
    """Tell whether a snapshot is complete and untouched since it was verified, by a quick check."""
    try:
        require_verified(snapshot)
    except (SnapshotMissing, SnapshotDamaged):
        return False
    return True


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

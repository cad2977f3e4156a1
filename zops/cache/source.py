"""What a specification's source offers: which files, from where, and how to bring one."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from zops.cache.blocks import clone
from zops.cache.fetch import Delivery, patiently, tell_pause
from zops.cache.hashing import Stat, hash_files
from zops.cache.hubs import Advance, Hub, HubFailure, Listed, Span, Take, needed, open_hub, refused
from zops.cache.layout import INDEX, choose
from zops.cache.manifest import SIDECAR, FileEntry, Manifest, read_manifest
from zops.cache.redact import redacted
from zops.cache.room import shortage
from zops.catalog import Model, lookup
from zops.errors import SnapshotMissing, SourceFailed
from zops.events import Report
from zops.spec import Source

Answer = TypeVar("Answer")

COPY_STEP = 8 << 20


@dataclass(frozen=True, slots=True)
class Offer:
    """A model's files at one revision, and how to bring them. Without `manifest` it is made from what arrives."""

    model: str
    revision: str
    files: tuple[Listed, ...]
    delivery: Delivery
    text: str
    """Where the files come from, as it is written into the manifest."""
    manifest: Manifest | None = None


def offer_of_hub(source: Source, model: Model, report: Report) -> Offer:
    """Ask a hub what it offers; the catalog's manifest counts more than the hub's word.

    Raises:
        SourceFailed: when the hub cannot be reached, refuses, or offers other files than the catalog pins.
    """
    assert source.kind in {"modelscope", "huggingface"}
    hub = open_hub("modelscope" if source.kind == "modelscope" else "huggingface", source.endpoint)
    ask = _asker(model.id, report)
    pinned = model.pinned() if source.revision in {None, model.commit} else None
    if pinned is not None:
        manifest = Manifest.from_json(pinned)
        commit, files = _list_pinned(hub, model, ask)
        _compare(manifest, files, hub.name)
        wanted = tuple(Listed(entry.path, entry.size, entry.sha256) for entry in manifest.files)
    else:
        manifest = None
        commit = ask(lambda: hub.resolve(model.id, source.revision or hub.branch))
        wanted = needed(ask(lambda: hub.listing(model.id, commit)), model.patterns)
        if not any(file.path == INDEX for file in wanted):
            raise SourceFailed(
                f"{hub.name} has {model.id}, but it is no diffusers pipeline (no {INDEX})", code="source-no-pipeline"
            )

    def deliver(file: Listed, target: Path, advance: Advance) -> None:
        hub.fetch_file(model.id, commit, file, target, advance)

    def deliver_span(file: Listed, span: Span, take: Take) -> None:
        hub.fetch_span(model.id, commit, file, span, take)

    text = redacted(f"{hub.name} {hub.endpoint}".strip())
    delivery = Delivery(deliver, deliver_span)
    return Offer(model.id, manifest.revision if manifest else commit, wanted, delivery, text, manifest)


def _list_pinned(hub: Hub, model: Model, ask: "Ask") -> tuple[str, tuple[Listed, ...]]:
    """List the pinned commit, or the newest where this hub numbers its commits differently; hashes decide anyway."""
    try:
        return model.commit, ask(lambda: hub.listing(model.id, model.commit))
    except SourceFailed as error:
        if error.code != "source-not-found":
            raise
    commit = ask(lambda: hub.resolve(model.id, hub.branch))
    return commit, ask(lambda: hub.listing(model.id, commit))


def _compare(manifest: Manifest, files: tuple[Listed, ...], hub: str) -> None:
    offered = {file.path: file for file in files}
    differing = {}
    for entry in manifest.files:
        file = offered.get(entry.path)
        if file is None:
            differing[entry.path] = "is not there"
        elif file.size != entry.size or (file.sha256 or entry.sha256) != entry.sha256:
            differing[entry.path] = "is another file"
    if differing:
        shown = ", ".join(f"{path} {what}" for path, what in list(differing.items())[:3])
        raise SourceFailed(
            f"{hub} offers other files of {manifest.model} than the catalog pins: {shown}",
            code="source-not-pinned",
            hint="use another source.endpoint, or name a source.revision to take what the hub has",
            files=differing,
        )


class Ask(Protocol):
    """Asks a hub a question with patience; raises `SourceFailed` when it gives no answer."""

    def __call__(self, question: Callable[[], Answer], /) -> Answer:
        """Return the answer."""


def _asker(model: str, report: Report) -> Ask:
    def wait(seconds: float, failure: HubFailure) -> None:
        tell_pause(report, model, seconds, failure)
        time.sleep(seconds)

    def ask(question: Callable[[], Answer], /) -> Answer:
        answers: list[Answer] = []
        try:
            patiently(lambda: answers.append(question()), moved=lambda: False, wait=wait)
        except HubFailure as failure:
            raise refused(model, failure) from failure
        return answers[-1]

    return ask


def offer_of_directory(source: Source, model: Model, report: Report) -> Offer:
    """Offer what a directory holds: by its own manifest, by the catalog's where that fits, else by hashing it.

    Raises:
        SourceFailed: when there is no snapshot, or one of another model.
    """
    assert source.path is not None
    root = _snapshot_in(Path(source.path), model.id, source.revision)
    manifest = read_manifest(root) or _pinned_if_it_fits(root, model)
    if manifest is None:
        manifest, _ = local_manifest(root, model, source.revision or "", report)
    if manifest.model != model.id:
        raise SourceFailed(
            f"{root} holds {manifest.model}, not {model.id}",
            code="source-other-model",
            hint=f"set model: {manifest.model}, or another source.path",
        )

    files = tuple(Listed(entry.path, entry.size, entry.sha256) for entry in manifest.files)
    return Offer(model.id, manifest.revision, files, _copier(root), f"directory {root}", manifest)


def delivery_for(manifest: Manifest, source: Source, report: Report) -> Delivery:
    """Return what brings single files of a manifest from a source, to mend a snapshot.

    Raises:
        SourceFailed: when the source does not have that model at that revision.
    """
    model = lookup(manifest.model)
    if source.kind == "directory":
        assert source.path is not None
        return _copier(_snapshot_in(Path(source.path), model.id, None))
    return offer_of_hub(source.model_copy(update={"revision": manifest.revision}), model, report).delivery


def _copier(root: Path) -> Delivery:
    def deliver(file: Listed, target: Path, advance: Advance) -> None:
        try:
            copy_file(root / file.path, target, advance)
        except FileNotFoundError:
            raise HubFailure(f"is missing in {root}", final=True) from None

    return Delivery(deliver, fickle=False)


def _snapshot_in(path: Path, model: str, revision: str | None) -> Path:
    if (path / INDEX).is_file():
        return path
    try:
        return choose(path, model, revision).path
    except SnapshotMissing:
        raise SourceFailed(
            f"{path} holds no snapshot of {model}",
            code="source-not-found",
            hint=f"set source.path to a directory with {INDEX}, or to the root of a cache",
        ) from None


def _pinned_if_it_fits(root: Path, model: Model) -> Manifest | None:
    body = model.pinned()
    if body is None:
        return None
    manifest = Manifest.from_json(body)
    sizes = {path: (root / path).stat().st_size for path in runtime_files(root, model)}
    return manifest if all(sizes.get(entry.path) == entry.size for entry in manifest.files) else None


def runtime_files(root: Path, model: Model) -> list[str]:
    """Return the files of a directory that are needed at run time, as sorted POSIX paths relative to it."""
    listed = tuple(Listed(path, 0) for path in walk(root))
    return sorted(file.path for file in needed(listed, model.patterns))


def walk(root: Path) -> Iterator[str]:
    """Yield every file under a directory as a POSIX path relative to it, without the sidecar and hidden places."""
    for directory, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != SIDECAR and not name.startswith("."))
        place = Path(directory).relative_to(root)
        yield from ((place / name).as_posix() for name in sorted(files))


def local_manifest(root: Path, model: Model, revision: str, report: Report) -> tuple[Manifest, dict[str, Stat]]:
    """Hash what a directory holds and write it down as it is; only this disk vouches for it.

    Without a revision it gets one made from its content, `local-` and twelve digits of the digest.

    Returns:
        The manifest, and the stat of each file from before it was hashed.

    Raises:
        SourceFailed: when a file cannot be read.
    """
    paths = {path: root / path for path in runtime_files(root, model)}
    entries, stats = [], {}
    for path, result in hash_files(paths, report, f"hashing {root}").items():
        if isinstance(result, OSError):
            raise SourceFailed(f"{root / path} cannot be read: {result.strerror}", code="source-unreadable") from None
        entries.append(FileEntry(path, result[1][0], result[0]))
        stats[path] = result[1]
    manifest = Manifest(model.id, revision, tuple(sorted(entries)), "local", f"directory {root}")
    return (manifest if revision else replace(manifest, revision=f"local-{manifest.digest[:12]}")), stats


def copy_file(origin: Path, target: Path, advance: Advance) -> None:
    """Copy a file, by sharing its blocks where the file system can, within the kernel otherwise.

    Raises:
        HostShort: when there is no room for it.
        HubFailure: when the origin cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with origin.open("rb") as reader, target.open("wb") as writer:
            size = os.fstat(reader.fileno()).st_size
            if not clone(reader.fileno(), writer.fileno()):
                _copy(reader.fileno(), writer.fileno(), size, advance)
            else:
                advance(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        target.unlink(missing_ok=True)
        short = shortage(error)
        if short is not None:
            raise short from error
        raise HubFailure(f"cannot be copied: {error.strerror}", final=True) from error


def _copy(reader: int, writer: int, size: int, advance: Advance) -> None:
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(reader, writer, min(COPY_STEP, size - done))
        except OSError as error:
            if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                raise
            count = os.sendfile(writer, reader, None, min(COPY_STEP, size - done))
        if count == 0:
            return
        done += count
        advance(count)

"""Snapshots, archives and trees for the tests of backup and restore."""

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

from zops.archive.backup import BackupResult, backup
from zops.archive.store import DirectoryStore
from zops.cache.layout import place
from zops.cache.manifest import FileEntry, Manifest, stat_key, write_manifest, write_marker

MODEL = "acme/painter"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b'{"_class_name": "ZImagePipeline"}',
    "vae/config.json": b"{}\n" * 300,
    "vae/model.safetensors": bytes(range(256)) * 40,
    "tokenizer/empty.txt": b"",
}


def make_snapshot(
    cache: Path, files: Mapping[str, bytes] = FILES, *, model: str = MODEL, revision: str = REVISION
) -> Path:
    """Write files as a verified snapshot into a cache and return its directory."""
    directory = place(cache, model, revision)
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return vouch(directory, list(files), model=model, revision=revision)


def vouch(directory: Path, paths: list[str], *, model: str = MODEL, revision: str = REVISION) -> Path:
    """Give a directory a manifest of the files named, and the marker that they were verified."""
    entries = []
    for path in paths:
        content = (directory / path).read_bytes()
        entries.append(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest(model, revision, tuple(entries))
    write_manifest(directory, manifest)
    write_marker(directory, manifest, {path: stat_key(directory / path) for path in paths})
    return directory


def back_up(snapshot: Path, store: Path, compression: str = "zstd") -> tuple[Path, BackupResult]:
    """Back a snapshot up into a directory and return the archive's path and the result."""
    result = backup([snapshot], DirectoryStore(store), compression=compression)
    return Path(result.location), result


def tree(directory: Path) -> dict[str, tuple[int, str, bytes]]:
    """Return everything in a directory, links not followed: path -> permission bits, link, content; no markers."""
    found = {}
    for parent, names, files in os.walk(directory):
        for name in [*names, *files]:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            link = str(path.readlink()) if stat.S_ISLNK(mode) else ""
            content = path.read_bytes() if stat.S_ISREG(mode) else b""
            if name != "verified.json":
                found[str(path.relative_to(directory))] = (0 if link else stat.S_IMODE(mode), link, content)
    return found


def foreign_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    """Write a tar with Python's tarfile, member by member, hostile ones too."""
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            if info.isreg() and not info.size:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return a header as `foreign_tar` takes it."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info

"""What of a restore is complete, written down so that the next run need not do it again when this one is killed."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zops.cache.manifest import FORMAT, FileEntry, Manifest, read_marker, sidecar, stat_key

_NAME = "restoring.jsonl"


class Journal:
    """One line for every file that is complete, durable and right; bound to the manifest that it was held against.

    A line is written after its file has reached the disk. A torn or lost line only costs restoring that file again.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._path = sidecar(directory) / _NAME
        self._head = json.dumps({"format": FORMAT, "manifest_digest": manifest.digest})
        self._manifest = manifest
        self._lock = threading.Lock()
        self._descriptor = -1

    def open(self) -> dict[str, FileEntry]:
        """Take up what an earlier run left and return what is right of it; everything else is removed."""
        found = dict(self._recorded())
        _keep_only(self._directory, found.keys() | {self._path.relative_to(self._directory).as_posix()})
        self._path.parent.mkdir(exist_ok=True)
        lines = [self._head, *(self._line(entry) for entry in found.values())]
        self._path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.fsync(self._descriptor)
        return found

    def record(self, entry: FileEntry) -> None:
        """Write down that a file is complete; it must be durable by then. May be called from several threads."""
        line = f"{self._line(entry)}\n".encode()
        with self._lock:
            os.write(self._descriptor, line)
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Stop writing; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _line(self, entry: FileEntry) -> str:
        return json.dumps({"path": entry.path, "sha256": entry.sha256, "stat": stat_key(self._directory / entry.path)})

    def _recorded(self) -> Iterator[tuple[str, FileEntry]]:
        """Yield the files of the manifest that are what the record says, untouched since."""
        known = {entry.path: entry for entry in self._manifest.files}
        marker = read_marker(self._directory)
        if marker and marker.manifest_digest == self._manifest.digest:
            # Killed between the last file and the rename.
            for path, key in marker.stats.items():
                with suppress(KeyError, OSError):
                    if key == stat_key(self._directory / path) and _is_plain(self._directory / path):
                        yield path, known[path]
        with suppress(OSError, UnicodeDecodeError):
            head, *lines = self._path.read_text(encoding="utf-8").splitlines() or [""]
            for line in lines if head == self._head else ():
                with suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
                    body = json.loads(line)
                    entry = known[body["path"]]
                    file = self._directory / entry.path
                    if body["sha256"] == entry.sha256 and tuple(body["stat"]) == stat_key(file) and _is_plain(file):
                        yield entry.path, entry


def forget(directory: Path) -> None:
    """Remove the record from a directory in which there is nothing left to do."""
    (sidecar(directory) / _NAME).unlink(missing_ok=True)


def has_progress(directory: Path) -> bool:
    """Tell whether an earlier run left a file that is complete."""
    if read_marker(directory):
        return True
    with suppress(OSError, UnicodeDecodeError):
        return len((sidecar(directory) / _NAME).read_text(encoding="utf-8").splitlines()) > 1
    return False


@contextmanager
def journal(directory: Path, manifest: Manifest | None) -> Iterator[tuple[Journal | None, dict[str, FileEntry]]]:
    """Give the record of a directory and the files that it proves; without a manifest nothing is proven or recorded."""
    if manifest is None:
        _keep_only(directory, set())
        yield None, {}
        return
    opened = Journal(directory, manifest)
    try:
        yield opened, opened.open()
    finally:
        opened.close()


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _keep_only(directory: Path, files: set[str]) -> None:
    """Remove everything in a directory but these files and the directories that hold them."""
    parents = {parent.as_posix() for file in files for parent in Path(file).parents}
    for path in sorted(directory.rglob("*"), reverse=True):
        name = path.relative_to(directory).as_posix()
        if name in files or (name in parents and path.is_dir() and not path.is_symlink()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

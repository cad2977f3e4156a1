"""Backup and restore by sharing blocks, on XFS and btrfs in files: how long, and that nothing is copied.

    python -m benchmarks.archive.reflink [--size-gb 1] [--dir DIR] [--json FILE]

Needs root, mkfs.xfs and mkfs.btrfs (packages xfsprogs and btrfs-progs). What is left of the time when hashing is taken
off is what the bar is for; hashing is told by the command's own progress.
"""

import argparse
import fcntl
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from benchmarks.archive.table import Row, show
from benchmarks.archive.weights import Weights, write_weights
from benchmarks.measure import describe_host, evict, sync
from zops.archive.backup import backup
from zops.archive.restore import restore
from zops.archive.store import DirectoryStore
from zops.events import Event, Finished

SYSTEMS = ("xfs", "btrfs")
CLONE_S = 0.5
# What may be new on the disk although no data is copied: headers, manifests, the index, the file system's own.
COPIED_MB = 4
_FIEMAP = 0xC020660B
_SHARED, _SYNC = 0x2000, 1
_HEAD, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
_EXTENTS = 2000


@contextmanager
def mounted(system: str, root: Path, size_gb: float) -> Iterator[Path]:
    """Give a file system of a kind, in a file."""
    image, disk = root / f"{system}.image", root / system
    with image.open("wb") as stream:
        stream.truncate(int(size_gb * 1e9))
    disk.mkdir()
    subprocess.run([f"mkfs.{system}", "-q", image], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
        image.unlink()


def shared_bytes(path: Path) -> int:
    """Return how many bytes of a file lie in blocks that another file has too, as the kernel tells (FIEMAP)."""
    found = start = 0
    with path.open("rb") as stream:
        while True:
            request = bytearray(_HEAD.size + _EXTENTS * _EXTENT.size)
            _HEAD.pack_into(request, 0, start, (1 << 64) - 1 - start, _SYNC, 0, _EXTENTS, 0)
            fcntl.ioctl(stream, _FIEMAP, request)
            count = _HEAD.unpack_from(request)[3]
            for number in range(count):
                logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
                found += length if flags & _SHARED else 0
                start = logical + length
            if count < _EXTENTS:
                return found


class Watch:
    """How long a call takes, how much of that is hashing, and by how much the disk gets fuller."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._hashing = 0.0

    def __enter__(self) -> Self:
        self._used = _used(self._disk)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began - self._hashing
        self.hashing = self._hashing
        self.copied = _used(self._disk) - self._used

    def report(self, event: Event) -> None:
        """Take the time of hashing off."""
        if isinstance(event, Finished) and event.task not in {"backup", "restore"}:
            self._hashing += event.seconds

    def rows(self, what: str) -> Iterator[Row]:
        """Yield the time and what was copied."""
        text = f"and {self.hashing:.2f} s of hashing"
        yield Row(what, text, self.seconds, CLONE_S, at_most=True, unit=" s")
        yield Row(f"{what}: newly used", "by statfs", self.copied / 1e6, COPIED_MB, at_most=True, unit=" MB")


def _used(disk: Path) -> int:
    sync()
    return shutil.disk_usage(disk).used


def measure(system: str, disk: Path, size_gb: float) -> Iterator[Row]:
    """Back up and restore by sharing, and read the archive by GNU tar."""
    weights = write_weights(disk / "cache", size_gb)
    evict(weights.files)
    store = DirectoryStore(disk / "store")
    with Watch(disk) as trusting:
        trusted = backup([weights.snapshot], store, compression="none", trust_marker=True, report=trusting.report)
    yield from trusting.rows(f"{system}: backup that trusts the last verification")
    with Watch(disk) as writing:
        made = backup([weights.snapshot], store, compression="none", report=writing.report)
    yield from writing.rows(f"{system}: backup")
    yield _shared(f"{system}: archive that shares its blocks", [Path(made.location)], weights.size)
    with Watch(disk) as reading:
        back = restore(made.location, disk / "back", report=reading.report).snapshots[0].path
    yield from reading.rows(f"{system}: restore")
    files = [back / path.relative_to(weights.snapshot) for path in weights.files]
    yield _shared(f"{system}: restored files that share their blocks", files, weights.size)
    yield _by_tar(system, disk, Path(made.location), weights)
    assert trusted.cloned
    assert made.cloned


def _shared(figure: str, files: list[Path], size: int) -> Row:
    share = sum(map(shared_bytes, files)) / size
    return Row(figure, "by FIEMAP", share * 100, 99, unit=" %")


def _by_tar(system: str, disk: Path, archive: Path, weights: Weights) -> Row:
    """Extract by GNU tar and compare every file with the snapshot's."""
    target = disk / "by-tar"
    target.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", target], check=True)
    extracted = target / weights.snapshot.relative_to(weights.cache)
    different = [
        file for file in weights.files
        if subprocess.run(["cmp", "-s", file, extracted / file.relative_to(weights.snapshot)], check=False).returncode
    ]  # fmt: skip
    figure = f"{system}: files that GNU tar extracts otherwise"
    return Row(figure, f"of {len(weights.files)}", len(different), 0, at_most=True, unit="")


def main() -> int:
    """Measure, print, and return 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--dir", type=Path, help="where the file systems are made (default: the temporary directory)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="zops-bench-", dir=given.dir))
    print(f"{describe_host()}; {given.size_gb:g} GB", flush=True)
    rows: list[Row] = []
    try:
        for system in SYSTEMS:
            if shutil.which(f"mkfs.{system}") is None:
                print(f"mkfs.{system} is not here: {system} is not measured", file=sys.stderr)
                continue
            with mounted(system, root, 2.5 * given.size_gb + 1) as disk:
                rows += measure(system, disk, given.size_gb)
    finally:
        shutil.rmtree(root)
    return show(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())

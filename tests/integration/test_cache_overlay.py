"""On overlayfs, as in a container, a file's pages belong to the file below; residency must see them all the same."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from zops.cache.warm import _read_ahead, resident_bytes

SIZE = (1 << 20) + 5


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A mounted overlay whose lower directory holds one file that is not in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir()
    (lower / "file").write_bytes(os.urandom(SIZE))
    descriptor = os.open(lower / "file", os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"no overlay can be mounted here: {done.stderr.decode().strip()}")
    yield merged
    subprocess.run(["umount", str(merged)], check=True)


def test_a_warm_file_on_overlayfs_must_not_be_called_cold(overlay: Path) -> None:
    file = overlay / "file"
    assert resident_bytes(file) < SIZE
    file.read_bytes()
    assert resident_bytes(file) == SIZE


def test_reading_ahead_on_overlayfs_must_bring_the_file_in(overlay: Path) -> None:
    with (overlay / "file").open("rb", buffering=0) as stream:
        _read_ahead(stream.fileno(), 0, SIZE)
    eventually(lambda: resident_bytes(overlay / "file") == SIZE, "the pages to arrive", timeout_s=5)

"""Digests must be right whatever the sizes, wherever the bytes are, and whatever happens to the files meanwhile."""

import hashlib
import mmap
import os
import resource
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import eventually
from zops.cache import hashing, reading
from zops.cache.hashing import Digests, _Job, digest_files
from zops.cache.lanes import BUFFERS, Schedule
from zops.cache.pages import resident_bytes
from zops.cache.reading import BLOCK, CHUNK, HUGE_PAGE, SMALL, OpenFile, new_buffer
from zops.events import Event, Progressed, silent

BOTH = ("sha256", "blake3")
SIZES = [0, 1, 4095, 4096, BLOCK, BLOCK + 1, SMALL - 1, SMALL, SMALL + 1, CHUNK - 1, CHUNK, CHUNK + 4097, 3 * CHUNK + 5]


def evict(path: Path) -> bool:
    """Drop a file from the page cache; tell whether that worked."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_bytes(path) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    content = os.urandom(max(SIZES) + len(SIZES))
    for number, size in enumerate(SIZES):
        (root / str(size)).write_bytes(content[number : number + size])
    return {str(size): root / str(size) for size in SIZES}


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("slice_bytes", [CHUNK, 2 * CHUNK])
def test_every_digest_must_be_right_whatever_the_size(
    files: dict[str, Path], *, cold: bool, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "SLICE_BYTES", slice_bytes)
    for path in files.values():
        if cold:
            evict(path)
    found = digest_files(files, BOTH, silent, "")
    for key, path in files.items():
        content = path.read_bytes()
        result = found[key]
        assert isinstance(result, Digests)
        assert result.hex == {"sha256": hashlib.sha256(content).hexdigest(), "blake3": blake3(content).hexdigest()}, key
        assert result.stat[0] == len(content)


def test_progress_must_count_every_byte_once(files: dict[str, Path]) -> None:
    events: list[Event] = []
    digest_files(files, ("sha256",), events.append, "")
    done = [event.done for event in events if isinstance(event, Progressed)]
    assert done == sorted(done)
    assert done[-1] == sum(SIZES)


def test_what_is_on_the_disk_must_be_read_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * CHUNK + 5))
    if not evict(path):
        pytest.skip("this file system keeps everything in memory")
    assert isinstance(digest_files({"": path}, ("sha256",), silent, "")[""], Digests)
    assert resident_bytes(path) == 0


def test_a_file_system_without_direct_reads_must_be_read_all_the_same(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, command: int, argument: int = 0) -> int:
        if command == reading.fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "refused")
        return 0

    monkeypatch.setattr(reading.fcntl, "fcntl", refuse)
    for path in files.values():
        evict(path)
    found = digest_files(files, ("sha256",), silent, "")
    for key, path in files.items():
        assert found[key].hex["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_cannot_be_read_must_not_keep_the_others_from_it(files: dict[str, Path], tmp_path: Path) -> None:
    paths = {**files, "gone": tmp_path / "gone", "directory": tmp_path}
    found = digest_files(paths, ("sha256",), silent, "")
    assert isinstance(found["gone"], FileNotFoundError)
    assert isinstance(found["directory"], IsADirectoryError)
    assert sum(isinstance(each, Digests) for each in found.values()) == len(files)


def test_more_files_than_may_be_open_at_once_must_be_hashed(tmp_path: Path) -> None:
    paths = {str(number): tmp_path / str(number) for number in range(200)}
    for path in paths.values():
        path.write_bytes(b"x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 80, limits[1]))
    try:
        found = digest_files(paths, ("sha256",), silent, "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(isinstance(each, Digests) for each in found.values())


def test_an_error_while_reporting_must_end_all_threads_and_close_all_files(files: dict[str, Path]) -> None:
    def broken(event: Event) -> None:
        if isinstance(event, Progressed):
            raise BrokenPipeError

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BrokenPipeError):
        digest_files(files, ("sha256",), broken, "")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash")]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_bug_in_a_reader_must_end_the_work_and_be_seen(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: OpenFile, start: int, stop: int) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(OpenFile, "is_cached", broken)
    with pytest.raises(ZeroDivisionError):
        digest_files(files, ("sha256",), silent, "")


def test_a_writer_must_get_a_file_that_is_hashed_in_place_and_cutting_it_must_end_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * CHUNK))
    file = OpenFile(path)
    views = file.from_cache(new_buffer(), 0, file.size)
    assert len(next(views)) == CHUNK, "not hashed in place: this test would show nothing"
    writer = threading.Thread(target=os.truncate, args=(path, CHUNK))
    writer.start()
    eventually(
        lambda: reading.fcntl.fcntl(file._descriptor, reading.fcntl.F_GETLEASE) != reading.fcntl.F_RDLCK,
        "the writer to come",
    )
    assert path.stat().st_size == 8 * CHUNK, "the writer did not wait"
    assert sum(len(view) for view in views) <= 7 * CHUNK
    writer.join()
    assert path.stat().st_size == CHUNK
    file.close()


def test_a_file_that_somebody_writes_to_must_be_copied_and_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(CHUNK + 5)
    path.write_bytes(content)
    with path.open("r+b"):
        file = OpenFile(path)
        views = [bytes(view) for view in file.from_cache(new_buffer(), 0, file.size)]
        file.close()
    assert b"".join(views) == content
    assert max(map(len, views)) == BLOCK


def test_buffers_must_stay_within_what_a_thread_may_use() -> None:
    assert BUFFERS * (CHUNK + HUGE_PAGE) + CHUNK <= 64 << 20
    assert len(new_buffer()) == CHUNK
    assert CHUNK % mmap.PAGESIZE == 0


def drain(sizes: list[int], slice_bytes: int, workers: int) -> float:
    """Play the schedule with workers of equal speed, one slice at a time; return when the last one ends, in bytes."""
    schedule = Schedule([_Job(Path(), ("sha256",), size) for size in sizes], slice_bytes, workers=workers)
    busy: list[tuple[int, int, _Job]] = []
    free = set(range(workers))
    now = 0
    while True:
        while free and schedule._idle and (job := schedule.take(min(free))):
            worker = min(free)
            free.remove(worker)
            part = min(slice_bytes, job.left)
            job.left -= part
            busy.append((now + part, worker, job))
        if not busy:
            return now
        busy.sort(key=lambda each: each[:2])
        now, worker, job = busy.pop(0)
        free.add(worker)
        schedule.give_back(job, worker)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=12), st.integers(1, 8))
def test_all_cores_must_end_together_unless_one_file_is_too_large_for_that(sizes: list[int], workers: int) -> None:
    slice_bytes = max(1, sum(sizes) // (workers * 64))
    best = max(*sizes, sum(sizes) / workers)
    assert drain(sizes, slice_bytes, workers) <= best + 2 * slice_bytes


def test_a_worker_must_not_read_ahead_into_the_file_that_an_idle_one_needs() -> None:
    jobs = [_Job(Path(), ("sha256",), size) for size in (30, 20, 10)]
    schedule = Schedule(jobs, 1, workers=2)
    assert schedule.take(0) is jobs[0]
    assert schedule._may_take(0), "two files are left: one to read ahead, one for the idle worker"
    assert schedule.take(0) is jobs[1]
    assert not schedule._may_take(0)
    assert schedule._may_take(1)
    assert schedule.take(1) is jobs[2]
    schedule.give_back(jobs[2], 1)
    assert not schedule._may_take(0)
    assert schedule._may_take(1)

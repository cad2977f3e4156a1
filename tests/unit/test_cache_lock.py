"""A lock must name its holder, make others wait, and die with its holder."""

import os
import threading
from pathlib import Path

import pytest

from zops.cache import lock as lock_module
from zops.cache.lock import hold, read_holder
from zops.errors import HostShort, LockHeld
from zops.events import Event, Warned, silent


def test_a_lock_must_name_its_holder_while_it_is_held_and_leave_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "made" / "lock"
    with hold(lock, silent):
        holder = read_holder(lock)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert not lock.exists()


def test_a_second_holder_must_wait_and_be_told_for_whom(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    events: list[Event] = []
    told, entered = threading.Event(), threading.Event()

    def report(event: Event) -> None:
        events.append(event)
        told.set()

    def second() -> None:
        with hold(lock, report):
            entered.set()

    with hold(lock, silent):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10)
        assert not entered.is_set()
    assert entered.wait(10)
    thread.join()
    assert [type(event) for event in events] == [Warned]
    assert f"process {os.getpid()}" in events[0].text
    assert not lock.exists()


def test_a_lock_held_too_long_must_be_an_error_that_names_the_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with hold(lock, silent), pytest.raises(LockHeld, match=f"process {os.getpid()}"), hold(lock, silent, timeout_s=0):
        pass
    assert not lock.exists()


def test_a_file_that_a_dead_holder_left_must_not_be_in_the_way(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text('{"pid": 1, "host": "gone", "command": "zops", "since": 0}')
    with hold(lock, silent, timeout_s=0):
        assert read_holder(lock).pid == os.getpid()


def test_a_file_that_lost_its_name_before_it_was_locked_must_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    try_lock = lock_module._try_lock
    others: list[int] = []

    def late(descriptor: int, operation: int) -> bool:
        # Between our open and our flock the last holder ended, and a third one took the name.
        if not others:
            path.unlink()
            others.append(os.open(path, os.O_RDWR | os.O_CREAT))
            assert try_lock(others[0])
        return try_lock(descriptor, operation)

    monkeypatch.setattr(lock_module, "_try_lock", late)
    with pytest.raises(LockHeld), hold(path, silent, timeout_s=0):
        pass
    os.close(others[0])


def test_many_at_once_must_take_turns(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "lock", [], []

    def work() -> None:
        with hold(lock, silent):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 8


@pytest.mark.parametrize("where", ["file/lock", "/proc/nowhere/lock"])
def test_a_place_that_cannot_be_written_must_be_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostShort, match="cannot write"), hold(tmp_path / where, silent):
        pass


def test_who_only_reads_must_share_a_lock_and_keep_writers_out_until_the_last_one_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path, silent, shared=True):
        with hold(path, silent, shared=True, timeout_s=0), pytest.raises(LockHeld), hold(path, silent, timeout_s=0):
            pass
        assert path.exists()
        with pytest.raises(LockHeld), hold(path, silent, timeout_s=0):
            pass
    assert not path.exists()
    with hold(path, silent, timeout_s=0), pytest.raises(LockHeld), hold(path, silent, shared=True, timeout_s=0):
        pass

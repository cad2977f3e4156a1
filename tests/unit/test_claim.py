"""Claims on deployments: one holder at a time on this host, again without waiting for whoever holds it already."""

import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from zops.errors import LockHeld
from zops.events import Warned, silent
from zops.runtime import claim as module
from zops.runtime.claim import claim, claim_path


@contextmanager
def held_by_another(engine: str, name: str):
    """Somebody else who holds the claim: a thread of its own, as another process would."""
    has, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with claim(engine, name, silent):
            has.set()
            may_go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has.wait(10)
    try:
        yield may_go
    finally:
        may_go.set()
        thread.join(10)


def test_a_second_claim_must_be_refused_naming_the_holder() -> None:
    with held_by_another("e", "demo"), pytest.raises(LockHeld) as raised, claim("e", "demo", silent, timeout_s=0):
        pass
    assert raised.value.message.startswith("demo is being changed by ")
    assert f"process {os.getpid()}" in raised.value.message
    with claim("e", "demo", silent, timeout_s=0):
        pass


def test_whoever_waits_must_be_told_for_whom_and_go_on_after_it() -> None:
    told = []
    with held_by_another("e", "demo") as may_go:

        def report(event) -> None:
            told.append(event)
            may_go.set()

        with claim("e", "demo", report, timeout_s=10):
            pass
    assert [type(event) for event in told] == [Warned]
    assert f"process {os.getpid()}" in told[0].text


def test_whoever_holds_it_must_get_it_again_at_once_and_keep_it_until_the_end() -> None:
    path = claim_path("e", "demo")
    with claim("e", "demo", silent, timeout_s=0):
        with claim("e", "demo", silent, timeout_s=0):
            pass
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("other", [("e", "other"), ("f", "demo")])
def test_another_deployment_or_engine_must_not_wait(other: tuple[str, str]) -> None:
    with held_by_another("e", "demo"), claim(*other, silent, timeout_s=0):
        pass


def test_an_error_of_what_is_done_under_it_must_pass_unchanged() -> None:
    with pytest.raises(LockHeld, match="a cache is locked by me"), claim("e", "demo", silent):
        raise LockHeld("a cache is locked by me")
    assert not claim_path("e", "demo").exists()


def test_the_lock_must_lie_where_it_was_asked_for(tmp_path: Path) -> None:
    assert claim_path("e", "demo", {"ZOPS_LOCK_DIR": str(tmp_path)}).parent == tmp_path


def test_the_shared_directory_must_be_for_every_user(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SHARED_DIR", tmp_path / "zops")
    for _ in range(2):
        assert claim_path("e", "demo", {}).parent == tmp_path / "zops"
        assert (tmp_path / "zops").stat().st_mode & 0o7777 == 0o1777


def test_without_a_shared_directory_state_must_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SHARED_DIR", tmp_path / "missing" / "zops")
    assert claim_path("e", "demo", {"ZOPS_STATE_DIR": str(tmp_path)}).parent == tmp_path / "locks"

"""Fixtures that every layer of tests shares."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# A job in the background of a shell ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may see or touch the operator's own files, settings or hubs, nor leave settings to the next one."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("ZOPS_", "HF_", "MODELSCOPE_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ZOPS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("ZOPS_LOCK_DIR", str(tmp_path / "locks"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic tiny model, seed 0, as a verified snapshot; a test that changes it copies it first."""
    from zops.cache.synthetic import synthesize_snapshot

    return synthesize_snapshot(tmp_path_factory.mktemp("model") / "tiny", "tiny").path


@pytest.fixture(scope="session")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A running `zops serve` with the tiny model, shared by every test that leaves it as it found it."""
    from tests.support.serving import start_server, stop_hard

    server = start_server(tiny_model, tmp_path_factory.mktemp("served"))
    try:
        yield server.wait_ready()
    finally:
        stop_hard(server)

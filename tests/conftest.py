"""Fixtures that every layer of tests shares."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see or touch the operator's own files, settings or hubs."""
    for name in list(os.environ):
        if name.startswith(("ZOPS_", "HF_", "MODELSCOPE_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ZOPS_STATE_DIR", str(tmp_path / "state"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

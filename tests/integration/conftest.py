"""Fixtures of integration tests of several rooms."""

import pytest


@pytest.fixture
def renders(monkeypatch):
    """Which presets the gate had make images."""
    from zops.serving.accelerate import gate

    made = []
    plain = gate.render
    monkeypatch.setattr(gate, "render", lambda applied, **how: made.append(applied.preset) or plain(applied, **how))
    return made

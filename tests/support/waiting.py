"""Waiting for conditions: the only way in which a test lets time pass."""

import time
from collections.abc import Callable
from typing import Any


def eventually(check: Callable[[], Any], what: str, *, timeout_s: float = 30.0) -> Any:
    """Return the first true value of `check()`; fail naming `what` when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.02)
    return found

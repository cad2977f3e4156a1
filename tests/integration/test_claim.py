"""Claims between users and processes of one host."""

import os
import subprocess
import sys
import tempfile
from contextvars import Context
from pathlib import Path

import pytest

from zops.errors import LockHeld, ZopsError
from zops.events import silent
from zops.runtime import claim as module
from zops.runtime.claim import claim

ROOT = Path(__file__).parents[2]
NOBODY = 65534
HOLD = """
import sys
from zops.events import silent
from zops.runtime.claim import claim
with claim("e", "demo", silent):
    print("holds", flush=True)
    sys.stdin.read()
"""


def said_to(user: int, directory: Path) -> str:
    """What another user is told who claims the same; forked, because that user may not read our interpreter."""
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(user)
            os.setuid(user)
            os.environ["ZOPS_LOCK_DIR"] = str(directory)
            # This process has the claim of the one that it was forked from only by name.
            Context().run(claim_once, say)
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(said, "rb") as told:
        answer = told.read().decode()
    os.waitpid(child, 0)
    return answer


def claim_once(say: int) -> None:
    try:
        with claim("e", "demo", silent, timeout_s=0):
            os.write(say, b"claimed")
    except ZopsError as error:
        os.write(say, f"{error.code}: {error.message}".encode())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be two users")
def test_another_user_must_be_told_of_the_holder_and_not_of_a_permission(monkeypatch) -> None:
    # Not below pytest's own directory, which no other user may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        Path(parent).chmod(0o755)
        shared = Path(parent) / "zops"
        monkeypatch.setattr(module, "SHARED_DIR", shared)
        monkeypatch.delenv("ZOPS_LOCK_DIR")
        with claim("e", "demo", silent):
            told = said_to(NOBODY, shared)
        assert told.startswith("lock-held: demo is being changed by ")
        assert f"process {os.getpid()} " in told
        assert said_to(NOBODY, shared) == "claimed"


def test_a_holder_that_is_killed_must_not_be_waited_for(monkeypatch) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"holds\n"
    with pytest.raises(LockHeld), claim("e", "demo", silent, timeout_s=0):
        pass
    holder.kill()
    holder.communicate(timeout=20)
    with claim("e", "demo", silent, timeout_s=0):
        pass

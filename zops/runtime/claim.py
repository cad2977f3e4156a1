"""One zops at a time on a deployment: whoever deploys, removes or heals one holds its claim.

A claim is a lock of this host: two hosts that deploy to one engine do not see each other's. It is held again without
waiting by whoever holds it already in the same thread, so that a command can hold it over several of its steps.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from zops.cache.lock import hold
from zops.errors import LockHeld
from zops.events import Report
from zops.host.paths import state_dir
from zops.runtime.base import CLAIM_TIMEOUT_S

SHARED_DIR = Path("/run/lock/zops")
# As /tmp: everybody may claim, nobody may take away another one's claim.
SHARED_MODE = 0o1777

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def claim(engine: str, name: str, report: Report, *, timeout_s: float = CLAIM_TIMEOUT_S) -> Iterator[None]:
    """Hold the claim on a deployment.

    Args:
        engine: what names the engine on which it runs, always in the same words.
        name: of the deployment.
        report: is told whom it waits for.
        timeout_s: how long to wait for another holder, in seconds; 0 gives up at once.

    Raises:
        LockHeld: when another process holds it longer than that, naming the process.
        HostShort: when no directory for locks can be written.
    """
    path = claim_path(engine, name)
    if path in _held.get():
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(path, report, timeout_s=timeout_s))
        except LockHeld as error:
            holder = error.message.partition(" is locked by ")[2]
            raise LockHeld(f"{name} is being changed by {holder}", hint=error.hint, lock=str(path)) from error
        token = _held.set(_held.get() | {path})
        stack.callback(_held.reset, token)
        yield


def claim_path(engine: str, name: str, environ: Mapping[str, str] | None = None) -> Path:
    """Return the lock file of a deployment: in `ZOPS_LOCK_DIR`, else where all users share one, else in our state."""
    environ = os.environ if environ is None else environ
    chosen = environ.get("ZOPS_LOCK_DIR")
    directory = Path(chosen).expanduser().absolute() if chosen else _shared_dir() or state_dir(environ) / "locks"
    return directory / f"{name}.{hashlib.sha256(engine.encode()).hexdigest()[:12]}.lock"


def _shared_dir() -> Path | None:
    """Return the directory that all users of this host share, made where it is missing; None where it cannot be."""
    try:
        SHARED_DIR.mkdir()
        SHARED_DIR.chmod(SHARED_MODE)
    except FileExistsError:
        pass
    except OSError:
        return None
    return SHARED_DIR if os.access(SHARED_DIR, os.W_OK | os.X_OK) else None

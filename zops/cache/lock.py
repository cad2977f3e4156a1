"""One zops at a time on a snapshot: a lock that names its holder and dies with it.

It is flock(2), so the kernel takes it from a process that ends, however it ends; the text in the file only tells
people who holds it.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from zops.cache.redact import redacted
from zops.cache.room import FULL, shortage
from zops.errors import HostShort, LockHeld
from zops.events import Report, Warned

# A pull of 33 GB over 100 Mbit/s takes 45 minutes; whoever waits for one should not give up before.
TIMEOUT_S = 3600.0
POLL_S = 0.1
DIRECTORY_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. `since` is seconds since the epoch."""

    pid: int
    host: str
    command: str
    since: float

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.command} (process {self.pid} on {self.host}, since {began})"


@contextmanager
def hold(path: Path, report: Report, *, timeout_s: float = TIMEOUT_S, shared: bool = False) -> Iterator[None]:
    """Hold the lock in the file `path` (made when missing, removed afterwards), waiting for another holder to end.

    Args:
        path: of the lock file.
        report: is told whom it waits for.
        timeout_s: how long to wait, in seconds.
        shared: hold it beside others who only read as well; who writes waits for all of them.

    Raises:
        LockHeld: when another process holds it longer than `timeout_s`, naming that process.
        HostShort: when the directory of the lock cannot be written.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = _acquire(path, report, timeout_s, operation)
    try:
        yield
    finally:
        # Removed while held alone: whoever waits on this inode sees that the name has gone and starts over.
        with suppress(OSError):
            if _try_lock(descriptor, fcntl.LOCK_EX) and _is_current(descriptor, path):
                path.unlink()
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """Return who wrote itself into a lock file, None when nobody did (or is just about to)."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _acquire(path: Path, report: Report, timeout_s: float, operation: int = fcntl.LOCK_EX) -> int:
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        descriptor = _open(path)
        try:
            if _try_lock(descriptor, operation) and _is_current(descriptor, path):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        holder = read_holder(path)
        if time.monotonic() >= deadline:
            raise LockHeld(
                f"{path.parent} is locked by {holder or 'another process'}",
                hint=f"wait until it ends{f', or end it with: kill {holder.pid}' if holder else ''}",
                lock=str(path),
            )
        if holder and not told:
            report(Warned(f"waiting for {holder}, which holds {path}"))
            told = True
        time.sleep(POLL_S)


def _open(path: Path) -> int:
    reason: str | None = ""
    # Whoever held the lock before may remove the empty directory between the two calls, but not again and again.
    for _ in range(DIRECTORY_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError as error:
            reason = error.strerror
        except PermissionError as error:
            # Another user's, in a directory that all users share. To wait for it, reading it is enough.
            with suppress(OSError):
                return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            reason = error.strerror
            break
        except OSError as error:
            if error.errno in FULL:
                raise shortage(error) or error from error
            reason = error.strerror
            break
    raise HostShort(
        f"cannot write in {path.parent}: {reason}",
        code="cache-not-writable",
        hint="give this user write access, or set another cache.dir",
    )


def _try_lock(descriptor: int, operation: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """Tell whether the locked file still has its name; the last holder removed it otherwise."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    # Whoever waits gets to read it, and it may name a mirror with its password.
    command = redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))[:200]
    holder = Holder(os.getpid(), socket.gethostname(), command, time.time())
    # On a full disk others are not told who holds it, and what is to be done under it says more of the disk.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)

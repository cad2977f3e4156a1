"""The directory of an instance that is a process, what lives of it, and how that is ended."""

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zops.runtime.supervisor import SETTLE_S, Identity, read_identity, read_json, read_status, write_status


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one instance, and what lies in it."""

    path: Path

    @property
    def record(self) -> dict[str, Any] | None:
        """What was started, None when there is no instance."""
        return read_json(self.path / "instance.json")

    @property
    def supervisor(self) -> Identity | None:
        """The supervisor, None when it does not live."""
        identity = read_identity(self.path / "pid")
        return identity if identity and identity.alive else None


def end_instance(place: Place, grace_s: float | None = None) -> None:
    """End supervisor and child; a child whose supervisor was killed is ended as well.

    Args:
        place: of the instance.
        grace_s: seconds to finish in, by default those that it was started with and what its supervisor adds to them.
    """
    own_s = float((place.record or {}).get("grace_s", 0))
    supervisor = place.supervisor
    if supervisor:
        _end(supervisor, own_s + 2 * SETTLE_S if grace_s is None else grace_s)
    child = read_status(place.path).child
    # A supervisor that was killed here did not write down how its child ended, which may be gone by now.
    if child and (child.alive or supervisor):
        if child.alive:
            # A supervisor that had its time and was killed for it leaves a child that had it too.
            _end(child, own_s if grace_s is None else 0 if supervisor else grace_s)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        write_status(place.path, replace(read_status(place.path), child=None, exit_code=128 + signal.SIGKILL))


def _end(identity: Identity, grace_s: float) -> None:
    """End a process and return when it has ended; the descriptor keeps its number from being another's meanwhile."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        for order, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, SETTLE_S)):
            if not identity.alive:
                return
            signal.pidfd_send_signal(descriptor, order)
            select.select([descriptor], [], [], wait_s)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)

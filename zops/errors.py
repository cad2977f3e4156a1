"""Every error that an operator is meant to read, in one tree.

    ZopsError                     1   the operation failed
    ├── UsageError                2   what was asked for cannot be asked for
    │   └── SpecError             2   zops.yaml, a ZOPS_* variable or a flag is wrong
    ├── SnapshotMissing           3   no (complete) snapshot where one is needed
    ├── SnapshotDamaged           4   files do not match their manifest
    ├── ArchiveDamaged            4   a tarball does not match what it says of itself
    ├── RuntimeUnreachable        5   no engine, no cluster, no permission to talk to it
    ├── HostShort                 6   the host lacks space, memory, a GPU or a free port
    ├── LockHeld                  7   another zops works on the same thing
    ├── NotReady                  8   an instance did not become ready in time
    └── SourceFailed              9   a hub, mirror or store did not deliver

A `ZopsError` is rendered as one clear line: what, why, what to do. Anything else that escapes is a bug and keeps its
traceback. The exit statuses are a published contract (docs/reference/exit-codes.md), and so are the codes
(docs/reference/errors.md); tests enumerate both.
"""

from typing import ClassVar


class ZopsError(Exception):
    """Base of every error that is shown without a traceback.

    Args:
        message: what happened and why, one sentence without a trailing full stop.
        code: a stable kebab-case name of this very situation, used in JSON and as the anchor in the documentation.
        hint: what to do about it, preferably a command; empty when there is nothing useful to say.
        details: facts for scripts (paths, sizes, names); rendered in JSON only.
    """

    exit_status: ClassVar[int] = 1
    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, code: str = "", hint: str = "", **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.details = details

    def as_json(self) -> dict[str, object]:
        """Return the error as the JSON object documented in docs/reference/json.md."""
        body: dict[str, object] = {"code": self.code, "message": self.message, "exit_status": self.exit_status}
        if self.hint:
            body["hint"] = self.hint
        if self.details:
            body["details"] = self.details
        return {"error": body}


class UsageError(ZopsError):
    """Raised when what was asked for makes no sense, whatever the state of the host."""

    exit_status = 2
    default_code = "usage"


class SpecError(UsageError):
    """Raised when the specification is wrong: names where the value came from, its path and the value itself."""

    default_code = "spec-invalid"


class SnapshotMissing(ZopsError):
    """Raised when there is no snapshot, or only part of one, where a whole one is needed."""

    exit_status = 3
    default_code = "snapshot-missing"


class SnapshotDamaged(ZopsError):
    """Raised when files of a snapshot do not match its manifest."""

    exit_status = 4
    default_code = "snapshot-damaged"


class ArchiveDamaged(ZopsError):
    """Raised when an archive is cut, flipped, hostile, or not what its manifest says."""

    exit_status = 4
    default_code = "archive-damaged"


class RuntimeUnreachable(ZopsError):
    """Raised when the container engine or cluster cannot be talked to."""

    exit_status = 5
    default_code = "runtime-unreachable"


class HostShort(ZopsError):
    """Raised when the host lacks something: disk space, inodes, memory, a GPU, a free port."""

    exit_status = 6
    default_code = "host-short"


class LockHeld(ZopsError):
    """Raised when another zops process holds the lock, naming its holder."""

    exit_status = 7
    default_code = "lock-held"


class NotReady(ZopsError):
    """Raised when an instance did not become ready within its time, naming the phase in which it stopped."""

    exit_status = 8
    default_code = "not-ready"


class SourceFailed(ZopsError):
    """Raised when a hub, mirror or store refused, broke off or sent wrong bytes, after all retries."""

    exit_status = 9
    default_code = "source-failed"

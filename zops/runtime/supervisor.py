"""The small process that keeps a local instance running: `python -m zops.runtime.supervisor DIR`.

It does for a process what an engine does for a container: starts it in its own session, starts it again when it ends
(always, until it is told to stop), rotates its log, and stops it with SIGTERM and, after the grace, SIGKILL. It needs
nothing but the standard library and a directory:

    DIR/instance.json   what to run, written before it is started: argv, environment, grace_s, log_bytes, log_files
    DIR/pid             the supervisor itself, as an `Identity`; there only while it lives
    DIR/status.json     the child as an `Identity`, how often it was started again, and how it ended the last time
    DIR/log             everything the child wrote, and what the supervisor did, in lines that begin with [supervisor]
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

# As Docker does it: doubled after each end, forgotten after a run that lasted.
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
LASTING_RUN_S = 10.0
# Fallback for a missed SIGCHLD; nothing waits for it.
POLL_S = 5.0
# What a killed process group may take to vanish from the kernel, and a log to be read to its end.
SETTLE_S = 5.0
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: int
    """Clock ticks between boot and the start of the process: field 22 of /proc/PID/stat, see proc(5)."""
    boot: str
    """The boot in which it was started."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the identity of a living process, None when there is none; a zombie does not live."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        # The second field is the command in parentheses and may contain anything, parentheses included.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in {"Z", "X"} else cls(pid, int(fields[19]), _boot())

    @property
    def alive(self) -> bool:
        """Whether this very process still lives."""
        return Identity.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class Status:
    """What the supervisor last wrote of its child."""

    child: Identity | None = None
    started_at: str = ""
    """ISO 8601 in UTC."""
    restarts: int = 0
    exit_code: int | None = None
    """How the child ended the last time; 128 + N after signal N, as shells count."""


def read_identity(path: Path) -> Identity | None:
    """Return the identity that a file holds, None when there is none."""
    body = read_json(path)
    return _identity(body) if body else None


def read_status(directory: Path) -> Status:
    """Return what the supervisor last wrote of its child; an empty status when it wrote nothing yet."""
    body = read_json(directory / "status.json") or {}
    child = body.get("child")
    return Status(
        child=_identity(child) if child else None,
        started_at=str(body.get("started_at", "")),
        restarts=int(body.get("restarts", 0)),
        exit_code=body.get("exit_code"),
    )


def write_status(directory: Path, status: Status) -> None:
    """Write what is known of a child."""
    write_file(directory / "status.json", asdict(status))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None when it is missing or broken."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def write_file(path: Path, body: dict[str, Any]) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


class RotatingLog:
    """A log file that is renamed to log.1, log.2 ... when it grows too large; the oldest is dropped."""

    def __init__(self, path: Path, *, limit_bytes: int, files: int) -> None:
        self._path = path
        self._limit = limit_bytes
        self._files = files
        self._stream = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._lock = threading.Lock()

    def write(self, chunk: bytes) -> None:
        """Append a line, or a part of one, in a file with room for it; a full disk costs lines, not the instance."""
        with self._lock, suppress(OSError):
            if self._size and self._size + len(chunk) > self._limit:
                self._rotate()
            self._stream.write(chunk)
            self._size += len(chunk)

    def note(self, text: str) -> None:
        """Append a line of the supervisor's own."""
        self.write(f"[supervisor] {_now()} {text}\n".encode())

    def close(self) -> None:
        """Close the file; nothing can be written any more."""
        self._stream.close()

    def _rotate(self) -> None:
        self._stream.close()
        for number in range(self._files - 1, 0, -1):
            older = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            with suppress(FileNotFoundError):
                older.replace(self._path.with_name(f"{self._path.name}.{number}"))
        self._stream = self._path.open("wb", buffering=0)
        self._size = 0


class Supervisor:
    """Keeps one child running until it is told to stop."""

    def __init__(self, directory: Path) -> None:
        body = json.loads((directory / "instance.json").read_text(encoding="utf-8"))
        self._directory = directory
        self._argv: list[str] = body["argv"]
        self._environment: dict[str, str] = body["environment"]
        self._grace_s = float(body["grace_s"])
        self._log = RotatingLog(directory / "log", limit_bytes=body["log_bytes"], files=body["log_files"])
        self._status = Status()
        self._stopping = False

    def run(self, ready: IO[str]) -> None:
        """Start the child, say so on `ready`, and keep it running until SIGTERM comes."""
        # Blocked signals wait in line for sigtimedwait; no handler can come between two statements.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        write_file(self._directory / "pid", asdict(_myself()))
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                began = time.monotonic()
                try:
                    child = self._start()
                except OSError as error:
                    self._log.note(f"cannot start {self._argv[0]}: {error}")
                    if not ready.closed:
                        ready.write(f"cannot start {self._argv[0]}: {error}")
                        ready.close()
                        return
                else:
                    if not ready.closed:
                        ready.write("started")
                        ready.close()
                    self._watch(child)
                if self._stopping:
                    return
                pause_s = FIRST_PAUSE_S if time.monotonic() - began > LASTING_RUN_S else pause_s
                self._log.note(f"starting it again in {pause_s:g} s")
                if self._told_to_stop_within(pause_s):
                    return
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self._record(restarts=self._status.restarts + 1)
        finally:
            (self._directory / "pid").unlink(missing_ok=True)

    def _start(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            self._argv,
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_prepare_child,  # noqa: PLW1509 - no other thread runs here: the log's ended with the last child
        )
        self._record(child=Identity.of(child.pid), started_at=_now())
        self._log.note(f"started {' '.join(self._argv)} as process {child.pid}")
        return child

    def _watch(self, child: "subprocess.Popen[bytes]") -> None:
        """Wait until the child has ended, passing on the wish to stop, and leave nothing of it behind."""
        copier = threading.Thread(target=self._copy, args=(child.stdout,), daemon=True)
        copier.start()
        deadline: float | None = None
        while not _has_ended(child.pid):
            wait_s = POLL_S if deadline is None else max(0.0, deadline - time.monotonic())
            received = signal.sigtimedwait(_SIGNALS, wait_s)
            if received is not None and received.si_signo in {signal.SIGTERM, signal.SIGINT} and not self._stopping:
                self._stopping = True
                deadline = time.monotonic() + self._grace_s
                child.terminate()
            elif received is None and deadline is not None and time.monotonic() >= deadline:
                self._log.note(f"it did not stop within {self._grace_s:g} s and is killed")
                child.kill()
                deadline = time.monotonic() + SETTLE_S
        # Its own children go first (a worker would keep its GPU); the number cannot be another's before it is reaped.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        copier.join(SETTLE_S)
        self._record(child=None, exit_code=code if code >= 0 else 128 - code)
        self._log.note(f"it ended with status {self._status.exit_code}")

    def _told_to_stop_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            received = signal.sigtimedwait(_SIGNALS, left_s)
            if received is not None and received.si_signo != signal.SIGCHLD:
                return True
        return False

    def _copy(self, output: IO[bytes]) -> None:
        with output:
            for line in iter(lambda: output.readline(65536), b""):
                self._log.write(line)

    def _record(self, **changes: Any) -> None:
        self._status = Status(
            **{
                "child": self._status.child,
                "started_at": self._status.started_at,
                "restarts": self._status.restarts,
                "exit_code": self._status.exit_code,
                **changes,
            }
        )
        # Advisory: a full disk must not end an instance that serves.
        with suppress(OSError):
            write_status(self._directory, self._status)


def main() -> None:
    """Detach from whoever called, then supervise."""
    parser = argparse.ArgumentParser(prog="python -m zops.runtime.supervisor")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ready-fd", type=int, required=True, help="where to say that the child was started")
    chosen = parser.parse_args()
    # The caller waits for the first process only, so that it has no child that it would have to wait for later.
    if os.fork():
        os._exit(0)
    os.setsid()
    with os.fdopen(chosen.ready_fd, "w", encoding="utf-8") as ready:
        Supervisor(chosen.directory).run(ready)
    sys.exit(0)


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A child whose supervisor was killed stops too; nobody would restart, stop or log it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _has_ended(pid: int) -> bool:
    """Tell whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _identity(body: dict[str, Any]) -> Identity | None:
    try:
        return Identity(int(body["pid"]), int(body["started"]), str(body["boot"]))
    except (KeyError, TypeError, ValueError):
        return None


def _myself() -> Identity:
    identity = Identity.of(os.getpid())
    assert identity, "a process that runs is alive"
    return identity


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    main()

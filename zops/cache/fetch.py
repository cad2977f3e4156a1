"""Bringing files from a source into a staging directory: several at once, with patience, and hashed on arrival."""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zops.cache.hashing import Hashed, Stopped, git_sha1_file, sha256_file
from zops.cache.hubs import Advance, HubFailure, Listed
from zops.cache.manifest import stat_key
from zops.errors import SourceFailed, ZopsError
from zops.events import Finished, Progressed, Report, Started, Task, Warned, task

if TYPE_CHECKING:
    import tenacity

Deliver = Callable[[Listed, Path, Advance], None]
"""Brings one file to a path in one attempt, or raises `HubFailure`."""

PARALLEL_FILES = 4
# Attempts in a row that bring no byte. One that brings some starts the count anew: a bad line is slow, not dead.
ATTEMPTS = 4
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
# How long threads may take to notice that they were stopped, before the lock is given up without them.
GRACE_S = 2.0
# Smaller files are done before anybody could read their line.
OWN_BAR_BYTES = 8_000_000

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def patiently(attempt: Callable[[], None], *, moved: Callable[[], bool], wait: Callable[[float], None]) -> None:
    """Repeat an attempt while it is worth it.

    Args:
        attempt: what to do; raises `HubFailure`.
        moved: whether the last attempt got further than the ones before.
        wait: waits that many seconds, or raises to give up.

    Raises:
        HubFailure: the last one.
    """
    import tenacity  # noqa: PLC0415 - it brings asyncio, which only those who fetch need to pay for

    idle = 0

    def enough(_state: object) -> bool:
        nonlocal idle
        idle = 0 if moved() else idle + 1
        return idle >= ATTEMPTS

    def pause(state: "tenacity.RetryCallState") -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after_s if isinstance(failure, HubFailure) else None
        return min(FIRST_WAIT_S * 2**idle if asked is None else asked, LONGEST_WAIT_S)

    tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HubFailure) and not error.final),
        stop=enough,
        wait=pause,
        sleep=wait,
        reraise=True,
    )(attempt)


@dataclass
class _Run:
    """What the threads of one `fetch` share."""

    deliver: Deliver
    staging: Path
    counter: Task
    report: Report
    arrived: Callable[[str, Hashed], None]
    todo: "queue.SimpleQueue[Listed]" = field(default_factory=queue.SimpleQueue)
    done: "queue.SimpleQueue[tuple[Listed, BaseException | None]]" = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        while not self.stop.is_set():
            try:
                file = self.todo.get_nowait()
            except queue.Empty:
                return
            try:
                _fetch_one(self, file)
            except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
                self.done.put((file, error))
            else:
                self.done.put((file, None))


def fetch(
    deliver: Deliver,
    files: Sequence[Listed],
    staging: Path,
    report: Report,
    *,
    arrived: Callable[[str, Hashed], None],
) -> None:
    """Bring every file to its path under `staging` and hash it; `arrived` is told of each that is right.

    Raises:
        SourceFailed: naming every file that could not be had, after all others were.
        HostShort: when the disk is full or read-only.
    """
    if not files:
        return
    failures: dict[str, HubFailure] = {}
    text = f"fetching {len(files)} file(s)"
    with task(report, "fetch", text, total=sum(file.size for file in files)) as counter:
        run = _Run(deliver, staging, counter, report, arrived)
        for file in sorted(files, key=lambda file: -file.size):
            run.todo.put(file)
        # Daemons: a thread that hangs in a dead connection must not keep an interrupted zops from ending.
        threads = [
            threading.Thread(target=run.work, name="fetch", daemon=True) for _ in range(min(PARALLEL_FILES, len(files)))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in files:
                file, error = run.done.get()
                if isinstance(error, HubFailure):
                    failures[file.path] = error
                elif error is not None:
                    raise error
        finally:
            run.stop.set()
            deadline = time.monotonic() + GRACE_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if failures:
            raise _undelivered(failures, len(files))


def _fetch_one(run: _Run, file: Listed) -> None:
    target = run.staging / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    counted = 0
    furthest = 0
    own_bar = file.size >= OWN_BAR_BYTES

    def advance(count: int) -> None:
        nonlocal counted
        if run.stop.is_set():
            raise Stopped
        counted += count
        run.counter.advance(count)
        if own_bar:
            run.report(Progressed(file.path, counted, file.size))

    def attempt() -> None:
        advance(-counted)
        run.deliver(file, target, advance)
        run.arrived(file.path, accept(file, target))

    def moved() -> bool:
        nonlocal furthest
        further, furthest = counted > furthest, max(furthest, counted)
        return further and counted < file.size

    def wait(seconds: float) -> None:
        if run.stop.wait(seconds):
            raise Stopped

    if own_bar:
        run.report(Started(file.path, file.path, file.size))
    patiently(attempt, moved=moved, wait=wait)
    advance(file.size - counted)
    if own_bar:
        run.report(Finished(file.path, file.path, 0.0))


def accept(file: Listed, path: Path) -> Hashed:
    """Hash a file that arrived, make it durable and return its SHA-256; remove it when it is not what was listed.

    Raises:
        HubFailure: saying what differs.
    """
    try:
        stat = stat_key(path)
    except FileNotFoundError:
        raise HubFailure("the SDK reported success and left no file") from None
    sha256 = sha256_file(path)
    wrong = ""
    if stat[0] != file.size:
        wrong = f"{stat[0]} bytes arrived instead of {file.size}"
    elif file.sha256 is not None and sha256 != file.sha256:
        wrong = f"its SHA-256 is {sha256[:12]} instead of {file.sha256[:12]}"
    elif file.sha256 is None and file.git_sha1 is not None and git_sha1_file(path) != file.git_sha1:
        wrong = "its git hash is not the listed one"
    if wrong:
        path.unlink()
        raise HubFailure("the source sent 0 bytes" if sha256 == EMPTY_SHA256 else wrong)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256, stat


def _undelivered(failures: dict[str, HubFailure], total: int) -> ZopsError:
    shown = "; ".join(f"{path}: {failure.text}" for path, failure in list(failures.items())[:3])
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    return SourceFailed(
        f"{len(failures)} of {total} file(s) could not be fetched: {shown}{more}",
        code="source-files-failed",
        hint="what arrived is kept; run the same command again to go on",
        files={path: failure.text for path, failure in failures.items()},
    )


def warn_without_digests(files: Sequence[Listed], report: Report) -> bool:
    """Tell the operator of files that nobody but this disk vouches for; return whether there are any."""
    bare = [file.path for file in files if file.sha256 is None and file.git_sha1 is None]
    if bare:
        report(Warned(f"the source lists no hash of {len(bare)} file(s); what arrives is recorded as it is"))
    return bool(bare)

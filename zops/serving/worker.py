"""The worker: the one process that owns a pipeline. Importing this module imports no torch.

It makes one batch at a time, because a pipeline called by two threads mixes up images. A second thread reads the pipe,
so that a cancellation is seen between two forwards, and the end of the HTTP process at any time; a third one tells
every half second that the worker lives.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from zops.errors import ZopsError
from zops.serving.batch import DeviceLost, Maker, Progress
from zops.serving.loader import load
from zops.serving.memory import Told
from zops.serving.messages import BEAT_S, Batch, Beat, Cancel, Free, FromWorker, StartFailed, ToWorker, WorkerSettings
from zops.serving.warmup import WarmupFailed

ORPHAN_GRACE_S = 1.5
# Chores are for a worker that has nothing to do: while requests follow each other, none waits for one.
CHORES_AFTER_S = 2.0
_DONE = object()


def main(connection: "Connection[ToWorker, FromWorker]", settings: WorkerSettings) -> None:
    """Load, then make batches until the other end of the pipe is closed."""
    # A terminal's Ctrl-C and an engine's SIGTERM reach the whole group; the HTTP process decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    outbox, inbox, progress = Outbox(connection), Inbox(connection), Progress()
    heart = Heart(outbox.send, progress)
    try:
        loaded = load(settings, outbox.send)
    except Exception as error:  # noqa: BLE001 - whatever it is, the HTTP process must be able to tell it
        if not isinstance(error, ZopsError | WarmupFailed):
            traceback.print_exc()
        hint = f"; {error.hint}" if isinstance(error, ZopsError) and error.hint else ""
        outbox.send(StartFailed(f"{error}{hint}" if str(error) else type(error).__name__))
        sys.exit(1)
    heart.memory = loaded.memory
    outbox.send(loaded.ready)
    maker = Maker(loaded.pipelines, loaded.projection, outbox.send, inbox.cancelled, progress)
    while (batch := inbox.next_batch(loaded.chores)) is not None:
        try:
            fits = maker.make(batch)
        except DeviceLost:
            sys.exit(1)  # the traceback is in the log; what was not answered is tried again elsewhere
        outbox.send(Free(batch.id, fits))
    loaded.close()


class Outbox:
    """The way to the HTTP process, for several threads."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Send one message whole. When nobody is there any more it is dropped: `Inbox` sees to the end."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)


class Inbox:
    """What the HTTP process sends, read by a thread of its own."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._closed = False
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_batch(self, chores: Iterator[None]) -> Batch | None:
        """Wait for the next batch, doing chores after a while; None when the HTTP process is gone.

        What was cancelled before is forgotten.
        """
        batch = self._wait(chores)
        self._cancelled &= {picture.id for picture in batch.pictures} if batch else set()
        return batch

    def _wait(self, chores: Iterator[None]) -> Batch | None:
        try:
            return self._batches.get(timeout=CHORES_AFTER_S)
        except queue.Empty:
            while self._batches.empty() and next(chores, _DONE) is not _DONE:
                pass
            return self._batches.get()

    def cancelled(self, picture: str) -> bool:
        """Tell whether nobody waits for a picture any more."""
        return self._closed or picture in self._cancelled

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                # The HTTP process is gone; what still runs is for nobody. End in order if that is quick, end anyway.
                self._closed = True
                self._batches.put(None)
                time.sleep(ORPHAN_GRACE_S)
                os._exit(0)
            if isinstance(message, Cancel):
                self._cancelled.add(message.picture)
            else:
                self._batches.put(message)


class Heart:
    """Tells every `BEAT_S` that the worker lives, from its start on, whatever its other threads do."""

    def __init__(self, send: Callable[[Beat], None], progress: Progress) -> None:
        self.memory: Callable[[], Told] = tuple
        """Returns used and total bytes of each card. Replaced once they are there."""
        self._send = send
        self._progress = progress
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._send(Beat(self._progress.batch, self._progress.forwards, self.memory()))
            time.sleep(BEAT_S)

"""The HTTP process's end of one worker: starts it, talks to it without ever blocking the event loop, ends it."""

import asyncio
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from zops.serving.messages import FromWorker, ToWorker, WorkerSettings

CLOSE_GRACE_S = 2.0
"""How long a worker that was let go may take to end; it ends when its pipe does."""


class Process(Protocol):
    """The little of a process that a link needs; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Number of the process."""
        ...

    @property
    def returncode(self) -> int | None:
        """How it ended, as in `subprocess`; None while it runs or was not waited for."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, or raise `subprocess.TimeoutExpired`."""
        ...


class WorkerLink:
    """A started worker and the pipe to it.

    Both directions have a thread, because a stopped or dying worker can leave a read or a write hanging for good.
    """

    def __init__(self, process: Process, connection: "Connection[Any, Any]") -> None:
        self._process = process
        self._connection = connection
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()

    @property
    def pid(self) -> int:
        """Number of the worker's process."""
        return self._process.pid

    @property
    def ending(self) -> str:
        """How the process ended, in words; empty when that is not known."""
        code = self._process.returncode
        if code is None:
            return ""
        if code >= 0:
            return f"its process ended with exit status {code}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process was ended by signal {-code}"

    def listen(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[FromWorker], None],
        on_lost: Callable[[], None],
    ) -> None:
        """Call back in the event loop for each message and, once, when the worker is gone."""
        writer = threading.Thread(target=self._write, name="worker-writer", daemon=True)
        writer.start()
        reading = (writer, loop, on_message, on_lost)
        threading.Thread(target=self._read, args=reading, name="worker-reader", daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Hand a message to the worker; returns at once, also when the worker is gone."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the worker now, whatever it does; `on_lost` follows."""
        self._process.kill()

    def let_go(self) -> None:
        """Close the pipe once all is sent, upon which the worker ends; returns at once."""
        self._outbox.put(None)

    def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Let the worker go and wait for its end; kill it when it does not come within `grace_s`."""
        self.let_go()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(
        self,
        writer: threading.Thread,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[FromWorker], None],
        on_lost: Callable[[], None],
    ) -> None:
        try:
            while True:
                message: FromWorker = self._connection.recv()
                loop.call_soon_threadsafe(on_message, message)
        except (EOFError, OSError):
            self.close()
        except RuntimeError:
            return  # the event loop is closed: nobody is left to tell
        # Only now: closed under the writer, the descriptor's number could be another connection's already.
        writer.join()
        self._connection.close()
        with contextlib.suppress(RuntimeError):  # as above
            loop.call_soon_threadsafe(on_lost)

    def _write(self) -> None:
        # An error means that the worker is gone; the reader sees that too, and reports it.
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
            # Closing alone would not do: the reader's pending read keeps the socket open.
            with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)


def close_all(links: Iterable[WorkerLink], grace_s: float = CLOSE_GRACE_S) -> None:
    """Let several workers go at the same time."""
    deadline = time.monotonic() + grace_s
    closing = list(links)
    for link in closing:
        link.let_go()
    for link in closing:
        link.close(max(0.0, deadline - time.monotonic()))


def start_worker(settings: WorkerSettings) -> WorkerLink:
    """Start a worker in a process of its own."""
    return WorkerLink(*start_process(settings))


def start_process(first: Any) -> "tuple[subprocess.Popen[bytes], Connection[Any, Any]]":
    """Start a fresh interpreter (a forked one would inherit threads and, later, CUDA) for what `first` describes.

    Not by `multiprocessing`: it would import the caller's main module there and start a process to track resources,
    which costs a start a good part of a second.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            # What this process would import is what the worker imports, whatever lies in the current directory (-P).
            [sys.executable, "-P", "-m", "zops.serving.boot", str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints belongs into the log
        )
    connection: Connection[Any, Any] = Connection(ours.detach())
    connection.send(first)  # far less than the pipe holds, so this never waits
    return process, connection

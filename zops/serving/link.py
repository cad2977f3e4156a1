"""The HTTP process's end of one worker: starts it, talks to it without ever blocking the event loop, ends it."""

import asyncio
import contextlib
import multiprocessing
import os
import queue
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from zops.serving.messages import FromWorker, ToWorker, WorkerSettings


class Process(Protocol):
    """The little of a process that a link needs."""

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        ...

    def is_alive(self) -> bool:
        """Tell whether it still runs."""
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
    def pid(self) -> int | None:
        """Number of the worker's process."""
        return self._process.pid

    def listen(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: "Callable[[WorkerLink, FromWorker], None]",
        on_lost: "Callable[[WorkerLink], None]",
    ) -> None:
        """Call back in the event loop for each message and, once, when the worker is gone."""
        writer = threading.Thread(target=self._write, name="worker-writer", daemon=True)
        arguments = (writer, loop, on_message, on_lost)
        writer.start()
        threading.Thread(target=self._read, args=arguments, name="worker-reader", daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Hand a message to the worker; returns at once, also when the worker is gone."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the worker now, whatever it does; `on_lost` follows."""
        self._process.kill()

    def close(self, grace_s: float = 2.0) -> None:
        """Let the worker go: it ends when its pipe does. Kill it when it does not within `grace_s`."""
        self._outbox.put(None)
        self._process.join(grace_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _read(
        self,
        writer: threading.Thread,
        loop: asyncio.AbstractEventLoop,
        on_message: "Callable[[WorkerLink, FromWorker], None]",
        on_lost: "Callable[[WorkerLink], None]",
    ) -> None:
        try:
            while True:
                message: FromWorker = self._connection.recv()
                loop.call_soon_threadsafe(on_message, self, message)
        except (EOFError, OSError):
            self.close()
        except RuntimeError:
            return  # the event loop is closed: nobody is left to tell
        # Only now: closed under the writer, the descriptor's number could be another connection's already.
        writer.join()
        self._connection.close()
        try:
            loop.call_soon_threadsafe(on_lost, self)
        except RuntimeError:
            return  # as above

    def _write(self) -> None:
        # An error means that the worker is gone; the reader sees that too, and reports it.
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
            # Closing alone would not do: the reader's pending read keeps the socket open.
            with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)


def start_worker(settings: WorkerSettings) -> WorkerLink:
    """Start a worker in a fresh interpreter (a forked one would inherit threads and, later, CUDA)."""
    from zops.serving import worker  # noqa: PLC0415 - light, but only the real thing needs it

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    process = context.Process(target=worker.main, args=(theirs, settings), name="zops-worker", daemon=True)
    process.start()
    theirs.close()
    return WorkerLink(process, ours)

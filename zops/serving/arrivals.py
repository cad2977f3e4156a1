"""What becomes of a tensor of weights once it is whole on the device: made narrower there, before the next one comes.

On a GPU a tensor is whole when the copies of all its pieces are done, which several streams do: the stream here waits
for their events, and the tensor's memory is given away only when this stream is past it.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

Arrived = Callable[[str, str, Any], Any]
"""Path of the file, name of the tensor, the whole tensor in its shape -> what is kept in its place."""
_MOST_WAITING = 8


class Holder(Protocol):
    """A file whose tensors arrive."""

    path: str

    def take(self, name: str) -> Any:
        """Give a whole tensor away, in its shape."""

    def keep(self, name: str, made: Any) -> None:
        """Keep what was made of a tensor in its place."""


class Arrivals:
    """Gives each tensor that is whole to `arrived`, one after another, on a stream of its own."""

    def __init__(self, device: str, arrived: Arrived) -> None:
        self._cuda = device.startswith("cuda")
        self.arrived = arrived
        self._error: BaseException | None = None
        # Readers wait while so many tensors wait: else a fast disk would fill the device before they shrink.
        self._whole: queue.Queue[tuple[Holder, str, list[Any]] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="zops-arrivals", daemon=True)
        self._thread.start()

    def put(self, file: Holder, name: str, events: list[Any]) -> None:
        """Hand a whole tensor over; `events` are those of its pieces' copies."""
        self._whole.put((file, name, events))

    def close(self) -> None:
        """Wait until all that was handed over is done."""
        self._whole.put(None)
        self._thread.join()

    def check(self) -> None:
        """Raise what `arrived` raised."""
        if self._error:
            raise self._error

    def _run(self) -> None:
        import torch  # noqa: PLC0415 - only the worker may pay for it

        stream = torch.cuda.Stream() if self._cuda else None  # type: ignore[no-untyped-call]  # torch has no annotation here
        while whole := self._whole.get():
            if self._error:
                continue  # the queue must be emptied all the same, or the readers would wait for ever
            try:
                with torch.cuda.stream(stream):
                    self._take(stream, *whole)
            except BaseException as error:  # noqa: BLE001 - told by `check` in the thread that asks for the result
                self._error = error
        if stream:
            stream.synchronize()

    def _take(self, stream: Any, file: Holder, name: str, events: list[Any]) -> None:
        wide = file.take(name)
        if stream:
            for event in events:
                stream.wait_event(event)
            wide.record_stream(stream)  # its memory is given away once the stream is past it
        file.keep(name, self.arrived(file.path, name, wide))

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
    """Gives each tensor that is whole to `arrived`, one after another, on a stream of its own on the tensor's card."""

    def __init__(self, arrived: Arrived) -> None:
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

        streams: dict[Any, Any] = {}
        while whole := self._whole.get():
            if self._error:
                continue  # the queue must be emptied all the same, or the readers would wait for ever
            file, name, events = whole
            try:
                wide = file.take(name)
                if wide.is_cuda and wide.device not in streams:
                    torch.cuda.set_device(wide.device)  # of this thread, as in `lanes.Lane`
                    streams[wide.device] = torch.cuda.Stream(wide.device)  # type: ignore[no-untyped-call]  # torch has no annotation here
                self._take(streams.get(wide.device), file, name, wide, events)
            except BaseException as error:  # noqa: BLE001 - told by `check` in the thread that asks for the result
                self._error = error
            wide = whole = None  # while the queue is empty this thread must hold no tensor
        for stream in streams.values():
            stream.synchronize()

    def _take(self, stream: Any, file: Holder, name: str, wide: Any, events: list[Any]) -> None:
        import torch  # noqa: PLC0415 - as above

        with torch.cuda.stream(stream):  # does nothing where there is none
            if stream:
                for event in events:
                    stream.wait_event(event)
                wide.record_stream(stream)  # its memory is given away once the stream is past it
            made = self.arrived(file.path, name, wide)
            if stream:
                # Made on this stream and read on the card's own: freed while that still reads, it must stay as long.
                made.record_stream(torch.cuda.default_stream(stream.device))
            file.keep(name, made)

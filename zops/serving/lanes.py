"""The way of bytes from a buffer on the host to the devices. Runs in the worker's reading threads."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from zops.cache.reading import new_buffer

_FOR_ALL_CARDS = 1  # cudaHostRegisterPortable


class Lane:
    """A buffer on the host, and the ends of copies from it on the devices that its bytes go to."""

    def __init__(self, devices: Sequence[str], size: int) -> None:
        import torch  # noqa: PLC0415 - only the worker may pay for it

        self.buffer = new_buffer(size)
        self._host = torch.frombuffer(self.buffer, dtype=torch.uint8)
        self._busy: _End | None = None
        cards = [device for device in devices if device.startswith("cuda")]
        if cards:
            # Of this thread: CUDA would take the first card, which may be none of ours, and keep half a gigabyte there.
            torch.cuda.set_device(torch.device(cards[0]).index or 0)
            # Refused where the limit of locked memory is low; copies from plain memory are slower, and as right.
            registered = _cudart().cudaHostRegister(self._host.data_ptr(), len(self.buffer), _FOR_ALL_CARDS)
        self.pinned = not cards or int(registered) == 0
        if not self.pinned:
            # CUDA keeps the refusal until somebody asks for it, and torch asks after its next kernel: let it be this.
            with suppress(RuntimeError):
                torch.ones(1, device=cards[0])
        self._ends = {device: _End(device, len(self.buffer)) for device in cards}

    def send(self, device: str, count: int, scatter: Callable[[Any], None]) -> None:
        """Copy the first `count` bytes to a device and let `scatter` take them there; returns before it is done."""
        end = self._ends.get(device)
        if end is None:
            scatter(self._host)
        else:
            end.send(self._host[:count], scatter)
        self._busy = end

    def mark(self) -> Any:
        """Return an event that happens on the device once what was sent has arrived; None where nothing overlaps."""
        return self._busy.stream.record_event() if self._busy else None

    def wait(self) -> None:
        """Wait until the buffer may be filled again."""
        if self._busy:
            self._busy.copied.synchronize()
            self._busy = None

    def close(self) -> None:
        """Wait for what was sent, and let go of the buffer."""
        for end in self._ends.values():
            end.stream.synchronize()
        if self._ends and self.pinned:
            _cudart().cudaHostUnregister(self._host.data_ptr())


class _End:
    """A lane's counterpart on one GPU, and the queue of copies to it."""

    def __init__(self, device: str, size: int) -> None:
        import torch  # noqa: PLC0415 - only the worker may pay for it

        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # as above

    def send(self, source: Any, scatter: Callable[[Any], None]) -> None:
        """Copy what is in the host's buffer here, and let `scatter` take it from there."""
        import torch  # noqa: PLC0415 - as above

        with torch.cuda.stream(self.stream):
            self._bytes[: len(source)].copy_(source, non_blocking=True)
            scatter(self._bytes)
            self.copied.record(self.stream)


def _cudart() -> Any:
    from torch.cuda import cudart  # noqa: PLC0415 - as above

    return cudart()  # type: ignore[no-untyped-call]  # torch has no annotation here

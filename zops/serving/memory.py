"""The memory of a worker's cards, as the driver and torch's allocator tell it. torch is imported when it is asked."""

from collections.abc import Callable, Sequence

Told = tuple[tuple[int, int], ...]
"""Used and total bytes of each card; empty where that cannot be told."""

MOST_KEPT = 1 << 30
"""Bytes of replaced weights above which they are given back: that takes milliseconds, so not for each of them."""


def give_back(device: str, *, above: int = 0) -> None:
    """Give the driver what torch keeps of freed memory, on all cards, if it is more than `above` bytes on this one.

    The allocator first waits for the streams that memory was allocated on or recorded for (`Tensor.record_stream`), so
    nothing else has to be waited for before. It pays where tensors of other sizes, or of another stream, are wanted
    next: those could not use what is kept.
    """
    if _is_cuda(device):
        import torch  # noqa: PLC0415 - only the worker may pay for it

        if _count_kept(device) > above:
            torch.cuda.empty_cache()


def count_free(device: str) -> int | None:
    """Return the free bytes of a card; None where there is none."""
    import torch  # noqa: PLC0415 - as above

    if not _is_cuda(device):
        return None
    # What torch holds for later counts as free: the next image takes it from there.
    return int(torch.cuda.mem_get_info(device)[0] + _count_kept(device))


def gauge(devices: Sequence[str]) -> Callable[[], Told]:
    """Return what tells the memory of cards, whoever uses it. May be called by any thread."""
    import torch  # noqa: PLC0415 - as above

    def look() -> Told:
        try:
            both = [torch.cuda.mem_get_info(device) for device in devices]
        except RuntimeError:
            return ()  # the device failed; the thread that uses it says so
        return tuple((total - free, total) for free, total in both)

    return look if any(map(_is_cuda, devices)) else lambda: ()


class Peak:
    """The most that torch's allocator held on each card since it was begun, above what it held then."""

    def __init__(self, devices: Sequence[str]) -> None:
        import torch  # noqa: PLC0415 - as above

        self._before: dict[str, int] = {}
        for device in filter(_is_cuda, devices):
            torch.cuda.reset_peak_memory_stats(device)
            self._before[device] = torch.cuda.memory_allocated(device)

    def read(self) -> dict[str, int]:
        """Return it by card; empty where there is none."""
        import torch  # noqa: PLC0415 - as above

        return {device: torch.cuda.max_memory_allocated(device) - before for device, before in self._before.items()}


def _count_kept(device: str) -> int:
    """Return the bytes of a card that were freed, and that torch keeps for later."""
    import torch  # noqa: PLC0415 - as above

    return int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")

"""CUDA graphs: hundreds of kernels that start with one call, so that a slow CPU leaves no gaps between them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

Work = Callable[[], None]
Made = TypeVar("Made")


def capture(work: Work, pool: Any) -> Work:
    """Return the replay of what `work` does on the GPU. It must read and write the same tensors every time.

    `work` runs once before, since libraries choose and compile their kernels at first use, which no graph can hold.
    """
    torch.cuda.empty_cache()  # what was freed on the stream of the images is of no use on this one
    side = _side(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        work()
    return graph.replay


@cache
def _side(card: int) -> torch.cuda.Stream:
    """Return the stream of a card on which graphs are captured: cuBLAS keeps 32 MB for each stream that it saw.

    torch's own stream for this belongs to the card on which it was first used.
    """
    return torch.cuda.Stream(card)


def pool_bytes(pool: Any) -> int:
    """Return how much of the GPU a pool of graphs holds."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


def drop_all() -> bool:
    """Drop every graph of this process, where memory is wanted for something else; return whether there was one."""
    holding = [graphs for graphs in _ALIVE if graphs.held_bytes]
    for graphs in holding:
        graphs.drop()
    return bool(holding)


class Graphs:
    """Graphs of several shapes in one pool of memory, within a share of what is free when the first one is captured.

    In one pool each graph works in the memory that the others work in too, so it is about as large as the largest
    asks for; and nothing of it can be given back while one graph is left. When it grows beyond the limit all graphs
    go, and the one that asked begins a new pool; shapes that are used again are captured again. What is too large
    even alone, for the limit or for the memory that is left, is never captured.

    Args:
        share: of the free memory.
        make: captures work in a pool.
        new_pool: makes an empty pool.
        measure: tells the bytes that a pool holds.
        free: tells the bytes that are free.
    """

    def __init__(
        self,
        share: float,
        *,
        free: Callable[[], int | None],
        make: Callable[[Work, Any], Work] = capture,
        new_pool: Callable[[], Any] = torch.cuda.graph_pool_handle,
        measure: Callable[[Any], int] = pool_bytes,
    ) -> None:
        self._share, self._free = share, free
        self._make, self._new_pool, self._measure = make, new_pool, measure
        self._limit: float | None = None
        self._pool: Any = None
        self._kept: OrderedDict[Hashable, Work] = OrderedDict()
        self._held: dict[Hashable, int] = {}
        self._too_large: set[Hashable] = set()
        _ALIVE.add(self)

    @property
    def held_bytes(self) -> dict[Hashable, int]:
        """Return by how much the pool grew for each graph that is kept, the least recently used first."""
        return {key: self._held[key] for key in self._kept}

    def get(self, key: Hashable, work: Work) -> Work | None:
        """Return the replay of a shape's work, captured now if need be; None where it would take too much."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None if key in self._too_large else self._capture(key, work)

    def forget(self, key: Hashable) -> None:
        """Drop the graph of a shape that nobody keeps any more."""
        self._too_large.discard(key)
        self._held.pop(key, None)
        if self._kept.pop(key, None) and not self._kept:
            self.drop()

    def drop(self) -> None:
        """Drop all graphs, and give their memory back."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the allocator waits for the stream of the captures; replays run on another
        self._kept.clear()
        self._held.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _capture(self, key: Hashable, work: Work) -> Work | None:
        if self._limit is None:
            self._limit = self._share * (self._free() or 0)
        if not self._kept:
            self._pool = self._new_pool()  # torch takes none again whose last graph is gone, or was never made
        replay = self._try(work)
        if replay and (held := self._measure(self._pool)) <= self._limit:
            self._kept[key], self._held[key] = replay, held - sum(self._held.values())
            return replay
        alone = not self._kept
        del replay
        self.drop()
        if alone:
            self._too_large.add(key)
            return None
        return self._capture(key, work)

    def _try(self, work: Work) -> Work | None:
        """Capture work; return None where memory is short: with a pool of its own it takes more than without."""
        try:
            return self._make(work, self._pool)
        except torch.OutOfMemoryError:
            return None


_ALIVE: WeakSet[Graphs] = WeakSet()


class Recent(Generic[Made]):
    """What was made for the shapes that were used last; the least recently used is dropped first."""

    def __init__(self, limit: int, dropped: Callable[[Made], None] = lambda _made: None) -> None:
        self._limit = limit
        self._dropped = dropped
        self._made: OrderedDict[Hashable, Made] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what was made for a key, making it now if it is not there."""
        if key in self._made:
            self._made.move_to_end(key)
        else:
            self._made[key] = make()
            if len(self._made) > self._limit:
                self._dropped(self._made.popitem(last=False)[1])
        return self._made[key]

"""CUDA graphs: hundreds of kernels that start with one call, so that a slow CPU leaves no gaps between them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

Work = Callable[[], None]
Made = TypeVar("Made")


def capture(work: Work, pool: Any) -> Work:
    """Return the replay of what `work` does on the GPU. It must read and write the same tensors every time.

    `work` runs once before, since libraries choose and compile their kernels at first use, which no graph can hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


class Recent(Generic[Made]):
    """What was made for the shapes that were used last; the least recently used is dropped first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made: OrderedDict[Hashable, Made] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what was made for a key, making it now if it is not there."""
        if key in self._made:
            self._made.move_to_end(key)
        else:
            self._made[key] = make()
            if len(self._made) > self._limit:
                self._made.popitem(last=False)
        return self._made[key]

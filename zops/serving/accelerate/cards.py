"""One image on several cards: each has a share of the rows, and of the heads while they attend to each other.

All steps of a block but attention work on rows alone, so a card does them for its share only. Before attention the
cards exchange: every card gets all rows of its share of the heads (DeepSpeed's Ulysses); afterwards they exchange
back. No mask and no padding of tokens is needed; rows and heads that do not divide by the cards are filled up with
zeros, which nobody reads. diffusers has such a thing too (`enable_parallelism`), but no plan for this model, and it
wants lengths that divide.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import distributed
from torch.nn import functional

from zops.serving.accelerate.attention import Attend, attend_packed

_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
"""torch 2.13 gave it a new name, and warns of the old one."""


class Cards(Protocol):
    """The cards that work on one image, as one of them sees them."""

    count: int

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this card's share of all rows; shares are equally long."""

    def all(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """Return all `count` rows from every card's share."""

    def attend(self, qkv: torch.Tensor, head: int, packing: Sequence[tuple[int, int]], attend: Attend) -> torch.Tensor:
        """Return the attention of this card's rows to all rows; see `attention.attend_packed`."""


class Alone:
    """One card, which has everything."""

    count = 1

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows."""
        return rows

    def all(self, mine: torch.Tensor, count: int) -> torch.Tensor:  # noqa: ARG002 - as of several cards
        """Return the rows."""
        return mine

    def attend(self, qkv: torch.Tensor, head: int, packing: Sequence[tuple[int, int]], attend: Attend) -> torch.Tensor:
        """Return the attention of all rows."""
        return attend_packed(qkv, head, packing, attend)


ALONE = Alone()


class Together:
    """One of several cards, each of which is served by a process of torch.distributed's default group."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this card's share of all rows, with rows of zeros at the end of the last ones."""
        each = -(-len(rows) // self.count)
        share = rows[self.rank * each : (self.rank + 1) * each]
        return _filled(share, 0, each)

    def all(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """Return all `count` rows from every card's share."""
        rows = mine.new_empty(self.count * len(mine), *mine.shape[1:])
        _gather(rows, mine.contiguous())
        return rows[:count]

    def attend(self, qkv: torch.Tensor, head: int, packing: Sequence[tuple[int, int]], attend: Attend) -> torch.Tensor:
        """Return the attention of this card's rows to all rows."""
        each, total = len(qkv), sum(length * images for length, images in packing)
        heads = qkv.shape[1] // 3 // head
        share = -(-heads // self.count)
        parts = _filled(qkv.view(each, 3, heads, head), 2, share * self.count)
        # Cards first: (cards, rows, 3, share, head). What comes back from card i is the i-th share of the rows.
        parts = parts.view(each, 3, self.count, share, head).permute(2, 0, 1, 3, 4)
        rows = self._exchanged(parts).view(self.count * each, 3 * share * head)[:total]
        attended = _filled(attend_packed(rows, head, packing, attend), 0, self.count * each)
        parts = self._exchanged(attended.view(self.count, each, share, head))
        return parts.permute(1, 0, 2, 3).reshape(each, self.count * share, head)[:, :heads].flatten(1)

    def _exchanged(self, parts: torch.Tensor) -> torch.Tensor:
        """Send the i-th part to card i; return what all cards sent here, in their order."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts)
        return received


def _filled(x: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Return a tensor with zeros at the end of one dimension, so that it has a size."""
    missing = size - x.shape[dimension]
    return functional.pad(x, (0, 0) * (x.ndim - 1 - dimension) + (0, missing)) if missing else x

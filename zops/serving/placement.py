"""Which card of a worker holds which component: a rule over plain numbers, without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes that a component takes on its card: for good, and in addition while it works."""

    resident: int
    working: int = 0


def place(demands: Mapping[str, Demand], cards: Sequence[int]) -> dict[str, int] | None:
    """Return the card of each component, None when they do not fit.

    Components work one after another, so a card needs room for all that it holds and for the work of one. Of all
    ways that fit the one is taken that leaves most on the fullest card; of equal ones that with the larger components
    on the earlier cards, so that equal hosts place alike.

    Args:
        demands: of each component.
        cards: free bytes of each card.
    """
    names = sorted(demands, key=lambda name: (-demands[name].resident, name))
    best: tuple[int, tuple[int, ...]] | None = None
    for places in product(range(len(cards)), repeat=len(names)):
        left = min(_left(demands, names, places, cards), default=0)
        if left >= 0 and (best is None or left > best[0]):
            best = (left, places)
    return None if best is None else dict(zip(names, best[1], strict=True))


def _left(
    demands: Mapping[str, Demand], names: Sequence[str], places: Sequence[int], cards: Sequence[int]
) -> list[int]:
    """Return what is left of each card that holds something."""
    held: dict[int, list[Demand]] = {}
    for name, card in zip(names, places, strict=True):
        held.setdefault(card, []).append(demands[name])
    return [
        cards[card] - sum(one.resident for one in those) - max(one.working for one in those)
        for card, those in held.items()
    ]

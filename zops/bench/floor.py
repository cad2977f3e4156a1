"""The least time that a generation can take on a GPU whose matrix products and attention run at measured rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCH = 16
"""Pixels an edge of a token: the VAE shrinks by 8, the transformer takes patches of 2."""
CAPTION_TOKENS = 64
"""Of the bench's prompt, padded to buckets of 32 as the model pads it."""
BUCKET = 32


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of one forward of one image."""

    products: float
    """Of the linear layers, two a multiplication and addition."""
    scores: float
    """Of attention."""

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.scores


def forward_work(config: Mapping[str, Any], width: int, height: int, caption: int = CAPTION_TOKENS) -> Work:
    """Return the work of one forward, from the transformer's config.json.

    Each block has four square products (q, k, v, out) and three of the feed-forward, which is 8/3 as wide. The blocks
    that refine the caption are left out: it is refined once a prompt, not once a forward. So are embeddings and the
    last layer, together below a percent.
    """
    dim = int(config["dim"])
    hidden = int(dim / 3 * 8)
    weights = 4 * dim**2 + 3 * dim * hidden
    image = -(-(width // PATCH) * (height // PATCH) // BUCKET) * BUCKET
    both = image + caption
    layers, refiners = int(config["n_layers"]), int(config.get("n_refiner_layers", 2))
    products = 2.0 * weights * (layers * both + refiners * image)
    scores = 4.0 * dim * (layers * both**2 + refiners * image**2)
    return Work(products, scores)


def floor_s(work: Work, forwards: int, product_rate: float, attention_rate: float) -> float:
    """Return the seconds that forwards take at rates in FLOP/s, with nothing else between them."""
    return forwards * (work.products / product_rate + work.scores / attention_rate)

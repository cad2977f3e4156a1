"""Rotary tables of images and captions: real numbers, made once a size.

A caption's tokens are at (1.., 0, 0), an image's at (caption + 1, row, column), padding of an image at the origin; the
caption counts with its padding to 32 tokens. That is how the model was trained, see diffusers' transformer_z_image.py.
"""

from collections.abc import Sequence
from typing import Any

import torch

from zops.serving.accelerate.fused import real_table

BUCKET = 32  # SEQ_MULTI_OF in diffusers: every part of a sequence is a multiple of it long


def padded(tokens: int) -> int:
    """Return a number of tokens with its padding."""
    return -(-tokens // BUCKET) * BUCKET


def caption_table(transformer: Any, tokens: int, device: torch.device) -> torch.Tensor:
    """Return the table of one padded caption, shape (tokens, width of a head), cosines and sines."""
    places = torch.zeros(tokens, 3, dtype=torch.int32, device=device)
    places[:, 0] = torch.arange(1, tokens + 1, device=device)
    return real_table(transformer.rope_embedder(places))


def image_table(transformer: Any, caption: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the table of one image of height x width tokens and its padding, beside a caption of so many tokens."""
    places = torch.zeros(padded(height * width), 3, dtype=torch.int32, device=device)
    places[: height * width, 0] = caption + 1
    places[: height * width, 1:] = torch.cartesian_prod(
        torch.arange(height, dtype=torch.int32, device=device), torch.arange(width, dtype=torch.int32, device=device)
    )
    return real_table(transformer.rope_embedder(places))


def joint_table(images: Sequence[torch.Tensor], captions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the table of packed sequences, in each of which the image comes before its caption."""
    return torch.cat([part for pair in zip(images, captions, strict=True) for part in pair])

"""Inductor instead of the kernels of this package: for comparison, and where those do not run.

It fuses about the same steps, but compiles tens of seconds for every new number of tokens; `kernels` compiles seconds,
once, for all sizes.
"""

from functools import partial
from typing import Any

import torch

from zops.serving.accelerate.fused import FusedBlock
from zops.serving.accelerate.rows import PLAIN


def compile_blocks(transformer: Any) -> int:
    """Let Inductor fuse the steps of all fused blocks; the first call with each shape compiles.

    Returns:
        How many blocks there are; they share their code.
    """
    compiled = torch.compile(FusedBlock.run, dynamic=False)
    count = 0
    for block in transformer.modules():
        if isinstance(block, FusedBlock):
            block.rows = PLAIN
            block.__dict__["run"] = partial(compiled, block)
            count += 1
    return count


def compile_decoder(vae: Any) -> None:
    """Let Inductor fuse the VAE's decoder, channels last; the first image of each size compiles."""
    vae.decoder.to(memory_format=torch.channels_last)
    vae.decoder.compile(dynamic=False)

"""Latents to pixels: the VAE's decoder with channels last and fused steps between its convolutions.

The modules stay diffusers' own, only their weights lie differently in memory. What is fused: a group norm with its
SiLU and with the bias of the convolution before it, and a residual with the bias of the one before that.
"""

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from zops.serving.accelerate.choice import has_triton

# Scores of attention held at once, in elements: 268 MB in float32.
_SCORES = 2**26
# torch's kernel that doubles an image with channels last counts its elements in 32 bits.
_MOST_ELEMENTS = 2**31


class ImageOperations(Protocol):
    """What `decoder` in plain torch and `image_kernels` in Triton both have."""

    def norm(self, x: torch.Tensor, by: nn.GroupNorm, *, shift: torch.Tensor | None, silu: bool) -> torch.Tensor:
        """Return the group norm of x + shift (one number a channel), through SiLU if asked."""

    def add(self, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return x + branch + bias, one number a channel."""


class _Plain:
    def norm(self, x: torch.Tensor, by: nn.GroupNorm, *, shift: torch.Tensor | None, silu: bool) -> torch.Tensor:
        wide = x.float() if shift is None else x.float() + shift.float().view(1, -1, 1, 1)
        wide = functional.group_norm(wide, by.num_groups, by.weight.float(), by.bias.float(), by.eps)
        return (functional.silu(wide) if silu else wide).to(x.dtype)

    def add(self, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (x.float() + branch.float() + bias.float().view(1, -1, 1, 1)).to(x.dtype)


PLAIN: ImageOperations = _Plain()


def operations(decoder: Any) -> ImageOperations:
    """Return the fast operations where there are a GPU and Triton and the shapes suit it, the plain ones elsewhere."""
    widths = {module.num_channels for module in decoder.modules() if isinstance(module, nn.GroupNorm)}
    on_gpu = decoder.conv_in.weight.device.type == "cuda" and has_triton()
    if on_gpu and all(width & (width - 1) == 0 for width in widths):
        from zops.serving.accelerate import image_kernels  # noqa: PLC0415 - Triton is there with CUDA only

        return cast("ImageOperations", image_kernels)
    return PLAIN


class FusedDecoder:
    """A VAE's decoder; its weights are put in channels-last order in place."""

    def __init__(self, vae: Any) -> None:
        self._decoder = vae.decoder.to(memory_format=torch.channels_last)
        self._images = operations(self._decoder)

    def fits(self, z: torch.Tensor) -> bool:
        """Return whether the decoder takes latents of this size; larger ones are the VAE's own business (tiles)."""
        widest = max(block.resnets[0].conv1.in_channels for block in self._decoder.up_blocks)
        return bool(z.shape[2] * z.shape[3] * 64 * widest < _MOST_ELEMENTS)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Return the decoded images, -1..1, (images, 3, height, width)."""
        decoder = self._decoder
        x = _convolved(z.contiguous(memory_format=torch.channels_last), decoder.conv_in)
        first, *others = decoder.mid_block.resnets
        x = self._resnet(x, first)
        for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
            x = self._resnet(x if attention is None else self._attention(x, attention), resnet)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(x, resnet)
            for upsampler in block.upsamplers or ():
                x = _convolved(functional.interpolate(x, scale_factor=2.0, mode="nearest"), upsampler.conv)
        return _convolved(self._norm(x, decoder.conv_norm_out), decoder.conv_out)

    def _norm(
        self, x: torch.Tensor, norm: nn.GroupNorm, *, shift: torch.Tensor | None = None, silu: bool = True
    ) -> torch.Tensor:
        return self._images.norm(x, norm, shift=shift, silu=silu)

    def _resnet(self, x: torch.Tensor, resnet: Any) -> torch.Tensor:
        branch = _convolved(self._norm(x, resnet.norm1), resnet.conv1, bias=False)
        branch = _convolved(self._norm(branch, resnet.norm2, shift=resnet.conv1.bias), resnet.conv2, bias=False)
        shortcut = x if resnet.conv_shortcut is None else _convolved(x, resnet.conv_shortcut)
        return self._images.add(shortcut, branch, resnet.conv2.bias)

    def _attention(self, x: torch.Tensor, attention: Any) -> torch.Tensor:
        """Attend with one head as wide as the image is deep, for which torch's fused kernels are slow or not made."""
        normed = self._norm(x, attention.group_norm, silu=False)
        count, channels, height, width = x.shape
        rows = normed.permute(0, 2, 3, 1).reshape(count, height * width, channels)
        q, k, v = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
        q = q * channels**-0.5
        each = max(1, _SCORES // (height * width))
        out = torch.cat([_attend(piece, k, v) for piece in q.split(each, dim=1)], dim=1)
        out = attention.to_out[0](out).view(count, height, width, channels).permute(0, 3, 1, 2)
        return torch.add(x, out)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the attention of some queries, scores in float32."""
    if q.device.type == "cuda" and q.dtype != torch.float32:
        scores = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    else:
        scores = q.float() @ k.float().transpose(1, 2)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _convolved(x: torch.Tensor, conv: Any, *, bias: bool = True) -> torch.Tensor:
    return functional.conv2d(x, conv.weight, conv.bias if bias else None, padding=conv.padding)

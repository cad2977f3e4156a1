"""Attention of packed images: no padding and no mask, whatever the prompts of a batch are.

Rows of a batch lie one image after the other. Images of equal length attend in one call, others in calls of their own;
no call needs a mask, which the fastest backends refuse. (diffusers pads the shorter ones and masks the padding.)
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# q, k and v as (images, tokens, heads, width of a head) -> the same shape.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Twice the error of bfloat16's own rounding against float32, measured on normal numbers; quantising backends exceed it.
_LARGEST_ERROR = 0.01
_PROBE_CALLS = 5


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention, and what its probe said."""

    name: str
    attend: Attend
    seconds: float = 0.0
    error: float = 0.0
    trouble: str = ""

    @property
    def usable(self) -> bool:
        """Whether it ran and was right."""
        return not self.trouble


def runs(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (length, images) for each run of neighbours of equal length."""
    return tuple((length, len(list(group))) for length, group in groupby(lengths))


def attend_packed(qkv: torch.Tensor, head: int, packing: Sequence[tuple[int, int]], attend: Attend) -> torch.Tensor:
    """Return the attention of packed rows of q, k and v beside each other, as rows of all heads."""
    pieces = []
    start = 0
    for length, images in packing:
        piece = qkv[start : start + length * images].view(images, length, 3, -1, head)
        pieces.append(attend(*piece.unbind(2)).reshape(images * length, -1))
        start += length * images
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def attend_natively(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: SDPBackend | None = None
) -> torch.Tensor:
    """Attend by torch's own kernels, one of them by name or whichever torch prefers."""
    choice: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
    with choice:
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


NATIVE = Backend("native", attend_natively)


def candidates() -> list[Backend]:
    """Return every backend that can be imported here."""
    found = [
        Backend("cudnn", partial(attend_natively, backend=SDPBackend.CUDNN_ATTENTION)),
        Backend("flash", partial(attend_natively, backend=SDPBackend.FLASH_ATTENTION)),
        NATIVE,
    ]
    for name, load in (("flash-3", _flash_3), ("flash-4", _flash_4), ("sage", _sage)):
        try:
            found.append(Backend(name, load()))
        except Exception:  # noqa: BLE001, S112 - a package that is not there or does not load is not a candidate
            continue
    return found


def _flash_3() -> Attend:
    from flash_attn_interface import flash_attn_func  # noqa: PLC0415 - an optional package

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _flash_4() -> Attend:
    from flash_attn.cute import flash_attn_func  # noqa: PLC0415 - an optional package

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _sage() -> Attend:
    from sageattention import sageattn  # noqa: PLC0415 - an optional package

    return lambda q, k, v: torch.as_tensor(sageattn(q, k, v, tensor_layout="NHD"))


def _first(result: Any) -> torch.Tensor:
    """Return the output of a function that returns it alone or with its statistics."""
    return torch.as_tensor(result[0] if isinstance(result, tuple) else result)


def probe(device: torch.device, dtype: torch.dtype, *, heads: int, head: int, tokens: int) -> list[Backend]:
    """Run every backend on random numbers of the given shape; return them all, the fastest that is right first.

    A backend that fails or is off by more than bfloat16's own rounding is last and says so in `trouble`. Takes tens of
    milliseconds a backend, more where it compiles first.
    """
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, tokens, 3, heads, head, generator=generator, device=device, dtype=dtype)
    q, k, v = qkv.unbind(2)
    some = slice(0, min(tokens, 256))  # enough rows to judge by: the exact way would hold all scores in float32
    exact = [part.transpose(1, 2).float() for part in (q[:, some], k, v)]
    expected = scaled_dot_product_attention(exact[0], exact[1], exact[2]).transpose(1, 2)
    judged = [_judge(backend, (q, k, v), expected) for backend in candidates()]
    return sorted(judged, key=lambda backend: (not backend.usable, backend.seconds))


def _judge(backend: Backend, qkv: tuple[torch.Tensor, ...], expected: torch.Tensor) -> Backend:
    try:
        out = backend.attend(*qkv)
        got = out[:, : expected.shape[1]].float()
        error = float((got - expected).norm() / expected.norm())
        times = []
        for _ in range(_PROBE_CALLS):
            _wait(expected.device)
            began = time.perf_counter()
            backend.attend(*qkv)
            _wait(expected.device)
            times.append(time.perf_counter() - began)
    except Exception as trouble:  # noqa: BLE001 - foreign kernels fail in foreign ways; the next one is tried
        return Backend(backend.name, backend.attend, trouble=f"{type(trouble).__name__}: {trouble}"[:200])
    wrong = "" if error <= _LARGEST_ERROR else f"off by {error:.3f} of the norm"
    return Backend(backend.name, backend.attend, sorted(times)[len(times) // 2], error, wrong)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

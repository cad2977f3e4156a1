"""What this device can do at most: matrix products, attention and copies, each in the model's own shapes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zops.bench.floor import CAPTION_TOKENS
from zops.bench.inside.clock import free, gpu_seconds, on_gpu
from zops.host.gpu import read_clocks
from zops.serving.accelerate.attention import probe
from zops.serving.accelerate.fp8 import has_fp8

COPY_BYTES = 1 << 30
IMAGE_TOKENS = 4096
"""Of a 1024 x 1024 image."""


def measure(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """Tell every rate, with the samples that it was seen at."""
    config = json.loads((Path(task["snapshot"]) / "transformer" / "config.json").read_text(encoding="utf-8"))
    device = torch.device("cuda" if on_gpu() else "cpu")
    for part, shape, rates, unit in _rates(device, int(config["dim"]), int(config["n_heads"])):
        tell(part=part, shape=shape, samples=rates, unit=unit)
        free()
    tell(clocks=[clock.as_json() for clock in read_clocks()])


def _rates(device: torch.device, dim: int, heads: int) -> Iterator[tuple[str, str, list[float], str]]:
    tokens = IMAGE_TOKENS + CAPTION_TOKENS if on_gpu() else 512
    cube = 8192 if on_gpu() else 512
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    hidden = int(dim / 3 * 8)
    shapes = {"cube": (cube, cube, cube), "qkv": (tokens, dim, 3 * dim), "out": (tokens, dim, dim),
              "up": (tokens, dim, 2 * hidden), "down": (tokens, hidden, dim)}  # fmt: skip
    name = str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    for shape, (m, k, n) in shapes.items():
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        size = f"{shape} {m} x {k} x {n}"
        yield f"{name} products", size, _tflops(2.0 * m * k * n, partial(_product, a, b)), "TFLOP/s"
        if has_fp8(device):
            yield "fp8 products", size, _tflops(2.0 * m * k * n, _fp8_product(a, b)), "TFLOP/s"
    flops = 4.0 * tokens**2 * dim
    for backend in probe(device, dtype, heads=heads, head=dim // heads, tokens=tokens):
        if backend.usable and backend.seconds > 0:
            qkv = torch.randn(1, tokens, 3, heads, dim // heads, device=device, dtype=dtype).unbind(2)
            times = gpu_seconds(partial(backend.attend, *qkv))
            rates = [flops / each / 1e12 for each in times]
            yield "attention", f"{backend.name}, {heads} x {tokens} x {dim // heads}", rates, "TFLOP/s"
    yield from _copies(device)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b.t()


def _tflops(flops: float, work: Callable[[], object]) -> list[float]:
    return [flops / each / 1e12 for each in gpu_seconds(work)]


def _fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    """Return a row-wise scaled product of two matrices in fp8, as `serving.accelerate` multiplies."""
    limit = torch.finfo(torch.float8_e4m3fn).max

    def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(1, keepdim=True).float() / limit
        return (x / scale).to(torch.float8_e4m3fn), scale

    (qa, sa), (qb, sb) = quantised(a), quantised(b)
    return lambda: torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it
        qa, qb.t(), scale_a=sa, scale_b=sb.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _copies(device: torch.device) -> Iterator[tuple[str, str, list[float], str]]:
    count = COPY_BYTES if on_gpu() else COPY_BYTES >> 5
    source = torch.empty(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    rates = [2 * count / each / 1e9 for each in gpu_seconds(lambda: target.copy_(source))]
    yield "memory", "read and write, on the device", rates, "GB/s"
    if on_gpu():
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        rates = [count / each / 1e9 for each in gpu_seconds(lambda: target.copy_(host, non_blocking=True), runs=5)]
        yield "host to device", "pinned memory", rates, "GB/s"

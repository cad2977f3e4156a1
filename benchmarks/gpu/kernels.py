"""The Triton kernels on a GPU: equal to their definition in plain torch, and how many bytes a second they move."""

from typing import Any

import torch

from benchmarks.gpu.stages import gpu_seconds
from zops.serving.accelerate import decoder, image_kernels, kernels
from zops.serving.accelerate.rows import PLAIN, Quantised

ROWS, WIDTH, HIDDEN, HEAD = 4160, 3840, 10240, 128


def wide(result: Any) -> torch.Tensor:
    return result.values.float() * result.scales if isinstance(result, Quantised) else result.float()


def away(got: Any, expected: Any) -> float:
    got, expected = wide(got), wide(expected)
    return round(float((got - expected).norm() / expected.norm()), 6)


def check_and_time(figures: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, branch = (torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    both = torch.randn(ROWS, 2 * HIDDEN, device="cuda", dtype=torch.bfloat16)
    qkv = torch.randn(ROWS, 3 * WIDTH, device="cuda", dtype=torch.bfloat16)
    gate, gain = (torch.randn(WIDTH, device="cuda") for _ in range(2))
    head_gain = torch.randn(HEAD, device="cuda")
    rope = torch.randn(ROWS, HEAD, device="cuda")
    row = 2 * WIDTH  # bytes of a row in bf16
    for fp8 in (True, False):
        out = WIDTH if fp8 else row
        hidden = HIDDEN if fp8 else 2 * HIDDEN
        cases = {
            "norm": (lambda k, fp8=fp8: k.norm(x, gain, 1e-5, fp8=fp8), row + out),
            "add_norm_norm": (
                lambda k, fp8=fp8: k.add_norm_norm(x, branch, gate, gain, 1e-5, fp8=fp8)[1],
                3 * row + out,
            ),
            "gated": (lambda k, fp8=fp8: k.gated(both, fp8=fp8), 4 * HIDDEN + hidden),
        }
        if fp8:
            cases["quantise"] = (lambda k: k.quantise(x), row + WIDTH)
        else:
            cases["add_norm"] = (lambda k: k.add_norm(x, branch, gate, 1e-5), 3 * row)
            cases["rotate"] = (lambda k: k.rotate(qkv.clone(), head_gain, head_gain, rope, 1e-5), 4 * row)
        for name, (work, moved) in cases.items():
            key = f"{name} {'fp8' if fp8 else 'bf16'}"
            try:
                error = away(work(kernels), work(PLAIN))
                if name == "rotate":  # in place, so that only its own bytes are timed
                    seconds = gpu_seconds(lambda: kernels.rotate(qkv, head_gain, head_gain, rope, 1e-5))
                else:
                    seconds = gpu_seconds(lambda work=work: work(kernels))
                figures[key] = {
                    "error": error,
                    "us": round(seconds * 1e6, 1),
                    "TB/s": round(ROWS * moved / seconds / 1e12, 2),
                }
            except Exception as trouble:  # noqa: BLE001 - the next one may work
                figures[key] = repr(trouble)[:300]
    for channels, size in ((128, 1024), (512, 256)):
        image = torch.randn(1, channels, size, size, device="cuda", dtype=torch.bfloat16) * 2 + 3
        check_image_kernels(image.contiguous(memory_format=torch.channels_last), figures)


def check_image_kernels(image: torch.Tensor, figures: dict[str, Any]) -> None:
    channels, size = image.shape[1:3]
    by = torch.nn.GroupNorm(32, channels, eps=1e-6, device="cuda", dtype=torch.bfloat16).requires_grad_(
        requires_grad=False
    )
    for parameter in by.parameters():
        parameter.normal_()
    shift = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    moved = 2 * image.numel()
    cases = {
        "group norm": (lambda k: k.norm(image, by, shift=shift, silu=True), 3 * moved),
        "add": (lambda k: k.add(image, image, shift), 2 * moved),
    }
    for name, (work, volume) in cases.items():
        key = f"{name} {channels} x {size} x {size}"
        try:
            error = away(work(image_kernels), work(decoder.PLAIN))
            seconds = gpu_seconds(lambda work=work: work(image_kernels))
            figures[key] = {"error": error, "us": round(seconds * 1e6, 1), "TB/s": round(volume / seconds / 1e12, 2)}
        except Exception as trouble:  # noqa: BLE001 - the next one may work
            figures[key] = repr(trouble)[:300]

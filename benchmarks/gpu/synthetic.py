"""A pipeline of random weights made on the device itself: seconds, where writing and reading a snapshot takes minutes.

The values are distributed as `zops model synthesize` distributes them, so activations are as sane as there.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from zops.catalog.configs import CONFIGS, SCHEDULER, Size, text_files
from zops.catalog.tensors import Tensor, text_encoder_tensors, transformer_tensors, vae_tensors


def build(size: Size, device: torch.device, dtype: torch.dtype, *, seed: int = 0):
    import diffusers
    import transformers

    configs = CONFIGS[size]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, torch.no_grad():
            transformer = diffusers.ZImageTransformer2DModel(**_plain(configs.transformer))
            vae = diffusers.AutoencoderKL(**_plain(configs.vae))
            encoder = transformers.Qwen3Model(transformers.Qwen3Config(**_qwen(configs.text_encoder)))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    _fill(transformer, transformer_tensors(configs.transformer), generator)
    _fill(encoder, text_encoder_tensors(configs.text_encoder), generator, prefix="model.")
    _fill(vae, vae_tensors(configs.vae), generator)
    with tempfile.TemporaryDirectory() as folder:
        for path, text in text_files(size).items():
            if path.startswith("tokenizer/"):
                (Path(folder) / path.removeprefix("tokenizer/")).write_text(text, encoding="utf-8")
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(SCHEDULER)),
        vae=vae.eval().requires_grad_(False),
        text_encoder=encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
        transformer=transformer.eval().requires_grad_(False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _plain(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _qwen(config):
    return {key: value for key, value in config.items() if key not in {"torch_dtype", "transformers_version"}}


def _fill(model: torch.nn.Module, tensors: Iterable[Tensor], generator: torch.Generator, prefix: str = "") -> None:
    own = dict(model.named_parameters())
    for tensor in tensors:
        target = own.pop(tensor.name.removeprefix(prefix))
        target.data.normal_(tensor.mean, tensor.deviation, generator=generator)
    assert not own, f"not filled: {sorted(own)[:3]}"

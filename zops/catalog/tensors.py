"""Names and shapes of every tensor of a Z-Image pipeline, from its configurations, in the order of its checkpoints.

Written after diffusers' ZImageTransformer2DModel and AutoencoderKL and transformers' Qwen3Model; a test compares names,
shapes and order with those classes. The order matters: it decides which tensor falls into which shard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from zops.catalog.configs import Config

# Width of the timestep's embedding and of the layer before it; constants in diffusers' transformer_z_image.py.
_TIME_WIDTH = 256
_TIME_HIDDEN = 1024

# Every layer but a block's last shrinks what it is given a little, so that sums over dozens of blocks stay small.
_GAIN = 0.6
_BIAS = 0.02


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor and how it is filled: normally distributed about `mean` with `deviation`."""

    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def transformer_tensors(config: Config) -> Iterator[Tensor]:
    """Yield the tensors of a ZImageTransformer2DModel."""
    width = config["dim"]
    time_width = min(width, _TIME_WIDTH)
    yield _table("x_pad_token", 1, width)
    yield _table("cap_pad_token", 1, width)
    patches = [
        (f"{patch}-{f_patch}", patch * patch * f_patch * config["in_channels"])
        for patch, f_patch in zip(config["all_patch_size"], config["all_f_patch_size"], strict=True)
    ]
    for key, patch_width in patches:
        yield from _linear(f"all_x_embedder.{key}", patch_width, width)
    for key, patch_width in patches:
        yield from _linear(f"all_final_layer.{key}.linear", width, patch_width)
        yield from _linear(f"all_final_layer.{key}.adaLN_modulation.1", time_width, width)
    for i in range(config["n_refiner_layers"]):
        yield from _transformer_block(f"noise_refiner.{i}", config, modulated=True)
    for i in range(config["n_refiner_layers"]):
        yield from _transformer_block(f"context_refiner.{i}", config, modulated=False)
    yield from _linear("t_embedder.mlp.0", _TIME_WIDTH, _TIME_HIDDEN)
    yield from _linear("t_embedder.mlp.2", _TIME_HIDDEN, time_width)
    yield _scale("cap_embedder.0", config["cap_feat_dim"])
    yield from _linear("cap_embedder.1", config["cap_feat_dim"], width)
    for i in range(config["n_layers"]):
        yield from _transformer_block(f"layers.{i}", config, modulated=True)


def _transformer_block(name: str, config: Config, *, modulated: bool) -> Iterator[Tensor]:
    width = config["dim"]
    hidden = int(width / 3 * 8)
    for norm in ("norm_q", "norm_k"):
        yield _scale(f"{name}.attention.{norm}", width // config["n_heads"])
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.attention.{projection}", width, width, bias=False)
    yield from _linear(f"{name}.feed_forward.w1", width, hidden, bias=False)
    yield from _linear(f"{name}.feed_forward.w2", hidden, width, bias=False)
    yield from _linear(f"{name}.feed_forward.w3", width, hidden, bias=False)
    for norm in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
        yield _scale(f"{name}.{norm}", width)
    if modulated:
        yield from _linear(f"{name}.adaLN_modulation.0", min(width, _TIME_WIDTH), 4 * width)


def text_encoder_tensors(config: Config) -> Iterator[Tensor]:
    """Yield the tensors of a Qwen3Model as a Qwen3ForCausalLM with a tied head saves them, prefixed `model.`."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield _table("model.embed_tokens.weight", config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        yield from _linear(f"{name}.self_attn.q_proj", width, queries, bias=False)
        yield from _linear(f"{name}.self_attn.k_proj", width, keys, bias=False)
        yield from _linear(f"{name}.self_attn.v_proj", width, keys, bias=False)
        yield from _linear(f"{name}.self_attn.o_proj", queries, width, bias=False)
        yield _scale(f"{name}.self_attn.q_norm", config["head_dim"])
        yield _scale(f"{name}.self_attn.k_norm", config["head_dim"])
        yield from _linear(f"{name}.mlp.gate_proj", width, hidden, bias=False)
        yield from _linear(f"{name}.mlp.up_proj", width, hidden, bias=False)
        yield from _linear(f"{name}.mlp.down_proj", hidden, width, bias=False)
        yield _scale(f"{name}.input_layernorm", width)
        yield _scale(f"{name}.post_attention_layernorm", width)
    yield _scale("model.norm", width)


def vae_tensors(config: Config) -> Iterator[Tensor]:
    """Yield the tensors of an AutoencoderKL without quant convolutions."""
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    latent = config["latent_channels"]
    yield from _linear("encoder.conv_in", config["in_channels"], widths[0], kernel=3)
    for i, (before, after) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        name = f"encoder.down_blocks.{i}"
        yield from _resnets(name, before, after, layers)
        if i < len(widths) - 1:
            yield from _linear(f"{name}.downsamplers.0.conv", after, after, kernel=3)
    yield from _middle_and_out("encoder", widths[-1], widths[-1], 2 * latent)
    yield from _linear("decoder.conv_in", latent, widths[-1], kernel=3)
    upwards = widths[::-1]
    for i, (before, after) in enumerate(zip([upwards[0], *upwards], upwards, strict=False)):
        name = f"decoder.up_blocks.{i}"
        yield from _resnets(name, before, after, layers + 1)
        if i < len(upwards) - 1:
            yield from _linear(f"{name}.upsamplers.0.conv", after, after, kernel=3)
    yield from _middle_and_out("decoder", widths[-1], widths[0], config["out_channels"])


def _resnets(name: str, before: int, after: int, count: int) -> Iterator[Tensor]:
    for i in range(count):
        entry = before if i == 0 else after
        resnet = f"{name}.resnets.{i}"
        yield from _group_norm(f"{resnet}.norm1", entry)
        yield from _linear(f"{resnet}.conv1", entry, after, kernel=3)
        yield from _group_norm(f"{resnet}.norm2", after)
        yield from _linear(f"{resnet}.conv2", after, after, kernel=3)
        if entry != after:
            yield from _linear(f"{resnet}.conv_shortcut", entry, after, kernel=1)


def _middle_and_out(name: str, middle: int, last: int, out: int) -> Iterator[Tensor]:
    attention = f"{name}.mid_block.attentions.0"
    yield from _group_norm(f"{attention}.group_norm", middle)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{attention}.{projection}", middle, middle)
    yield from _resnets(f"{name}.mid_block", middle, middle, 2)
    yield from _group_norm(f"{name}.conv_norm_out", last)
    yield from _linear(f"{name}.conv_out", last, out, kernel=3)


def _linear(name: str, fan_in: int, out: int, *, kernel: int = 0, bias: bool = True) -> Iterator[Tensor]:
    """Yield the weight of a linear layer or, with a kernel, of a square convolution, and its bias."""
    shape = (out, fan_in, kernel, kernel) if kernel else (out, fan_in)
    yield Tensor(f"{name}.weight", shape, 0.0, _GAIN / math.sqrt(math.prod(shape[1:])))
    if bias:
        yield Tensor(f"{name}.bias", (out,), 0.0, _BIAS)


def _scale(name: str, width: int) -> Tensor:
    return Tensor(f"{name}.weight", (width,), 1.0, 0.0)


def _group_norm(name: str, width: int) -> Iterator[Tensor]:
    yield _scale(name, width)
    yield Tensor(f"{name}.bias", (width,), 0.0, _BIAS)


def _table(name: str, rows: int, width: int) -> Tensor:
    """Return a tensor whose rows are looked up, not multiplied with: there is no fan-in to divide by."""
    return Tensor(name, (rows, width), 0.0, _GAIN)

"""The configurations of a Z-Image pipeline, real and shrunk, as data and as the very bytes of their files.

The real ones are Z-Image-Turbo's at commit f332072a; a test holds their files to the published SHA-256. The tiny ones
differ from them in numbers only, so that code which handles one size handles the other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zops.catalog.tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_IDS, tokenizer_files

Size = Literal["tiny", "full"]
Config = Mapping[str, Any]

_DIFFUSERS = "0.36.0.dev0"
_TRANSFORMERS = "4.51.0"

MODEL_INDEX: Config = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": _DIFFUSERS,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": _DIFFUSERS,
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}
_TRANSFORMER: Config = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": _DIFFUSERS,
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
_TEXT_ENCODER: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": _TRANSFORMERS,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": _DIFFUSERS,
    "_name_or_path": "flux-dev",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


@dataclass(frozen=True, slots=True)
class Configs:
    """The three networks of a pipeline, and the bytes after which its two sharded checkpoints start a new file."""

    transformer: Config
    text_encoder: Config
    vae: Config
    transformer_shard_bytes: int
    text_encoder_shard_bytes: int


# The shard limits are the defaults of the libraries that wrote the real checkpoint; with them every tensor falls into
# the same file as there (the indexes come out byte for byte). The tiny ones make three files each, as there.
CONFIGS: Mapping[Size, Configs] = {
    "full": Configs(_TRANSFORMER, _TEXT_ENCODER, _VAE, 10_000_000_000, 4_000_000_000),
    "tiny": Configs(
        transformer={
            **_TRANSFORMER,
            "axes_dims": [8, 12, 12],
            "cap_feat_dim": 64,
            "dim": 64,
            "n_heads": 2,
            "n_kv_heads": 2,
            "n_layers": 4,
            "n_refiner_layers": 1,
        },
        text_encoder={
            **_TEXT_ENCODER,
            "bos_token_id": SPECIAL_IDS[END_OF_TEXT],
            "eos_token_id": SPECIAL_IDS[END_OF_TURN],
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "max_window_layers": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
        vae={**_VAE, "block_out_channels": [16, 32, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
        transformer_shard_bytes=1_500_000,
        text_encoder_shard_bytes=180_000,
    ),
}


def text_files(size: Size) -> dict[str, str]:
    """Return path -> text of every file of a synthetic model that holds no weights, the shard indexes excepted."""
    configs = CONFIGS[size]
    end_of_text, end_of_turn = configs.text_encoder["bos_token_id"], configs.text_encoder["eos_token_id"]
    generation = {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": _TRANSFORMERS,
    }
    # Indents and last newlines are those of the real files, which several tools wrote.
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": _README.format(size=size),
        "model_index.json": json.dumps(MODEL_INDEX, indent=4),
        "scheduler/scheduler_config.json": json.dumps(SCHEDULER, indent=2),
        "text_encoder/config.json": json.dumps(configs.text_encoder, indent=2),
        "text_encoder/generation_config.json": json.dumps(generation, indent=4),
        "transformer/config.json": json.dumps(configs.transformer, indent=2) + "\n",
        "vae/config.json": json.dumps(configs.vae, indent=2) + "\n",
        **{f"tokenizer/{name}": text for name, text in tokenizer_files().items()},
    }


_README = """\
---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# zops/synthetic-{size}

Random weights in the layout of Z-Image-Turbo, made on this host by `zops model synthesize`. It makes images of
nothing, as fast and in as much memory as a trained model of its shapes; use it to accept a host or to test a
deployment.
"""

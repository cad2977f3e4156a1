"""Small directories in the layout of a pipeline, whose weights are sound safetensors files."""

import json
import os
from pathlib import Path


def write_safetensors(path: Path, tensors: dict[str, int], *, content: bytes | None = None) -> None:
    """Write a file with byte tensors of the given lengths, random unless content is given."""
    header, offset = {}, 0
    for name, length in tensors.items():
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + (os.urandom(offset) if content is None else content))


def write_pipeline(root: Path, *, shard_bytes: int = 200_000) -> Path:
    """Write a pipeline of seven run-time files and one that nobody needs, and return its directory."""
    files = {
        "model_index.json": {"_class_name": "ZImagePipeline"},
        "vae/config.json": {},
        "transformer/config.json": {},
    }
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(body))
    shards = {"a": "shard-1-of-2.safetensors", "b": "shard-2-of-2.safetensors"}
    for tensor, file in shards.items():
        write_safetensors(root / "transformer" / file, {tensor: shard_bytes})
    index = {"metadata": {}, "weight_map": shards}
    (root / "transformer" / "shard.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(root / "vae" / "model.safetensors", {"w": shard_bytes // 2})
    (root / "README.md").write_text("nobody needs this to make an image")
    return root


RUNTIME_FILES = (
    "model_index.json",
    "transformer/config.json",
    "transformer/shard-1-of-2.safetensors",
    "transformer/shard-2-of-2.safetensors",
    "transformer/shard.safetensors.index.json",
    "vae/config.json",
    "vae/model.safetensors",
)

"""What lies where in a synthetic model: every file, tensor, type, shape and offset, known before a byte is written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from zops.catalog.configs import CONFIGS, Size, text_files
from zops.catalog.tensors import Tensor, text_encoder_tensors, transformer_tensors, vae_tensors

Dtype = Literal["F32", "BF16"]
BYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the half-open range of bytes that it takes in the data of its file (after the header)."""

    tensor: Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class TextFile:
    """A small file that is the same for every seed."""

    path: str
    body: bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.body)


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file: eight bytes with the length of the header, the header, the tensors without gaps."""

    path: str
    dtype: Dtype
    tensors: tuple[Placed, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor; padded with spaces to eight bytes, as the safetensors library does."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for placed in self.tensors:
            entries[placed.tensor.name] = {
                "dtype": self.dtype,
                "shape": placed.tensor.shape,
                "data_offsets": [placed.begin, placed.end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + (self.tensors[-1].end if self.tensors else 0)


@dataclass(frozen=True)
class Plan:
    """Every file of a synthetic model, sorted by path."""

    files: tuple[TextFile | WeightsFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def plan(size: Size) -> Plan:
    """Return what a synthetic model of a size consists of; reads and writes nothing."""
    configs = CONFIGS[size]
    vae = _place("vae/diffusion_pytorch_model.safetensors", "BF16", vae_tensors(configs.vae))
    files: list[TextFile | WeightsFile] = [TextFile(path, text.encode()) for path, text in text_files(size).items()]
    files += _sharded(
        "transformer/diffusion_pytorch_model",
        "F32",
        list(transformer_tensors(configs.transformer)),
        configs.transformer_shard_bytes,
    )
    files += _sharded(
        "text_encoder/model", "BF16", list(text_encoder_tensors(configs.text_encoder)), configs.text_encoder_shard_bytes
    )
    return Plan(tuple(sorted([*files, vae], key=lambda file: file.path)))


def _sharded(stem: str, dtype: Dtype, tensors: Sequence[Tensor], limit: int) -> list[TextFile | WeightsFile]:
    """Return the shards of a checkpoint and the index that says which tensor is in which."""
    groups = split(tensors, dtype, limit)
    paths = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    shards = [_place(path, dtype, group) for path, group in zip(paths, groups, strict=True)]
    index = {
        "metadata": {"total_size": sum(tensor.count for tensor in tensors) * BYTES[dtype]},
        "weight_map": {
            placed.tensor.name: shard.path.rpartition("/")[2] for shard in shards for placed in shard.tensors
        },
    }
    body = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return [*shards, TextFile(f"{stem}.safetensors.index.json", body.encode())]


def split(tensors: Iterable[Tensor], dtype: Dtype, limit: int) -> list[list[Tensor]]:
    """Cut a checkpoint into shards of at most `limit` bytes, in its own order, as diffusers and transformers do."""
    shards: list[list[Tensor]] = []
    filled = limit
    for tensor in tensors:
        size = tensor.count * BYTES[dtype]
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _place(path: str, dtype: Dtype, tensors: Iterable[Tensor]) -> WeightsFile:
    """Lay tensors out as the safetensors library does: widest type first (here all have one type), then by name."""
    placed = []
    offset = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        end = offset + tensor.count * BYTES[dtype]
        placed.append(Placed(tensor, offset, end))
        offset = end
    return WeightsFile(path, dtype, tuple(placed))

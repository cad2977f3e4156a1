"""A verified cache in the shape of the real one: weights that compress as weights do."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zops.cache.layout import place
from zops.cache.verify import pin
from zops.events import silent

MODEL, REVISION = "bench/weights", "0" * 40
# Elements of a tensor: none of a model is larger by much, and each has a scale of its own.
_TENSOR = 3840 * 2560
_SHARDS = 3
_DTYPES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True)
class Weights:
    """A cache, its one snapshot, and the files of that."""

    cache: Path
    snapshot: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def write_weights(cache: Path, size_gb: float, *, upcast: bool = False, fp32: float = 0.75) -> Weights:
    """Write a snapshot of fp32 and bf16 weights, each in three shards, and of small JSON.

    Args:
        cache: the cache's root, which must not exist.
        size_gb: of all of it, in 1e9 bytes.
        upcast: whether the fp32 values are bf16 values, as in many published models.
        fp32: share of fp32; the rest is bf16.
    """
    root = place(cache, MODEL, REVISION)
    jobs = []
    seeds = count()
    for folder, dtype, share in (("transformer", "F32", fp32), ("text_encoder", "BF16", 1 - fp32)):
        (root / folder).mkdir(parents=True)
        elements = int(size_gb * 1e9 * share / _SHARDS / _DTYPES[dtype])
        for shard in range(1, _SHARDS + 1):
            path = root / folder / f"model-{shard:05d}-of-{_SHARDS:05d}.safetensors"
            jobs.append((path, dtype, elements, upcast, next(seeds)))
        (root / folder / "config.json").write_text(json.dumps({"hidden_size": 3840, "layers": list(range(60))}))
    (root / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps({f"token{n}": n for n in range(20_000)}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: _write_shard(*job), jobs))
    pin(root, MODEL, REVISION, silent)
    files = sorted(path for path in root.rglob("*") if path.is_file() and ".zops" not in path.parts)
    return Weights(cache, root, tuple(files))


def _write_shard(path: Path, dtype: str, elements: int, upcast: bool, seed: int) -> None:  # noqa: FBT001 - for `map`
    header: dict[str, object] = {}
    sizes = [min(_TENSOR, elements - start) for start in range(0, elements, _TENSOR)]
    end = 0
    for number, size in enumerate(sizes):
        begin, end = end, end + size * _DTYPES[dtype]
        header[f"layers.{number}.weight"] = {"dtype": dtype, "shape": [size], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for values in _tensors(sizes, seed):
            bits = values.view(np.uint32)
            if dtype == "BF16":
                stream.write((bits >> 16).astype(np.uint16).data)
            else:
                stream.write((bits & np.uint32(0xFFFF0000) if upcast else bits).data)
        stream.flush()
        os.fsync(stream.fileno())


def _tensors(sizes: list[int], seed: int) -> Iterator[NDArray[np.float32]]:
    """Yield normal values, of another scale for each tensor."""
    chance = np.random.default_rng(seed)
    for size in sizes:
        scale = np.float32(10 ** chance.uniform(-2.5, -0.5))
        yield chance.standard_normal(size, dtype=np.float32) * scale

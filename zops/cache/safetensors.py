"""The header of a safetensors file, read without any library: names, types, shapes and places of its tensors.

The format: eight bytes of little-endian length, that much JSON, then the tensors' bytes without a gap. The file may
come from anywhere, so every number in it is checked before it is used.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zops.errors import SnapshotDamaged

# The reference implementation's own limit.
HEADER_LIMIT = 100_000_000
# Bits an element, as the format names its types.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its type as the format names it, its shape, and where its bytes begin and end after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name; their bytes begin at `data_offset` of the file."""

    tensors: dict[str, Tensor] = field(repr=False)
    data_offset: int

    @property
    def file_size(self) -> int:
        """The size in bytes that the whole file must have."""
        return self.data_offset + max((tensor.end for tensor in self.tensors.values()), default=0)

    @property
    def dtypes(self) -> set[str]:
        """The types that occur."""
        return {tensor.dtype for tensor in self.tensors.values()}


def read_header(path: Path) -> Header:
    """Read and check the header of a file, and that the file has exactly the size that it promises.

    Raises:
        SnapshotDamaged: naming the file and what is wrong with it.
        OSError: when the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise _invalid(path, f"its header would have {length} bytes, the file has {size}")
        text = stream.read(length)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid(path, "its header is no JSON") from None
    if not isinstance(body, dict):
        raise _invalid(path, "its header is no JSON object")
    header = Header({name: _tensor(path, name, t) for name, t in body.items() if name != "__metadata__"}, 8 + length)
    _check_places(path, header)
    if header.file_size != size:
        raise _invalid(path, f"it has {size} bytes, its header promises {header.file_size}")
    return header


def _tensor(path: Path, name: str, body: Any) -> Tensor:
    try:
        dtype, shape, (begin, end) = body["dtype"], body["shape"], body["data_offsets"]
        numbers = [begin, end, *shape]
        sound = dtype in BITS and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        if not sound or (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _invalid(path, f"tensor {name[:80]!r} has no plausible type, shape and place") from None
    return Tensor(dtype, tuple(shape), begin, end)


def _check_places(path: Path, header: Header) -> None:
    """Refuse tensors that overlap or leave gaps, in which anything could hide."""
    expected = 0
    for tensor in sorted(header.tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != expected:
            raise _invalid(path, f"its tensors leave a gap or overlap at byte {expected}")
        expected = tensor.end


def check_shards(snapshot: Path, index: str, headers: dict[str, Header]) -> list[tuple[str, str]]:
    """Compare an index with the headers of the shards it names; return (file, what is wrong) for each difference.

    Args:
        snapshot: the snapshot's directory.
        index: path of the `*.safetensors.index.json` relative to it.
        headers: header of each readable shard by its path relative to the snapshot.
    """
    try:
        weights = json.loads((snapshot / index).read_text(encoding="utf-8"))["weight_map"]
        pairs = sorted((str(file), str(name)) for name, file in weights.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [(index, "is no index of shards")]
    folder = index.rpartition("/")[0]
    wrong: dict[str, str] = {}
    for file, name in pairs:
        path = f"{folder}/{file}" if folder else file
        if path not in headers:
            wrong.setdefault(index, f"names {path}, which is not there or not readable")
        elif name not in headers[path].tensors:
            wrong.setdefault(path, f"lacks tensor {name[:80]}, which {index} expects in it")
    return sorted(wrong.items())


def _invalid(path: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"{path} is no sound safetensors file: {what}",
        code="safetensors-invalid",
        hint="repair it with: zops cache verify --deep --repair",
        reason=what,
    )

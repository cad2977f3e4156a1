"""float32 to bfloat16 as torch does it: the arithmetic, and the header of a safetensors file after it.

A bfloat16 is the upper half of a float32. Rounding to nearest, ties to even, is an addition to the lower half whose
carry rounds the upper one: 0x7fff, and one more where the upper half is odd. Infinities, zeros and subnormals need no
case of their own, and what rounds beyond the largest number becomes infinity by the same carry. Only a NaN would be
carried into something else: it becomes 0xffff, which is what torch's vector code on x86 writes for every NaN (its
scalar code and other devices write other NaNs; which one has no meaning).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops.cache.safetensors import BITS, Header, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDE, NARROW = "F32", "BF16"
# Elements that are cast at once: with the scratch beside them they stay in a core's L2 cache, where this does 6.7 GB/s
# of float32 a core; with blocks of 8 Ki or of 1 Mi elements it does 3.4 and 6.4 GB/s.
STEP = 1 << 16
_INFINITY_DOUBLED = 0xFF000000
_NAN = 0xFFFF


class Caster:
    """Casts in buffers of its own that are made once; one for each thread."""

    def __init__(self) -> None:
        import numpy as np  # noqa: PLC0415 - 100 ms that only this work needs

        self._np = np
        self._scratch = np.empty(STEP, np.uint32)

    def cast(self, source: memoryview, target: memoryview) -> None:
        """Round the float32 in `source` to the bfloat16 in `target`; both little-endian, the latter half as long."""
        np = self._np
        bits = np.frombuffer(source, "<u4")
        rounded = np.frombuffer(target, "<u2")
        for start in range(0, len(bits), STEP):
            self._cast_step(bits[start : start + STEP], rounded[start : start + STEP])

    def _cast_step(self, bits: "NDArray[np.uint32]", rounded: "NDArray[np.uint16]") -> None:
        np = self._np
        work = self._scratch[: len(bits)]
        np.left_shift(bits, 1, out=work)  # drops the sign, so that one comparison finds a NaN
        nan = bool(work.max() > _INFINITY_DOUBLED)
        np.right_shift(bits, 16, out=work)
        np.bitwise_and(work, 1, out=work)
        np.add(work, 0x7FFF, out=work)
        np.add(work, bits, out=work)
        np.right_shift(work, 16, out=work)
        np.copyto(rounded, work, casting="unsafe")
        if nan:
            rounded[(bits << 1) > _INFINITY_DOUBLED] = _NAN


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring bytes of a file that are treated alike: cast, or taken as they are."""

    size: int
    cast: bool


@dataclass(frozen=True)
class Recast:
    """A safetensors file before and after: how many bytes its header took, the new header, and the runs of its data."""

    old_header_size: int
    header: bytes
    runs: tuple[Run, ...]
    tensor_bytes: int
    """Bytes of all tensors afterwards."""

    @property
    def size(self) -> int:
        """Bytes of the file afterwards."""
        return len(self.header) + self.tensor_bytes


def recast(path: Path) -> Recast | None:
    """Plan the cast of every float32 tensor of a file; None when there is none.

    The tensors keep their order, and the header its metadata. A file whose other tensors would no longer lie at a
    multiple of their width, which the library that wrote it avoids by sorting, is not cast either.

    Raises:
        SnapshotDamaged: when the file is no sound safetensors file.
        OSError: when it cannot be read.
    """
    header = read_header(path)
    if WIDE not in header.dtypes:
        return None
    body = _read_body(path, header)
    runs: list[Run] = []
    offset = 0
    for name, tensor in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        cast = tensor.dtype == WIDE
        dtype = NARROW if cast else tensor.dtype
        size = (tensor.end - tensor.begin) // (2 if cast else 1)
        if offset * 8 % BITS[dtype]:
            return None
        body[name] |= {"dtype": dtype, "data_offsets": [offset, offset + size]}
        offset += size
        _extend(runs, Run(tensor.end - tensor.begin, cast))
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # as the safetensors library does, so that the data are aligned
    return Recast(header.data_offset, len(text).to_bytes(8, "little") + text, tuple(runs), offset)


def _read_body(path: Path, header: Header) -> dict[str, Any]:
    """Return the header's JSON, with the metadata that `read_header` passes over."""
    with path.open("rb") as stream:
        body: dict[str, Any] = json.loads(stream.read(header.data_offset)[8:])
    return body


def _extend(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].cast == run.cast:
        run = Run(runs.pop().size + run.size, run.cast)
    if run.size:
        runs.append(run)

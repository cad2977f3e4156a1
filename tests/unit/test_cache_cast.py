"""The cast to bfloat16 must be torch's, bit for bit, for every kind of float32; the file around it must stay sound."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from zops.cache.cast import STEP, Caster, recast
from zops.cache.derive import derive_file
from zops.cache.safetensors import read_header

# Upper half, then a lower half around the tie: what decides how a value is rounded.
LOWER = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
SPECIAL = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000,
    0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF,
]  # fmt: skip
PATTERNS = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from(SPECIAL),
    st.builds(lambda upper, lower: upper << 16 | lower, st.integers(0, 0xFFFF), st.sampled_from(LOWER)),
    st.builds(lambda sign, rest: sign << 31 | rest, st.integers(0, 1), st.integers(0x7F7FFF00, 0x7F800100)),
)


def cast(bits: np.ndarray) -> np.ndarray:
    """Cast by ours; the target is filled before, so that nothing that is left out goes unseen."""
    target = bytearray(b"\x5a" * (2 * len(bits)))
    Caster().cast(memoryview(bits.tobytes()), memoryview(target))
    return np.frombuffer(target, np.uint16)


def cast_by_torch(bits: np.ndarray) -> np.ndarray:
    """Cast by torch, which writes NaNs of its own where it runs no vector code of x86."""
    found = torch.from_numpy(bits.view(np.float32).copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        found = np.where((bits << 1) > 0xFF000000, np.uint16(0xFFFF), found)
    return found


@given(st.lists(PATTERNS, min_size=1, max_size=200))
def test_the_cast_must_equal_torchs(patterns: list[int]) -> None:
    bits = np.array(patterns, np.uint32)
    np.testing.assert_array_equal(cast(bits), cast_by_torch(bits))


def test_the_cast_must_equal_torchs_for_every_upper_half_around_the_tie() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = (upper[:, None] | np.array(LOWER, np.uint32)).reshape(-1)
    np.testing.assert_array_equal(cast(bits), cast_by_torch(bits))


@pytest.mark.parametrize("count", [1, STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
def test_no_element_must_be_lost_where_steps_meet(count: int) -> None:
    bits = np.random.default_rng(count).integers(0, 1 << 32, count, np.uint32)
    np.testing.assert_array_equal(cast(bits), cast_by_torch(bits))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64]
TENSORS = st.dictionaries(
    st.text('abcé."', min_size=1, max_size=6),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=8,
)


@given(TENSORS, st.integers(0, 2**32))
def test_a_cast_file_must_hold_what_torch_would_have_made_of_it(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict, seed: int
) -> None:
    root = tmp_path_factory.mktemp("cast")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_file(tensors, root / "before.safetensors", metadata={"format": "pt", "who": "é"})
    how = recast(root / "before.safetensors")
    if how is None:
        assert torch.float32 not in {tensor.dtype for tensor in tensors.values()}
        return
    derive_file(root / "before.safetensors", root / "after.safetensors", how, lambda _: None)
    assert (root / "after.safetensors").stat().st_size == how.size
    after = load_file(root / "after.safetensors")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted), name
    with safe_open(root / "after.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "who": "é"}


def test_a_file_whose_tensors_would_lose_their_alignment_must_be_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert read_header(path).dtypes == {"F32", "I32"}
    assert recast(path) is None

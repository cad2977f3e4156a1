"""What a synthetic model consists of, and how its numbers are made; nothing here touches a disk."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.catalog import Z_IMAGE_TURBO
from zops.catalog.configs import Size
from zops.catalog.shards import BYTES, TextFile, WeightsFile, plan, split
from zops.catalog.synthetic import BLOCK, block_of, to_bfloat16
from zops.catalog.tensors import Tensor
from zops.catalog.tokenizer import byte_alphabet

SIZES: list[Size] = ["tiny", "full"]
# The tokenizer is built locally; everything else of the full model but the weights' values is the published one.
OWN = ("tokenizer/",)


def published() -> dict[str, tuple[int, str]]:
    pinned = Z_IMAGE_TURBO.pinned()
    assert pinned is not None
    files = {f["path"]: (f["size"], f["sha256"]) for f in pinned["files"] if not f["path"].startswith(OWN)}
    assert len(files) == 15
    return files


def test_the_full_model_must_have_the_published_files_with_their_very_sizes() -> None:
    sizes = {file.path: file.size for file in plan("full").files}
    assert {path: sizes.get(path) for path in published()} == {path: size for path, (size, _) in published().items()}


def test_configurations_and_indexes_of_the_full_model_must_be_the_published_bytes() -> None:
    hashes = {f.path: hashlib.sha256(f.body).hexdigest() for f in plan("full").files if isinstance(f, TextFile)}
    expected = {path: sha256 for path, (_, sha256) in published().items() if path.endswith(".json")}
    assert len(expected) == 8
    assert {path: hashes[path] for path in expected} == expected


def test_the_tiny_model_must_have_the_published_pipeline_and_scheduler() -> None:
    files = {file.path: file for file in plan("tiny").files}
    for path in ("model_index.json", "scheduler/scheduler_config.json"):
        assert hashlib.sha256(files[path].body).hexdigest() == published()[path][1]


def test_the_tiny_model_must_have_the_same_files_as_the_full_one_in_four_megabytes() -> None:
    assert [file.path for file in plan("tiny").files] == [file.path for file in plan("full").files]
    assert 3_500_000 < plan("tiny").size < 4_500_000


@pytest.mark.parametrize("size", SIZES)
def test_tensors_must_fill_their_file_without_gap_or_overlap_from_an_aligned_start(size: Size) -> None:
    for file in plan(size).files:
        if isinstance(file, WeightsFile):
            ends = [0, *(placed.end for placed in file.tensors)]
            assert [placed.begin for placed in file.tensors] == ends[:-1]
            assert all(p.end - p.begin == math.prod(p.tensor.shape) * BYTES[file.dtype] for p in file.tensors)
            assert len(file.header) % 8 == 0
            assert file.size == len(file.header) + ends[-1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 120))
def test_shards_must_keep_the_order_and_the_limit_and_be_as_full_as_the_next_tensor_allows(
    counts: list[int], limit_elements: int
) -> None:
    tensors = [Tensor(f"t{i}", (count,), 0.0, 1.0) for i, count in enumerate(counts)]
    shards = split(tensors, "F32", 4 * limit_elements)
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert all(0 < sum(t.count for t in shard) <= limit_elements for shard in shards)
    for shard, following in itertools.pairwise(shards):
        assert sum(t.count for t in shard) + following[0].count > limit_elements


def test_a_tensor_above_the_limit_must_get_a_shard_of_its_own() -> None:
    tensors = [Tensor(name, (count,), 0.0, 1.0) for name, count in (("a", 1), ("big", 9), ("c", 1))]
    assert [[t.name for t in shard] for shard in split(tensors, "F32", 8)] == [["a"], ["big"], ["c"]]


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=20))
def test_bfloat16_must_be_the_nearest_value_and_the_even_one_of_two_equally_near(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    got = to_bfloat16(exact).tolist()
    for bits, value in zip(got, exact.astype(np.float64), strict=True):
        error = abs(widen(bits) - value)
        for neighbour in (bits - 1, bits + 1):
            if (neighbour ^ bits) & 0x8000 or not bits & 0x7FFF:
                continue  # the other side of zero
            other = abs(widen(neighbour) - value)
            assert error < other or (error == other and bits % 2 == 0)


@pytest.mark.parametrize(
    ("value", "bits"), [(1.0, 0x3F80), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (-2.0, 0xC000), (0.0, 0)]
)
def test_bfloat16_of_known_numbers_and_ties_must_be_right(value: float, bits: int) -> None:
    assert to_bfloat16(np.array([value], np.float32)).tolist() == [bits]


def widen(bits: int) -> float:
    return float(np.array([bits << 16], np.uint32).view(np.float32)[0])


def floats(tensor: Tensor, *, seed: int = 0, start: int = 0) -> np.ndarray:
    return np.frombuffer(block_of(tensor, "F32", seed, start), np.float32)


def test_a_block_must_depend_on_seed_name_and_position_and_on_nothing_else() -> None:
    tensor = Tensor("layers.0.weight", (3, BLOCK), 0.0, 1.0)
    again = Tensor("layers.0.weight", (3 * BLOCK,), 0.0, 1.0)
    other_name = Tensor("layers.1.weight", (3, BLOCK), 0.0, 1.0)
    block = floats(tensor, start=BLOCK)
    assert np.array_equal(block, floats(again, start=BLOCK))
    for other in (floats(tensor, seed=1, start=BLOCK), floats(other_name, start=BLOCK), floats(tensor, start=0)):
        assert abs(np.corrcoef(block, other)[0, 1]) < 0.01


def test_blocks_of_a_tensor_must_not_overlap_in_the_random_stream() -> None:
    tensor = Tensor("w", (3 * BLOCK,), 0.0, 1.0)
    blocks = [floats(tensor, start=i * BLOCK) for i in range(3)]
    assert len(np.unique(np.concatenate([b.view(np.uint32)[:1000] for b in blocks]))) > 2990
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        assert blocks[later][:16].tobytes() not in blocks[earlier].tobytes()


def test_values_must_have_the_mean_and_the_deviation_that_were_asked_for() -> None:
    values = floats(Tensor("w", (BLOCK,), 0.25, 0.5))
    assert abs(values.mean() - 0.25) < 0.005
    assert abs(values.std() - 0.5) < 0.005
    assert set(floats(Tensor("norm", (7,), 1.0, 0.0))) == {1.0}


def test_the_last_block_must_end_with_the_tensor() -> None:
    tensor = Tensor("w", (BLOCK + 5,), 0.0, 1.0)
    assert [len(block_of(tensor, "BF16", 0, start)) for start in (0, BLOCK)] == [2 * BLOCK, 10]


def test_the_byte_alphabet_must_give_each_byte_a_visible_character_of_its_own() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert all(character.isprintable() and not character.isspace() for character in alphabet)
    assert (alphabet[ord("a")], alphabet[ord(" ")]) == ("a", "Ġ")

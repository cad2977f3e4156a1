"""A safetensors header may come from anywhere: every lie in it must end in an error that names the file."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.snapshots import write_pipeline, write_safetensors
from zops.cache.safetensors import check_shards, read_header
from zops.errors import SnapshotDamaged


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_sound_header_must_tell_types_shapes_and_places(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "c": {"dtype": "F4", "shape": [2], "data_offsets": [16, 17]},
    }
    found = read_header(write(tmp_path / "x", header, bytes(17)))
    assert found.dtypes == {"BF16", "F32", "F4"}
    assert found.tensors["a"].shape == (2, 3)


LIES = {
    "empty": b"",
    "no json": b"{",
    "a list": [],
    "a number": 3,
    "tensor is none": {"a": None},
    "no such type": {"a": {"dtype": "F5", "shape": [1], "data_offsets": [0, 1]}},
    "type is a list": {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
    "too few bytes": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "negative": {"a": {"dtype": "U8", "shape": [-4], "data_offsets": [4, 0]}},
    "huge": {"a": {"dtype": "U8", "shape": [1 << 70], "data_offsets": [0, 1 << 70]}},
    "a boolean": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "fraction": {"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1.0]}},
    "gap": {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
    "overlap": {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    },
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_must_be_refused(tmp_path: Path, lie: str) -> None:
    with pytest.raises(SnapshotDamaged, match="no sound safetensors"):
        read_header(write(tmp_path / "x", LIES[lie], bytes(8)))


@pytest.mark.parametrize("length", [3, 100_000_001, 1 << 63])
def test_a_header_longer_than_the_file_or_the_limit_must_not_be_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(SnapshotDamaged):
        read_header(write(tmp_path / "x", {}, length=length))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_is_not_as_long_as_its_header_says_must_be_refused(tmp_path: Path, change: int) -> None:
    write_safetensors(tmp_path / "x", {"a": 10}, content=bytes(10 + change))
    with pytest.raises(SnapshotDamaged, match="promises"):
        read_header(tmp_path / "x")


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_may_end_in_anything_but_a_header_or_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with suppress(SnapshotDamaged):
        read_header(tmp_path / "x")


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path, shard_bytes=10)
    index = "transformer/shard.safetensors.index.json"
    headers = {f"transformer/shard-{i}-of-2.safetensors": None for i in (1, 2)}
    headers = {path: read_header(root / path) for path in headers}
    assert check_shards(root, index, headers) == []
    write_safetensors(root / "transformer/shard-2-of-2.safetensors", {"other": 10})
    headers["transformer/shard-2-of-2.safetensors"] = read_header(root / "transformer/shard-2-of-2.safetensors")
    assert [path for path, _ in check_shards(root, index, headers)] == ["transformer/shard-2-of-2.safetensors"]
    del headers["transformer/shard-1-of-2.safetensors"]
    assert index in dict(check_shards(root, index, headers))
    (root / index).write_text('{"weight_map": [1]}')
    assert check_shards(root, index, headers) == [(index, "is no index of shards")]

"""How files of weights are cut into chunks: every byte of every tensor once, and on borders of elements."""

import math

from hypothesis import given
from hypothesis import strategies as st

from zops.cache.safetensors import Header, Tensor
from zops.serving.streaming import CHUNK, is_aligned, plan

WIDTHS = {"F32": 4, "BF16": 2, "U8": 1}


@st.composite
def headers(draw):
    offset = 8 * draw(st.integers(2, 1 << 10)) + draw(st.sampled_from([0, 0, 0, 1, 2]))
    tensors, position = {}, 0
    for index in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        count = draw(st.one_of(st.integers(0, 9), st.integers(0, CHUNK)))
        end = position + count * WIDTHS[dtype]
        tensors[f"tensor.{index}"] = Tensor(dtype, (count,), position, end)
        position = end
    return Header(tensors, offset)


@given(st.lists(headers(), min_size=1, max_size=3))
def test_the_chunks_must_cover_each_file_once_and_in_order(files):
    for index, header in enumerate(files):
        chunks = [chunk for chunk in plan(files) if chunk.file == index]
        assert [chunk.start for chunk in chunks] == list(range(0, header.file_size, CHUNK))
        assert sum(chunk.stop - chunk.start for chunk in chunks) == header.file_size


@given(headers())
def test_the_pieces_must_make_up_every_aligned_tensor_without_cutting_an_element(header):
    pieces = [(chunk, piece) for chunk in plan([header]) for piece in chunk.pieces]
    for name, tensor in header.tensors.items():
        mine = [(chunk, piece) for chunk, piece in pieces if piece.name == name]
        if tensor.begin == tensor.end or not is_aligned(header, name):
            assert not mine
            continue
        width = WIDTHS[tensor.dtype]
        position = header.data_offset + tensor.begin
        for chunk, piece in mine:
            assert chunk.start + piece.begin == position
            assert piece.first == (position - header.data_offset - tensor.begin) // width
            assert (piece.end - piece.begin) % width == 0
            assert piece.begin % width == 0
            position = chunk.start + piece.end
        assert position == header.data_offset + tensor.end
        assert sum(p.end - p.begin for _, p in mine) == math.prod(tensor.shape) * width


def test_files_must_advance_together_so_that_their_digests_can_run_side_by_side():
    long = Header({"a": Tensor("U8", (10 * CHUNK,), 0, 10 * CHUNK)}, 16)
    short = Header({"a": Tensor("U8", (5 * CHUNK,), 0, 5 * CHUNK)}, 16)
    half = plan([long, short])[: 16 // 2]
    assert sum(chunk.file == 1 for chunk in half) >= 2
    assert sum(chunk.file == 0 for chunk in half) >= 4

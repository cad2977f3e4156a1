"""Golden images: likeness, baselines and what is kept."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.health.golden import BASELINE_COUNT, MOST, Album, new_golden, similarity_db
from zops.health.verdict import CODES, LAYERS

KEY = {"manifest": "a", "preset": "bf16", "size": 512}


def test_equal_thumbnails_must_be_infinitely_alike_and_opposite_ones_not_at_all():
    assert similarity_db(b"\x00\x80\xff", b"\x00\x80\xff") == inf
    assert similarity_db(b"\x00" * 9, b"\xff" * 9) == 0
    assert similarity_db(b"\x00" * 9, b"\x00" * 8) == 0
    assert similarity_db(b"", b"") == 0


@given(st.binary(min_size=1, max_size=64), st.integers(1, 40))
def test_a_picture_must_be_the_less_alike_the_more_it_differs(thumbnail, step):
    def moved(by: int) -> bytes:
        return bytes(value - by if value > 127 else value + by for value in thumbnail)

    assert similarity_db(thumbnail, moved(step)) > similarity_db(thumbnail, moved(step + 1))


def test_the_baseline_must_be_the_median_of_the_first_ones_and_deaf_to_later_ones():
    golden = new_golden(b"png", b"small", 9.0)
    for seconds in (1.0, 1.1, 1.2, 1.3):
        golden = golden.joined_by(seconds)
    assert golden.baseline_s == 1.2
    assert len(golden.seconds) == BASELINE_COUNT
    assert golden.joined_by(100.0) is golden


def test_a_golden_must_come_back_as_it_was_kept_and_only_for_its_own_key():
    golden = new_golden(b"png", bytes(range(256)) * 3, 1.5)
    Album("web").keep(KEY, golden)
    assert Album("web").find(KEY) == golden
    assert Album("web").find(KEY | {"size": 256}) is None
    assert Album("web", "gpu-1").find(KEY) is None
    assert Album("other").find(KEY) is None


def test_an_album_must_not_grow_for_ever_and_lose_the_oldest_first():
    album = Album("web")
    for number in range(MOST + 3):
        album.keep(KEY | {"size": number}, new_golden(b"png", b"small", 1.0))
    there = [number for number in range(MOST + 3) if album.find(KEY | {"size": number})]
    assert there == list(range(3, MOST + 3))


@pytest.mark.parametrize("code", CODES)
def test_a_code_must_be_a_name_that_alerts_can_be_written_for(code):
    assert code == code.lower().strip("-")
    assert code not in LAYERS

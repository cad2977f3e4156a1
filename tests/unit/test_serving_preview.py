"""Which forwards get a preview, and how many an edit runs; no torch needed."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from zops.serving.generate import forwards_run
from zops.serving.messages import Shape
from zops.serving.preview import preview_forwards


@given(previews=st.integers(0, 20), forwards=st.integers(1, 200))
def test_previews_must_be_spread_over_the_forwards_and_never_follow_the_last(previews, forwards):
    due = preview_forwards(previews, forwards)
    assert len(due) == min(previews, max(forwards - 2, 0))
    assert list(due) == sorted(set(due))
    assert all(2 <= forward < forwards for forward in due)
    gaps = [after - before for before, after in pairwise(due)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_three_previews_of_eight_forwards_must_come_after_the_third_fifth_and_seventh():
    assert preview_forwards(3, 8) == (3, 5, 7)


@given(forwards=st.integers(1, 200), strength=st.floats(0, 1))
def test_an_edit_must_run_some_forwards_whenever_the_http_process_lets_it_pass(forwards, strength):
    run = forwards_run(Shape("edit", 64, 64, forwards, 0.0, 32, strength))
    assert int(forwards * strength) <= run <= min(forwards, int(forwards * strength) + 1)


def test_a_generation_must_run_all_its_forwards_whatever_its_strength():
    assert forwards_run(Shape("generate", 64, 64, 8, 0.0, 32, strength=0.1)) == 8

"""Which card holds which component, by plain numbers."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from zops.serving.accelerate.choice import demands
from zops.serving.placement import Demand, place

GB = 1_000_000_000
# Z-Image-Turbo: parameters of its components.
WEIGHTS = {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683}
components = st.dictionaries(
    st.sampled_from(["transformer", "text_encoder", "vae", "image_encoder"]),
    st.builds(Demand, st.integers(0, 100), st.integers(0, 30)),
    min_size=1,
)
cards = st.lists(st.integers(0, 200), min_size=1, max_size=4)


def test_two_equal_cards_must_get_the_transformer_and_the_rest():
    found = place(demands(WEIGHTS), [24 * GB, 24 * GB])
    assert found == {"transformer": 0, "text_encoder": 1, "vae": 1}
    assert place(demands(WEIGHTS), [16 * GB, 16 * GB]) == found, "neither card would hold all of it"
    assert place(demands(WEIGHTS), [16 * GB]) is None


def test_the_transformer_must_go_where_there_is_room_for_it():
    assert place(demands(WEIGHTS), [12 * GB, 16 * GB]) == {"transformer": 1, "text_encoder": 0, "vae": 0}


def test_fp8_must_ask_for_less():
    wide, narrow = demands(WEIGHTS), demands(WEIGHTS, fp8=True)
    assert narrow["transformer"].resident < 0.6 * wide["transformer"].resident
    assert narrow["text_encoder"] == wide["text_encoder"]
    assert demands(WEIGHTS, fp8=True, fp8_text=True)["text_encoder"].resident < 0.6 * wide["text_encoder"].resident
    assert demands(WEIGHTS, bytes_each=4)["vae"].resident == 2 * wide["vae"].resident


def left(asked, places, free):
    """Return what is left of the fullest card that holds something."""
    return min(
        free[card] - sum(asked[n].resident for n in names) - max(asked[n].working for n in names)
        for card in set(places.values())
        for names in [[name for name, place in places.items() if place == card]]
    )


@given(components, cards)
def test_what_fits_somehow_must_be_placed_with_most_left_on_the_fullest_card(asked, free):
    found = place(asked, free)
    ways = [dict(zip(asked, way, strict=True)) for way in product(range(len(free)), repeat=len(asked))]
    best = max(left(asked, way, free) for way in ways)
    if found is None:
        assert best < 0
        return
    assert found.keys() == asked.keys()
    assert left(asked, found, free) == best >= 0
    assert place(dict(reversed(asked.items())), free) == found, "the order in which components come must not matter"

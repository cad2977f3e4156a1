"""Which preset a device gets, by its generation and memory alone."""

import pytest

from zops.errors import ZopsError
from zops.serving.accelerate.choice import ROOM_BYTES, Choice, Device, Wanted, choose

# Z-Image-Turbo: parameters of its components.
WEIGHTS = {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683}
GIB = 1 << 30
AUTO = Wanted("auto", None, forced=False)
H200 = Device("cuda", (9, 0), 139 * GIB, triton=True)
RTX_4090 = Device("cuda", (8, 9), int(23.5 * GIB), triton=True)
RTX_4080 = Device("cuda", (8, 9), int(15.6 * GIB), triton=True)
T4 = Device("cuda", (7, 5), 15 * GIB, triton=True)
A100 = Device("cuda", (8, 0), 40 * GIB, triton=True)
CPU = Device("cpu")


@pytest.mark.parametrize(
    ("device", "preset", "text", "eager_fits"),
    [
        (H200, "bf16", False, True),
        (A100, "bf16", False, True),
        (RTX_4090, "bf16", False, True),
        (RTX_4080, "fp8", True, False),
        (T4, "bf16", False, False),
        (Device("cuda", (9, 0), 80 * GIB, triton=False), "eager", False, True),
        (CPU, "eager", False, True),
    ],
    ids=["H200", "A100", "24 GB", "16 GB", "no fp8", "no Triton", "CPU"],
)
def test_auto_must_put_quality_first_and_fp8_where_nothing_else_fits(device, preset, text, eager_fits):
    found = choose(AUTO, device, WEIGHTS)
    assert (found.preset, found.fp8_text, found.eager_fits) == (preset, text, eager_fits)
    assert found.reason


def test_the_text_encoder_must_be_narrowed_only_where_it_would_not_fit_wide():
    wanted = Wanted("fp8", None, forced=False)
    assert not choose(wanted, H200, WEIGHTS).fp8_text
    assert not choose(wanted, Device("cuda", (8, 9), 20 * GIB, triton=True), WEIGHTS).fp8_text
    assert choose(wanted, RTX_4080, WEIGHTS).fp8_text
    assert choose(Wanted("fp8", True, forced=False), H200, WEIGHTS).fp8_text
    assert not choose(Wanted("fp8", False, forced=False), RTX_4080, WEIGHTS).fp8_text
    assert not choose(Wanted("bf16", True, forced=False), H200, WEIGHTS).fp8_text


def test_whether_bf16_fits_must_turn_at_its_weights_and_the_room_beside_them():
    edge = 2 * sum(WEIGHTS.values()) + ROOM_BYTES
    assert choose(AUTO, Device("cuda", (9, 0), edge, triton=True), WEIGHTS).preset == "bf16"
    assert choose(AUTO, Device("cuda", (9, 0), edge - 1, triton=True), WEIGHTS).preset == "fp8"


@pytest.mark.parametrize(
    ("preset", "device", "says"),
    [("bf16", CPU, "a GPU"), ("fp8", CPU, "a GPU"), ("fp8", A100, "8.9 or newer, and this one has 8.0")],
)
def test_what_a_device_cannot_compute_must_be_refused_unless_forced(preset, device, says):
    with pytest.raises(ZopsError, match=says) as raised:
        choose(Wanted(preset, None, forced=False), device, WEIGHTS)
    assert raised.value.code == "preset-unusable"
    assert choose(Wanted(preset, None, forced=True), device, WEIGHTS).preset == preset


def test_eager_must_be_had_everywhere():
    for device in (CPU, T4, H200):
        assert choose(Wanted("eager", None, forced=False), device, WEIGHTS) == Choice(
            "eager", fp8_text=False, eager_fits=device is not T4, reason="asked for"
        )


def fallbacks(device, wanted=AUTO):
    return [each.preset for each in choose(wanted, device, WEIGHTS).fallbacks]


def test_auto_must_know_what_to_serve_instead_as_memory_allows():
    assert fallbacks(H200) == ["eager"]
    assert fallbacks(RTX_4080) == [], "neither bf16 nor eager fits"
    assert fallbacks(T4) == ["eager"], "eager takes no more than the bf16 that is tried there"
    assert fallbacks(CPU) == []
    for preset in ("eager", "bf16", "fp8"):
        assert fallbacks(H200, Wanted(preset, None, forced=False)) == [], "what was asked for is served or refused"


def test_two_cards_together_must_have_room_for_what_neither_has_alone():
    alone = Device("cuda", (8, 9), 16_500_000_000, triton=True)
    both = Device("cuda", (8, 9), 16_500_000_000, triton=True, more_cards=(16_500_000_000,))
    assert choose(AUTO, alone, WEIGHTS).preset == "fp8"
    assert choose(AUTO, alone, WEIGHTS).fp8_text
    assert choose(AUTO, both, WEIGHTS).preset == "bf16"
    wanted = Wanted("fp8", None, forced=False)
    assert choose(wanted, alone, WEIGHTS).fp8_text
    assert not choose(wanted, both, WEIGHTS).fp8_text

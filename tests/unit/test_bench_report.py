"""The report: its plots start at zero, its text is escaped, it asks nothing of anybody."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bench import MACHINE, MODEL, figure, result, whole
from zops.bench.report.page import headline, page, tiles
from zops.bench.report.svg import BAR_ROOM, Bar, Line, bars, lines, number, ticks

VOID = {"meta", "br", "link", "img"}


class Strict(HTMLParser):
    """Fails on a tag that is not closed in its turn, and collects what a page asks for."""

    def __init__(self):
        super().__init__()
        self.open, self.asked = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.asked += [
            value for name, value in attrs if name in {"src", "href", "srcset", "action", "onclick", "onload"}
        ]
        assert tag not in {"script", "iframe", "object", "form"}

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    strict = Strict()
    strict.feed(text)
    assert strict.open == []
    return strict


def drawn(svg):
    return ET.fromstring(svg)


def percent(text):
    return float(text.removesuffix("%"))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(any))
def test_bars_must_be_as_long_as_their_values_from_zero(values):
    svg = drawn(bars([Bar(f"b{i}", value, str(value)) for i, value in enumerate(values)], "s", "t"))
    rects = svg.findall("rect")
    assert {rect.get("x") for rect in rects} == {"0"}
    for rect, value in zip(rects, values, strict=True):
        assert percent(rect.get("width")) == pytest.approx(value / max(values) * BAR_ROOM, abs=0.01)


@given(st.floats(1e-9, 1e9))
def test_ticks_must_begin_at_zero_be_even_and_reach_near_the_end(most):
    found = ticks(most)
    assert found[0] == 0
    assert 2 <= len(found) <= 6
    assert found[-1] <= most * 1.00001
    assert found[-1] + found[1] > most * 0.99999


def test_parts_of_a_bar_must_follow_each_other():
    rects = drawn(bars([Bar("a", 4, "4", parts=(1.0, 3.0))], "s", "t")).findall("rect")
    assert [percent(r.get("x")) for r in rects] == [0, BAR_ROOM / 4]
    assert sum(percent(r.get("width")) for r in rects) == pytest.approx(BAR_ROOM)


def test_a_line_must_start_its_scale_at_zero_and_keep_names_apart():
    series = [Line(f"line {i}", ((0.0, 1.0), (1.0, 10 + i / 100))) for i in range(4)]
    svg = drawn(lines(series, [(0.0, "a"), (1.0, "b")], "s", "t"))
    ends = sorted(float(text.get("y")) for text in svg.findall("text") if "end" in text.get("class"))
    assert all(after - before >= 14.9 for before, after in pairwise(ends))
    heights = {circle.get("cy") for circle in svg.findall("circle")}
    zero = next(line for line in svg.findall("line") if line.get("class") == "grid").get("y1")
    assert max(map(float, heights)) < float(zero), "1 lies above 0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0154, "0.0154"), (1.5, "1.5"), (17.62, "17.6"), (1506, "1,506"), (float("inf"), "∞")],
)
def test_numbers_must_have_three_digits(value, text):
    assert number(value) == text


def test_a_whole_report_must_be_sound_and_ask_nothing_of_anybody():
    text = page(whole(), [whole(created_at="2026-01-01T00:00:00+00:00")])
    strict = parsed(text)
    assert strict.asked == []
    assert "url(" not in text
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/\S+", "", text)
    assert "default-src 'none'" in text
    for title in (
        "Loading",
        "Types and presets",
        "Sizes, forwards",
        "Serving",
        "Cache",
        "Floor",
        "Earlier runs",
        "Not measured",
    ):
        assert f"<h2>{title}" in text
    assert "fewer than two GPUs are visible" in text
    assert "RTX 4090D" in text


def test_whatever_a_result_says_must_be_escaped():
    evil = "<script>alert(1)</script>\"'&"
    machine = MACHINE | {"gpus": [{"name": evil, "memory_bytes": 1}], "cpu": evil, "versions": {evil: evil}}
    made = whole(machine=machine, model=MODEL | {"model": evil, "dtypes": {evil: [evil]}}, zops=evil)
    made.add(figure(1, way=evil, weights=evil, page_cache="warm", method=evil))
    made.add(figure(1, table="serve", quantity="images/s", unit=evil, size=evil, clients=evil))
    made.skip("gpus", {"gpus": evil}, evil)
    text = page(made, [made])
    parsed(text)
    assert "<script" not in text


@pytest.mark.parametrize("table", ["load", "precision", "sizes", "serve", "cache", "roofline", "gpus"])
def test_a_report_of_one_table_alone_must_be_sound(table):
    made = result(*(each for each in whole().figures if each.table == table))
    parsed(page(made))
    parsed(page(result(figure(1, way="zops", weights="full", page_cache="warm"), model={}, machine={})))


def test_the_headline_must_stand_beside_the_usual_way():
    found = {tile.label: tile for tile in tiles(whole())}
    load = found["weights on the device, warm page cache"]
    assert (load.value, load.unit) == ("1.89", "s")
    assert load.beside == "3.28\N{MULTIPLICATION SIGN} as fast as the usual 6.2 s"
    assert headline(result()) == []


def test_what_was_cut_short_or_quick_must_be_said():
    made = whole(quick=True)
    made.complete = False
    text = page(made)
    assert "ended early" in text
    assert "quick run" in text
    assert "ended early" not in page(whole())

"""Statistics, result files and their comparison."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bench import MACHINE, figure, result, whole
from zops.bench.compare import compare, judge
from zops.bench.floor import floor_s, forward_work
from zops.bench.result import Result, merged, read_result, write_result
from zops.bench.statistics import percentile, summarise
from zops.errors import UsageError, ZopsError

NUMBERS = st.floats(min_value=1e-6, max_value=1e6)


@pytest.mark.parametrize(
    ("samples", "median", "p99", "spread"),
    [
        ([3.0], 3.0, 3.0, 0.0),
        ([1.0, 3.0], 2.0, 3.0, 1.0),
        ([1.0, 2.0, 9.0], 2.0, 9.0, 4.0),
        # The outlier of four is outside of the middle half.
        ([1.0, 2.0, 3.0, 100.0], 2.5, 100.0, 1.0),
        (list(map(float, range(1, 201))), 100.5, 198.0, 50.0),
    ],
)
def test_a_summary_must_be_what_was_measured(samples, median, p99, spread):
    found = summarise(samples[::-1])
    assert (found.n, found.median, found.p99, found.spread) == (len(samples), median, p99, spread)
    assert (found.least, found.most) == (samples[0], samples[-1])


@given(st.lists(NUMBERS, min_size=1, max_size=300), st.floats(0, 100))
def test_a_percentile_must_be_a_measured_value_that_enough_others_do_not_exceed(samples, share):
    ordered = sorted(samples)
    found = percentile(ordered, share)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= share / 100 * len(ordered) - 1e-9


def test_a_result_must_come_back_from_its_file(tmp_path):
    made = whole()
    made.add(
        figure(math.inf, table="precision", quantity="PSNR", unit="dB", better="more", preset="bf16", forwards="8")
    )
    write_result(tmp_path / "a.json", made)
    back = read_result(tmp_path / "a.json")
    assert back.as_json() == made.as_json()
    assert back.figures[-1].value == math.inf
    assert json.loads((tmp_path / "a.json").read_text())["figures"][-1]["value"] is None
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.json"]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format": 2}', "\x00", "[" * 100_000,
        json.dumps(whole().as_json() | {"figures": [{"id": "x"}]}),
        json.dumps(whole().as_json() | {"created_at": "yesterday"}),
        json.dumps(whole().as_json()).replace('"less"', '"purple"'),
        json.dumps(whole().as_json()).replace('"load"', '"lead"'),
        json.dumps(result(figure(7.5)).as_json()).replace('"samples": [7.5]', '"samples": []'),
        json.dumps(result(figure(7.5)).as_json()).replace('"samples": [7.5]', '"samples": [NaN]'),
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_must_be_refused_by_name(tmp_path, text):
    file = tmp_path / "no-result.json"
    file.write_text(text)
    with pytest.raises(ZopsError, match=r"no-result\.json") as refused:
        read_result(file)
    assert refused.value.code == "bench-result-invalid"
    with pytest.raises(UsageError, match="gone"):
        read_result(tmp_path / "gone.json")


def test_a_result_that_cannot_be_written_must_leave_the_old_one(tmp_path):
    file = tmp_path / "a.json"
    write_result(file, result(figure(0)))
    with file.open() as reader:
        write_result(file, result(figure(1)))
        assert json.load(reader)["figures"][0]["value"] == 0, "who reads meanwhile sees one or the other"
    with pytest.raises(ZopsError) as refused:
        write_result(tmp_path / "missing" / "a.json", result(figure(2)))
    assert refused.value.code == "file-not-written"
    assert read_result(file).figures[0].value == 1


def test_results_that_are_merged_must_give_each_table_from_the_newest_that_has_it():
    older = result(figure(1), figure(9, table="cache", step="disk"), created_at="2026-01-01T00:00:00+00:00")
    newer = result(figure(2), created_at="2026-02-01T00:00:00+00:00")
    both = merged([newer, older])
    assert {each.id: each.value for each in both.figures} == {"load/zops/time": 2, "cache/disk/time": 9}
    assert both.created_at == newer.created_at


# before, after, better -> verdict with 5 % tolerance
VERDICTS = [
    ((1.0,), (1.04,), "less", "same"),
    ((1.0,), (1.06,), "less", "worse"),
    ((1.0,), (0.9,), "less", "better"),
    ((10.0,), (9.0,), "more", "worse"),
    ((10.0,), (11.0,), "more", "better"),
    ((1.0,), (9.0,), "neither", "same"),
    # 10 % slower, but the runs differ by as much among themselves.
    ((0.9, 1.0, 1.1), (1.0, 1.1, 1.2), "less", "unclear"),
    ((0.99, 1.0, 1.01), (1.09, 1.1, 1.11), "less", "worse"),
    # One outlier of many says nothing.
    ((1.0, 1.0, 1.0, 5.0), (1.2, 1.2, 1.2, 5.0), "less", "worse"),
    ((0.0,), (1.0,), "less", "worse"),
    ((0.0,), (0.0,), "less", "same"),
    ((math.inf,), (45.0,), "more", "worse"),
    ((45.0,), (math.inf,), "more", "better"),
    ((math.inf,), (math.inf,), "more", "same"),
]


@pytest.mark.parametrize(("before", "after", "better", "verdict"), VERDICTS)
def test_a_figure_must_be_judged_by_tolerance_and_spread(before, after, better, verdict):
    assert judge(figure(*before, better=better), figure(*after, better=better), 0.05) == verdict


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.lists(NUMBERS, min_size=1, max_size=9))
def test_what_is_worse_one_way_must_be_better_or_within_tolerance_the_other_way(one, other):
    there, back = (judge(figure(*a), figure(*b), 0.0) for a, b in ((one, other), (other, one)))
    assert (there, back) in {("worse", "better"), ("better", "worse"), ("same", "same"), ("unclear", "unclear")}


def test_a_comparison_must_tell_what_is_gone_new_and_measured_elsewhere():
    before = result(figure(1), figure(2, way="old"))
    after = result(figure(1), figure(3, way="new"), machine=MACHINE | {"driver": "1.3"})
    found = compare(before, after)
    assert {pair.id: pair.verdict for pair in found.pairs} == {
        "load/zops/time": "same", "load/old/time": "gone", "load/new/time": "new",
    }  # fmt: skip
    assert found.machines == ("driver: 1.2 -> 1.3",)
    assert found.regressions == ()
    assert compare(before, before).machines == ()


def test_the_work_of_a_forward_must_be_that_of_the_published_model():
    work = forward_work({"dim": 3840, "n_layers": 30, "n_refiner_layers": 2}, 1024, 1024)
    assert work.total == pytest.approx(5.6e13, rel=0.03)  # counted once by hand for this model at this size
    # Twice the side is four times the tokens: four times the products and sixteen times the scores, nearly.
    large = forward_work({"dim": 3840, "n_layers": 30, "n_refiner_layers": 2}, 2048, 2048)
    assert large.products / work.products == pytest.approx(4, rel=0.02)
    assert large.scores / work.scores == pytest.approx(16, rel=0.04)
    assert floor_s(work, 8, 746e12, 550e12) == pytest.approx(0.62, rel=0.03)


def test_finding_must_take_every_value_that_is_named():
    made = whole()
    assert made.find("load", "time", way="zops", page_cache="cold").case["page cache"] == "cold"
    assert made.find("load", "time", way="nobody's") is None
    assert isinstance(Result.from_json(made.as_json()), Result)

"""Which archives stay: whatever the rules and the store, never the last good one goes, nor one that another needs."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.archive.chain import bases, chain, is_complete
from zops.archive.keep import Keep, decide
from zops.archive.names import ArchiveInfo
from zops.errors import SourceFailed, UsageError

START = datetime(2026, 1, 1, tzinfo=UTC)
MODELS = ("a/x", "b/y", "c/z")


def info(hours, models=("a/x",), base=None):
    created = START + timedelta(hours=hours)
    origin = START + timedelta(hours=base) if base is not None else None
    name = f"{'+'.join(models)}-{hours}-from-{base}"
    return ArchiveInfo(name, tuple((model, "r") for model in models), created, 1, f"/s/{name}", origin)


def kept(decisions):
    return {decision.archive.name for decision in decisions if decision.kept}


@st.composite
def stores(draw):
    hours = sorted(draw(st.sets(st.integers(0, 24 * 500), max_size=25)))
    found = []
    for at in hours:
        models = tuple(sorted(draw(st.sets(st.sampled_from(MODELS), min_size=1))))
        earlier = [h for h in hours if h < at]
        # A base may be of another model or be gone, as in a store that somebody tidied by hand.
        base = draw(st.one_of(st.none(), st.sampled_from(earlier))) if earlier else None
        found.append(info(at, models, base))
    return found


keeps = st.builds(Keep, *(st.integers(0, 5) for _ in range(5))).filter(str)


@given(stores(), keeps, st.randoms(), st.booleans())
def test_whatever_the_rules_what_must_never_go_must_stay(archives, keep, dice, some_bad):
    bad = {each.name for each in archives if some_bad and dice.random() < 0.3}
    decisions = decide(archives, keep, zone=UTC, bad=bad)
    assert sorted(d.archive.name for d in decisions) == sorted(each.name for each in archives)
    staying = kept(decisions)
    left = [each for each in archives if each.name in staying]
    for each in left:
        assert {base.name for base in bases(each, archives)} <= staying, "a chain was broken"
    for model in MODELS:
        held = [each for each in archives if model in {m for m, _ in each.snapshots}]
        good = [each for each in held if each.name not in bad and is_complete(each, archives)]
        if good:
            assert good[-1].name in staying, "the newest good archive went"
            assert is_complete(good[-1], left)
        assert not held or any(each.name in staying for each in held)
    # Removing in this order, a kill in between leaves no archive without what it builds on.
    for place, decision in enumerate(decisions):
        later = {d.archive.name for d in decisions[place + 1 :]}
        assert {base.name for base in bases(decision.archive, archives)} <= later


@given(stores(), keeps, st.sampled_from(MODELS))
def test_what_nobody_asked_about_must_stay(archives, keep, model):
    decisions = decide(archives, keep, models=[model], zone=UTC)
    going = {each.name for each in archives} - kept(decisions)
    assert all({m for m, _ in each.snapshots} == {model} for each in archives if each.name in going)
    for each in archives:
        if each.name not in going:
            assert not {base.name for base in bases(each, archives)} & going


@given(stores(), keeps)
def test_deciding_again_about_what_stayed_must_remove_nothing(archives, keep):
    staying = kept(decide(archives, keep, zone=UTC))
    left = [each for each in archives if each.name in staying]
    assert kept(decide(left, keep, zone=UTC)) == staying


def test_the_rules_must_count_the_youngest_of_every_period():
    archives = [info(hours) for hours in range(0, 24 * 70, 8)]  # three a day, for seventy days
    decisions = decide(archives, Keep(last=2, daily=3, weekly=2, monthly=9), zone=UTC)
    days = sorted(
        (24 * 70 - 8 - d.archive.created.timestamp() / 3600 + START.timestamp() / 3600) for d in decisions if d.kept
    )
    # Wednesday 11 March is the last day; 8 March ends the week before, 28 February and 31 January their months.
    assert days == [0, 8, 24, 48, 72, 264, 936]


def test_periods_without_an_archive_must_not_count():
    archives = [info(24 * day) for day in (0, 100, 200)]
    assert len(kept(decide(archives, Keep(daily=3), zone=UTC))) == 3


def test_a_damaged_archive_must_not_take_the_place_of_a_good_one():
    archives = [info(0), info(24), info(48)]
    assert kept(decide(archives, Keep(last=1), zone=UTC, bad={archives[2].name})) == {archives[1].name}
    assert kept(decide(archives, Keep(last=1), zone=UTC, bad={each.name for each in archives})) == {archives[2].name}


def test_a_chain_must_be_found_and_a_gap_in_it_said():
    archives = [info(0), info(1, base=0), info(2, base=1), info(3, base=2)]
    assert [each.created.hour for each in chain(archives, archives[3].name)] == [3, 2, 1, 0]
    del archives[1]
    with pytest.raises(SourceFailed) as caught:
        chain(archives, archives[2].name)
    assert caught.value.code == "archive-base-missing"


@given(keeps)
def test_rules_must_be_read_as_they_are_written(keep):
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize(
    "text", ["", "last", "last=0", "last=-1", "hourly=3", "last=1,last=2", "daily=7 weekly=4", "=7"]
)
def test_rules_that_keep_nothing_or_mean_nothing_must_be_refused(text):
    with pytest.raises(UsageError):
        Keep.parse(text)


def test_the_newest_must_stay_even_when_the_rules_keep_nothing():
    assert kept(decide([info(0), info(24)], Keep(), zone=UTC)) == {info(24).name}

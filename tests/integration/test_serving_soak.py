"""Everything at once against a real server while its workers are killed; in long: benchmarks/serving/soak.py."""

import collections

import pytest

from benchmarks.serving.acts import ACTS
from benchmarks.serving.soak import Plan, soak


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What came of half a minute with a SIGKILL, a SIGSTOP, and a SIGKILL for whoever is ready then."""
    plan = Plan(seconds=28, clients=16, workers=2, strike_every_s=7, recipes=8, hold_s=14)
    return soak(plan, tmp_path_factory.mktemp("soak"))


def test_no_promise_must_be_broken_under_a_mixed_load_while_workers_are_killed(findings):
    assert findings.faults == []


def test_the_load_must_have_been_mixed_and_the_workers_hit(findings):
    kinds = collections.Counter(ending.kind for ending in findings.endings)
    often = {kind for kind, (_, weight) in ACTS.items() if weight >= 3}
    assert often - kinds.keys() == set()
    assert {strike.number.name for strike in findings.strikes} == {"SIGKILL", "SIGSTOP"}
    assert {look.status for look in findings.looks} == {200, 503}, "there was no time without workers"
    assert sum(ending.pictures for ending in findings.endings) > 50
    assert {200, 400, 401} <= {ending.status for ending in findings.endings}

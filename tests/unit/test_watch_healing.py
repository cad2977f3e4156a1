"""What the watch does about an unhealthy instance, and above all when it does nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.health.verdict import CODES
from zops.watch.case import APART, Case, Rhythm
from zops.watch.healing import TABLE, WINDOW_S, Heal, Policy, Problem, decide
from zops.watch.latch import Answer, Latch

INTERVAL_S = 10.0
HEALED = sorted(code for code, remedy in TABLE.items() if remedy in {"restart", "recreate"})
POLICY = Policy(first_pause_s=30, longest_pause_s=900, quiet_s=600, budget=6)


def problem(code="hung", since=0.0, verdict="failed", patience_s=900.0):
    return Problem(code, verdict, "live", "it hangs", since, patience_s)


def heal(at, recovered_at=None, problem_since=None):
    return Heal(at, "restart", "hung", at - 5 if problem_since is None else problem_since, at + 1, recovered_at)


def answer(at, code="", verdict=None, layer="live"):
    return Answer(at, verdict or ("failed" if code else "ok"), code, layer if code else "", code)


def case(failures=2, of=3, policy=POLICY, **more):
    return Case("demo", "process", Rhythm(INTERVAL_S, failures=failures, of=of, **more), policy)


def test_every_code_of_health_must_have_its_place_in_the_table_and_no_other() -> None:
    assert TABLE.keys() == CODES.keys()


@pytest.mark.parametrize(("code", "remedy"), TABLE.items())
def test_the_first_heal_must_be_the_table_s(code, remedy) -> None:
    decision = decide(problem(code, since=-1000), [], POLICY, now=0)
    assert decision.do == remedy


def test_what_merely_works_less_well_must_never_be_healed() -> None:
    assert decide(problem("canary-slow", verdict="degraded"), [], POLICY, 0).do == "report"


def test_an_unknown_code_must_only_be_reported() -> None:
    assert decide(problem("something-new"), [], POLICY, 0).do == "report"


def test_a_lost_worker_must_get_the_time_of_a_start_to_come_back() -> None:
    assert decide(problem("worker-down", since=0, patience_s=60), [], POLICY, 59).do == "wait"
    assert decide(problem("worker-down", since=0, patience_s=60), [], POLICY, 60).do == "restart"


def test_each_further_heal_must_be_the_stronger_one_after_twice_the_pause() -> None:
    heals, now, pauses = [], 0.0, []
    for _ in range(4):
        waited = decide(problem(since=now), heals, POLICY, now)
        if waited.do == "wait":
            pauses.append(waited.until - heals[-1].done_at)
            now = waited.until
        decision = decide(problem(since=now), heals, POLICY, now)
        assert decision.do == ("recreate" if heals else "restart")
        heals.append(heal(now))
    assert pauses == [30, 60, 120]


def test_a_pause_must_never_be_longer_than_the_longest() -> None:
    policy = Policy(first_pause_s=30, longest_pause_s=100, budget=1000)
    heals = [heal(float(n)) for n in range(50)]
    assert decide(problem(since=50), heals, policy, 50).until == heals[-1].done_at + 100


def test_a_quiet_time_in_good_health_must_forgive_and_a_shorter_one_must_not() -> None:
    done = heal(0, recovered_at=10)
    assert decide(problem(since=610), [done], POLICY, 611).do == "restart"
    assert decide(problem(since=600), [done], POLICY, 611).do == "recreate"
    older = [heal(0, recovered_at=10), heal(700, recovered_at=710, problem_since=690)]
    assert decide(problem(since=720), older, POLICY, 720).until == 701 + 30, "only the last belongs to this trouble"
    nearer = [heal(0, recovered_at=10), heal(650, recovered_at=660, problem_since=605)]
    assert decide(problem(since=670), nearer, POLICY, 670).until == 651 + 60, "it was well for 595 s only"


def test_a_spent_budget_must_end_in_giving_up_until_an_hour_after_the_last_heal() -> None:
    heals = [heal(100.0 * n, recovered_at=100.0 * n + 5) for n in range(6)]
    decision = decide(problem(since=1200), heals, Policy(quiet_s=1, budget=6), 1200)
    assert (decision.do, decision.until) == ("give-up", 500 + WINDOW_S)
    assert decide(problem(since=4000), heals, Policy(quiet_s=1, budget=6), 500 + WINDOW_S).do == "restart"


def test_one_bad_answer_must_change_nothing_and_the_second_must() -> None:
    patient = case()
    assert patient.see(answer(0)).verdict == "ok"
    assert patient.see(answer(10, "hung")) is None
    assert patient.decide(10) is None
    change = patient.see(answer(15, "hung"))
    assert (change.was, change.verdict, change.answer.code) == ("ok", "failed", "hung")
    assert patient.decide(15).do == "restart"
    assert patient.problem.since == 10


def test_from_fault_to_verdict_it_must_take_at_most_two_intervals_whatever_luck() -> None:
    for luck in (0.0, 0.5, 1.0):
        patient = case(jitter=0.5)
        patient.see(answer(0))
        first = patient.pause_s(answer(0), luck)
        patient.see(answer(first, "hung"))
        second = first + patient.pause_s(answer(first, "hung"), luck)
        assert patient.see(answer(second, "hung")).verdict == "failed"
        assert second <= 1.5 * INTERVAL_S


def test_answers_that_call_for_a_heal_must_be_counted_apart_from_those_that_do_not() -> None:
    latch = Latch(2, 3)
    for at, code in enumerate(["starting", "hung"]):
        latch.see(answer(at, code))
    assert latch.standing.gravity == 2, "failed, but one hung answer heals nothing"
    latch.see(answer(3, "hung"))
    assert latch.standing.code == "hung"


def test_bad_answers_in_a_hurry_must_count_as_one() -> None:
    patient = case()
    patient.see(answer(0, "hung"))
    for at in (0.1, 1.0, APART * INTERVAL_S - 0.1):
        patient.see(answer(at, "hung"))
        assert patient.decide(at) is None
    patient.see(answer(APART * INTERVAL_S + 0.1, "hung"))
    assert patient.decide(5).do == "restart"


def test_what_was_seen_before_a_heal_must_not_heal_again() -> None:
    patient = case(policy=Policy(first_pause_s=0.001, longest_pause_s=0.001))
    for at in (0, 5):
        patient.see(answer(at, "hung"))
    patient.begin("restart", 5)
    patient.finish(6, "new")
    assert patient.recovering
    assert patient.pause_s(None, 0.0) == 1.0
    patient.see(answer(7, "hung"))
    assert patient.decide(7) is None
    patient.see(answer(12, "hung"))
    assert patient.decide(12).do == "recreate"


def test_the_first_ok_answer_after_a_heal_must_close_it() -> None:
    patient = case()
    for at in (0, 5):
        patient.see(answer(at, "hung"))
    patient.begin("restart", 5)
    patient.finish(6)
    change = patient.see(answer(9))
    assert (change.verdict, change.healed.at, change.healed.recovered_at) == ("ok", 5, 9)
    assert not patient.recovering


def test_an_instance_that_is_merely_degraded_after_a_heal_must_count_as_healed() -> None:
    patient = case()
    for at in (0, 5):
        patient.see(answer(at, "hung"))
    patient.begin("restart", 5)
    patient.finish(6)
    patient.gave_up = True
    patient.see(answer(12, "cache-writable", "degraded"))
    change = patient.see(answer(17, "cache-writable", "degraded"))
    assert (change.verdict, change.healed.recovered_at, patient.gave_up) == ("degraded", 17, False)


def test_a_restart_loop_must_be_given_up_once_even_where_it_serves_between() -> None:
    patient = case()
    for at in (0, 5):
        patient.see(answer(at, "restart-loop", "degraded"))
    assert patient.decide(5).do == "give-up"
    patient.gave_up = True
    patient.see(answer(10, "restart-loop", "degraded"))
    assert patient.gave_up


def test_a_new_container_by_somebody_else_must_be_a_new_chance() -> None:
    patient = case(policy=Policy(budget=1))
    patient.meet("first")
    for at in (0, 5):
        patient.see(answer(at, "hung"))
    patient.begin("restart", 5)
    patient.finish(6, "second")
    assert not patient.meet("second"), "the watch made that one itself"
    for at in (10, 15):
        patient.see(answer(at, "hung"))
    assert patient.decide(15).do == "give-up"
    assert patient.meet("third")
    for at in (20, 25):
        patient.see(answer(at, "hung"))
    assert patient.decide(25).do == "restart"


def test_a_black_image_must_not_be_outvoted_by_answers_without_an_image() -> None:
    patient = case(canary_every_s=900.0)
    assert patient.wants_canary(0)
    patient.see(answer(0), deep=True)
    assert not patient.wants_canary(899)
    patient.see(answer(900, "canary-black", layer="canary"), deep=True)
    assert patient.wants_canary(905), "it is made sure at once"
    patient.see(answer(905))
    patient.see(answer(910))
    patient.see(answer(915, "canary-black", layer="canary"), deep=True)
    assert patient.decide(915).do == "restart"
    patient.begin("restart", 915)
    patient.finish(916)
    patient.see(answer(920))
    assert patient.verdict == "failed", "only a sound image proves that it is well"
    assert patient.wants_canary(920)
    assert patient.see(answer(921), deep=True).verdict == "ok"
    assert not patient.wants_canary(922)


def test_a_canary_that_is_never_to_be_made_must_not_be_wanted() -> None:
    assert not case(canary_every_s=0.0).wants_canary(1e9)


steps = st.lists(
    st.tuples(
        st.floats(APART * INTERVAL_S + 0.01, 400),
        st.sampled_from(["", "", "starting", "canary-differs", *HEALED]),
        st.booleans(),
    ),
    max_size=200,
)


@given(steps, st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_no_heal_must_come_before_n_of_m_nor_more_than_the_budget_in_any_hour(story, failures, more, budget) -> None:
    of = failures + more
    policy = Policy(first_pause_s=1, longest_pause_s=60, quiet_s=100, budget=budget)
    patient = case(failures, of, policy)
    now, given_since_heal, healed_at = 0.0, [], []
    for pause_s, code, works in story:
        now += pause_s
        given_since_heal.append(code)
        patient.see(answer(now, code), deep=True, patience_s=10)
        decision = patient.decide(now)
        if decision is None or decision.do not in {"restart", "recreate"}:
            continue
        bad = [one for one in given_since_heal[-of:] if one in HEALED]
        assert len(bad) >= failures, given_since_heal
        patient.begin(decision.do, now)
        patient.finish(now + (0.1 if works else 5.0), "id")
        healed_at.append(now)
        given_since_heal.clear()
        assert len([at for at in healed_at if at > now - WINDOW_S]) <= budget


@given(st.lists(st.floats(0, 20_000), max_size=40), st.integers(1, 8), st.floats(0, 30_000))
def test_the_budget_must_hold_whatever_was_done_before(moments, budget, now) -> None:
    heals = [heal(at, recovered_at=at + 1) for at in sorted(moments) if at <= now]
    decision = decide(problem(since=now), heals, Policy(quiet_s=0.5, budget=budget), now)
    recent = [one for one in heals if one.at > now - WINDOW_S]
    if len(recent) >= budget:
        assert decision.do in {"give-up", "wait"}


@pytest.mark.parametrize("code", ["starting", "worker-down"])
def test_what_is_only_on_its_way_back_must_be_asked_often_and_believed_at_its_first_good_answer(code) -> None:
    one = case()
    for at in (0.0, 5.0):
        one.see(answer(at, code))
    assert one.verdict == "failed"
    assert one.pause_s(answer(5.0, code), luck=0.0) == one.rhythm.recovery_s
    change = one.see(answer(6.0))
    assert change is not None
    assert change.verdict == "ok"


def test_a_hung_instance_must_not_be_believed_at_its_first_good_answer() -> None:
    one = case()
    for at in (0.0, 5.0):
        one.see(answer(at, "hung"))
    assert one.see(answer(15.0)) is None
    assert one.verdict == "failed"


def test_new_answers_must_be_waited_for_once_what_they_were_about_has_changed() -> None:
    one = case()
    for at in (0.0, 5.0):
        one.see(answer(at, "snapshot-gone", layer="cache"))
    one.look_again()
    assert one.decide(6.0) is None
    assert one.verdict == "failed"
    assert one.see(answer(15.0)).verdict == "ok"
    one.see(answer(25.0, "snapshot-gone", layer="cache"))
    assert one.decide(26.0) is None


def test_a_fault_that_goes_on_after_a_new_look_must_be_healed_as_old_as_it_is() -> None:
    one = case()
    for at in (0.0, 5.0):
        one.see(answer(at, "snapshot-gone", layer="cache"))
    one.look_again()
    for at in (15.0, 20.0):
        one.see(answer(at, "snapshot-gone", layer="cache"))
    assert one.decide(20.0).do == "recreate"
    assert one.problem.since == 0.0

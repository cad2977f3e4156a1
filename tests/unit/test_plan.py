"""A plan looks before it acts, stops at the first failure, and says how to go on."""

import pytest

from zops.errors import HostShort
from zops.events import Report, silent
from zops.provision.plan import Look, Step, run


def step(name: str, acted: list[str], *, done: bool = False) -> Step:
    def act(_report: Report) -> str:
        acted.append(name)
        return f"did {name}"

    return Step(name, lambda: Look(done, "there" if done else "missing"), act)


def test_a_step_that_is_done_must_not_be_done_again() -> None:
    acted: list[str] = []
    outcomes = list(run([step("a", acted, done=True), step("b", acted)], silent))
    assert acted == ["b"]
    assert [(o.step, o.state, o.text) for o in outcomes] == [("a", "found", "there"), ("b", "done", "did b")]


def test_a_dry_run_must_look_at_every_step_and_act_on_none() -> None:
    acted: list[str] = []
    outcomes = list(run([step("a", acted), step("b", acted)], silent, dry_run=True))
    assert acted == []
    assert [o.state for o in outcomes] == ["would", "would"]


def test_a_failing_step_must_stop_the_plan_with_its_name_the_remedy_and_the_way_on() -> None:
    acted: list[str] = []

    def fail(_report: Report) -> str:
        raise HostShort("port 8000 is taken", hint="free it")

    plan = [step("a", acted), Step("b", lambda: Look(done=False, reason=""), fail), step("c", acted)]
    with pytest.raises(HostShort) as caught:
        list(run(plan, silent, go_on="zops provision"))
    assert acted == ["a"]
    assert caught.value.message == "step b failed: port 8000 is taken"
    assert caught.value.hint == "free it; then go on with: zops provision"
    assert caught.value.details["step"] == "b"

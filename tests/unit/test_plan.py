"""A plan looks before it acts, stops at the first failure, and says how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from zops.errors import HostShort, ZopsError
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


def claims(held: list[str]):
    @contextmanager
    def claim() -> Iterator[None]:
        held.append("claimed")
        try:
            yield
        finally:
            held.append("let go")

    return claim


def test_the_claim_must_be_held_from_the_first_claimed_step_to_the_last() -> None:
    done: list[str] = []

    def one(name: str, *, claimed: bool) -> Step:
        return Step(name, lambda: Look(done=False, reason=""), lambda _: done.append(name) or "", claimed=claimed)

    steps = [
        one("pull", claimed=False),
        one("image", claimed=True),
        one("up", claimed=True),
        one("canary", claimed=False),
    ]
    list(run(steps, silent, claim=claims(done)))
    assert done == ["pull", "claimed", "image", "up", "let go", "canary"]


def test_the_claim_must_be_let_go_after_a_failure_and_not_be_taken_by_a_dry_run() -> None:
    held: list[str] = []

    def fail(_report) -> str:
        raise ZopsError("no")

    step = Step("up", lambda: Look(done=False, reason=""), fail, claimed=True)
    list(run([step], silent, dry_run=True, claim=claims(held)))
    assert held == []
    with pytest.raises(ZopsError):
        list(run([step], silent, claim=claims(held)))
    assert held == ["claimed", "let go"]

"""A dry run is given hands that refuse, and a runtime that refuses; so it cannot change anything."""

import inspect

import pytest

from zops.provision.hands import Hands, NoHands
from zops.provision.steps import plan
from zops.runtime.base import ReadOnly, WriteRefused
from zops.spec import load

WRITING = sorted(name for name, thing in vars(Hands).items() if inspect.isfunction(thing) and not name.startswith("_"))


def test_the_hands_must_have_methods_to_refuse() -> None:
    assert {"pull", "restore", "verify", "warm", "obtain_image", "up", "wait", "make_canary"} == set(WRITING)


@pytest.mark.parametrize("name", WRITING)
def test_no_hands_must_refuse_every_method_of_hands(name: str) -> None:
    with pytest.raises(WriteRefused, match=f"Hands.{name}"):
        getattr(NoHands(), name)


@pytest.mark.parametrize("kind", ["docker", "process", "kubernetes"])
def test_a_dry_plan_must_be_given_only_what_refuses_and_a_real_one_only_what_acts(tmp_path, kind: str) -> None:
    loaded = load(environ={"ZOPS_RUNTIME": kind}, directory=tmp_path)
    dry, real = plan(loaded, dry_run=True), plan(loaded, dry_run=False)
    assert isinstance(dry.hands, NoHands)
    assert isinstance(dry.runtime, ReadOnly)
    assert type(real.hands) is Hands
    assert not isinstance(real.runtime, ReadOnly)
    assert [step.name for step in dry.steps()] == [step.name for step in real.steps()]


@pytest.mark.parametrize("kind", ["docker", "process", "kubernetes"])
def test_every_write_of_a_runtime_must_be_refused_in_a_dry_run(tmp_path, kind: str) -> None:
    runtime = plan(load(environ={"ZOPS_RUNTIME": kind}, directory=tmp_path), dry_run=True).runtime
    for name in ("up", "down", "obtain_image", "claim", "restart", "recreate", "stop"):
        with pytest.raises(WriteRefused, match=name):
            getattr(runtime, name)
    assert callable(runtime.ask)

"""Several cards on one image: processes that talk by gloo here, on the CPU, in float32.

Three of them have shares of rows and heads that do not divide; two of them are what most hosts have.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.support.pipelines import SHAPE, Told, load_here, picture, settings_for  # noqa: E402 - torch may be missing
from tests.support.waiting import eventually  # noqa: E402 - as above
from zops.errors import ZopsError  # noqa: E402 - as above
from zops.serving.accelerate.denoise import Stopped  # noqa: E402 - as above
from zops.serving.accelerate.lead import Lead  # noqa: E402 - as above
from zops.serving.batch import DeviceLost  # noqa: E402 - as above
from zops.serving.followers import Followers  # noqa: E402 - as above
from zops.serving.link import start_process  # noqa: E402 - as above
from zops.serving.messages import Batch, Free, Made, Ready  # noqa: E402 - as above

FORCED = {"preset": "bf16", "force_preset": True}


def together(count):
    return FORCED | {"parallel": "context", "cards": count}


@pytest.fixture(scope="module")
def alone(tiny_model):
    return load_here(tiny_model, **FORCED)


@pytest.fixture(scope="module", params=[2, 3])
def cards(request, tiny_model):
    """Group of the whole module: joining costs the others' start."""
    loaded = load_here(tiny_model, **together(request.param))
    yield loaded
    loaded.close()


def latents(loaded, *, width=8, height=8, images=1, how=None, watch=lambda _index, _now: True):
    applied, seed = loaded.pipelines.applied, torch.Generator().manual_seed(3)
    noise = torch.randn(images, loaded.pipelines.generate.transformer.in_channels, height, width, generator=seed)
    prompts = ["a cat", "far more words than that, " * 12, "two dogs"][:images]
    how = {"forwards": 3} | (how or {})
    if how.get("guidance_scale"):
        how["negative"] = applied.encode(["blurry", "", "far too many words to say nothing " * 8][:images])
    return applied.denoise(applied.encode(prompts), noise, watch=watch, **how)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"width": 10, "height": 6},
        {"width": 22, "height": 14},
        {"images": 3},
        {"images": 3, "width": 10, "how": {"guidance_scale": 2.0}},
        {"how": {"forwards": 5, "skip": 2}},
    ],
    ids=["square", "15 tokens", "77 tokens", "batch", "guided batch", "edit"],
)
def test_several_cards_must_compute_what_one_does(alone, cards, asked):
    torch.testing.assert_close(latents(cards, **asked), latents(alone, **asked), rtol=1e-5, atol=1e-5)


def test_pictures_of_several_cards_must_be_those_of_one(alone, cards):
    wanted = [picture(1, previews=2), picture(2, prompt="far more words than that, " * 12)]
    ours, theirs = Told(cards), Told(alone)
    ours.make(*wanted), theirs.make(*wanted)
    for one in wanted:
        mine, other = ours.answers[one.id].rgb, theirs.answers[one.id].rgb
        assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) <= 1
    assert [each.index for each in ours.previews("p1")] == [each.index for each in theirs.previews("p1")] != []


def test_a_call_that_is_stopped_must_stop_on_all_cards_and_the_next_one_be_right(alone, cards):
    seen = []
    with pytest.raises(Stopped):
        latents(cards, how={"forwards": 8}, watch=lambda index, _now: seen.append(index) or index < 2)
    assert seen == [0, 1, 2]
    torch.testing.assert_close(latents(cards), latents(alone), rtol=1e-5, atol=1e-5)


def test_a_worker_on_several_cards_must_say_what_it_leaves_out(cards):
    assert (cards.ready.preset, cards.ready.gate.result) == ("bf16", "passed")
    assert not cards.pipelines.applied.graphs
    assert cards.memory() == (), "the CPU tells no memory"


def test_eager_must_be_computed_by_one_card_and_that_be_said(tiny_model):
    loaded = load_here(tiny_model, parallel="context", cards=2)
    assert loaded.ready.preset == "eager"
    assert "several cards on one image: left out, eager is computed by one" in loaded.ready.notes


@pytest.mark.parametrize("fault", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_a_fault_in_the_midst_of_a_call_must_lose_the_worker(alone, monkeypatch, fault):
    """The other cards wait for the rest of it: not even a smaller batch can be tried."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_given, **_named: None)
    plain, told = alone.pipelines.applied.denoise, []

    def fail_after_two(embeds, noise, *, watch, **how):
        def watched(index, now):
            if index == 2:
                raise fault
            return watch(index, now)

        return plain(embeds, noise, watch=watched, **how)

    applied = replace(alone.pipelines.applied, denoise=Lead(fail_after_two, told.append))
    broken = replace(alone, pipelines=replace(alone.pipelines, applied=applied))
    with pytest.raises(DeviceLost):
        Told(broken).make(picture(1), picture(2))
    assert told[1:] == [True, True]
    assert (told[0].forwards, told[0].latents[0], len(told[0].embeds)) == (SHAPE.forwards, 2, 2)


def test_a_card_that_cannot_load_must_say_why(tiny_model, tmp_path):
    followers = Followers(settings_for(tmp_path / "nowhere", **together(2)), "bf16")
    try:
        with pytest.raises(ZopsError, match=r"card 1 of this worker could not load: .*nowhere") as raised:
            followers.join("cpu")
        assert raised.value.code == "card-failed"
    finally:
        followers.close()


def test_a_card_that_ends_on_its_way_to_the_meeting_must_end_the_worker(tiny_model):
    """The worker would wait for it there; nothing tells NCCL that it never comes."""
    lost = []
    followers = Followers(settings_for(tiny_model, **together(2)), "bf16", lost=lost.append)
    try:
        eventually(lambda: not followers._all[0].loaded.empty(), "the follower's model")
        os.kill(followers.pids[0], signal.SIGKILL)
        eventually(lambda: lost == [1], "the loss")
    finally:
        followers.close()


def alive(pid):
    """Tell whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def worker(tiny_model):
    """A worker in a process of its own, with one follower."""
    process, connection = start_process(settings_for(tiny_model, **together(2)))
    while not isinstance(connection.recv(), Ready):
        pass
    [follower] = children(process.pid)
    yield process, connection, follower
    process.kill()
    process.wait()
    connection.close()


def test_a_worker_that_loses_a_card_must_end_as_a_whole_even_while_it_has_nothing_to_do(worker):
    process, connection, follower = worker
    connection.send(Batch(1, SHAPE, (picture(1),)))
    seen = []
    while not (seen and isinstance(seen[-1], Free)):
        seen.append(connection.recv())
    assert any(isinstance(message, Made) for message in seen)
    os.kill(follower, signal.SIGKILL)
    assert process.wait(10) == 1


def test_a_card_must_die_with_its_worker(worker):
    process, _, follower = worker
    assert alive(follower)
    process.kill()
    eventually(lambda: not alive(follower), "the follower's end")


def test_a_worker_that_is_let_go_must_leave_no_card_behind(worker):
    process, connection, follower = worker
    connection.close()
    assert process.wait(10) == 0
    eventually(lambda: not alive(follower), "the follower's end")

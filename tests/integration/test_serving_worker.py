"""A worker as a process of its own, at the other end of a pipe: what it tells, survives, and when it ends."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.pipelines import SHAPE, picture, settings_for
from tests.support.waiting import eventually
from zops.serving import worker
from zops.serving.messages import (
    BEAT_S,
    Batch,
    Beat,
    Cancel,
    Cancelled,
    Failed,
    Free,
    Made,
    Preview,
    Ready,
    StartFailed,
)

SLOW = replace(SHAPE, width=512, height=512, forwards=200)
"""Takes the tiny model the better part of a minute, in steps between which it can be cancelled."""


class Started:
    """A worker's process and our end of its pipe."""

    def __init__(self, settings, main=worker.main):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=True)
        self.process = context.Process(target=main, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.beats = []

    def receive(self, kind, timeout_s=60):
        """Return the next message of a kind, and what else came before it; beats are kept apart."""
        others, deadline = [], time.monotonic() + timeout_s
        while self.connection.poll(max(0.0, deadline - time.monotonic())):
            message = self.connection.recv()
            if isinstance(message, Beat):
                self.beats.append((time.monotonic(), message))
            if isinstance(message, kind):
                return message, others
            if not isinstance(message, Beat):
                others.append(message)
        pytest.fail(f"no {kind} in {timeout_s} s, only {others}")

    def make(self, number, *pictures, shape=SHAPE):
        self.connection.send(Batch(number, shape, pictures))
        free, answers = self.receive(Free)
        assert free.batch == number
        return answers

    def next_beat(self, check):
        return eventually(lambda: check(beat := self.receive(Beat)[0]) and beat, "such a beat")

    def end(self):
        self.connection.close()
        self.process.join(5)
        assert self.process.exitcode is not None


@pytest.fixture(scope="module")
def started(tiny_model):
    # One slow start for all: each test leaves the worker free.
    started = Started(settings_for(tiny_model))
    started.ready, _ = started.receive(Ready)
    yield started
    started.process.kill()
    started.process.join()


def test_a_worker_must_beat_while_it_starts(started):
    before_ready = [beat for _, beat in started.beats]
    assert before_ready, "no beat during the imports"
    assert {beat.batch for beat in before_ready} == {None}


def test_each_picture_must_be_answered_once_and_then_the_worker_be_free(started):
    answers = started.make(1, picture(1), picture(2))
    assert [answer.picture for answer in answers] == ["p1", "p2"]
    assert all(isinstance(answer, Made) for answer in answers)


def test_a_busy_worker_must_beat_and_tell_its_forwards_until_it_is_cancelled(started):
    started.connection.send(Batch(7, SLOW, (picture(1),)))
    first = started.next_beat(lambda beat: beat.batch == 7 and beat.forwards >= 1)
    later = started.next_beat(lambda beat: beat.forwards > first.forwards)
    assert later.batch == 7
    times = [when for when, beat in started.beats if beat.batch == 7]
    assert max(after - before for before, after in pairwise(times)) < BEAT_S * 4
    started.connection.send(Cancel("p1"))
    _, answers = started.receive(Free, timeout_s=10)
    assert answers == [Cancelled("p1")]
    assert started.next_beat(lambda beat: beat.batch is None)


def test_a_cancellation_that_comes_late_must_not_touch_the_picture_when_it_is_tried_again(started):
    started.make(10, picture(1))
    started.connection.send(Cancel("p1"))
    started.connection.send(Cancel("p9"))
    [answer] = started.make(11, picture(2))
    assert isinstance(answer, Made)
    [again] = started.make(12, picture(1))
    assert isinstance(again, Made)


@pytest.mark.parametrize(
    "bad",
    [
        (replace(SHAPE, width=65), picture(1)),
        (replace(SHAPE, forwards=0), picture(1)),
        (replace(SHAPE, mode="edit", strength=0.5), picture(1, source=b"short")),
        (replace(SHAPE, mode="edit", strength=7.0), picture(1, source=bytes(64 * 48 * 3))),
        (SHAPE, replace(picture(1), seed="no seed")),
        (SHAPE, replace(picture(1), prompt="\ud800")),
    ],
    ids=["width", "forwards", "source", "strength", "seed", "prompt"],
)
def test_a_worker_must_survive_what_it_should_never_be_asked(started, bad):
    shape, one = bad
    [answer] = started.make(20, one, shape=shape)
    assert isinstance(answer, Failed)
    assert isinstance(started.make(21, picture(2))[0], Made)


def test_a_signal_for_the_group_must_not_end_a_worker(started):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(started.process.pid, number)
    assert isinstance(started.make(30, picture(3))[0], Made)


def test_a_worker_must_end_when_the_http_process_is_gone_whatever_it_does(tiny_model):
    started = Started(settings_for(tiny_model))
    started.receive(Ready)
    started.connection.send(Batch(1, SLOW, (picture(1),)))
    started.next_beat(lambda beat: beat.batch == 1)
    started.end()


def _main_on_a_device_that_breaks(connection, settings):
    """A worker whose second batch meets what torch raises when a kernel failed."""
    import torch

    from zops.serving import worker

    load = worker.load

    def load_and_break(*arguments):
        loaded = load(*arguments)

        def fail(_module, args):
            if len(args[0]) == 2:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        loaded.pipelines.generate.transformer.register_forward_pre_hook(fail)
        return loaded

    worker.load = load_and_break
    worker.main(connection, settings)


def test_a_worker_whose_device_failed_must_end_and_leave_its_pictures_to_another(tiny_model):
    started = Started(settings_for(tiny_model), _main_on_a_device_that_breaks)
    started.receive(Ready)
    assert isinstance(started.make(1, picture(1))[0], Made)
    started.connection.send(Batch(2, SHAPE, (picture(1), picture(2))))
    with pytest.raises(EOFError):  # and until then nothing but heartbeats
        started.receive(Made | Failed | Cancelled | Free, timeout_s=20)
    started.process.join(5)
    assert started.process.exitcode == 1


def _main_that_hangs_in_a_forward(connection, settings):
    """A worker whose batches of two never come to the end of their first forward."""
    from zops.serving import worker

    load = worker.load

    def load_and_hang(*arguments):
        loaded = load(*arguments)
        loaded.pipelines.generate.transformer.register_forward_pre_hook(
            lambda _module, args: time.sleep(600) if len(args[0]) == 2 else None
        )
        return loaded

    worker.load = load_and_hang
    worker.main(connection, settings)


def test_a_worker_that_hangs_must_beat_on_without_progress_and_end_with_the_http_process(tiny_model):
    started = Started(settings_for(tiny_model), _main_that_hangs_in_a_forward)
    started.receive(Ready)
    started.connection.send(Batch(1, SHAPE, (picture(1), picture(2))))
    first = started.next_beat(lambda beat: beat.batch == 1)
    assert (first.forwards, started.receive(Beat)[0].forwards) == (0, 0)
    started.end()


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs an NVIDIA GPU")
def test_a_gpu_must_make_pictures_alone_and_together_and_tell_its_memory(tiny_model):
    started = Started(settings_for(tiny_model, gpus=None, threads=None))
    ready, _ = started.receive(Ready, timeout_s=120)
    assert (ready.device, ready.dtype) != ("cpu", "float32")
    assert ready.memory_free > 0
    assert ready.pixel_bytes > 0
    made = started.make(1, picture(1, previews=1), picture(2))
    assert [type(message) for message in made] == [Preview, Made, Made]
    [alone] = started.make(2, picture(1))
    # bfloat16 has eight bits, and a batch may run through other kernels than a picture alone.
    distances = [abs(one - other) for one, other in zip(made[1].rgb, alone.rgb, strict=True)]
    assert sum(distances) / len(distances) < 2
    edit = replace(SHAPE, mode="edit", strength=0.6)
    [edited] = started.make(3, picture(1, source=bytes(64 * 48 * 3)), shape=edit)
    assert isinstance(edited, Made)
    [(used, total)] = started.next_beat(lambda beat: beat.memory).memory
    assert 0 < used < total
    started.end()


def test_a_worker_that_cannot_start_must_say_why_and_end(tmp_path):
    started = Started(settings_for(tmp_path / "nothing"))
    failed, _ = started.receive(StartFailed)
    assert str(tmp_path / "nothing") in failed.message
    started.process.join(10)
    assert started.process.exitcode == 1

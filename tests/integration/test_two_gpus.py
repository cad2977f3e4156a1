"""What only two GPUs can show: components that are really apart, and cards that really exchange. Skipped elsewhere."""

import pytest

from tests.support.pipelines import SHAPE, picture, settings_for
from zops.host.gpu import read_gpus
from zops.serving.link import start_process
from zops.serving.messages import Batch, Beat, Free, Made, Ready, StartFailed

pytestmark = pytest.mark.skipif(len(read_gpus().gpus) < 2, reason="needs two NVIDIA GPUs")


class Running:
    """A worker in a process of its own."""

    def __init__(self, settings):
        self.process, self.connection = start_process(settings)
        self.beat = None
        self.ready = self.until(Ready)

    def until(self, kind):
        while True:
            message = self.connection.recv()
            assert not isinstance(message, StartFailed), message
            if isinstance(message, Beat) and message.memory:
                self.beat = message
            if isinstance(message, kind):
                return message

    def make(self, number, *pictures, shape=SHAPE):
        self.connection.send(Batch(number, shape, pictures))
        made = []
        while not isinstance(message := self.connection.recv(), Free):
            made += [message] if isinstance(message, Made) else []
        return made

    def end(self):
        self.process.kill()
        self.process.wait()
        self.connection.close()


@pytest.fixture
def run(tiny_model):
    running = []

    def call(**changes):
        running.append(Running(settings_for(tiny_model, force_preset=True, **changes)))
        return running[-1]

    yield call
    for each in running:
        each.end()


def distance(one, other):
    return sum(abs(a - b) for a, b in zip(one.rgb, other.rgb, strict=True)) / len(one.rgb)


@pytest.mark.parametrize("parallel", ["split", "context"])
@pytest.mark.parametrize("preset", ["bf16", "fp8"])
def test_two_gpus_must_make_the_pictures_of_one(run, parallel, preset):
    # Before anything else takes memory of a card: so small a model is split between equally free ones only.
    both = run(preset=preset, gpus="0,1", parallel=parallel, cards=2)
    alone = run(preset=preset, gpus="0")
    wanted = [picture(1), picture(2, prompt="far more words than that, " * 12)]
    for number in (1, 2, 3):  # the second call with a shape captures a graph
        pairs = list(zip(alone.make(number, *wanted), both.make(number, *wanted), strict=True))
        assert len(pairs) == 2
        assert all(distance(one, other) < 2 for one, other in pairs)
    both.until(Beat)
    assert len(both.beat.memory) == 2, "memory is told of each card"
    assert any("text encoder on cuda:" in note for note in both.ready.notes) == (parallel == "split")

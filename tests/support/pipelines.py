"""The tiny model's pipelines in the process of the test, and what a maker of batches tells."""

import os
from dataclasses import dataclass, field, replace

from zops.serving.batch import Maker
from zops.serving.messages import Batch, Cancelled, Failed, Made, Picture, Preview, Shape, WorkerSettings

SHAPE = Shape("generate", 64, 48, 4, 0.0, 32)


def settings_for(snapshot, **changes):
    """Settings of a worker on one thread of the CPU."""
    settings = WorkerSettings(str(snapshot), "zops/synthetic-tiny", "auto", "", 4, 0.0, 64, threads=1)
    return replace(settings, **changes)


def load_here(snapshot, **changes):
    """Load into this process, and leave its environment as it was."""
    from zops.serving.loader import load

    before = dict(os.environ)
    try:
        return load(settings_for(snapshot, **changes), lambda _message: None)
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Told:
    """A maker's own view of a batch, with everything that it sent in order."""

    loaded: object
    messages: list = field(default_factory=list)
    cancelled: set = field(default_factory=set)

    def make(self, *pictures, shape=SHAPE, number=1):
        maker = Maker(self.loaded.pipelines, self.loaded.projection, self.messages.append, self.cancelled.__contains__)
        return maker.make(Batch(number, shape, pictures))

    @property
    def answers(self):
        """The one answer to each picture."""
        found = {}
        for message in self.messages:
            if isinstance(message, Made | Failed | Cancelled):
                assert message.picture not in found, "answered twice"
                found[message.picture] = message
        return found

    def previews(self, picture):
        return [message for message in self.messages if isinstance(message, Preview) and message.picture == picture]


def picture(seed, name=None, **changes):
    return replace(Picture(name or f"p{seed}", f"a picture of {seed}", seed), **changes)

"""A scheduler whose workers are scripted, in virtual time."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from tests.support.clock import run_patiently
from zops.serving.life import Patience
from zops.serving.messages import BEAT_S, Batch, Beat, Cancel, Cancelled, Free, Made, Picture, Ready, Shape
from zops.serving.metrics import Metrics
from zops.serving.scheduler import Scheduler
from zops.spec import Spec

CPU = Ready("cpu", "float32", {"zops": "0", "torch": "0", "diffusers": "0"})
GPU = replace(CPU, device="NVIDIA H200", dtype="bfloat16", preset="fp8")
SHAPE = Shape("generate", 64, 64, 8, 0.0, 32)


def picture(name):
    return Picture(name, "a cat", 1)


def made(name, seconds=None):
    return Made(name, 64, 64, 1, b"", 5, False, 8, 1, seconds or {"text": 0.1, "denoise": 0.7, "decode": 0.2})


class ScriptedLink:
    """The place of a worker and its pipe: says what the test tells it to, and remembers what it was told."""

    def __init__(self, index, pid):
        self.index = index
        self.pid = pid
        self.ending = ""
        self.alive = True
        self.heard = []
        self.beating = False
        self._batch = None

    # --- what a WorkerLink does

    def listen(self, loop, on_message, on_lost):
        self._loop, self._on_message, self._on_lost = loop, on_message, on_lost
        self.began = loop.time()

    def send(self, message):
        self.heard.append(message)
        if isinstance(message, Batch):
            self._batch = message

    def kill(self):
        self.die("its process was ended by SIGKILL")

    def let_go(self):
        self.alive = False

    def close(self, grace_s=0.0):
        self.alive = False

    # --- what a test has it do

    def say(self, *messages):
        for message in messages:
            self._loop.call_soon(self._on_message, message)

    def become_ready(self, facts=CPU):
        self.say(facts)
        self.beating = True
        self._beat()

    def stop(self):
        """Do what SIGSTOP does."""
        self.beating = False

    def die(self, ending="its process was ended by SIGSEGV"):
        if self.alive:
            self.alive, self.ending = False, ending
            self._loop.call_soon(self._on_lost)

    def finish(self, *, fits=None):
        """Make every picture of the present batch."""
        self.say(*[made(each.id) for each in self._batch.pictures], Free(self._batch.id, fits))

    def obey(self):
        """Give up every picture of the present batch."""
        self.say(*[Cancelled(each.id) for each in self._batch.pictures], Free(self._batch.id))

    def _beat(self):
        if self.beating and self.alive:
            self.say(Beat(None, 0, ((10, 100),)))
            self._loop.call_later(BEAT_S, self._beat)

    @property
    def batches(self):
        """The names of the pictures of each batch that it was given, joined."""
        return ["".join(each.id for each in message.pictures) for message in self.heard if isinstance(message, Batch)]

    @property
    def batch(self):
        return self._batch

    @property
    def cancelled(self):
        return [message.picture for message in self.heard if isinstance(message, Cancel)]


@dataclass
class Bench:
    """A scheduler and its scripted workers: `links[-1]` is the last that was started."""

    scheduler: Scheduler
    metrics: Metrics
    links: list[ScriptedLink]
    events: list[Any]

    @property
    def worker(self):
        return self.links[-1]

    @property
    def now(self):
        return asyncio.get_running_loop().time()

    async def ready(self, facts=CPU):
        """Have every worker that was started become ready."""
        for link in self.links:
            if link.alive and not link.beating:
                link.become_ready(facts)
        await settle()

    def ask(self, names, *, client="", **shape):
        """Submit a request with a picture for each letter."""
        return self.scheduler.submit(replace(SHAPE, **shape), tuple(picture(name) for name in names), client)

    def metric(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


async def settle():
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(scenario, *, workers=1, max_batch=None, patience=None, **serve):
    """Run a scenario with a bench whose workers are started."""

    async def whole():
        links, events = [], []

        def start(index):
            links.append(ScriptedLink(index, 1000 + len(links)))
            return links[-1]

        metrics = Metrics(model="m", revision="r", manifest_digest="d")
        scheduler = Scheduler(
            start,
            Spec.model_validate({"serve": serve}).serve,
            metrics,
            workers=workers,
            max_batch=max_batch,
            report=events.append,
            patience=patience or Patience(),
        )
        scheduler.begin()
        try:
            await scenario(Bench(scheduler, metrics, links, events))
        finally:
            scheduler.close()

    run_patiently(whole())

"""All of the HTTP process but its socket: log, gate, repeated requests and application, around a scripted scheduler."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.studio import ScriptedScheduler, write_tokenizer
from zops.serving.access import AccessLog, set_up_log
from zops.serving.app import Identity, create_app
from zops.serving.gate import Gate
from zops.serving.idempotency import Idempotency
from zops.serving.keys import KeyRing
from zops.serving.metrics import Metrics
from zops.serving.request import Limits
from zops.spec import Spec

MODEL = "zops/synthetic-tiny"


def loggers():
    """Return the state of the loggers that a server sets up; they are the process's own."""
    both = [logging.getLogger(name) for name in ("zops.serving", "uvicorn")]
    return [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in both]


def put_back(before) -> None:
    """Give the loggers the state that they had."""
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


async def until(condition) -> None:
    """Let the event loop go on until something is so."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.001)


@dataclass
class Front:
    """An application as `zops serve` puts it together, and what it is made of."""

    snapshot: Path
    keys: KeyRing | None = None
    log: object = None
    scheduler: ScriptedScheduler = field(default_factory=ScriptedScheduler)
    metrics: Metrics = field(default_factory=lambda: Metrics(model="m/m", revision="r", manifest_digest="d"))

    def __post_init__(self):
        write_tokenizer(self.snapshot)
        limits = Limits.of(Spec.model_validate({"model": MODEL, "gpus": "none"}))
        identity = Identity(MODEL, "r", "d", self.snapshot)
        self.inner = create_app(self.scheduler, limits, identity, self.metrics, keyed=self.keys is not None)
        self.idempotency = Idempotency(self.inner, self.metrics, limits)
        gate = Gate(self.idempotency, self.keys, self.metrics)
        self.app = AccessLog(gate, set_up_log(as_json=True, stream=self.log))

    def count(self, name: str, **labels: str) -> float:
        """Return the value of a metric, 0 when there is none."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

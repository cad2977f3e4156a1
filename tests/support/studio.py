"""An HTTP process without workers: a scheduler that plays them by a script, and a client in the same event loop."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from zops.catalog.tokenizer import tokenizer_files
from zops.serving.access import AccessLog, set_up_log
from zops.serving.app import Identity, create_app
from zops.serving.errors import ApiError
from zops.serving.making import Making
from zops.serving.messages import Made, Preview, Ready
from zops.serving.metrics import Metrics
from zops.serving.request import Limits

READY = Ready("cpu", "float32", {"zops": "1", "torch": "2", "diffusers": "0"}, template=("<u>", "</u>"))


def made(picture, shape, **changes):
    """Return what a worker would send for a picture: all its bytes are the lowest ones of its seed."""
    fields = {
        "picture": picture.id,
        "width": shape.width,
        "height": shape.height,
        "seed": picture.seed,
        "rgb": bytes([picture.seed % 256]) * (shape.width * shape.height * 3),
        "prompt_tokens": 9,
        "truncated": False,
        "forwards": shape.forwards,
        "batch_size": 1,
        "seconds": {"text": 0.1, "denoise": 0.2, "decode": 0.3},
    }
    return Made(**(fields | changes))


@dataclass
class ScriptedScheduler:
    """The part of a scheduler that the API uses. Pictures are made at once unless `hold` is set."""

    facts: Ready | None = READY
    left: int | None = None
    hold: bool = False
    error: ApiError | None = None
    """Raised by each making, after its previews."""
    refusal: ApiError | None = None
    draining: bool = False
    submitted: list[Making] = field(default_factory=list)

    @property
    def ready(self):
        return self.facts is not None

    def memory_left(self):
        return self.left

    def snapshot(self):
        return {
            "phase": "ready" if self.ready else "starting",
            "reason": "",
            "phases": {"imports": 1.0},
            "device": "cpu",
            "dtype": "float32",
            "versions": {},
            "workers": [],
            "queue": self.queue_facts(),
        }

    def queue_facts(self):
        return {"waiting": 0, "running": 0, "limit": 16, "oldest_s": None, "idle_s": None, "made": 0}

    def submit(self, shape, pictures, client=""):
        if self.refusal:
            raise self.refusal
        now = asyncio.get_running_loop().time()
        making = Making(shape, pictures, client, arrived=now, deadline=now + 60, on_end=lambda _making: None)
        self.submitted.append(making)
        if not self.hold:
            asyncio.get_running_loop().call_soon(self.finish, making)
        return making

    def finish(self, making):
        """Play the worker for one making."""
        making.begin(asyncio.get_running_loop().time())
        for part in making.parts:
            for index in range(part.picture.previews):
                making.show(part, Preview(part.picture.id, index, 16, 16, bytes(16 * 16 * 3)))
        if self.error:
            making.fail(self.error)
            return
        for part in making.parts:
            making.add(part, made(part.picture, making.shape))


def write_tokenizer(snapshot: Path) -> None:
    """Put the tiny model's tokenizer where the HTTP process looks for it."""
    (snapshot / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files().items():
        (snapshot / "tokenizer" / name).write_text(text, encoding="utf-8")


def build_app(snapshot: Path, scheduler, *, log=None, limits: Limits, metrics: Metrics | None = None):
    """Build the application as `zops serve` does, around a scripted scheduler."""
    metrics = metrics or Metrics(model="m/m", revision="r", manifest_digest="d")
    app = create_app(scheduler, limits, Identity(limits.model, "r", "d", snapshot), metrics)
    return AccessLog(app, set_up_log(as_json=True, stream=log))


@asynccontextmanager
async def client_of(app):
    """Yield a client that calls an application in this event loop."""
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://zops.test") as client:
        yield client

"""From a request that passed to its answer: the core that the paths for images, the streams and the jobs share.

The life of a request is `begin`, which refuses what cannot be made now and puts the rest into the queue, and then
`answer`, which waits for the images and builds the body. `produce` is both, for a caller who waits:

    wanted = await studio.read(body, studio.arrival(request_id, base_url))    # or read_edit
    content = await studio.produce(wanted, client)    # bytes of JSON; cancelling it cancels the making

A job that outlives its caller calls `begin` at once (so that a full queue is told to the caller), keeps the `Making`
for its progress and its cancellation, and lets a task of its own wait for `answer`.
"""

import asyncio
import base64
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zops.serving.answers import ImageItem, ImagesAnswer, Usage
from zops.serving.errors import ApiError
from zops.serving.messages import Made
from zops.serving.metrics import Metrics
from zops.serving.receipt import Receipt, encode
from zops.serving.request import Arrival, ImageRequest, Limits, parse, parse_edit
from zops.serving.results import Results
from zops.serving.tokens import TokenCounter

if TYPE_CHECKING:
    from zops.serving.making import Making
    from zops.serving.scheduler import Scheduler

_LONG_BODY_BYTES = 4096
"""Above it a body is read in a thread: JSON and tokens of a megabyte take tens of milliseconds."""
PATCH_PIXELS = 16 * 16
"""Pixels of an image that are one token of the transformer."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What is served, by name and by content."""

    model: str
    revision: str
    manifest_digest: str
    snapshot: Path

    @property
    def snapshot_writable(self) -> bool:
        """Whether the snapshot's file system is mounted so that an instance could write to it."""
        return not os.statvfs(self.snapshot).f_flag & os.ST_RDONLY


class Studio:
    """Reads requests, has them made, and builds their answers."""

    def __init__(self, scheduler: "Scheduler", limits: Limits, identity: Identity, metrics: Metrics) -> None:
        self.limits = limits
        self.results = Results(limits.results_bytes, limits.results_keep_s)
        self._scheduler = scheduler
        self._identity = identity
        self._metrics = metrics
        self._tokens = TokenCounter(identity.snapshot)
        # One at a time: a decoded upload may have 150 MB.
        self._decoder = ThreadPoolExecutor(1, "decoder")
        self._decoder.submit(_import_encoders)

    def arrival(self, request_id: str, base_url: str) -> Arrival:
        """Note the arrival of a request, now."""
        facts = self._scheduler.facts
        base_url = (self.limits.public_url or base_url).rstrip("/")
        if facts is None:
            return Arrival(request_id, base_url)
        return Arrival(request_id, base_url, lambda prompt: self._tokens.count(prompt, facts.template))

    async def read(self, body: bytes, arrival: Arrival) -> ImageRequest:
        """Read and check the body of a generation.

        Raises:
            ApiError: naming what is wrong with it.
        """
        if len(body) <= _LONG_BODY_BYTES:
            return parse(body, self.limits, arrival)
        return await asyncio.to_thread(parse, body, self.limits, arrival)

    async def read_edit(self, texts: Mapping[str, str], image: bytes, arrival: Arrival) -> ImageRequest:
        """Read and check the fields and the image of an edit.

        Raises:
            ApiError: naming what is wrong with them.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, parse_edit, texts, image, self.limits, arrival)

    def begin(self, wanted: ImageRequest, client: str) -> "Making":
        """Put a request into the queue.

        Raises:
            ApiError: when it does not fit into memory, or the server is not ready, draining or full.
        """
        self._check_memory(wanted)
        return self._scheduler.submit(wanted.shape, wanted.pictures, client)

    async def answer(self, wanted: ImageRequest, making: "Making", client: str) -> tuple[bytes, dict[str, float]]:
        """Wait for the images; return the body of the answer, and the seconds of each phase.

        Raises:
            ApiError: when the images could not be made.
        """
        outcome = await making.outcome()
        began = time.monotonic()
        items = await asyncio.gather(
            *(self.develop(wanted, made, client, outcome.queue_s, outcome.retries) for made in outcome.made)
        )
        body: ImagesAnswer = {
            "created": int(time.time()),
            "data": items,
            "output_format": wanted.output_format,
            "size": f"{wanted.shape.width}x{wanted.shape.height}",
            "background": "opaque",
            "usage": usage(outcome.made),
        }
        content = await asyncio.to_thread(lambda: json.dumps(body).encode())
        return content, self.count(wanted, outcome.made, outcome.queue_s, time.monotonic() - began)

    async def produce(self, wanted: ImageRequest, client: str) -> bytes:
        """Make the images and return the body of the answer; cancelling this call cancels the making.

        Raises:
            ApiError: as `begin` and `answer`.
        """
        making = self.begin(wanted, client)
        try:
            content, _ = await self.answer(wanted, making, client)
        except asyncio.CancelledError:
            making.cancel()
            raise
        return content

    async def develop(self, wanted: ImageRequest, made: Made, client: str, queue_s: float, retries: int) -> ImageItem:
        """Encode one image with its receipt: the image itself, or where it is kept for the client."""
        content, item = await asyncio.to_thread(self._encode, wanted, made, queue_s, retries)
        if wanted.response_format == "url":
            name = self.results.keep(content, f"image/{wanted.output_format}", client)
            item["url"] = f"{wanted.arrival.base_url}/v1/images/{name}/content"
        return item

    def count(
        self, wanted: ImageRequest, pictures: Sequence[Made], queue_s: float, encode_s: float
    ) -> dict[str, float]:
        """Count a request that was answered; return the seconds of its phases."""
        seconds = {"queue": queue_s}
        for made in pictures:  # pictures of one request may be made at the same time: the slowest is what counts
            for phase, value in made.seconds.items():
                seconds[phase] = max(value, seconds.get(phase, 0.0))
        seconds["encode"] = encode_s
        # The scheduler counts the other phases, those of batches once a batch.
        self._metrics.phase_seconds.labels("encode").observe(encode_s)
        self._metrics.request_seconds.observe(time.monotonic() - wanted.arrival.arrived)
        self._metrics.images.labels(wanted.output_format).inc(len(pictures))
        return {phase: round(value, 4) for phase, value in seconds.items()}

    def _encode(self, wanted: ImageRequest, made: Made, queue_s: float, retries: int) -> tuple[bytes, ImageItem]:
        receipt = Receipt.of(
            made,
            wanted.shape,
            model=self._identity.model,
            revision=self._identity.revision,
            manifest_digest=self._identity.manifest_digest,
            facts=self._scheduler.facts,
        )
        began = time.monotonic()
        content = encode(made.rgb, receipt, wanted.output_format, wanted.quality, mark=self.limits.mark_images)
        seconds = {"queue": queue_s, **made.seconds, "encode": time.monotonic() - began}
        item: ImageItem = {"receipt": receipt.as_json(seconds, made.batch_size) | {"retries": retries}}
        if wanted.response_format == "b64_json":
            item["b64_json"] = base64.b64encode(content).decode()
        return content, item

    def _check_memory(self, wanted: ImageRequest) -> None:
        facts, left = self._scheduler.facts, self._scheduler.memory_left()
        if facts is None or not facts.pixel_bytes or left is None:
            return
        shape = wanted.shape
        if shape.width * shape.height * facts.pixel_bytes > left:
            most = int(left / facts.pixel_bytes)
            message = (
                f"{shape.width}x{shape.height} is {shape.width * shape.height} pixels, "
                f"the device has memory for {most} pixels; ask for a smaller image"
            )
            raise ApiError("too_large_for_memory", message, param="size")


def _import_encoders() -> None:
    """Import now, while workers load, what the first image would wait for: 50 ms."""
    import isal.isal_zlib  # noqa: F401, PLC0415 - off the event loop, and once the socket answers
    import numpy as np  # noqa: F401, PLC0415
    import PIL.Image  # noqa: F401, PLC0415


def usage(pictures: Sequence[Made]) -> Usage:
    """Count the tokens that went into pictures and that they consist of."""
    # A request has one prompt, however many pictures.
    text = pictures[0].prompt_tokens
    image = sum(made.width * made.height // PATCH_PIXELS for made in pictures)
    return {
        "input_tokens": text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": text},
        "output_tokens": image,
        "total_tokens": text + image,
    }

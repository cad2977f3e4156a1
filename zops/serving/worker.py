"""The worker: the one process that owns the pipeline. Importing this module imports no torch.

It runs one job at a time, because a pipeline called by two threads mixes up images. A second thread reads the pipe, so
that a cancellation is seen between two forwards, and the end of the HTTP process at any time.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from zops.errors import ZopsError
from zops.serving.generate import Interrupted, count_tokens, find_fault, make_images, to_rgb
from zops.serving.loader import Loaded, WarmupFailed, load
from zops.serving.messages import (
    MAX_PROMPT_TOKENS,
    Answer,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Job,
    RawImage,
    StartFailed,
    WorkerSettings,
)

ORPHAN_GRACE_S = 1.5


def main(connection: "Connection[Any, Any]", settings: WorkerSettings) -> None:
    """Load, then answer jobs until the other end of the pipe is closed."""
    # A terminal's Ctrl-C and an engine's SIGTERM reach the whole group; the HTTP process decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox = Inbox(connection)
    try:
        loaded = load(settings, connection.send)
    except Exception as error:  # noqa: BLE001 - whatever it is, the HTTP process must be able to tell it
        if not isinstance(error, ZopsError | WarmupFailed):
            traceback.print_exc()
        connection.send(StartFailed(str(error) or type(error).__name__))
        sys.exit(1)
    connection.send(loaded.ready)
    while (job := inbox.next_job()) is not None:
        answer, usable = _answer(loaded, job, inbox)
        if not inbox.closed:
            connection.send(answer)
        if not usable:
            sys.exit(1)


class Inbox:
    """What the HTTP process sends, read by a thread of its own."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.closed = False
        self._connection = connection
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_job(self) -> Job | None:
        """Wait for the next job; None when the HTTP process is gone. What was cancelled before is forgotten."""
        job = self._jobs.get()
        self._cancelled &= {job.id} if job else set()
        return job

    def cancelled(self, job: Job) -> bool:
        """Tell whether nobody waits for the job any more."""
        return self.closed or job.id in self._cancelled

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                # The HTTP process is gone; what still runs is for nobody. End in order if that is quick, end anyway.
                self.closed = True
                self._jobs.put(None)
                time.sleep(ORPHAN_GRACE_S)
                os._exit(0)
            if isinstance(message, Cancel):
                self._cancelled.add(message.id)
            else:
                self._jobs.put(message)


def _answer(loaded: Loaded, job: Job, inbox: Inbox) -> tuple[Answer, bool]:
    """Run one job; return its answer and whether the worker is still fit for the next one."""
    try:
        return _run(loaded.pipeline, job, inbox), True
    except Interrupted:
        return Cancelled(job.id), True
    except Exception as error:  # noqa: BLE001 - the request is answered, the log has the traceback
        traceback.print_exc()
        import torch  # noqa: PLC0415 - imported already

        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            message = f"the device ran out of memory at {job.width}x{job.height}; ask for a smaller image"
            return Failed(job.id, "out_of_memory", message), True
        # After any other error in its midst CUDA often answers every call with the same error: start afresh.
        return Failed(job.id, "generation_failed", f"the worker failed: {type(error).__name__}"), False


def _run(pipeline: Any, job: Job, inbox: Inbox) -> Answer:
    began = time.monotonic()
    tokens = count_tokens(pipeline, job.prompt)
    if tokens > MAX_PROMPT_TOKENS:
        message = f"the prompt has {tokens} tokens with its template, the limit is {MAX_PROMPT_TOKENS}; shorten it"
        return Failed(job.id, "prompt_too_long", message, param="prompt")
    images = []
    # One by one: at 1024x1024 a batch is no faster than its images in a row (0.743 against 0.787 images a second,
    # eager, H200), needs more memory, and this way image i of n is to the bit what its seed gives alone.
    for seed in job.seeds:
        if inbox.cancelled(job):
            return Cancelled(job.id)
        pixels = make_images(
            pipeline,
            [job.prompt],
            [seed],
            width=job.width,
            height=job.height,
            forwards=job.forwards,
            guidance_scale=job.guidance_scale,
            cancelled=lambda: inbox.cancelled(job),
        )[0]
        # A user may ask for a black picture, so only what cannot be a picture at all is thrown away here.
        if find_fault(pixels) == "not a number":
            return Failed(job.id, "image_invalid", f"the image of seed {seed} has values that are no numbers")
        images.append(RawImage(job.width, job.height, seed, to_rgb(pixels)))
    return Done(job.id, tuple(images), tokens, time.monotonic() - began)

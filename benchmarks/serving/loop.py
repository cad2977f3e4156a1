"""The pipeline as one calls it without a server: a process of its own that makes images in a loop when told to."""

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

PROMPT = "a lighthouse at dawn"
SIZE = 64
FORWARDS = 8


class Loop:
    """The process, seen from the benchmark."""

    def __init__(self, snapshot: Path, threads: int) -> None:
        ours, theirs = socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving.loop", str(theirs.fileno()), str(snapshot)],
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                pass_fds=(theirs.fileno(),),
            )
        self._connection: Connection = Connection(ours.detach())
        assert self._connection.recv() == "ready"

    def make(self, count: int, first_seed: int) -> list[float]:
        """Make images one after the other; return the seconds of each."""
        self._connection.send((count, first_seed))
        return self._connection.recv()

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.wait(10)


def main(descriptor: int, snapshot: str) -> None:
    """Load the pipeline in the plain way, then make images as they are asked for."""
    import torch
    from diffusers import ZImagePipeline

    connection: Connection = Connection(descriptor)
    pipeline = ZImagePipeline.from_pretrained(snapshot, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def make(seed: int) -> float:
        began = time.perf_counter()
        pipeline(
            PROMPT,
            width=SIZE,
            height=SIZE,
            num_inference_steps=FORWARDS,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return time.perf_counter() - began

    for seed in range(5):
        make(seed)
    connection.send("ready")
    while True:
        try:
            count, first = connection.recv()
        except EOFError:
            return
        connection.send([make(first + number) for number in range(count)])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

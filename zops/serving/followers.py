"""The other cards of a worker that makes each image on several: a process each, which follows the worker's own.

They belong together for life: a follower dies with its worker, and a worker that lost a follower ends, because the
cards may wait for each other in the midst of a forward. Whoever watches the worker starts another one, with followers
of its own.
"""

import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops.errors import ZopsError
from zops.serving.link import start_process
from zops.serving.memory import Told
from zops.serving.messages import Post, WorkerSettings

if TYPE_CHECKING:
    from zops.serving.accelerate.cards import Together

JOIN_S = 300.0
"""How long a loaded card waits for the others: a cold disk gives 32.8 GB in less."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The follower has its share of the model and comes to the meeting."""


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """The follower cannot load; it ends after this."""

    message: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Used and total bytes of the follower's card."""

    used: int
    total: int


def meet(meeting: str, rank: int, count: int, device: str) -> "Together":
    """Wait for all processes of a meeting, and return the cards as this one sees them."""
    import torch  # noqa: PLC0415 - only workers and followers may pay for it
    from torch import distributed  # noqa: PLC0415 - as above

    from zops.serving.accelerate.cards import Together  # noqa: PLC0415 - as above

    on_gpu = device.startswith("cuda")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=Path(meeting).as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=JOIN_S),
        device_id=torch.device(device) if on_gpu else None,
    )
    return Together(rank, count)


def stay_on_this_host() -> None:
    """Let the processes talk by the loopback interface only; to be called before torch is imported."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def end_worker(rank: int) -> None:
    """End this process at once: its main thread may wait for ever for a card that is gone."""
    print(f"the process of card {rank} ended: the worker ends with it", file=sys.stderr, flush=True)
    os._exit(1)


@dataclass(slots=True)
class _Follower:
    process: Any
    connection: "Connection[Any, Any]"
    loaded: "queue.SimpleQueue[Loaded | NotLoaded]" = field(default_factory=queue.SimpleQueue)
    memory: Memory | None = None


class Followers:
    """The followers of this process, started at once; `lost` is called, in a thread, for one that ends unasked."""

    def __init__(self, settings: WorkerSettings, preset: str, *, lost: Callable[[int], None] = end_worker) -> None:
        self.count = settings.cards
        self._lost = lost
        self._closing = False
        self._joined = False
        self._folder = tempfile.TemporaryDirectory(prefix="zops-cards-")  # private, so nobody else can come
        self._meeting = str(Path(self._folder.name) / "meeting")
        self._all = [self._start(settings, preset, rank) for rank in range(1, settings.cards)]

    @property
    def pids(self) -> tuple[int, ...]:
        """Numbers of their processes."""
        return tuple(follower.process.pid for follower in self._all)

    def join(self, device: str) -> "Together":
        """Wait until all have loaded; return the cards as the first of them.

        Raises:
            ZopsError: `card-failed` when one cannot load.
        """
        for rank, follower in enumerate(self._all, 1):
            told = follower.loaded.get()
            if isinstance(told, NotLoaded):
                raise ZopsError(
                    f"card {rank} of this worker could not load: {told.message}",
                    code="card-failed",
                    hint="see the log above for the cause; serve.parallel: replicas needs one card an image",
                )
        cards = meet(self._meeting, 0, self.count, device)
        self._joined = True
        return cards

    def tell(self, message: Any) -> None:
        """Send a message to all of them."""
        for follower in self._all:
            follower.connection.send(message)

    def memory(self) -> Told:
        """Return used and total bytes of their cards, as they told last."""
        return tuple((told.used, told.total) for follower in self._all if (told := follower.memory))

    def close(self) -> None:
        """End them, and leave what was joined."""
        self._closing = True
        for follower in self._all:
            follower.process.kill()
            follower.process.wait()
        if self._joined:
            _leave()
            self._joined = False
        self._folder.cleanup()  # not before: torch's threads look into the file in it, and wait for one that is gone

    def _start(self, settings: WorkerSettings, preset: str, rank: int) -> _Follower:
        follower = _Follower(*start_process(Post(settings, preset, rank, self._meeting, os.getpid())))
        threading.Thread(target=self._listen, args=(rank, follower), name=f"card-{rank}", daemon=True).start()
        return follower

    def _listen(self, rank: int, follower: _Follower) -> None:
        comes = False  # to the meeting, where this process waits for it as in every call after
        with suppress(EOFError, OSError):
            while True:
                told = follower.connection.recv()
                if isinstance(told, Memory):
                    follower.memory = told
                else:
                    comes = isinstance(told, Loaded)
                    follower.loaded.put(told)
        if comes and not self._closing:
            self._lost(rank)
        follower.loaded.put(NotLoaded("its process ended"))


def _leave() -> None:
    """Leave the others, who are dead: NCCL's orderly end would wait for them."""
    from torch import distributed  # noqa: PLC0415 - imported already

    if distributed.get_backend() == "nccl":
        distributed.distributed_c10d._abort_process_group()  # noqa: SLF001 - torch has no public way
    else:
        distributed.destroy_process_group()

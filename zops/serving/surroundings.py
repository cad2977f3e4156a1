"""What this server sees around itself: its GPUs through NVML, and its snapshot on the disk as both are now.

A container can lose its GPUs while its server lives, and the disk under it can be swapped; only from inside can that be
told. Looking may take for ever (a driver that hangs, a disk that is gone), so it is done in threads that nobody waits
for, and what is asked for is their last answer. It changes nothing in readiness: `zops health` judges it.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from zops.cache.manifest import Manifest, read_manifest, sidecar
from zops.errors import SnapshotDamaged
from zops.host.gpu import NO_DRIVER, Gpu, GpuFacts, read_gpus
from zops.serving.answers import GpusState, GpuState, SnapshotState

Answer = TypeVar("Answer")

INTERVAL_S = 5.0
# NVML waits for the driver while a worker opens its GPU, which takes seconds on a host with eight.
GPU_LIMIT_S = 10.0
DISK_LIMIT_S = 10.0


class Question(Generic[Answer]):
    """Something that is asked again and again in a thread of its own.

    Args:
        name: of the thread.
        ask: the question.
        every_s: seconds between an answer and the next question.
        limit_s: seconds after which a question without an answer is overdue.
    """

    def __init__(self, name: str, ask: Callable[[], Answer], *, every_s: float, limit_s: float) -> None:
        self.answer: Answer | None = None
        """The last one; None before there was one."""
        self.failure = ""
        """Why the last question could not even be asked: a bug, whose traceback was printed."""
        self._ask = ask
        self._every_s = every_s
        self._limit_s = limit_s
        self._asked_at: float | None = None
        self._ended = threading.Event()
        # A daemon: one that hangs must not keep the server from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def begin(self) -> None:
        """Ask for the first time, and from now on."""
        self._thread.start()

    def end(self) -> None:
        """Ask no more; a question that is under way is left alone."""
        self._ended.set()

    @property
    def overdue(self) -> bool:
        """Whether the present question should have been answered by now."""
        asked_at = self._asked_at
        return asked_at is not None and time.monotonic() - asked_at > self._limit_s

    def _run(self) -> None:
        while not self._ended.is_set():
            self._asked_at = time.monotonic()
            try:
                self.answer, self.failure = self._ask(), ""
            except Exception as error:  # noqa: BLE001 - dying of it, the thread would leave its last answer for ever
                if not self.failure:
                    traceback.print_exc()
                self.failure = repr(error)
            self._asked_at = None
            self._ended.wait(self._every_s)


class Surroundings:
    """The server's GPUs and snapshot, looked at every few seconds.

    Args:
        snapshot: directory of what is served.
        gpus: the names of the GPUs that the workers may use (index or UUID); None for all, empty for none.
        read: asks NVML.
        every_s: seconds between two looks.
        limit_s: seconds after which a look that has not ended counts as hanging.
    """

    def __init__(
        self,
        snapshot: Path,
        gpus: tuple[str, ...] | None,
        *,
        read: Callable[[], GpuFacts] = read_gpus,
        every_s: float = INTERVAL_S,
        limit_s: float = GPU_LIMIT_S,
    ) -> None:
        self._limit_s = limit_s
        self._gpus = None if gpus == () else Question("gpus", GpuLook(gpus, read), every_s=every_s, limit_s=limit_s)
        self._snapshot = Question("snapshot", SnapshotLook(snapshot), every_s=every_s, limit_s=DISK_LIMIT_S)

    def begin(self) -> None:
        """Start to look; returns at once."""
        for question in self._questions:
            question.begin()

    def end(self) -> None:
        """Look no more; returns at once, whatever hangs."""
        for question in self._questions:
            question.end()

    def gpus(self) -> GpusState | None:
        """Return what NVML said last; None where no GPU is used, and before the first answer."""
        if self._gpus is None:
            return None
        if self._gpus.overdue:
            return {"error": f"NVML did not answer within {self._limit_s:g} s", "devices": []}
        if self._gpus.failure:
            return {"error": f"NVML could not be asked: {self._gpus.failure}", "devices": []}
        return self._gpus.answer

    def snapshot(self) -> SnapshotState | None:
        """Return what the disk said last; None before the first answer."""
        last = self._snapshot.answer
        if self._snapshot.overdue:
            return _unseen(f"the disk of the snapshot did not answer within {DISK_LIMIT_S:g} s")
        return _unseen(self._snapshot.failure) if self._snapshot.failure else last

    @property
    def _questions(self) -> "tuple[Question[GpusState | None] | Question[SnapshotState], ...]":
        return (self._snapshot,) if self._gpus is None else (self._gpus, self._snapshot)


class GpuLook:
    """Asks NVML for the GPUs that are used here, and remembers which there were.

    Each look begins anew with NVML: what is open already goes on to answer when the way to the GPU was taken away.
    """

    def __init__(self, names: tuple[str, ...] | None, read: Callable[[], GpuFacts]) -> None:
        self._names = names
        self._read = read
        self._known: set[str] = set()
        """UUID of every GPU that was seen here."""

    def __call__(self) -> GpusState | None:
        """Return what NVML says now; None where there is no driver and never was one."""
        facts = self._read()
        if facts.reason == NO_DRIVER and not self._known:
            return None
        used = [gpu for gpu in facts.gpus if self._uses(gpu)]
        gone = self._known - {gpu.uuid for gpu in used}
        self._known |= {gpu.uuid for gpu in used}
        error = ""
        if gone or not used or len(used) < len(self._names or ()) or self._names is None:
            # Of another's GPU that is lost, nothing is to be said here.
            error = facts.reason
        if gone and not error:
            error = f"{', '.join(sorted(gone))} was there before and is missing now"
        return {"error": error, "devices": [_state(gpu) for gpu in used]}

    def _uses(self, gpu: Gpu) -> bool:
        names = self._names
        # Parts of a GPU (MIG) are not told by names of whole ones.
        if names is None or any(name.startswith("MIG-") for name in names):
            return True
        return any(name == str(gpu.index) or gpu.uuid.startswith(name) for name in names)


class SnapshotLook:
    """Looks whether the snapshot on the disk still is what its manifest says, as far as names and sizes tell."""

    def __init__(self, snapshot: Path) -> None:
        self._snapshot = snapshot
        self._manifest: Manifest | None = None
        self._seen: tuple[int, ...] = ()

    def __call__(self) -> SnapshotState:
        """Return digest, whether it could be written to, and what is wrong."""
        try:
            manifest = self._current()
            writable = not os.statvfs(self._snapshot).f_flag & os.ST_RDONLY
        except FileNotFoundError as error:
            return _unseen(f"{error.filename} is gone")
        except OSError as error:
            return _unseen(f"{error.filename} cannot be read: {error.strerror}")
        except SnapshotDamaged as error:
            return _unseen(error.message)
        return {"manifest_digest": manifest.digest, "writable": writable, "error": self._fault(manifest)}

    def _current(self) -> Manifest:
        """Return the manifest of the disk, read anew only where its file is another one than the last time."""
        found = (sidecar(self._snapshot) / "manifest.json").stat()
        seen = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        if self._manifest is None or seen != self._seen:
            self._manifest = read_manifest(self._snapshot)
            self._seen = seen
        if self._manifest is None:
            raise SnapshotDamaged(f"{self._snapshot} has no manifest any more")
        return self._manifest

    def _fault(self, manifest: Manifest) -> str:
        for entry in manifest.files:
            path = self._snapshot / entry.path
            try:
                size = path.stat().st_size
            except OSError as error:
                return f"{path}: {error.strerror}"
            if size != entry.size:
                return f"{path} has {size} bytes, its manifest says {entry.size}"
            if not os.access(path, os.R_OK):
                return f"{path} cannot be read"
        return ""


def _state(gpu: Gpu) -> GpuState:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "memory_used": gpu.memory_used_bytes,
        "memory_total": gpu.memory_total_bytes,
        "temperature": gpu.temperature_c,
        "ecc_uncorrected": gpu.ecc_uncorrected,
    }


def _unseen(error: str) -> SnapshotState:
    return {"manifest_digest": "", "writable": False, "error": error}

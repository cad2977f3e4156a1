"""Make a model of random weights in the real layout: tiny for tests, full to accept a host before the weights arrive.

Every block of every tensor has a generator of its own, keyed by seed, name and position. So the bytes depend neither
on the number of threads nor on their order, and nothing larger than a block is ever held. (They do depend on numpy's
way of making normal numbers, which numpy may change from one feature release to another.)
"""

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from zops.catalog import SYNTHETIC_FULL, SYNTHETIC_TINY
from zops.catalog.configs import Size
from zops.catalog.shards import Dtype, Plan, TextFile, WeightsFile, plan
from zops.catalog.tensors import Tensor
from zops.errors import HostShort, UsageError
from zops.events import Report, Task, silent, task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Elements of a block. At 1 MiB of float32 a thread spends 2 ms on one, long beside the 50 us of handing it out; with
# the threads below, all blocks that are being made, waiting or being written take less than 100 MB.
BLOCK = 2**18
_MAX_THREADS = 16
_WAITING_PER_THREAD = 2

MODEL_IDS: dict[Size, str] = {"tiny": SYNTHETIC_TINY.id, "full": SYNTHETIC_FULL.id}


@dataclass(frozen=True, slots=True, order=True)
class Written:
    """One file that was written: path relative to the model (POSIX), size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A synthetic model as it was written; the hashes were taken of the bytes on their way to the disk."""

    model: str
    revision: str
    files: tuple[Written, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


Seal = Callable[[Path, Synthetic], None]


def revision_of(seed: int) -> str:
    """Return the revision of a synthetic model, which the seed alone decides."""
    return f"seed-{seed}"


def synthesize(
    directory: Path, size: Size, *, seed: int = 0, report: Report = silent, seal: Seal | None = None
) -> Synthetic:
    """Write a synthetic model into a directory that is new or empty, all of it or nothing.

    It is made beside the directory under a hidden name and renamed when it is complete and durable. What a killed run
    left under that name is removed first, so one process at a time may make a directory; `zops.cache.synthetic` holds
    a lock for that.

    Args:
        directory: where the model will be.
        size: tiny (4 MB) or full (32.8 GB).
        seed: decides every weight.
        report: is told of the progress, in bytes.
        seal: called with the complete but still hidden directory, to add what must appear together with it.

    Raises:
        UsageError: when the directory holds something or is a mount point.
        HostShort: when the disk has not enough room or may not be written.
    """
    directory = directory.resolve()
    hidden = directory.parent / f".{directory.name}.part"
    what = plan(size)
    try:
        _prepare(directory, hidden, what)
        model = MODEL_IDS[size]
        with task(report, "synthesize", f"writing random weights of {model}", total=what.size) as counter:
            written = tuple(_write(hidden, what, seed, counter))
            made = Synthetic(model, revision_of(seed), written)
            if seal:
                seal(hidden, made)
            hidden.rename(directory)
            _sync(directory.parent)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        _explain(error, directory)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return made


def _prepare(directory: Path, hidden: Path, what: Plan) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is no directory", code="directory-needed", hint="name a new directory")
    if directory.is_dir() and (any(directory.iterdir()) or directory.is_mount()):
        why = "is a mount point" if directory.is_mount() else "is not empty"
        raise UsageError(
            f"{directory} {why}",
            code="directory-not-empty",
            hint=f"name a new directory, such as {directory / 'model'}",
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    if hidden.exists():
        shutil.rmtree(hidden)
    free = shutil.disk_usage(directory.parent).free
    if free < what.size:
        raise HostShort(
            f"{directory} needs {what.size} bytes, the disk has {free} bytes free",
            code="disk-full",
            hint="free some room, or name a directory on another disk",
            needed_bytes=what.size,
            free_bytes=free,
        )
    hidden.mkdir()


def _explain(error: OSError, directory: Path) -> NoReturn:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise HostShort(
            f"the disk of {directory} became full",
            code="disk-full",
            hint="free some room, or name a directory on another disk",
        ) from error
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
        raise HostShort(
            f"cannot write {directory}: {error.strerror}",
            code="directory-not-writable",
            hint="give this user write access, or name another directory",
        ) from error
    raise error


def _write(root: Path, what: Plan, seed: int, counter: Task) -> Iterator[Written]:
    """Write every file durably and yield what was written."""
    # Not os.cpu_count(): a container may be granted fewer cores than the host has.
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="synthesize") as pool:
        for file in what.files:
            path = root / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            blocks = [file.body] if isinstance(file, TextFile) else _contents(file, seed, pool, threads)
            with path.open("wb") as stream:
                digest = _copy(blocks, stream, counter)
                stream.flush()
                os.fsync(stream.fileno())
            yield Written(file.path, file.size, digest)
    for folder in sorted({(root / file.path).parent for file in what.files} | {root}):
        _sync(folder)


def _copy(blocks: Iterable[bytes], stream: BinaryIO, counter: Task) -> str:
    """Write blocks to a stream and return their SHA-256."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        stream.write(block)
        counter.advance(len(block))
    return digest.hexdigest()


def _contents(file: WeightsFile, seed: int, pool: ThreadPoolExecutor, threads: int) -> Iterator[bytes]:
    """Yield the bytes of a safetensors file in order, made ahead by the threads of the pool."""
    yield file.header
    waiting: deque[Future[bytes]] = deque()
    for placed in file.tensors:
        for start in range(0, placed.tensor.count, BLOCK):
            waiting.append(pool.submit(partial(block_of, placed.tensor, file.dtype, seed, start)))
            if len(waiting) > _WAITING_PER_THREAD * threads:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def block_of(tensor: Tensor, dtype: Dtype, seed: int, start: int) -> bytes:
    """Return the bytes of the block of a tensor that begins at element `start`, a multiple of `BLOCK`."""
    import numpy as np  # noqa: PLC0415 - 100 ms that only this work needs

    count = min(BLOCK, tensor.count - start)
    if tensor.deviation:
        key = int.from_bytes(hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()[:16], "little")
        # The counter's low 64 bits are the block's own, far more than it can use up.
        generator = np.random.Generator(np.random.Philox(key=key, counter=start // BLOCK << 64))
        values = generator.standard_normal(count, dtype=np.float32)
        values *= tensor.deviation
        values += tensor.mean
    else:
        values = np.full(count, tensor.mean, np.float32)
    return to_bfloat16(values).tobytes() if dtype == "BF16" else values.astype("<f4", copy=False).tobytes()


def to_bfloat16(
    values: "NDArray[np.float32]",
) -> "NDArray[np.uint16]":
    """Return finite float32 values rounded to bfloat16 (to nearest, ties to even), as the 16 bits of each."""
    import numpy as np  # noqa: PLC0415 - as above

    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

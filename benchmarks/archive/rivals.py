"""What else one would use for a backup, as one would call it; and what the disk itself can do."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.archive.process import run_shell
from benchmarks.archive.weights import Weights
from benchmarks.measure import sync
from zops.archive.format import CHUNK
from zops.cache.blocks import reserve
from zops.cache.reading import OpenFile, new_buffer

_BUFFERS = 5

# The keys are what is called, the values how; $CACHE is what is saved, $OUT an empty directory for it.
SAVE = {
    "cp -a": 'cp -a --reflink=never "$CACHE" "$OUT/copy"',
    "tar -czf": 'tar -czf "$OUT/x.tar.gz" -C "$CACHE" .',
    "tar | zstd -1 -T0": 'tar -cf - -C "$CACHE" . | zstd -q -1 -T0 -o "$OUT/x.tar.zst"',
    "tar | pigz": 'tar -cf - -C "$CACHE" . | pigz > "$OUT/x.tar.gz"',
    "restic": 'restic -q init -r "$OUT/r" && restic -q backup --no-cache -r "$OUT/r" "$CACHE"',
    "borg lz4": 'borg init -e none "$OUT/b" && borg create -C lz4 "$OUT/b::x" "$CACHE"',
}
LOAD = {
    "cp -a": SAVE["cp -a"],
    "tar -xzf": 'mkdir "$OUT/copy" && tar -xzf "$ARCHIVE" -C "$OUT/copy"',
}
PROGRAMS = {"tar | pigz": "pigz", "restic": "restic", "borg lz4": "borg", "tar | zstd -1 -T0": "zstd"}


def missing() -> list[str]:
    """Return the rivals whose program is not here."""
    return [name for name, program in PROGRAMS.items() if shutil.which(program) is None]


def save(name: str, weights: Weights, out: Path) -> Callable[[], None]:
    """Return what saves a cache by another program, durably: the disk has all of it in the end."""
    return lambda: _run(SAVE[name], CACHE=weights.cache, OUT=out)


def load(name: str, source: Path, out: Path) -> Callable[[], None]:
    """Return what brings a cache back, from a copy of it or an archive, durably."""
    return lambda: _run(LOAD[name], CACHE=source, ARCHIVE=source, OUT=out)


def _run(command: str, **places: Path) -> None:
    home = places["OUT"] / "home"
    environ = {
        "HOME": str(home),
        "RESTIC_PASSWORD": "benchmark",
        "BORG_BASE_DIR": str(home),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    run_shell(command, environ=environ, **places)
    sync()


def copy_direct(files: Sequence[Path], target: Path) -> None:
    """Copy files into one, durably, as fast as this disk can: by O_DIRECT, in huge pages, read beside being written."""
    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    free = [new_buffer(CHUNK) for _ in range(_BUFFERS)]
    flying: deque[tuple[memoryview, Future[int]]] = deque()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    opened = [OpenFile(path) for path in files]
    try:
        reserve(descriptor, sum(file.size + CHUNK for file in opened))
        position = 0
        for file in opened:
            for start in range(0, file.size, CHUNK):
                if not free:
                    buffer, written = flying.popleft()
                    written.result()
                    free.append(buffer)
                buffer = free.pop()
                read = reader.submit(file.from_disk, buffer, start, min(CHUNK, file.size - start))
                flying.append((buffer, writer.submit(_write, descriptor, buffer, read, position)))
                position += CHUNK
        for _, written in flying:
            written.result()
        os.fdatasync(descriptor)
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)
        os.close(descriptor)
        for file in opened:
            file.close()


def _write(descriptor: int, buffer: memoryview, read: Future[int], position: int) -> int:
    # Whole blocks: what is behind the end of a file does not matter here.
    count = -(-read.result() // 4096) * 4096
    return os.pwrite(descriptor, buffer[:count], position)

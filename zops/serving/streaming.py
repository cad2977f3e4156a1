"""Verified safetensors to tensors on the GPU, as fast as the page cache or the disk gives them. Runs in the worker.

Several threads each fill a pinned buffer in huge pages, copy it to the GPU with one asynchronous copy, and let the GPU
cut it into tensors and cast them; meanwhile the next buffer fills. Nothing here needs the model's classes, so the bytes
stream while diffusers is still being imported (see `assemble`). Chunks that are in the page cache are read through it,
the others past it (O_DIRECT), so that a cold start costs no page-cache copy.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from zops.cache.manifest import Manifest, read_marker
from zops.cache.reading import OpenFile
from zops.cache.safetensors import Header, read_header
from zops.errors import SnapshotDamaged
from zops.serving.arrivals import Arrivals, Arrived
from zops.serving.lanes import Lane

CHUNK = 32 << 20
"""Bytes that are read, copied and cut at once: large enough that the few Python calls for each cost nothing."""
MAX_READERS = 12
BUFFERS = 2
"""Buffers of `CHUNK` bytes a reader: one fills while the other is copied; 0.8 GB in all, and as much on each GPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that lies in one chunk: bytes of the chunk, and elements of the flattened tensor."""

    name: str
    begin: int
    end: int
    first: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a file that is read at once, and the pieces of tensors in it."""

    file: int
    start: int
    stop: int
    pieces: tuple[Piece, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What arrived: path of each file -> its tensors by name; how much was read, from where, in what time.

    Nothing else holds the tensors, and `take` keeps none back: what a preset replaces is then freed at once.
    """

    files: dict[str, dict[str, Any]] = field(repr=False)
    bytes_read: int
    bytes_from_disk: int
    seconds: float
    verified_by: str
    """`blake3` or `sha256` when the bytes were compared with the record on their way, else empty."""
    pinned: bool = True
    """Whether the copies went from pinned memory; False: the host refused it, and they waited for each other."""

    def take(self, component: str) -> dict[str, Any]:
        """Give the tensors of a component away, by name."""
        paths = [path for path in self.files if _component(path) == component]
        return {name: tensor for path in paths for name, tensor in self.files.pop(path).items()}


def _component(path: str) -> str:
    return path.partition("/")[0]


def plan(headers: Sequence[Header]) -> list[Chunk]:
    """Cut files into chunks, each file's in order, and take them from all files at once.

    So each file is finished at about the same time, and as many digests as there are files can run side by side.
    """
    chunks = [chunk for index, header in enumerate(headers) for chunk in _cut(index, header)]
    return sorted(chunks, key=lambda chunk: chunk.start / headers[chunk.file].file_size)


def _cut(index: int, header: Header) -> Iterator[Chunk]:
    """Cut one file; a chunk that holds nothing but the header is one too."""
    tensors = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    position = 0
    for start in range(0, header.file_size, CHUNK):
        stop = min(start + CHUNK, header.file_size)
        pieces = []
        while position < len(tensors):
            name, tensor = tensors[position]
            begin, end = header.data_offset + tensor.begin, header.data_offset + tensor.end
            low, high = max(begin, start), min(end, stop)
            # An element cut in two by a chunk's border could not be cast where it arrives: see `_File.finish`.
            if low < high and is_aligned(header, name):
                width = (tensor.end - tensor.begin) // max(1, _count(tensor.shape))
                pieces.append(Piece(name, low - start, high - start, (low - begin) // width))
            if end > stop:
                break
            position += 1
        yield Chunk(index, start, stop, tuple(pieces))


def is_aligned(header: Header, name: str) -> bool:
    """Tell whether a tensor begins on a border of its elements in the file; all files in use are so."""
    tensor = header.tensors[name]
    width = (tensor.end - tensor.begin) // max(1, _count(tensor.shape))
    return width > 0 and (header.data_offset + tensor.begin) % width == 0


def _count(shape: Sequence[int]) -> int:
    count = 1
    for edge in shape:
        count *= edge
    return count


class WeightStream:
    """Streams the tensors of safetensors files to a device; started at once, waited for by `result`.

    Args:
        snapshot: the snapshot's directory.
        paths: files in it, relative.
        device: a torch device, `cuda` or `cpu` (the latter copies without any overlap: for tests); or that of each
            component, which is the first part of its files' paths.
        dtype: what floating-point tensors are cast to, on the device; None leaves them as they are.
        arrived: makes of each whole tensor, given with its file's path and its name, what is kept of it; runs on the
            device, one tensor after another, so that no more of them are there at once than are on their way.
        verify: compare every byte with the BLAKE3 (or else the SHA-256) that is recorded of its file, on the way.
        readers: threads; by default one a core, at most `MAX_READERS`.
    """

    def __init__(
        self, snapshot: Path, paths: Sequence[str], device: str | Mapping[str, str], dtype: Any, *,
        verify: Manifest | None = None, readers: int | None = None, arrived: Arrived | None = None,
    ) -> None:  # fmt: skip
        self._began = time.monotonic()
        self._arrivals = Arrivals(arrived) if arrived else None
        self._files = [
            _File(
                snapshot, path, device if isinstance(device, str) else device[_component(path)], dtype, self._arrivals
            )
            for path in paths
        ]
        self._verified_by = _expect_digests(snapshot, self._files, verify) if verify else ""
        self._chunks = iter(plan([file.header for file in self._files]))
        self._next = threading.Lock()
        self.devices = {_component(file.path): file.device for file in self._files}
        self._failed = threading.Event()
        self._unpinned = threading.Event()
        count = readers or min(MAX_READERS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="zops-weights")
        self._work: list[Future[int]] = [self._pool.submit(self._read) for _ in range(count)]

    def result(self) -> Streamed:
        """Wait until every tensor is on the device.

        Raises:
            SnapshotDamaged: when a file is shorter than its header says, or a digest differs.
            OSError: when a file cannot be read.
        """
        try:
            from_disk = sum(work.result() for work in self._work)
        finally:
            self._failed.set()
            self._pool.shutdown(wait=True)
            if self._arrivals:
                self._arrivals.close()
        if self._arrivals:
            self._arrivals.check()
        for file in self._files:
            file.check_digest()
        files = {file.path: file.finish() for file in self._files}
        total = sum(file.header.file_size for file in self._files)
        seconds = time.monotonic() - self._began
        return Streamed(files, total, from_disk, seconds, self._verified_by, pinned=not self._unpinned.is_set())

    def _take(self) -> Chunk | None:
        with self._next:
            return None if self._failed.is_set() else next(self._chunks, None)

    def _read(self) -> int:
        """Read chunks until there are none; return how many bytes came from the disk."""
        lanes = [Lane(sorted(set(self.devices.values())), CHUNK) for _ in range(BUFFERS)]
        opened: dict[int, OpenFile] = {}
        from_disk = turn = 0
        if not all(lane.pinned for lane in lanes):
            self._unpinned.set()
        try:
            while chunk := self._take():
                file, lane = self._files[chunk.file], lanes[turn % BUFFERS]
                turn += 1
                if chunk.file not in opened:
                    opened[chunk.file] = OpenFile(file.location)
                lane.wait()
                cached = opened[chunk.file].is_cached(chunk.start, chunk.stop)
                _fill(opened[chunk.file], lane.buffer, chunk, cached=cached)
                from_disk += 0 if cached else chunk.stop - chunk.start
                file.hash_in_order(chunk, lane.buffer, self._failed)
                file.scatter(chunk, lane)
            for lane in lanes:
                lane.wait()
        except BaseException:
            self._failed.set()
            raise
        finally:
            for lane in lanes:
                lane.close()
            for stream in opened.values():
                stream.close()
        return from_disk


def _fill(opened: OpenFile, buffer: memoryview, chunk: Chunk, *, cached: bool) -> None:
    wanted = chunk.stop - chunk.start
    read = opened.copy_cached if cached else opened.from_disk
    if read(buffer, chunk.start, wanted) != wanted:
        raise SnapshotDamaged("a file of weights was cut while it was read", code="snapshot-changed")


class _File:
    """One file of weights on its way: its header, its tensors on the device, its running digest."""

    def __init__(self, snapshot: Path, path: str, device: str, dtype: Any, arrivals: Arrivals | None) -> None:
        self.path = path
        self._arrivals = arrivals
        self._missing: dict[str, int] = {}
        self._events: dict[str, list[Any]] = {}
        self._kept: dict[str, Any] = {}
        self.location = snapshot / path
        self.header = read_header(self.location)
        self.expected = ""
        self.hasher: Any = None  # hashlib's or blake3's
        self.device = device
        self._dtype = dtype
        self._tensors: dict[str, Any] = {}
        self._allocating = threading.Lock()
        self._hashed = 0
        self._hash_turn = threading.Condition()

    def scatter(self, chunk: Chunk, lane: Lane) -> None:
        """Copy the pieces in a chunk to their tensors, cast on the device."""
        targets = [(piece, self._target(piece.name)) for piece in chunk.pieces]

        def on_device(source: Any) -> None:
            for piece, flat in targets:
                values = source[piece.begin : piece.end].view(_torch_dtype(self.header.tensors[piece.name].dtype))
                flat[piece.first : piece.first + values.numel()].copy_(values)

        lane.send(self.device, chunk.stop - chunk.start, on_device)
        if self._arrivals and chunk.pieces:
            event = lane.mark()
            for piece in chunk.pieces:
                if (events := self._count(piece, event)) is not None:
                    self._arrivals.put(self, piece.name, events)

    def _count(self, piece: Piece, event: Any) -> list[Any] | None:
        """Note the arrival of a piece; return the events of all pieces with the tensor's last one."""
        with self._allocating:
            tensor = self.header.tensors[piece.name]
            left = self._missing.get(piece.name, tensor.end - tensor.begin) - (piece.end - piece.begin)
            self._missing[piece.name] = left
            events = self._events.setdefault(piece.name, [])
            events.append(event)
            return self._events.pop(piece.name) if left == 0 else None

    def take(self, name: str) -> Any:
        """Give a whole tensor away, in its shape."""
        with self._allocating:
            return self._tensors.pop(name).view(self.header.tensors[name].shape)

    def keep(self, name: str, made: Any) -> None:
        """Keep what was made of a tensor in its place."""
        self._kept[name] = made

    def hash_in_order(self, chunk: Chunk, buffer: memoryview, failed: threading.Event) -> None:
        """Hash a chunk once all before it were; waits for those that other threads have."""
        if self.hasher is None:
            return
        with self._hash_turn:
            while self._hashed != chunk.start and not failed.is_set():
                self._hash_turn.wait(0.1)
        if not failed.is_set():
            self.hasher.update(buffer[: chunk.stop - chunk.start])
            with self._hash_turn:
                self._hashed = chunk.stop
                self._hash_turn.notify_all()

    def check_digest(self) -> None:
        if self.hasher is not None and self.hasher.hexdigest() != self.expected:
            raise SnapshotDamaged(
                f"{self.location} has other bytes than were verified",
                code="snapshot-damaged",
                hint="repair it with: zops cache verify --deep --repair",
            )

    def finish(self) -> dict[str, Any]:
        """Give away the tensors in their shapes, by name, those too whose elements lie across borders."""
        for name, tensor in self.header.tensors.items():
            if tensor.begin < tensor.end and not is_aligned(self.header, name):
                self._target(name).copy_(self._read_alone(name))
                if self._arrivals:
                    self.keep(name, self._arrivals.arrived(self.path, name, self.take(name)))
        whole = {
            name: self._kept[name] if name in self._kept else self._target(name).view(tensor.shape)
            for name, tensor in self.header.tensors.items()
        }
        self._kept.clear()
        self._tensors.clear()
        return whole

    def _read_alone(self, name: str) -> Any:
        import torch  # noqa: PLC0415 - as above

        tensor = self.header.tensors[name]
        with self.location.open("rb") as stream:
            stream.seek(self.header.data_offset + tensor.begin)
            return torch.frombuffer(bytearray(stream.read(tensor.end - tensor.begin)), dtype=_torch_dtype(tensor.dtype))

    def _target(self, name: str) -> Any:
        """Return a tensor on the device, flat, made when it is first asked for."""
        import torch  # noqa: PLC0415 - as above

        with self._allocating:
            if name not in self._tensors:
                tensor = self.header.tensors[name]
                stored = _torch_dtype(tensor.dtype)
                dtype = self._dtype if self._dtype is not None and stored.is_floating_point else stored
                self._tensors[name] = torch.empty(_count(tensor.shape), dtype=dtype, device=self.device)
            return self._tensors[name]


def _torch_dtype(name: str) -> Any:
    import torch  # noqa: PLC0415 - as above

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
        "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    }  # fmt: skip
    if name not in names:
        raise SnapshotDamaged(f"weights of type {name} are not served", code="safetensors-invalid")
    return getattr(torch, names[name])


def _expect_digests(snapshot: Path, files: Sequence[_File], manifest: Manifest) -> str:
    """Prepare each file's digest; BLAKE3 where a deep verification recorded it, three times cheaper than SHA-256."""
    marker = read_marker(snapshot)
    recorded = marker.blake3 if marker and marker.manifest_digest == manifest.digest else {}
    fast = all(file.path in recorded for file in files)
    for file in files:
        if fast:
            from blake3 import blake3  # noqa: PLC0415 - only when asked to verify

            file.hasher, file.expected = blake3(), recorded[file.path]
        else:
            file.hasher, file.expected = sha256(), manifest.sha256[file.path]
    return "blake3" if fast else "sha256"

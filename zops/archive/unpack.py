"""The data of an archive of ours at the speed of the disk: read, decompressed, hashed and handed on by all cores.

Large files go through lanes (zops.cache.lanes): one thread reads and decompresses, the next hashes and writes the same
bytes. A thread beside them walks the tar from header to header and takes the small files on its way.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Protocol

from zops.archive.format import CHUNK, Entry, Index
from zops.archive.stream import TarStream
from zops.archive.tape import Tape
from zops.cache.lanes import Job, run_jobs
from zops.cache.reading import SMALL, new_buffer
from zops.errors import ArchiveDamaged

# How much a lane takes of a file at a time: the last lane ends no later than the others by the time for this.
SLICE_BYTES = 4 * CHUNK
# Where reading takes time, so many parts of a file are asked for ahead.
_AHEAD = 4


class Target(Protocol):
    """Takes the data of one file."""

    def write(self, content: memoryview, buffer: memoryview | None = None) -> None:
        """Take the next bytes, which lie at the beginning of a buffer on a border of pages, if one is given."""

    def done(self, sha256: str) -> None:
        """Be told that every byte was right, as far as the archive tells, and what all of them hash to."""

    def close(self) -> None:
        """Let go of everything; called after `done`, and without it when something failed."""


class Nowhere:
    """Takes data that was only to be verified."""

    def write(self, content: memoryview, buffer: memoryview | None = None) -> None:
        """See `Target`."""

    def done(self, sha256: str) -> None:
        """See `Target`."""

    def close(self) -> None:
        """See `Target`."""


OpenTarget = Callable[[Entry], Target]
OnDamage = Callable[[Entry, ArchiveDamaged], None]


def unpack(
    tape: Tape,
    wanted: Iterable[Entry],
    open_target: OpenTarget,
    advance: Callable[[int], None],
    *,
    index: Index | None = None,
    on_damage: OnDamage | None = None,
) -> None:
    """Read files of an archive, each checked by its SHA-256, and hand their data on.

    Args:
        tape: the archive's tar.
        wanted: the files to read, of its index.
        open_target: returns what takes a file's data; called once for each, from several threads.
        advance: is told of the bytes that were read.
        index: given when also every header and all padding is to be checked.
        on_damage: is told of each damaged file, and the others are read all the same; without it the first one ends
            everything.

    Raises:
        ArchiveDamaged: when a file, a header or padding is not what the index says.
        OSError: when a target cannot be written.
    """

    def refuse(_entry: Entry, error: ArchiveDamaged) -> None:
        raise error

    on_damage = on_damage or refuse
    jobs = [_FileJob(entry, tape, open_target, on_damage) for entry in wanted]
    beside = []
    if index:
        small = {job.entry.member.name: job for job in jobs if job.left <= SMALL}
        jobs = [job for job in jobs if job.left > SMALL]
        beside.append(_Walk(tape, index, small, advance, on_damage).run)
    cores = len(os.sched_getaffinity(0))
    run_jobs(jobs, advance, lanes=min(cores, len(jobs)), slice_bytes=SLICE_BYTES, chunk=CHUNK, beside=beside)


def ignored(_amount: int) -> None:
    """Count what nobody waits for."""


class _FileJob(Job):
    """A file on its way from the archive to its target."""

    def __init__(self, entry: Entry, tape: Tape, open_target: OpenTarget, on_damage: OnDamage) -> None:
        self.entry = entry
        self.left = entry.member.size
        self._given = self._used = 0
        self._tape, self._open_target, self._on_damage = tape, open_target, on_damage
        self._digest = hashlib.sha256()
        self._target: Target | None = None
        self._failed = False

    def next_slice(self, slice_bytes: int) -> tuple[range, bool]:
        """See `Job`."""
        begin, count = self._given, min(slice_bytes, self.left)
        self._given, self.left = begin + count, self.left - count
        return range(begin, self._given), False

    def read(self, buffer: memoryview, part: range) -> memoryview:
        """See `Job`."""
        if self._failed:
            return buffer[:0]
        start, size = self.entry.offset, self.entry.member.size
        self._tape.expect(range(start + part.start, start + min(part.start + _AHEAD * CHUNK, size)))
        try:
            return self._tape.read(buffer, range(start + part.start, start + part.stop))
        except ArchiveDamaged as error:
            self.fail(error)
            return buffer[:0]

    def use(self, buffer: memoryview | None, part: range, content: memoryview | None) -> None:
        """See `Job`."""
        if self._failed or content is None:
            return
        self._target = self._target or self._open_target(self.entry)
        self._digest.update(content)
        self._target.write(content, buffer)
        self._used += len(part)
        if self._used == self.entry.member.size:
            self._finish(self._target)

    def fail(self, error: ArchiveDamaged) -> None:
        """Give the file up; raises unless the others are to be read all the same."""
        self._failed, self.left = True, 0
        name = self.entry.member.name
        if "member" not in error.details:
            error = ArchiveDamaged(f"{name!r} is damaged: {error.message}", code=error.code, member=name)
        self._on_damage(self.entry, error)

    def anew(self) -> "_FileJob":
        """Return the same job from its beginning."""
        return _FileJob(self.entry, self._tape, self._open_target, self._on_damage)

    def _finish(self, target: Target) -> None:
        name = self.entry.member.name
        if self._digest.hexdigest() == self.entry.sha256:
            target.done(self.entry.sha256)
            return
        self.fail(
            ArchiveDamaged(
                f"{name!r} in the archive has another SHA-256 than it was written with",
                hint="take another archive, or fetch with: zops cache pull",
                member=name,
            )
        )

    def close(self) -> None:
        """See `Job`."""
        if self._target:
            self._target.close()


class _Walk:
    """Checks every header and all padding, and reads the small files."""

    def __init__(
        self,
        tape: Tape,
        index: Index,
        small: dict[str, _FileJob],
        advance: Callable[[int], None],
        on_damage: OnDamage,
    ) -> None:
        self._tape, self._index, self._small = tape, index, small
        self._advance, self._on_damage = advance, on_damage

    def run(self) -> None:
        """Walk from the first header to the end of the tar.

        Raises:
            ArchiveDamaged: when anything but the data of large files is not what the index says, unless `on_damage`
                takes it; then the small files that come behind are read one by one.
        """
        stream = TarStream(self._tape.pieces(0))
        entry = self._index.entries[0]
        try:
            for entry in self._index.entries:
                self._pass(stream, entry)
            if (stream.position, stream.structure.hexdigest()) != (self._index.end, self._index.structure_sha256):
                raise ArchiveDamaged("headers or padding of the archive are not what the index says")
            stream.finish()
        except ArchiveDamaged as error:
            self._on_damage(entry, error)
            self._read_apart()
        finally:
            for job in self._small.values():
                job.close()

    def _pass(self, stream: TarStream, entry: Entry) -> None:
        member = entry.member
        if stream.member() != member:
            raise ArchiveDamaged(f"the header of {member.name!r} is not what the index says", member=member.name)
        if member.kind != "file":
            return
        if stream.position != entry.offset:
            raise ArchiveDamaged(f"{member.name!r} is not where the index says", member=member.name)
        if member.size > SMALL:
            stream.pass_over(member, self._tape.pieces)
            return
        # What nobody wants is checked all the same: it costs next to nothing.
        job = self._small.get(member.name)
        advance = self._advance if job else ignored
        job = job or _FileJob(entry, self._tape, lambda _: Nowhere(), self._on_damage)
        part, _ = job.next_slice(member.size)
        if not part:
            job.use(None, part, memoryview(b""))
        for block in stream.data(member):
            job.use(None, range(len(block)), block)
            advance(len(block))
        job.close()
        self._small.pop(member.name, None)

    def _read_apart(self) -> None:
        """Find out which of the small files that are left are damaged."""
        buffer = new_buffer(CHUNK)
        for name, begun in list(self._small.items()):
            begun.close()
            job = self._small[name] = begun.anew()
            part, _ = job.next_slice(job.entry.member.size)
            job.use(buffer, part, job.read(buffer, part))

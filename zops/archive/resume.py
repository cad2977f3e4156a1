"""Going on with an archive whose writing was killed: a journal beside the unfinished file tells how far it is durable.

`.NAME.part.plan` begins with a line that tells what was being written; every further line tells how many pieces are
done, how long the archive is then, and the frames since the line before. It is there only while there is a part, and
only after some seconds of work: what takes less is done again.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zops.archive.format import Frame

INTERVAL_S = 5.0
"""A journal is written so often. Each time the disk has to empty its queue, which takes some hundredths of a second."""
SUFFIX = ".plan"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Leftover:
    """An archive whose writing was killed: its name, id, time, what it was to hold, and what of it is durable."""

    name: str
    id: str
    created: str
    fingerprint: str
    pieces: int
    size: int
    frames: tuple[Frame, ...]


def leftovers(directory: Path) -> Iterator[Leftover]:
    """Yield what killed backups left in a store's directory and can be gone on with; nobody works on it now."""
    for path in sorted(directory.glob(f".*.part{SUFFIX}")):
        part = path.with_suffix("")
        if not part.exists():
            # Somebody was killed between giving the archive its name and removing this.
            path.unlink(missing_ok=True)
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            with part.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                size = os.fstat(stream.fileno()).st_size
            found = _parse(part.name[1 : -len(".part")], path.read_text(encoding="utf-8"))
            if found.size <= size:
                yield found


def _parse(name: str, text: str) -> Leftover:
    header, *lines = text.splitlines(keepends=True)
    body = json.loads(header)
    if body["format"] != _FORMAT:
        raise ValueError(f"a journal of format {body['format']!r}")
    pieces = size = 0
    frames: list[Frame] = []
    for line in lines:
        if not line.endswith("\n"):
            break  # the last line of somebody who was killed while writing it
        pieces, size, more = json.loads(line)
        frames += [Frame(int(packed), int(plain), int(crc)) for packed, plain, crc in more]
    return Leftover(name, body["id"], body["created"], body["fingerprint"], int(pieces), int(size), tuple(frames))


class Journal:
    """Writes down, now and then, how far an archive is durable."""

    def __init__(self, directory: Path, name: str, header: Mapping[str, str], found: Leftover | None) -> None:
        self._path = directory / f".{name}.part{SUFFIX}"
        self._header = {"format": _FORMAT, **header}
        self._begun = found is not None
        self._frames = len(found.frames) if found else 0
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to make what is done durable, and then to note it."""
        return time.monotonic() - self._last >= INTERVAL_S

    def note(self, pieces: int, size: int, frames: Sequence[Frame]) -> None:
        """Note that so many pieces are durable: `size` bytes and, where they are packed, these frames."""
        new = [[frame.compressed, frame.size, frame.crc32] for frame in frames[self._frames :]]
        lines = [] if self._begun else [json.dumps(self._header)]
        lines.append(json.dumps([pieces, size, new]))
        with self._path.open("a" if self._begun else "w", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
        self._begun = True
        self._frames = len(frames)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove it: the archive is whole, or gone."""
        self._path.unlink(missing_ok=True)

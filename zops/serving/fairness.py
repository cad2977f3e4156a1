"""Who is next: pictures that wait, fair between clients, first come first served within one."""

import collections
from collections.abc import Iterator

from zops.serving.making import Making, Part
from zops.serving.messages import Shape


class FairQueue:
    """Pictures that wait for a worker.

    Clients take turns picture by picture, however many each has waiting. The picture whose turn it is always goes
    first; others of its shape may ride along in its batch, ahead of time, and that counts as a turn of their client.
    """

    def __init__(self) -> None:
        self._clients: collections.OrderedDict[str, collections.deque[Part]] = collections.OrderedDict()
        """In the order of their turns; a client without waiting pictures is not in it."""
        self._again: collections.deque[Part] = collections.deque()
        self._size = 0

    def __len__(self) -> int:
        """Count the pictures."""
        return self._size

    def put(self, part: Part) -> None:
        """Add a picture behind the others of its client."""
        self._clients.setdefault(part.making.client, collections.deque()).append(part)
        self._size += 1

    def put_back(self, part: Part) -> None:
        """Add a picture whose worker was lost: it had its turn, so it comes before all others."""
        self._again.append(part)
        self._size += 1

    def head(self) -> Part | None:
        """Return the picture whose turn it is."""
        if self._again:
            return self._again[0]
        return next(iter(self._clients.values()))[0] if self._clients else None

    def count(self, shape: Shape, most: int) -> int:
        """Count, up to `most`, the pictures that may be in one batch of this shape."""
        found = 0
        for _ in self._of(shape):
            found += 1
            if found == most:
                break
        return found

    def take(self, limit: int) -> list[Part]:
        """Remove and return the picture whose turn it is, and up to `limit` in all that may be made with it.

        A picture that was lost with a worker is taken alone: should it be what ends workers, it takes no other with it.
        """
        if self._again:
            self._size -= 1
            return [self._again.popleft()]
        taken: list[Part] = []
        while len(taken) < limit and (part := next(self._of(taken[0].shape if taken else None), None)):
            taken.append(part)
            self._remove(part)
            if part.making.client in self._clients:
                self._clients.move_to_end(part.making.client)
        return taken

    def drop(self, making: Making) -> None:
        """Remove the pictures of a making that ended."""
        for part in making.parts:
            if part in self._again:
                self._again.remove(part)
                self._size -= 1
            elif part.worker is None and part.made is None and part in self._clients.get(making.client, ()):
                self._remove(part)

    def _remove(self, part: Part) -> None:
        waiting = self._clients[part.making.client]
        waiting.remove(part)
        if not waiting:
            del self._clients[part.making.client]
        self._size -= 1

    def _of(self, shape: Shape | None) -> Iterator[Part]:
        """Yield pictures of a shape (None: of any), one of each client in turn."""
        mine = [(part for part in parts if shape in {None, part.shape}) for parts in self._clients.values()]
        while mine:
            for parts in list(mine):
                part = next(parts, None)
                if part is None:
                    mine.remove(parts)
                else:
                    yield part

"""Finished images that are fetched by their URL: kept in memory, within a number of bytes and for a time."""

import collections
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from zops.serving.errors import ApiError

_REMEMBERED = 4096
"""Ids of images that are gone are remembered up to this number, to tell `result_expired` from `not_found`."""


@dataclass(frozen=True, slots=True)
class Result:
    """An encoded image, and whose it is."""

    content: bytes = field(repr=False)
    media_type: str
    client: str
    expires: float
    """As `time.monotonic` counts."""


class Results:
    """The images that were answered as a URL. Lives in the event loop's thread."""

    def __init__(self, max_bytes: int, keep_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._kept: dict[str, Result] = {}  # oldest first, and all are kept equally long
        self._gone: collections.OrderedDict[str, str] = collections.OrderedDict()

    def keep(self, content: bytes, media_type: str, client: str) -> str:
        """Keep an image for its client and return its unguessable id; the oldest ones make room."""
        self._forget_expired()
        while self._kept and self.size_bytes + len(content) > self._max_bytes:
            self._forget(next(iter(self._kept)))
        name = f"img_{secrets.token_urlsafe(24)}"
        self._kept[name] = Result(content, media_type, client, self._clock() + self._keep_s)
        self.size_bytes += len(content)
        return name

    def fetch(self, name: str, client: str) -> Result:
        """Return an image of this client's.

        Raises:
            ApiError: `result_expired` when it made room or its time is over, else `not_found`; another client's images
                are not found either.
        """
        self._forget_expired()
        if self._gone.get(name) == client:
            raise ApiError("result_expired", "the image is no longer kept; make it again by its seed")
        found = self._kept.get(name)
        if found is None or found.client != client:
            raise ApiError("not_found", "there is no such image")
        return found

    def _forget_expired(self) -> None:
        while self._kept and next(iter(self._kept.values())).expires <= self._clock():
            self._forget(next(iter(self._kept)))

    def _forget(self, name: str) -> None:
        result = self._kept.pop(name)
        self.size_bytes -= len(result.content)
        self._gone[name] = result.client
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

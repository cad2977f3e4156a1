"""Who asks: API keys from a file that may change while the server runs."""

import hmac
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from zops.errors import SpecError
from zops.serving.errors import ApiError
from zops.spec.keys import ApiKey, hash_key, read_keys

LOOK_EVERY_S = 1.0
"""A change of the file is seen within this time; looking costs one stat."""
MAX_KEY_CHARS = 256
_LOG = logging.getLogger("zops.serving")


@dataclass(frozen=True, slots=True)
class Client:
    """Who sends a request: the name of a key and what the key may do."""

    name: str
    key: ApiKey


class KeyRing:
    """The keys that are good now.

    A file that becomes broken changes nothing but `fault`: the keys that were good stay so, for a slip of an editor
    must not lock everybody out, nor let anybody in.

    Args:
        path: the file of keys.
        clock: seconds that only ever grow.
        now: the time of day.

    Raises:
        SpecError: when the file is missing or broken already.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self.fault = ""
        """Why the file as it is now cannot be used; empty when it can."""
        self._clock = clock
        self._now = now
        self._seen = _identity(path)
        self._looked = clock()
        self._clients = _clients(path)
        self._names = frozenset(client.name for client in self._clients)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._clients)

    @property
    def names(self) -> frozenset[str]:
        """The names of all keys; the same object for as long as the file is not read again."""
        return self._names

    def identify(self, authorization: Iterable[bytes]) -> Client:
        """Return who sends the `Authorization` headers of a request.

        Raises:
            ApiError: missing_api_key or invalid_api_key; it never repeats what was sent.
        """
        self.refresh()
        headers = list(authorization)
        scheme, _, key = headers[0].decode("latin-1").partition(" ") if headers else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError("missing_api_key", "this server wants an API key, as Authorization: Bearer KEY")
        if len(headers) > 1:
            raise ApiError("invalid_api_key", "there is more than one Authorization header")
        found = self._find(key.strip())
        if found is None:
            raise ApiError("invalid_api_key", "this is none of the server's API keys")
        if found.key.expired(self._now()):
            raise ApiError("invalid_api_key", f"the API key {found.name} has expired; ask for a new one")
        return found

    def _find(self, key: str) -> Client | None:
        """Compare with every key, each in constant time, so that the time taken tells nothing of any of them."""
        wanted, found = hash_key(key[:MAX_KEY_CHARS]), None
        for client in self._clients:
            if hmac.compare_digest(client.key.sha256, wanted):
                found = client
        return found

    def refresh(self) -> None:
        """Read the file again if it changed since it was read, at most once in `LOOK_EVERY_S`."""
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        identity = _identity(self.path)
        if identity == self._seen:
            return
        # Before it is read: when it changes while it is read, the next look sees that.
        self._seen = identity
        try:
            self._clients = _clients(self.path)
        except SpecError as error:
            self.fault = error.message
            _LOG.warning("the file of API keys is broken; those read before stay good", extra=_fields(self.fault))
        else:
            self.fault = ""
            self._names = frozenset(client.name for client in self._clients)
            _LOG.info("the file of API keys was read again", extra={"fields": {"keys": len(self)}})


def _fields(reason: str) -> dict[str, dict[str, str]]:
    return {"fields": {"reason": reason}}


def _clients(path: Path) -> tuple[Client, ...]:
    return tuple(Client(name, key) for name, key in read_keys(path).items())


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes with the file, whether it is replaced (as `zops key` does) or written in place."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def published_address(host: str) -> str:
    """Return the address at which a server that binds `host` is reached: in a container, what its runtime says."""
    return os.environ.get("ZOPS_PUBLISHED") or host

"""How much a client may ask for: token buckets, one pair for each API key that has a limit."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from zops.serving.errors import ApiError
from zops.serving.keys import Client


class Bucket:
    """A token bucket: `per_minute` tokens at most, refilled evenly, `per_minute` of them each minute.

    A client that was silent for a minute may send a whole minute's requests at once; in no time span of t minutes does
    it get more than `per_minute` x (1 + t).
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._tokens = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Return the tokens that are there at a moment, 0 to `per_minute`."""
        # A clock never runs back, but moments may be given out of order.
        passed_s = max(0.0, now - self._at)
        self._tokens = min(float(self.per_minute), self._tokens + passed_s * self.per_minute / 60)
        self._at = max(self._at, now)
        return self._tokens

    def take(self, count: int, now: float) -> float:
        """Take tokens and return 0.0, or take none and return in how many seconds they are there.

        More than the bucket holds are never there: infinity.
        """
        lacking = count - self.level(now)
        # Refilling adds up in floating point; a client that came when it was told to must not come a hair too early.
        if lacking <= 1e-6:
            self._tokens = max(0.0, self._tokens - count)
            return 0.0
        return lacking * 60 / self.per_minute if count <= self.per_minute else math.inf

    def full_in(self, now: float) -> float:
        """Return the seconds until the bucket is full."""
        return (self.per_minute - self.level(now)) * 60 / self.per_minute


@dataclass(slots=True)
class _Account:
    """What is known of one client."""

    requests: Bucket | None
    images: Bucket | None
    waiting: int = 0


class Place:
    """One of a client's places: given back when its request was answered, or later by a job that keeps it."""

    def __init__(self, account: _Account) -> None:
        account.waiting += 1
        self._account: _Account | None = account
        self._kept = False

    def keep(self) -> "Place":
        """Hold it beyond the request; whoever keeps it calls `give_back`."""
        self._kept = True
        return self

    def give_back(self) -> None:
        """Let another request have it; does nothing the second time."""
        if self._account:
            self._account.waiting -= 1
            self._account = None

    def __enter__(self) -> Self:
        """Hold it for a request."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Give it back unless a job keeps it."""
        if not self._kept:
            self.give_back()


@dataclass(slots=True)
class Allowance:
    """What one client may still ask for; a request carries it as `request.state.allowance`.

    Without a file of keys everybody is the client "" and has no limit.
    """

    client: str = ""
    _account: _Account = field(default_factory=lambda: _Account(None, None))
    _max_waiting: int | None = None
    _clock: Callable[[], float] = time.monotonic

    def take_request(self) -> None:
        """Count one request.

        Raises:
            ApiError: rate_limit_exceeded, telling when to come back.
        """
        if self._account.requests:
            self._take(self._account.requests, 1, "requests", "request")

    def take_images(self, count: int) -> None:
        """Count the images of one request.

        Raises:
            ApiError: rate_limit_exceeded, telling when to come back.
        """
        if self._account.images:
            self._take(self._account.images, count, "images", "n")

    def _take(self, bucket: Bucket, count: int, what: str, param: str) -> None:
        wait_s = bucket.take(count, self._clock())
        if not wait_s:
            return
        limit = f"the limit of the API key {self.client} is {bucket.per_minute} {what} a minute"
        if math.isinf(wait_s):
            raise ApiError("too_many_images", f"{count} {what} at once are never possible: {limit}", param=param)
        raise ApiError("rate_limit_exceeded", f"{limit}; come back in {wait_s:.1f} s", retry_after_s=wait_s)

    def take_place(self) -> "Place":
        """Take one of the client's places, for as long as a request or a job of it waits or runs.

        Raises:
            ApiError: queue_full when the client has as many open already as it may.
        """
        if self._max_waiting is not None and self._account.waiting >= self._max_waiting:
            message = f"the API key {self.client} has {self._account.waiting} open requests, its limit"
            raise ApiError("queue_full", message, retry_after_s=1)
        return Place(self._account)

    def headers(self) -> dict[str, str]:
        """Return what the client has left, in the headers that OpenAI's clients know."""
        now = self._clock()
        found: dict[str, str] = {}
        for what, bucket in (("requests", self._account.requests), ("images", self._account.images)):
            if bucket:
                found |= {
                    f"x-ratelimit-limit-{what}": str(bucket.per_minute),
                    f"x-ratelimit-remaining-{what}": str(int(bucket.level(now) + 1e-6)),
                    f"x-ratelimit-reset-{what}": f"{bucket.full_in(now):.3f}s",
                }
        return found


class Rates:
    """The allowances of all clients. Holds no more of them than there are keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def allowance(self, client: Client) -> Allowance:
        """Return what a client may ask for; a limit that was changed in the file begins with a full bucket."""
        account = self._accounts.setdefault(client.name, _Account(None, None))
        account.requests = self._bucket(account.requests, client.key.requests_per_minute)
        account.images = self._bucket(account.images, client.key.images_per_minute)
        return Allowance(client.name, account, client.key.max_waiting, self._clock)

    def _bucket(self, before: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        return before if before and before.per_minute == per_minute else Bucket(per_minute, self._clock())

    def forget_all_but(self, names: frozenset[str]) -> None:
        """Forget the accounts of keys that are gone and have nothing open."""
        gone = [name for name, account in self._accounts.items() if name not in names and not account.waiting]
        for name in gone:
            del self._accounts[name]

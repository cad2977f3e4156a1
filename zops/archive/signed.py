"""Requests to a bucket for which obstore has no call, signed here: all that unfinished multipart uploads need."""

import hashlib
import hmac
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from zops.archive.credentials import Credentials, find_credentials, find_region, parse_xml
from zops.errors import UsageError

TIMEOUT_S = 60.0
"""How long a bucket may be silent, or take none of what is sent."""
RETRIES = 4
BACKOFF_S = 0.5
"""How long to wait before the first repetition; each further one waits twice as long."""
_ANSWER_LIMIT = 8 << 20
_SEND = 256 << 10
_REASON_LIMIT = 64 << 10
_EMPTY = hashlib.sha256(b"").hexdigest()
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
# Credentials that end are asked for anew so long before.
_SPARE = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where a bucket answers, and below which prefix our archives are (empty, or ending with a slash)."""

    name: str
    prefix: str
    region: str
    endpoint: str
    """Empty for AWS itself."""
    virtual: bool
    """Whether the bucket's name stands in the host's name instead of in the path."""

    @classmethod
    def at(cls, location: str, environ: Mapping[str, str] = os.environ) -> "Bucket":
        """Read `s3://bucket/prefix?endpoint=URL&region=NAME&style=virtual|path`; variables fill in what is missing.

        Raises:
            UsageError: when it is written in another way.
        """
        parts = urllib.parse.urlsplit(location)
        asked = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme != "s3" or not parts.netloc:
            raise UsageError(f"{location} names no bucket", hint="write it as s3://bucket/prefix")
        if set(asked) - {"endpoint", "region", "style"} or asked.get("style", "path") not in {"path", "virtual"}:
            raise UsageError(
                f"{location} has an option that is not known",
                hint="there are endpoint=URL, region=NAME and style=path or virtual",
            )
        endpoint = asked.get("endpoint") or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or ""
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise UsageError(f"the endpoint {endpoint} is no URL", hint="write it as https://host[:port]")
        style = environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in {"1", "true", "yes"}
        prefix = parts.path.strip("/")
        return cls(
            name=parts.netloc,
            prefix=f"{prefix}/" if prefix else "",
            region=asked.get("region") or find_region(environ) or "us-east-1",
            endpoint=endpoint.rstrip("/"),
            virtual=asked["style"] == "virtual" if "style" in asked else style,
        )

    @property
    def url(self) -> str:
        """The address of the bucket itself."""
        base = self.endpoint or f"https://s3.{self.region}.amazonaws.com"
        if not self.virtual:
            return f"{base}/{self.name}"
        scheme, _, host = base.partition("://")
        return base if host.startswith(f"{self.name}.") else f"{scheme}://{self.name}.{host}"


class BucketError(Exception):
    """A bucket refused a request, or did not answer it after several attempts; `status` is 0 without an answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Answer(NamedTuple):
    """What a bucket answered: its headers by name in lower case, and the body."""

    headers: Mapping[str, str]
    body: bytes


class _Given(NamedTuple):
    method: str
    bucket: Bucket
    key: str
    query: Mapping[str, str]
    body: bytes | memoryview
    headers: Mapping[str, str]


class Client:
    """Asks one bucket; requests may come from several threads."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._credentials: Credentials | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def end(self) -> None:
        """Repeat no request any more."""
        self._ended.set()

    def ask(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes | memoryview = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request, again when the bucket is busy or the connection fails, and return the answer.

        Raises:
            BucketError: when there is none in the end, or it is a refusal.
            SourceFailed: when there are no credentials.
        """
        given = _Given(method, self.bucket, key, query, body, headers or {})
        attempt = 0
        while True:
            try:
                return _send(given, self._current())
            except BucketError as error:
                if (error.status and error.status not in _BUSY) or attempt == RETRIES or self._ended.is_set():
                    raise
            self._ended.wait(BACKOFF_S * 2**attempt)
            attempt += 1

    def _current(self) -> Credentials:
        with self._lock:
            found = self._credentials
            if found is None or (found.expires and found.expires - _SPARE < datetime.now(UTC)):
                found = self._credentials = find_credentials()
            return found


def _send(given: _Given, credentials: Credentials) -> Answer:
    address = urllib.parse.urlsplit(given.bucket.url)
    path = address.path + (f"/{_quoted(given.key)}" if given.key else "") or "/"
    query = "&".join(f"{_quoted(k, safe='')}={_quoted(v, safe='')}" for k, v in sorted(given.query.items()))
    # Over TLS nobody can change what is sent, so it need not be hashed for the signature too.
    digest = "UNSIGNED-PAYLOAD" if given.body and address.scheme == "https" else _sha256(given.body)
    target = (given.method, address.netloc, path, query)
    headers = {**given.headers, **_signed(target, digest, given.bucket.region, credentials)}
    if given.body:
        headers.setdefault("Content-Type", "application/octet-stream")
        headers["Content-Length"] = str(len(given.body))
    request = urllib.request.Request(  # noqa: S310 - an http(s) address, checked by Bucket.at
        f"{address.scheme}://{address.netloc}{path}?{query}",
        data=_slices(given.body) if given.body else None,  # type: ignore[arg-type] # any iterable of buffers will do
        headers=headers,
        method=given.method,
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - as above
            body = answer.read(_ANSWER_LIMIT)
            return Answer({name.lower(): value for name, value in answer.getheaders()}, body)
    except urllib.error.HTTPError as error:
        raise BucketError(_told(error), error.code) from None
    except (OSError, http.client.HTTPException) as error:
        raise BucketError(str(getattr(error, "reason", "")) or str(error) or type(error).__name__) from None


def _told(error: urllib.error.HTTPError) -> str:
    """Return the status of a refusal, and what S3 calls its reason (NoSuchUpload, AccessDenied, ...)."""
    reason = ""
    with error, suppress(ValueError, OSError, http.client.HTTPException):
        reason = parse_xml(error.read(_REASON_LIMIT)).findtext("Code", "")
    return f"status {error.code}" + (f" ({reason})" if reason.isalnum() else "")


def _slices(body: bytes | memoryview) -> Iterator[memoryview]:
    """Yield a body in parts, each of which may take as long as the bucket may be silent."""
    view = memoryview(body)
    return (view[start : start + _SEND] for start in range(0, len(view), _SEND))


def _sha256(body: bytes | memoryview) -> str:
    return hashlib.sha256(body).hexdigest() if body else _EMPTY


def _signed(target: tuple[str, str, str, str], digest: str, region: str, credentials: Credentials) -> dict[str, str]:
    """Return the headers of a request, signed as AWS's Signature Version 4 wants it."""
    method, host, path, query = target
    now = time.gmtime()
    moment, day = time.strftime("%Y%m%dT%H%M%SZ", now), time.strftime("%Y%m%d", now)
    scope = f"{day}/{region}/s3/aws4_request"
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": moment}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    names = ";".join(headers)
    canonical = "\n".join([method, path, query, *(f"{k}:{v}" for k, v in headers.items()), "", names, digest])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return headers


def _quoted(text: str, safe: str = "/") -> str:
    return urllib.parse.quote(text, safe=f"{safe}~-._")


__all__ = ["Answer", "Bucket", "BucketError", "Client"]

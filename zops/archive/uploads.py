"""Multipart uploads that nobody will finish: listed and aborted by requests signed here, which obstore has no call for.

A bucket keeps, and bills, the parts of an upload whose program was killed until somebody aborts it.
"""

import fcntl
import hashlib
import hmac
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from zops.archive.credentials import Credentials, find_credentials, find_region, parse_xml
from zops.errors import SourceFailed, UsageError
from zops.host.paths import state_dir

_TIMEOUT_S = 30.0
_PAGE_LIMIT = 8 << 20
_PAGES = 1000
_EMPTY = hashlib.sha256(b"").hexdigest()


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


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    id: str
    began: datetime


def list_uploads(bucket: Bucket) -> list[Upload]:
    """Return the unfinished uploads below the bucket's prefix, not those in directories below it.

    Raises:
        SourceFailed: when the bucket does not answer as it should.
    """
    credentials = find_credentials()
    found: list[Upload] = []
    query = {"uploads": "", "prefix": bucket.prefix, "delimiter": "/"}
    for _ in range(_PAGES):
        try:
            page = parse_xml(_request("GET", bucket, "", query, credentials))
            for each in page.iter("Upload"):
                began = datetime.fromisoformat(each.findtext("Initiated", ""))
                found.append(Upload(each.findtext("Key", ""), each.findtext("UploadId", ""), began))
        except ValueError as error:
            raise _failed(bucket, f"its list of uploads cannot be read: {error}") from None
        if page.findtext("IsTruncated") != "true":
            break
        query |= {"key-marker": page.findtext("NextKeyMarker", "")}
        query |= {"upload-id-marker": page.findtext("NextUploadIdMarker", "")}
    return found


def abort_upload(bucket: Bucket, upload: Upload) -> None:
    """Remove the parts of an unfinished upload; one that is not there is fine.

    Raises:
        SourceFailed: when the bucket refuses.
    """
    _request("DELETE", bucket, upload.key, {"uploadId": upload.id}, find_credentials(), fine=404)


@contextmanager
def claimed(bucket: Bucket, key: str) -> Iterator[None]:
    """Leave word on this host, for the length of the block, that an upload is under way; a lock dies with the process.

    Where the host's state cannot be written nothing is left: then an orphan is known by its age alone.
    """
    text = json.dumps({"url": bucket.url, "key": key})
    path = _claims() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w", encoding="utf-8")
    except OSError:
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(text)
        stream.flush()
        yield
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """Word of an upload that a process of this host began, and whether that process still lives."""

    key: str
    path: Path
    alive: bool


def claims(bucket: Bucket) -> tuple[Claim, ...]:
    """Return the word of every upload into this bucket that processes of this host left."""
    found = []
    for path in sorted(_claims().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError), path.open("r", encoding="utf-8") as stream:
            alive = False
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                alive = True
            body = json.loads(stream.read())
            if body["url"] == bucket.url:
                found.append(Claim(str(body["key"]), path, alive))
    return tuple(found)


def _claims() -> Path:
    return state_dir() / "uploads"


def _request(
    method: str, bucket: Bucket, key: str, query: Mapping[str, str], credentials: Credentials, *, fine: int = 0
) -> bytes:
    path = urllib.parse.urlsplit(bucket.url).path + (f"/{_quoted(key)}" if key else "")
    address = urllib.parse.urlsplit(bucket.url)
    text = "&".join(f"{_quoted(k, safe='')}={_quoted(v, safe='')}" for k, v in sorted(query.items()))
    headers = _signed((method, address.netloc, path or "/", text), bucket.region, credentials)
    request = urllib.request.Request(  # noqa: S310 - an http(s) address, checked by Bucket.at
        f"{address.scheme}://{address.netloc}{path or '/'}?{text}", headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - as above
            return bytes(answer.read(_PAGE_LIMIT))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == fine:
            return b""
        raise _failed(bucket, f"status {error.code}") from None
    except OSError as error:
        raise _failed(bucket, str(getattr(error, "reason", error))) from None


def _signed(target: tuple[str, str, str, str], region: str, credentials: Credentials) -> dict[str, str]:
    """Return the headers of a request without a body, signed as AWS's Signature Version 4 wants it."""
    method, host, path, query = target
    now = datetime.now(UTC)
    moment, scope = now.strftime("%Y%m%dT%H%M%SZ"), f"{now:%Y%m%d}/{region}/s3/aws4_request"
    headers = {"host": host, "x-amz-content-sha256": _EMPTY, "x-amz-date": moment}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    names = ";".join(headers)
    canonical = "\n".join([method, path, query, *(f"{k}:{v}" for k, v in headers.items()), "", names, _EMPTY])
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


def _failed(bucket: Bucket, why: str) -> SourceFailed:
    return SourceFailed(
        f"s3://{bucket.name}/{bucket.prefix} does not tell of unfinished uploads: {why}",
        code="store-failed",
        hint="allow s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
    )


__all__ = ["Bucket", "Claim", "Upload", "abort_upload", "claimed", "claims", "list_uploads"]

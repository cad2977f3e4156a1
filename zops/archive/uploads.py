"""Multipart uploads: begun, gone on with after a kill, completed or aborted, and the word that a host keeps of its own.

A bucket keeps, and bills, the parts of an upload whose program was killed until somebody aborts it. obstore uploads in
parts too, but it can neither name an upload nor list its parts, so it cannot go on with one.
"""

import base64
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from zops.archive.credentials import parse_xml
from zops.archive.signed import Bucket, BucketError, Client
from zops.errors import SourceFailed
from zops.host.paths import state_dir

_PAGES = 1000
_GONE = 404


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    id: str
    began: datetime


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload as the bucket tells: what it calls it (mostly the MD5 of its bytes), and its size."""

    etag: str
    size: int


def list_uploads(bucket: Bucket) -> list[Upload]:
    """Return the unfinished uploads below the bucket's prefix, not those in directories below it.

    Raises:
        SourceFailed: when the bucket does not answer as it should.
    """
    client = Client(bucket)
    found: list[Upload] = []
    query = {"uploads": "", "prefix": bucket.prefix, "delimiter": "/"}
    for _ in range(_PAGES):
        try:
            page = parse_xml(client.ask("GET", "", query).body)
            for each in page.iter("Upload"):
                began = datetime.fromisoformat(each.findtext("Initiated", ""))
                found.append(Upload(each.findtext("Key", ""), each.findtext("UploadId", ""), began))
        except ValueError as error:
            raise _failed(bucket, f"its list of uploads cannot be read: {error}") from None
        except BucketError as error:
            raise _failed(bucket, str(error)) from None
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
    try:
        Client(bucket).ask("DELETE", upload.key, {"uploadId": upload.id})
    except BucketError as error:
        if error.status != _GONE:
            raise _failed(bucket, str(error)) from None


def begin_upload(client: Client, key: str) -> str:
    """Begin an upload and return its id.

    Raises:
        BucketError: when the bucket refuses or does not answer.
    """
    try:
        found = parse_xml(client.ask("POST", key, {"uploads": ""}).body).findtext("UploadId")
    except ValueError:
        found = None
    if not found:
        raise BucketError("it does not name the upload that it began")
    return found


def list_parts(client: Client, key: str, upload: str) -> dict[int, Part]:
    """Return the parts that a bucket has of an upload, by their numbers from 1 on.

    Raises:
        BucketError: when it refuses, does not answer, or does not know the upload (any more).
    """
    found: dict[int, Part] = {}
    query = {"uploadId": upload}
    for _ in range(_PAGES):
        try:
            page = parse_xml(client.ask("GET", key, query).body)
            for each in page.iter("Part"):
                etag = each.findtext("ETag", "").strip('"')
                found[int(each.findtext("PartNumber", ""))] = Part(etag, int(each.findtext("Size", "")))
        except ValueError as error:
            raise BucketError(f"its list of parts cannot be read: {error}") from None
        if page.findtext("IsTruncated") != "true":
            break
        query["part-number-marker"] = page.findtext("NextPartNumberMarker", "")
    return found


def put_part(client: Client, key: str, upload: str, number: int, body: memoryview, md5: bytes) -> str:  # noqa: PLR0917 - what a part is
    """Send one part, which the bucket compares with its MD5, and return what it calls it.

    Raises:
        BucketError: when the bucket refuses or does not answer.
    """
    query = {"partNumber": str(number), "uploadId": upload}
    answer = client.ask("PUT", key, query, body, {"Content-MD5": base64.b64encode(md5).decode()})
    return answer.headers.get("etag", "").strip('"')


def complete_upload(client: Client, key: str, upload: str, etags: Sequence[str]) -> str:
    """Make an object of the parts, which are named in order, and return what the bucket calls it.

    It is called nothing when the answer was lost and the upload is gone: then the object alone can tell.

    Raises:
        BucketError: when the bucket refuses or does not answer.
    """
    parts = "".join(
        f'<Part><PartNumber>{n}</PartNumber><ETag>"{etag}"</ETag></Part>' for n, etag in enumerate(etags, 1)
    )
    body = f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{parts}</CompleteMultipartUpload>'
    try:
        answer = client.ask("POST", key, {"uploadId": upload}, body.encode(), {"Content-Type": "application/xml"})
        page = parse_xml(answer.body)
    except BucketError as error:
        if error.status == _GONE:
            return ""
        raise
    except ValueError:
        return ""
    # S3 begins its answer before it knows how this ends, so that an error comes with status 200.
    if page.tag == "Error":
        raise BucketError(page.findtext("Code", "an error"))
    return page.findtext("ETag", "").strip('"')


@dataclass
class Word:
    """What a host keeps of an upload of its own, while that is under way and after its process was killed.

    Attributes:
        upload: the id that a killed process left; empty when there is none, or it was of another archive.
        orphaned: whether a killed process left word of the same key.
    """

    upload: str = ""
    orphaned: bool = False
    _stream: BinaryIO | None = None
    _body: dict[str, object] = field(default_factory=dict)

    def note(self, upload: str) -> None:
        """Write down the id of the upload, for who goes on with it."""
        if self._stream:
            self._stream.seek(0)
            self._stream.truncate()
            self._stream.write(json.dumps({**self._body, "upload": upload}).encode())
            self._stream.flush()


@contextmanager
def claimed(bucket: Bucket, key: str, plan: Mapping[str, str] | None = None) -> Iterator[Word]:
    """Leave word on this host, for the length of the block, that an upload is under way; a lock dies with the process.

    Where the host's state cannot be written nothing is left: then an orphan is known by its age alone.

    Args:
        bucket: where to.
        key: what.
        plan: what two runs must have in common to send the same bytes; without it nobody can go on with the upload.

    Raises:
        SourceFailed: when another process of this host is at it.
    """
    path = _path_of(bucket, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b")
    except OSError:
        yield Word()
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceFailed(
                f"another zops of this host uploads {key} just now", code="archive-exists", hint="wait for its end"
            ) from None
        left = _read(stream)
        body: dict[str, object] = {"url": bucket.url, "key": key, "plan": dict(plan or {})}
        same = bool(plan) and left.get("plan") == body["plan"]
        word = Word(str(left.get("upload", "")) if same else "", bool(left), stream, body)
        word.note(word.upload)
        yield word
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """Word of an upload that a process of this host began, and whether that process still lives."""

    key: str
    path: Path
    alive: bool
    plan: Mapping[str, str] = field(default_factory=dict)


def claims(bucket: Bucket) -> tuple[Claim, ...]:
    """Return the word of every upload into this bucket that processes of this host left."""
    found = []
    for path in sorted(_claims().glob("*.json")):
        with suppress(OSError, KeyError), path.open("rb") as stream:
            alive = False
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                alive = True
            body = _read(stream)
            plan = body.get("plan")
            if body["url"] == bucket.url:
                found.append(Claim(str(body["key"]), path, alive, plan if isinstance(plan, dict) else {}))
    return tuple(found)


def _read(stream: BinaryIO) -> dict[str, object]:
    """Return what a word says, nothing when its writer was killed at it."""
    stream.seek(0)
    with suppress(ValueError):
        body = json.loads(stream.read())
        if isinstance(body, dict):
            return body
    return {}


def _path_of(bucket: Bucket, key: str) -> Path:
    text = json.dumps({"url": bucket.url, "key": key})
    return _claims() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _claims() -> Path:
    return state_dir() / "uploads"


def _failed(bucket: Bucket, why: str) -> SourceFailed:
    return SourceFailed(
        f"s3://{bucket.name}/{bucket.prefix} does not tell of unfinished uploads: {why}",
        code="store-failed",
        hint="allow s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
    )


__all__ = [
    "Bucket",
    "Claim",
    "Part",
    "Upload",
    "Word",
    "abort_upload",
    "begin_upload",
    "claimed",
    "claims",
    "complete_upload",
    "list_parts",
    "list_uploads",
    "put_part",
]

"""Archives in a bucket that speaks S3, by obstore: streamed up in parts, read in ranges, nothing on disk in between."""

import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import obstore
import obstore.store

from zops.archive.credentials import find_credentials
from zops.archive.names import ArchiveInfo, listed, read_name
from zops.archive.resume import Leftover as Resumable
from zops.archive.signed import Bucket, BucketError, Client
from zops.archive.store import NOTE, NOTE_LIMIT, Leftover, Writer, cut_off, join, not_found
from zops.archive.transfer import READ_AHEAD, Forward, Outgoing, Ranges, Sent
from zops.archive.uploads import (
    Upload,
    Word,
    abort_upload,
    begin_upload,
    claimed,
    claims,
    complete_upload,
    list_parts,
    list_uploads,
    put_part,
)
from zops.errors import SourceFailed, ZopsError

Value = TypeVar("Value")

PART = 16 << 20
"""Bytes of a part of an upload, unless the archive needs larger ones. Four or five of them are in memory at once."""
_PARTS = 9_000
"""S3 takes 10,000 parts of an object; a tenth is spare for archives that turn out larger than was thought."""
LEFTOVER_AGE = timedelta(hours=24)
"""From then on an unfinished upload of another host counts as left behind: no backup takes a day."""
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "300s"}
_RETRY: dict[str, Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=90)}
_ERROR_LIMIT = 300


class S3Store:
    """Archives below `s3://bucket/prefix`; what the location does not tell comes from AWS_* variables and files."""

    def __init__(self, location: str) -> None:
        self._bucket = Bucket.at(location)
        self._prefix = self._bucket.prefix
        address, mark, options = location.partition("?")
        self.location = f"{address.rstrip('/')}{mark}{options}"
        self._unprovided: ZopsError | None = None
        self._client = self._connect(_CLIENT)
        self._whole: Forward | None = None
        self._lock = threading.Lock()

    def list(self) -> "list[ArchiveInfo]":
        """See `Store`."""
        try:
            result = self._call(lambda: obstore.list_with_delimiter(self._client, self._prefix or None))
        except FileNotFoundError as error:
            raise self._failed(error) from None
        entries = ((entry["path"].removeprefix(self._prefix), entry["size"]) for entry in result["objects"])
        return listed(self.location, entries)

    @contextmanager
    def open_writer(self, name: str, *, size: int = 0, plan: Mapping[str, str] | None = None) -> Iterator[Writer]:
        """See `Store`: a multipart upload, completed at the end or aborted, and then compared with what was sent.

        An upload of the same plan that was killed on this host is gone on with: a part that the bucket has is not sent
        again when the bucket calls it by the MD5 of the very bytes that would be sent.
        """
        key = self._prefix + name
        if self.exists(name):
            raise SourceFailed(
                f"{join(self, name)} exists already and is not replaced",
                code="archive-exists",
                hint="run the backup again",
            )
        with claimed(self._bucket, key, plan) as word:
            # Somebody else's leftovers, or a right that is lacking, must not keep a backup from being made.
            with suppress(ZopsError):
                self._clean(key, word)
            client = Client(self._bucket)
            with self._told():
                upload, there = self._begin(client, key, word.upload)
            word.note(upload)
            outgoing = Outgoing(partial(self._put, client, key, upload), max(PART, -(-size // _PARTS)), there)
            try:
                yield outgoing
                parts = outgoing.finish()
                with self._told():
                    etag = complete_upload(client, key, upload, [part.etag for part in parts])
            except BaseException:
                client.end()
                outgoing.abort()
                with suppress(ZopsError):
                    abort_upload(self._bucket, Upload(key, upload, datetime.now(UTC)))
                raise
            try:
                self._compare(name, etag, parts)
            except BaseException:
                with suppress(ZopsError):
                    self.delete(name)
                raise

    def _begin(self, client: Client, key: str, left: str) -> tuple[str, dict[int, tuple[str, int]]]:
        """Return the upload to send parts to, and what it has of them: the one that was left, while there is one."""
        if left:
            try:
                return left, {number: (part.etag, part.size) for number, part in list_parts(client, key, left).items()}
            except BucketError as error:
                if error.status in {0, 403}:
                    raise
        return begin_upload(client, key), {}

    def _put(self, client: Client, key: str, upload: str, number: int, body: memoryview, md5: bytes) -> str:  # noqa: PLR0917 - bound but for the last three
        with self._told():
            return put_part(client, key, upload, number, body, md5)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in our words what failed in the block."""
        try:
            yield
        except BucketError as error:
            raise self._refused(str(error)) if error.status in {401, 403} else self._broken(str(error)) from None

    def resumable(self) -> "Iterator[Resumable]":
        """See `Store`: what killed processes of this host were uploading."""
        for claim in claims(self._bucket):
            name = claim.key.removeprefix(self._prefix)
            plan = claim.plan
            ours = claim.key.startswith(self._prefix) and read_name(name, 0, self.location) is not None
            told = {"id", "created", "fingerprint"} <= plan.keys()
            if ours and not claim.alive and told and not self.exists(name):
                yield Resumable(name, plan["id"], plan["created"], plan["fingerprint"], 0, 0, ())

    def open_reader(self, name: str) -> BinaryIO:
        """See `Store`."""
        raw = Ranges(lambda start, end: self.read_range(name, start, end), self.size(name))
        return cast("BinaryIO", io.BufferedReader(raw, READ_AHEAD))

    def size(self, name: str) -> int:
        """See `Store`."""
        try:
            return int(self._call(lambda: obstore.head(self._client, self._prefix + name))["size"])
        except FileNotFoundError:
            raise not_found(join(self, name)) from None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """See `Store`."""
        if start >= end:
            return b""
        key = self._prefix + name
        try:
            # obstore asks again after errors of the store, and when an answer breaks off.
            data = bytes(obstore.get_range(self._client, key, start=start, end=end))
        except FileNotFoundError:
            raise not_found(join(self, name)) from None
        except obstore.exceptions.BaseError as error:
            if "non-partial" in str(error):
                return self._read_whole(key, start, end)
            raise self._failed(error) from None
        if len(data) != end - start:
            raise cut_off(join(self, name), start + len(data))
        return data

    def delete(self, name: str) -> None:
        """See `Store`."""
        for key in (self._prefix + name, self._prefix + name + NOTE):
            with suppress(FileNotFoundError):
                self._call(partial(obstore.delete, self._client, key))

    def exists(self, name: str) -> bool:
        """See `Store`."""
        try:
            self._call(lambda: obstore.head(self._client, self._prefix + name))
        except FileNotFoundError:
            return False
        return True

    def read_note(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            found = self._call(lambda: obstore.get(self._client, self._prefix + name + NOTE))
            return bytes(self._call(found.bytes)) if found.meta["size"] <= NOTE_LIMIT else None
        except (FileNotFoundError, SourceFailed):
            return None

    def write_note(self, name: str, text: bytes) -> None:
        """See `Store`."""
        key = self._prefix + name + NOTE
        self._call(lambda: obstore.put(self._client, key, text, use_multipart=False))

    def clean(self, *, dry_run: bool = False) -> tuple[Leftover, ...]:
        """See `Store`: uploads of dead processes of this host, and those of others that are a day old.

        Raises:
            SourceFailed: when the bucket does not tell of uploads.
        """
        return self._clean(dry_run=dry_run)

    def _clean(self, key: str = "", word: Word | None = None, *, dry_run: bool = False) -> tuple[Leftover, ...]:
        """Clean for who has left word of a key: of its uploads only the one that is gone on with stays."""
        known = claims(self._bucket)
        dead, alive = ({claim.key for claim in known if claim.alive is state} for state in (False, True))
        if word:
            alive.discard(key)
            dead |= {key} if word.orphaned else set()
        found = []
        for upload in list_uploads(self._bucket):
            name = upload.key.removeprefix(self._prefix)
            ours = upload.key.startswith(self._prefix) and read_name(name, 0, self.location) is not None
            old = datetime.now(UTC) - upload.began > LEFTOVER_AGE
            kept = upload.key in alive or (word is not None and upload.id == word.upload)
            if ours and not kept and (upload.key in dead or old):
                found.append(Leftover(name, 0, upload.began))
                if not dry_run:
                    abort_upload(self._bucket, upload)
        if not dry_run:
            for claim in known:
                if not claim.alive:
                    claim.path.unlink(missing_ok=True)
        return tuple(found)

    def _connect(self, options: dict[str, Any]) -> Any:
        def provide() -> dict[str, Any]:
            try:
                found = find_credentials()
            except ZopsError as error:
                # obstore would make a text of it.
                self._unprovided = error
                raise
            self._unprovided = None
            return {
                "access_key_id": found.access_key,
                "secret_access_key": found.secret_key,
                "token": found.token or None,
                "expires_at": found.expires,
            }

        bucket = self._bucket
        # Plain HTTP only where the operator wrote an endpoint of that kind, for a server on the same machine or net.
        options = {**options, "allow_http": bucket.endpoint.startswith("http://")}
        place = {"endpoint": bucket.url if bucket.virtual else bucket.endpoint} if bucket.endpoint else {}
        return obstore.store.S3Store(
            bucket.name,
            region=bucket.region,
            virtual_hosted_style_request=bucket.virtual,
            client_options=options,  # type: ignore[arg-type] # a TypedDict of just these keys
            retry_config=_RETRY,  # type: ignore[arg-type] # as above
            credential_provider=provide,  # type: ignore[arg-type] # as above
            **place,  # type: ignore[arg-type] # as above
        )

    def _compare(self, name: str, etag: str, parts: Sequence[Sent]) -> None:
        """Compare what the bucket holds with what was sent.

        Where parts are not sealed with a key of the store's own, S3 and MinIO name an object by the MD5 of its parts'
        MD5s; that proves it. What another store calls it says nothing, so the archive is read back.
        """
        joined = hashlib.md5(b"".join(part.md5 for part in parts), usedforsecurity=False).hexdigest()
        found = self._call(lambda: obstore.head(self._client, self._prefix + name))
        if found["size"] != sum(part.size for part in parts):
            raise self._corrupted(name)
        if (etag or (found["e_tag"] or "").strip('"')) == f"{joined}-{len(parts)}":
            return
        start = 0
        for part in parts:
            data = self.read_range(name, start, start + part.size)
            if hashlib.md5(data, usedforsecurity=False).digest() != part.md5:
                raise self._corrupted(name)
            start += part.size

    def _corrupted(self, name: str) -> SourceFailed:
        return SourceFailed(
            f"{join(self, name)} is not what was sent; it was removed",
            code="store-corrupted",
            hint="run the backup again; if it happens again, look at the network and at the store",
        )

    def _read_whole(self, key: str, start: int, end: int) -> bytes:
        """Read a range from a server that sends everything whatever was asked for."""
        with self._lock:
            if self._whole is None or self._whole.key != key or self._whole.position > start:
                # However long all of it takes, as long as it goes on.
                client = self._connect({**_CLIENT, "timeout": "7days"})
                self._whole = Forward(key, self._call(lambda: obstore.get(client, key)))
            try:
                return self._whole.read(start, end)
            except (obstore.exceptions.BaseError, EOFError) as error:
                self._whole = None
                raise self._failed(error) from None

    def _call(self, function: Callable[[], Value]) -> Value:
        """Call obstore and say in our words what failed; what is not found stays a FileNotFoundError."""
        try:
            return function()
        except obstore.exceptions.BaseError as error:
            raise self._failed(error) from None

    def _failed(self, error: BaseException) -> BaseException:
        """Build the error for a request that the store refused or that never reached it; others stay."""
        if not isinstance(error, obstore.exceptions.BaseError | FileNotFoundError | EOFError):
            return error
        if self._unprovided:
            return self._unprovided
        text = re.sub(r"\s+", " ", str(error).partition("\n\nDebug source")[0]).strip()[:_ERROR_LIMIT]
        if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
            return self._refused(text)
        return self._broken(text)

    def _refused(self, text: str) -> SourceFailed:
        return SourceFailed(
            f"{self.location} refused: {text}",
            code="store-refused",
            hint="look at the credentials and at what they may do",
        )

    def _broken(self, text: str) -> SourceFailed:
        return SourceFailed(
            f"{self.location} failed: {text}",
            code="store-failed",
            hint="check the bucket, its region and its endpoint (AWS_REGION, AWS_ENDPOINT_URL), and the network",
        )

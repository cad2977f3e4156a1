"""Archives in a bucket that speaks S3, by obstore: streamed up in parts, read in ranges, nothing on disk in between."""

import io
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeVar, cast

import obstore
import obstore.store

from zops.archive.store import ArchiveInfo, Writer, listed, not_found
from zops.errors import SourceFailed, UsageError

Value = TypeVar("Value")

# S3 takes 10,000 parts of an object, so this allows 160 GB; four of them are in memory at once.
PART = 16 << 20
_CONCURRENCY = 3
_READ_AHEAD = 8 << 20


class S3Store:
    """Archives below `s3://bucket/prefix`; credentials, region and endpoint from the usual AWS_* variables."""

    def __init__(self, location: str) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        if not bucket:
            raise UsageError(f"{location} names no bucket", hint="write it as s3://bucket/prefix")
        self.location = location.rstrip("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        # Plain HTTP only where the operator wrote an endpoint of that kind, for a server on the same machine or net.
        self._client = obstore.store.S3Store(
            bucket, client_options={"allow_http": endpoint.startswith("http://")}, retry_config={"max_retries": 5}
        )

    def list(self) -> "list[ArchiveInfo]":
        """See `Store`."""
        result = self._call(lambda: obstore.list_with_delimiter(self._client, self._prefix or None))
        return listed(self, ((entry["path"].removeprefix(self._prefix), entry["size"]) for entry in result["objects"]))

    @contextmanager
    def open_writer(self, name: str) -> Iterator[Writer]:
        """See `Store`: a multipart upload, completed at the end or aborted."""
        key = self._prefix + name

        def put(items: Iterator[bytes]) -> object:
            return obstore.put(
                self._client, key, items, use_multipart=True, chunk_size=PART, max_concurrency=_CONCURRENCY
            )

        upload = _Upload(put, self.failed)
        try:
            yield upload
        except BaseException:
            upload.abort()
            raise
        upload.finish()

    def open_reader(self, name: str) -> BinaryIO:
        """See `Store`."""
        key = self._prefix + name
        try:
            size = self._call(lambda: obstore.head(self._client, key))["size"]
        except FileNotFoundError:
            raise not_found(f"{self.location}/{name}") from None
        raw = _Ranges(
            lambda start, end: bytes(self._call(lambda: obstore.get_range(self._client, key, start=start, end=end))),
            size,
        )
        return cast("BinaryIO", io.BufferedReader(raw, _READ_AHEAD))

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._call(lambda: obstore.delete(self._client, self._prefix + name))

    def exists(self, name: str) -> bool:
        """See `Store`."""
        try:
            self._call(lambda: obstore.head(self._client, self._prefix + name))
        except FileNotFoundError:
            return False
        return True

    def _call(self, function: Callable[[], Value]) -> Value:
        """Call obstore and say in our words what failed; what is not found stays a FileNotFoundError."""
        try:
            return function()
        except obstore.exceptions.BaseError as error:
            raise self.failed(error) from None

    def failed(self, error: Exception) -> SourceFailed:
        """Build the error for a request that the store refused or that never reached it."""
        return SourceFailed(
            f"{self.location} failed: {str(error).partition(chr(10))[0]}",
            code="store-failed",
            hint="check the bucket, AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )


class _Aborted(Exception):
    pass


class _Upload:
    """Hands what is written here to obstore, which reads it in a thread of its own."""

    def __init__(self, put: Callable[[Iterator[bytes]], object], failed: Callable[[Exception], SourceFailed]) -> None:
        self._queue: queue.Queue[bytes | type[_Aborted] | None] = queue.Queue(maxsize=4)
        self._failure: BaseException | None = None
        self._put_all, self._failed = put, failed
        self._thread = threading.Thread(target=self._run, name="zops-upload", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue bytes for the upload.

        Raises:
            SourceFailed: when the upload failed meanwhile.
        """
        self._put(data)

    def finish(self) -> None:
        """Complete the upload, waiting for the store to confirm it.

        Raises:
            SourceFailed: when it failed.
        """
        self._put(None)
        self._thread.join()
        if self._failure:
            raise self._failure

    def abort(self) -> None:
        """Give the upload up; the parts that were sent are removed from the bucket."""
        if self._thread.is_alive() and self._failure is None:
            self._put(_Aborted, quiet=True)
        self._thread.join()

    def _put(self, item: "bytes | type[_Aborted] | None", *, quiet: bool = False) -> None:
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
        if self._failure and not quiet:
            raise self._failure

    def _items(self) -> Iterator[bytes]:
        while (item := self._queue.get()) is not None:
            if not isinstance(item, bytes):
                raise _Aborted
            yield item

    def _run(self) -> None:
        try:
            self._put_all(self._items())
        except _Aborted:
            pass
        except (obstore.exceptions.BaseError, FileNotFoundError) as error:
            self._failure = self._failed(error)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that writes, which raises it
            self._failure = error


class _Ranges(io.RawIOBase):
    """A file of which every read is a request for a range."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        # Python's own asks for 8 KiB at a time, each of which would be a request.
        parts = []
        while self._position < self._size:
            parts.append(self._fetch(self._position, min(self._position + _READ_AHEAD, self._size)))
            self._position += len(parts[-1])
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if self._position >= end:
            return 0
        data = self._fetch(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

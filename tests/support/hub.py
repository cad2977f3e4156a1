"""A hub on the loopback: enough ModelScope and Hugging Face for the unmodified SDKs, and faults on order.

    with Hub(directory, "owner/name") as hub:
        hub.misbehave("model_index.json", Status(503, retry_after=0), Cut(100))

Each GET of a file takes the next fault of its list; without one it is answered well.
"""

import hashlib
import json
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 16


@dataclass(frozen=True)
class Status:
    """Answer with an error status."""

    code: int
    retry_after: float | str | None = None


@dataclass(frozen=True)
class Cut:
    """Close the connection after so many bytes of the body."""

    after: int


@dataclass(frozen=True)
class Stall:
    """Send so many bytes of the body, then nothing more until the client gives up or the hub closes."""

    after: int


@dataclass(frozen=True)
class Flip:
    """Flip a bit of the byte at this offset."""

    offset: int


@dataclass(frozen=True)
class Short:
    """Serve only the first bytes, as if the file were no longer."""

    size: int


@dataclass(frozen=True)
class Whole:
    """Answer a request for a range with the whole file."""


Fault = Status | Cut | Stall | Flip | Short | Whole


@dataclass(frozen=True)
class Request:
    """One request as it came in. `file` is set for the content of a file."""

    method: str
    path: str
    file: str | None
    range_start: int | None
    range_end: int | None = None
    """Behind the last byte that was asked for; None for all that follow."""


@dataclass(frozen=True)
class File:
    """A file that the hub offers."""

    name: str
    location: Path

    @cached_property
    def content(self) -> bytes:
        return self.location.read_bytes()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def is_large(self) -> bool:
        return self.name.endswith(".safetensors")


class Hub:
    """The server. `commit` is what its branches and tags stand for; `digests` and `ranges` switch abilities off.

    With a `token` it refuses whoever does not show it; `pace_s` is how long it waits before each piece of a body.
    """

    def __init__(
        self,
        root: Path,
        model: str,
        *,
        digests: bool = True,
        ranges: bool = True,
        port: int = 0,
        token: str = "",
        pace_s: float = 0.0,
    ) -> None:
        self.model = model
        self.digests = digests
        self.ranges = ranges
        self.token = token
        self.pace_s = pace_s
        self.requests: list[Request] = []
        self.sent: dict[str, int] = defaultdict(int)
        """Bytes of the bodies that were sent, by file."""
        self.closing = threading.Event()
        self.gate = threading.Event()
        """Cleared by `hold_bodies`, set to let them go on."""
        self.hold_after = 0
        self.gate.set()
        self.holding = threading.Event()
        self.refuse_after: dict[str, int] = {}
        """File -> bytes of it after which every request for it is refused."""
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._lock = threading.Lock()
        places = sorted(p for p in root.rglob("*") if p.is_file() and ".zops" not in p.parts)
        self.files = {p.relative_to(root).as_posix(): File(p.relative_to(root).as_posix(), p) for p in places}
        self.commit = hashlib.sha1(model.encode()).hexdigest()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.closing.set()
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def misbehave(self, name: str, *faults: Fault) -> None:
        """Queue faults for the next GETs of a file."""
        assert name in self.files, name
        self._faults[name].extend(faults)

    def hold_bodies(self, after: int = CHUNK) -> None:
        """Let every longer body stop after so many bytes until `gate` is set; `holding` tells when one has."""
        self.hold_after = after
        self.gate.clear()

    def fetched(self) -> list[str]:
        """Return the file of each GET of a content, in order."""
        return [r.file for r in self.requests if r.file is not None and r.method == "GET"]

    def next_fault(self, name: str) -> Fault | None:
        with self._lock:
            return self._faults[name].popleft() if self._faults[name] else None

    def count(self, name: str, size: int) -> None:
        with self._lock:
            self.sent[name] += size

    def knows(self, revision: str) -> bool:
        return revision in {self.commit, "master", "main", "v1"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_arguments: object) -> None:
        """Say nothing: clients that hang up belong to the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        hub, model = self.hub, self.hub.model
        file = self._file_asked_for(path, query)
        span = self.headers.get("Range", "")
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, end = int(first) if first else None, int(last) + 1 if last else None
        hub.requests.append(Request(self.command, path, file, start, end))
        try:
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send_json({"Code": 401, "Message": f"not with {self.headers.get('Authorization')}"}, 401)
            elif file is not None:
                self._send_file(hub.files[file], start, end)
            elif path == f"/api/v1/models/{model}/revisions":
                branches = [{"Revision": "master", "CommitId": hub.commit}]
                self._send_json({"Code": 200, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}})
            elif path == f"/api/v1/models/{model}/repo/files" and hub.knows(query.get("Revision", "master")):
                self._send_json({"Code": 200, "Data": {"Files": self._modelscope_files()}, "Success": True})
            elif path.startswith(f"/api/models/{model}/revision/") and hub.knows(path.rpartition("/")[2]):
                self._send_json({"id": model, "sha": hub.commit, "siblings": []})
            elif path.startswith(f"/api/models/{model}/tree/") and hub.knows(path.rpartition("/")[2]):
                self._send_json(self._huggingface_files())
            else:
                self._send_json({"Code": 404, "Message": "not found", "error": "not found"}, 404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _file_asked_for(self, path: str, query: dict[str, str]) -> str | None:
        model = self.hub.model
        if path == f"/api/v1/models/{model}/repo":
            name, revision = query.get("FilePath", ""), query.get("Revision", "master")
        elif path.startswith(f"/{model}/resolve/"):
            revision, _, name = path.removeprefix(f"/{model}/resolve/").partition("/")
        else:
            return None
        return name if name in self.hub.files and self.hub.knows(revision) else None

    def _modelscope_files(self) -> list[dict[str, object]]:
        folders = {str(parent) for name in self.hub.files for parent in Path(name).parents} - {"."}
        listed: list[dict[str, object]] = [{"Path": f, "Name": f, "Type": "tree", "Size": 0} for f in sorted(folders)]
        for file in self.hub.files.values():
            entry = {"Path": file.name, "Name": Path(file.name).name, "Type": "blob", "Size": len(file.content)}
            entry |= {"Revision": self.hub.commit, "CommittedDate": 1764000000, "IsLFS": file.is_large}
            listed.append(entry | ({"Sha256": file.sha256} if self.hub.digests else {}))
        return listed

    def _huggingface_files(self) -> list[dict[str, object]]:
        listed: list[dict[str, object]] = [{"type": "directory", "path": "vae", "oid": "0" * 40, "size": 0}]
        for file in self.hub.files.values():
            entry = {"type": "file", "path": file.name, "size": len(file.content), "oid": file.git_sha1}
            large = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
            listed.append(entry | ({"lfs": large} if file.is_large else {}))
        return listed

    def _send_json(self, body: object, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, file: File, start: int | None, end: int | None) -> None:
        fault = self.hub.next_fault(file.name) if self.command == "GET" else None
        if self.hub.sent[file.name] >= self.hub.refuse_after.get(file.name, 1 << 62):
            fault = Status(403)
        if isinstance(fault, Status):
            self._send_error(fault)
            return
        content = file.content
        if isinstance(fault, Short):
            content = content[: fault.size]
        elif isinstance(fault, Flip):
            content = bytearray(content)
            content[fault.offset] ^= 1
        if start is not None and self.hub.ranges and not isinstance(fault, Whole):
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            end = min(end or len(content), len(content))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{file.sha256 if file.is_large else file.git_sha1}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self._send_body(file.name, bytes(content), fault)

    def _send_body(self, name: str, content: bytes, fault: Fault | None) -> None:
        if isinstance(fault, Cut | Stall):
            self.wfile.write(content[: fault.after])
            self.wfile.flush()
            self.hub.count(name, min(fault.after, len(content)))
            if isinstance(fault, Stall):
                self.hub.closing.wait(30)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        for offset in range(0, len(content), CHUNK):
            if self.hub.pace_s:
                self.hub.closing.wait(self.hub.pace_s)
            self.wfile.write(content[offset : offset + CHUNK])
            self.wfile.flush()
            self.hub.count(name, len(content[offset : offset + CHUNK]))
            if self.hub.hold_after <= offset + CHUNK < len(content) and not self.hub.gate.is_set():
                self.hub.holding.set()
                self.hub.gate.wait(30)

    def _send_error(self, fault: Status) -> None:
        body = json.dumps({"Code": fault.code, "Message": "ordered by the test"}).encode()
        self.send_response(fault.code)
        if fault.retry_after is not None:
            self.send_header("Retry-After", str(fault.retry_after))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

"""ModelScope and Hugging Face through their own SDKs; the only module that imports them.

What the SDKs (modelscope-hub 0.5, huggingface_hub 2.4) do and do not promise, and what is made of it here:

* ModelScope gives each file a budget of 3600 s, too little for a 10 GB shard on a slow line: raised.
* Both retry in layers of their own; theirs are cut to a minimum, the patience is in `zops.cache.fetch`.
* huggingface_hub's `hf_hub_download` starts over after a kill; its `http_get`, one layer below, can resume.
* huggingface_hub has a SHA-256 only for LFS files; the others carry git's SHA-1.
* Neither is believed when it reports success: `zops.cache.fetch` hashes what arrived.
* Both talk on stderr (loggers, tqdm): silenced, progress goes through the `advance` callback.
"""

import fnmatch
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from zops.cache.redact import redacted
from zops.cache.room import shortage
from zops.errors import SourceFailed

Advance = Callable[[int], None]
Take = Callable[[bytes], None]
Span = tuple[int, int]
"""Offsets in a file: of the first byte, and of the one behind the last."""

# Set before the SDKs are imported, for they read them once; what the operator set stays.
SDK_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "MODELSCOPE_LOG_LEVEL": "CRITICAL",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(7 * 24 * 3600),
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
    "MODELSCOPE_API_MAX_RETRIES": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Statuses after which asking again is pointless: bad request, no permission, not there, gone, blocked by law.
FINAL_STATUSES = frozenset({400, 401, 403, 404, 410, 451})
RANGE_REFUSED = 416
PARTIAL_CONTENT = 206
# What one read from a connection may bring at most.
BLOCK = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as a source lists it. Both digests are None where the source tells none."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class HubFailure(Exception):
    """One attempt failed. `final` when another would fail too; `retry_after_s` when the hub asked for a pause."""

    def __init__(
        self, text: str, *, final: bool = False, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(text)
        self.text = text
        self.final = final
        self.status = status
        self.retry_after_s = retry_after_s


class RangesIgnored(HubFailure):
    """The hub answered a request for a range with something else: only whole files can be had from it."""

    def __init__(self) -> None:
        super().__init__("the hub gives whole files only", final=True)


class Hub(Protocol):
    """What a hub must be able to do. Every method makes one attempt and raises `HubFailure`."""

    name: str
    branch: str
    """The branch that stands for "newest"."""
    endpoint: str

    def resolve(self, model: str, revision: str) -> str:
        """Return the commit behind a branch or tag; the name itself where the hub tells no commit."""

    def listing(self, model: str, commit: str) -> tuple[Listed, ...]:
        """Return every file of a commit."""

    def fetch_file(self, model: str, commit: str, file: Listed, target: Path, advance: Advance) -> None:
        """Bring one file to `target`, going on where an earlier attempt stopped; `advance` may be given less than 0."""

    def fetch_span(self, model: str, commit: str, file: Listed, span: Span, take: Take) -> None:
        """Give the bytes of a range of a file to `take`, in order; raises `RangesIgnored` before it gives any."""


def open_hub(kind: Literal["modelscope", "huggingface"], endpoint: str | None) -> Hub:
    """Return the hub, or its mirror at `endpoint`."""
    return ModelScope(endpoint) if kind == "modelscope" else HuggingFace(endpoint)


def needed(files: tuple[Listed, ...], patterns: tuple[str, ...]) -> tuple[Listed, ...]:
    """Return the files that are needed at run time, by the catalog's globs (a `*` stays within a path segment)."""

    def matches(path: str, pattern: str) -> bool:
        same_depth = path.count("/") == pattern.count("/")
        return same_depth and all(
            fnmatch.fnmatchcase(a, b) for a, b in zip(path.split("/"), pattern.split("/"), strict=True)
        )

    return tuple(file for file in files if any(matches(file.path, pattern) for pattern in patterns))


class ModelScope:
    """ModelScope, or a mirror that speaks its protocol."""

    name = "modelscope"
    branch = "master"

    def __init__(self, endpoint: str | None) -> None:
        self.endpoint = endpoint or ""

    @cached_property
    def _api(self) -> Any:
        os.environ.update(_unset(SDK_ENVIRONMENT))
        from modelscope_hub import HubApi  # noqa: PLC0415 - the SDK takes 0.2 s that only a pull needs to pay

        _silence("modelscope_hub")
        return HubApi(endpoint=self.endpoint or None)

    def resolve(self, model: str, revision: str) -> str:
        """Return the commit of a branch or tag; where the list of revisions tells none, that of the newest file."""
        if is_commit(revision):
            return revision
        with _translated(self.name):
            known = self._api.list_repo_revisions(model, "model")
            for entry in known:
                if entry.get("Revision") == revision and is_commit(str(entry.get("CommitId", ""))):
                    return str(entry["CommitId"])
            files = self._api.legacy.list_repo_files(repo_id=model, repo_type="model", revision=revision)
            newest: dict[str, Any] = max(files, key=lambda file: int(file.get("CommittedDate") or 0), default={})
            commit = str(newest.get("Revision", ""))
            return commit if is_commit(commit) else revision

    def listing(self, model: str, commit: str) -> tuple[Listed, ...]:
        """Return the files with size and, where the hub tells it, SHA-256."""
        with _translated(self.name):
            files = self._api.list_repo_files(model, "model", revision=commit)
            return tuple(Listed(f.path, int(f.size), f.sha256 or None) for f in files if f.type == "blob")

    def fetch_file(self, model: str, commit: str, file: Listed, target: Path, advance: Advance) -> None:
        """Bring one file; the SDK keeps `<name>.incomplete` beside it and resumes there."""
        root = target.parents[file.path.count("/")]
        with _translated(self.name):
            api = self._api
            from modelscope_hub import ProgressCallback  # noqa: PLC0415 - imported with the API above

            class Callback(ProgressCallback):  # type: ignore[misc] # the SDK is skipped by mypy, so its class is Any
                def update(self, size: int) -> None:
                    advance(size)

            # No expected_sha256: the SDK would hash each file a second time and repeat it in a layer of its own.
            api.downloader.download_file(
                model,
                "model",
                file.path,
                revision=commit,
                cache_dir=root,
                local_dir=root,
                file_size=file.size,
                progress_callbacks=[Callback],
            )

    def fetch_span(self, model: str, commit: str, file: Listed, span: Span, take: Take) -> None:
        """Give the bytes of a range to `take`, over the session and with the headers of the SDK's own downloads."""
        with _translated(self.name):
            api = self._api
            headers = api.downloader._build_download_headers()  # noqa: SLF001 - it finds the hub's nearest storage
            headers |= _range_header(span)
            with api.legacy.download_stream(model, "model", file.path, commit, headers=headers) as response:
                _check_range(response.status_code, response.headers.get("Content-Range"), span, file.size)
                while block := response.raw.read1(BLOCK):
                    take(block)


class HuggingFace:
    """Hugging Face, or a mirror that speaks its protocol."""

    name = "huggingface"
    branch = "main"

    def __init__(self, endpoint: str | None) -> None:
        self.endpoint = (endpoint or "").rstrip("/")

    @cached_property
    def _api(self) -> Any:
        os.environ.update(_unset(SDK_ENVIRONMENT))
        from huggingface_hub import HfApi, constants  # noqa: PLC0415 - the SDK takes 0.2 s that only a pull needs to pay

        # It writes and counts in steps of 10 MB, all of which is lost with a connection that dies within one.
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 20
        _silence("huggingface_hub")
        return HfApi(endpoint=self.endpoint or None)

    def resolve(self, model: str, revision: str) -> str:
        """Return the commit behind a branch or tag."""
        if is_commit(revision):
            return revision
        with _translated(self.name):
            return str(self._api.model_info(model, revision=revision).sha or revision)

    def listing(self, model: str, commit: str) -> tuple[Listed, ...]:
        """Return the files with size and SHA-256 (LFS) or git's SHA-1 (all others)."""
        with _translated(self.name):
            entries = self._api.list_repo_tree(model, recursive=True, revision=commit)
            return tuple(
                Listed(e.path, int(e.size), e.lfs.sha256) if e.lfs else Listed(e.path, int(e.size), None, e.blob_id)
                for e in entries
                if hasattr(e, "blob_id")  # a folder has none
            )

    def fetch_file(self, model: str, commit: str, file: Listed, target: Path, advance: Advance) -> None:
        """Bring one file into `<name>.incomplete` beside it, going on where that ends."""
        with _translated(self.name):
            api = self._api
            from huggingface_hub import hf_hub_url  # noqa: PLC0415 - imported with the API above
            from huggingface_hub.file_download import http_get  # noqa: PLC0415

            partial = target.with_name(f"{target.name}.incomplete")
            if partial.exists() and partial.stat().st_size > file.size:
                partial.unlink()
            with partial.open("ab") as stream:
                have = stream.tell()
                advance(have)
                try:
                    http_get(
                        hf_hub_url(model, file.path, revision=commit, endpoint=self.endpoint or None),
                        stream,
                        resume_size=have,
                        headers=api._build_hf_headers(),  # noqa: SLF001 - the public twin would not know the API's token
                        expected_size=file.size,
                        tqdm_class=_bar(advance),
                    )
                except OSError as error:
                    if _status(error) == RANGE_REFUSED:
                        partial.unlink()
                    raise
            partial.replace(target)

    def fetch_span(self, model: str, commit: str, file: Listed, span: Span, take: Take) -> None:
        """Give the bytes of a range to `take`, over the client that the SDK's own downloads use."""
        with _translated(self.name):
            api = self._api
            from huggingface_hub import constants, hf_hub_url, utils  # noqa: PLC0415 - imported with the API above

            with utils.http_stream_backoff(  # type: ignore[attr-defined] # public, if not in their __all__
                "GET",
                hf_hub_url(model, file.path, revision=commit, endpoint=self.endpoint or None),
                headers=api._build_hf_headers() | _range_header(span),  # noqa: SLF001 - as above
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=0,
                retry_on_exceptions=(),
                retry_on_status_codes=(),
            ) as response:
                utils.hf_raise_for_status(response)  # type: ignore[attr-defined] # as above
                _check_range(response.status_code, response.headers.get("Content-Range"), span, file.size)
                for block in response.iter_raw():
                    take(block)


def _range_header(span: Span) -> dict[str, str]:
    return {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}


def _check_range(status: int, content_range: str | None, span: Span, size: int) -> None:
    """Refuse an answer that is not the range that was asked for."""
    match = _CONTENT_RANGE.fullmatch(content_range or "")
    if status != PARTIAL_CONTENT or match is None or int(match[1]) != span[0]:
        raise RangesIgnored
    if match[3] not in {"*", str(size)}:
        raise HubFailure(f"the hub has {match[3]} bytes of it, and listed {size}")


def _bar(advance: Advance) -> Any:
    """Return a class that takes tqdm's place in `http_get` and counts instead of drawing."""

    class Bar:
        def __init__(self, **_options: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def update(self, count: int) -> None:
            advance(count)

    return Bar


@contextmanager
def _translated(hub: str) -> Iterator[None]:
    """Turn whatever an SDK raises for a failed request into `HubFailure`; a host without room into `HostShort`."""
    try:
        yield
    except OSError as error:
        short = shortage(error)
        if short is not None:
            raise short from error
        raise _failure(hub, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # A proxy's login page, or a mirror that speaks something else, ends here.
        status = _status(error)
        raise (
            _failure(hub, error) if status else HubFailure(f"{hub} answered something unintelligible: {_line(error)}")
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in {"modelscope_hub", "requests", "httpx2", "urllib3"}:
            raise
        raise _failure(hub, error) from error


def _failure(hub: str, error: Exception) -> HubFailure:
    status = _status(error)
    after = _retry_after(error)
    offline = type(error).__name__ == "OfflineModeIsEnabled"
    text = f"{hub}: {f'HTTP {status}, ' if status else ''}{_line(error)}"
    return HubFailure(text, final=status in FINAL_STATUSES or offline, status=status, retry_after_s=after)


def _status(error: Exception) -> int | None:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: Exception) -> float | None:
    told = getattr(error, "retry_after", None)
    if told is None:
        told = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After")
    try:
        return max(0.0, float(told)) if told is not None else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(told)).timestamp() - time.time())
    except ValueError:
        return None  # neither seconds nor a date


def _line(error: Exception) -> str:
    lines = str(getattr(error, "message", "") or error).strip().splitlines()
    return redacted(lines[0])[:300] if lines else type(error).__name__


def is_commit(text: str) -> bool:
    """Tell whether a revision is a commit, which never means anything else later."""
    return len(text) == 40 and not set(text) - set("0123456789abcdef")


def _unset(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in os.environ}


def _silence(logger: str) -> None:
    logging.getLogger(logger).setLevel(logging.CRITICAL + 1)


def refused(model: str, failure: HubFailure) -> SourceFailed:
    """Build the error for a hub that does not give a model's listing."""
    if failure.status == 404:
        return SourceFailed(
            f"the hub has no {model} (or not at this revision): {failure.text}",
            code="source-not-found",
            hint="check model, source.revision and source.endpoint with: zops config show --origin",
        )
    if failure.status in {401, 403}:
        return SourceFailed(
            f"the hub refuses {model}: {failure.text}",
            code="source-refused",
            hint="set MODELSCOPE_API_TOKEN or HF_TOKEN to a token that may read it",
        )
    return SourceFailed(
        f"cannot list {model}: {failure.text}",
        code="source-unreachable",
        hint="check the network and source.endpoint, then run the same command again",
    )

"""The file of API keys: who may use a server, each with the hash of a key and what that key may do.

A key is 32 random bytes, so its SHA-256 is enough: what makes slow hashes needful is that people's passwords can be
guessed, and 2^256 keys cannot. A slow hash would only give whoever sends wrong keys a way to keep the server busy. For
the same reason wrong keys are neither counted nor delayed.
"""

import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zops.errors import SpecError, UsageError, ZopsError
from zops.spec.load import read_yaml

KEY_PREFIX = "zops_"
"""So that people, and programs that look for leaked secrets, know what they see."""
KEY_BYTES = 32
MAX_KEYS = 1000
"""Each request is compared with all of them, in 0.2 ms; and their names are values of a metric's label."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HEADER = """\
# API keys of zops serve, of which this file knows only the SHA-256. Written by `zops key`, which keeps no comments.
# A server reads it again within a second after it has changed.
"""


class ApiKey(BaseModel):
    """What the file says of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime | None = None
    expires: datetime | None = None
    """The first moment at which the key is no longer good; UTC where the file gives no zone."""
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    images_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    max_waiting: int | None = Field(None, ge=1, le=4096)
    """Requests and jobs of this key that may wait or run at the same time."""

    @field_validator("created", "expires")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def expired(self, now: datetime) -> bool:
        """Tell whether the key is no longer good."""
        return self.expires is not None and now >= self.expires


def new_key() -> str:
    """Return a key that nobody has: `zops_` and 43 characters of the URL-safe alphabet."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """Return a key as the file knows it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> dict[str, ApiKey]:
    """Read and check a file of keys.

    Raises:
        SpecError: naming file, key and field, and never a value: somebody may have put a key where its hash belongs.
    """
    if not path.is_file():
        raise _invalid(path, "there is no such file", hint=f"make a first key with: zops key new NAME --file {path}")
    tree, _ = read_yaml(path)
    entries = tree.get("keys") or {}
    if tree.keys() - {"keys"} or not isinstance(entries, dict):
        raise _invalid(path, "it must hold one mapping, keys, from names to keys")
    if len(entries) > MAX_KEYS:
        raise _invalid(path, f"it holds {len(entries)} keys, the limit is {MAX_KEYS}")
    keys: dict[str, ApiKey] = {}
    owners: dict[str, str] = {}
    for name, fields in entries.items():
        keys[check_name(name, path)] = key = _read_key(path, name, fields)
        if key.sha256 in owners:
            raise _invalid(path, f"{owners[key.sha256]} and {name} are the same key")
        owners[key.sha256] = name
    return keys


def check_name(name: object, path: Path) -> str:
    """Return the name of a key if it may be one.

    Raises:
        SpecError: when it may not.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _invalid(
            path, f"{str(name)[:64]!r} is no name of a key", hint="up to 64 letters, digits, dots, dashes, underscores"
        )
    return name


def _read_key(path: Path, name: str, fields: Any) -> ApiKey:
    if not isinstance(fields, dict):
        raise _invalid(path, f"keys.{name} must be a mapping with sha256")
    try:
        return ApiKey.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = str(first["loc"][0])[:64] if first["loc"] else ""
        reason = first["msg"].replace("Input should be", "must be")
        if field == "sha256" and first["type"] != "missing":
            reason = "must be 64 hexadecimal digits, the SHA-256 of a key and not the key"
        raise _invalid(path, f"keys.{name}.{field}: {reason[:1].lower()}{reason[1:]}") from None


def add_key(path: Path, name: str, **limits: Any) -> str:
    """Add a key to a file, which is made when missing, and return the key: nothing else will ever know it.

    Args:
        path: the file.
        name: of the key.
        limits: fields of `ApiKey`; None is no limit.

    Raises:
        UsageError: when there is a key of this name.
        SpecError: when the file is broken, or the name is none.
        ZopsError: when the file cannot be written.
    """
    check_name(name, path)
    keys = read_keys(path) if path.exists() else {}
    if name in keys:
        raise UsageError(
            f"{path} has a key {name} already",
            code="key-exists",
            hint=f"take another name, or remove it first: zops key remove {name} --file {path}",
        )
    key = new_key()
    keys[name] = ApiKey(sha256=hash_key(key), created=datetime.now(UTC).replace(microsecond=0), **limits)
    _write(path, keys)
    return key


def remove_key(path: Path, name: str) -> ApiKey:
    """Take a key out of a file and return it.

    Raises:
        UsageError: when there is no key of this name.
        SpecError: when the file is broken or missing.
        ZopsError: when the file cannot be written.
    """
    keys = read_keys(path)
    if name not in keys:
        raise UsageError(
            f"{path} has no key {name[:64]}",
            code="key-unknown",
            hint=f"see all of them with: zops key list --file {path}",
        )
    removed = keys.pop(name)
    _write(path, keys)
    return removed


def _write(path: Path, keys: Mapping[str, ApiKey]) -> None:
    """Write the file whole or not at all: mode 0600 when it is new, else with the mode and owner that it has."""
    body = {name: key.model_dump(mode="json", exclude_none=True) for name, key in keys.items()}
    text = _HEADER + yaml.safe_dump({"keys": body}, sort_keys=False)
    path, part = path.resolve(), None
    try:
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            if path.exists():
                _keep_access(descriptor, path.stat())
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
        Path(part).replace(path)
        part = None
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise ZopsError(
            f"{path} cannot be written: {error.strerror}",
            code="file-not-written",
            hint="run this as the owner of the file and of its directory",
        ) from error
    finally:
        if part:
            Path(part).unlink(missing_ok=True)


def _keep_access(descriptor: int, before: os.stat_result) -> None:
    """Give the new file the owner and mode of the old one: an instance of another user may be reading it."""
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches what listens on a host."""
    return host in {"localhost", "::1", "[::1]"} or host.startswith("127.")


def _invalid(path: Path, reason: str, *, hint: str = "") -> SpecError:
    return SpecError(f"{path}: {reason}", code="keys-invalid", hint=hint, file=str(path))

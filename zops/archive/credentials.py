"""Credentials for a bucket, from where AWS's tools look for them; they never appear in argv or in messages."""

import configparser
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from zops.errors import SourceFailed

_METADATA = "http://169.254.169.254"
_CONTAINER = "http://169.254.170.2"
_TIMEOUT_S = 10.0
# Off a cloud nobody answers at the address of its metadata, so nobody waits long for it.
_METADATA_TIMEOUT_S = 2.0
_ANSWER_LIMIT = 8 << 20
_DELEGATED = ("credential_process", "sso_session", "sso_start_url", "source_profile")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What requests are signed with; the secrets are left out of its repr."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)
    expires: datetime | None = None


def find_credentials(environ: Mapping[str, str] = os.environ) -> Credentials:
    """Return the first credentials found: variables, web identity, profile files, container, instance.

    Raises:
        SourceFailed: when there are none, or where they should be they cannot be read.
    """
    found = _from_variables(environ) or _from_web_identity(environ) or _from_profile(environ)
    found = found or _from_container(environ) or _from_instance(environ)
    if found is None:
        raise SourceFailed(
            "there are no credentials for the bucket",
            code="store-credentials-missing",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into ~/.aws/credentials",
        )
    return found


def find_region(environ: Mapping[str, str] = os.environ) -> str:
    """Return the region that the variables or the profile name, empty when none does."""
    named = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    return named or _profile(environ).get("region", "")


def parse_xml(body: bytes) -> ET.Element:
    """Parse an answer of a store, which may be hostile, its namespace dropped.

    Raises:
        ValueError: when it is no XML or brings declarations of its own.
    """
    if b"<!" in body:
        raise ValueError("it brings declarations")
    try:
        root = ET.fromstring(body)  # noqa: S314 - without a DTD there are no entities to expand
    except ET.ParseError as error:
        raise ValueError(str(error)) from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _from_variables(environ: Mapping[str, str]) -> Credentials | None:
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if not access or not secret:
        return None
    return Credentials(access, secret, environ.get("AWS_SESSION_TOKEN", ""))


def _from_web_identity(environ: Mapping[str, str]) -> Credentials | None:
    file, role = environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"), environ.get("AWS_ROLE_ARN")
    if not file or not role:
        return None
    what = "the web identity of AWS_WEB_IDENTITY_TOKEN_FILE"
    query = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": environ.get("AWS_ROLE_SESSION_NAME") or "zops",
        "WebIdentityToken": _read(Path(file), what),
    }
    region = find_region(environ)
    endpoint = environ.get("AWS_ENDPOINT_URL_STS") or (
        f"https://sts.{region}.amazonaws.com" if region else "https://sts.amazonaws.com"
    )
    # In the body, because addresses end up in logs.
    body = _ask(endpoint, what, data=urllib.parse.urlencode(query).encode())
    try:
        given = next(parse_xml(body).iter("Credentials"))
        return _from_json({element.tag: element.text or "" for element in given}, what)
    except (ValueError, StopIteration):
        raise _unreadable(what) from None


def _profile(environ: Mapping[str, str]) -> dict[str, str]:
    name = environ.get("AWS_PROFILE", "default")
    directory = Path(environ.get("HOME") or Path.home()) / ".aws"
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(environ.get(variable) or directory / file).expanduser(), encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            # Their messages quote the line, which may hold a secret.
            raise _unreadable(f"the profile file {environ.get(variable) or directory / file}") from None
        if parser.has_section(section):
            found |= parser.items(section)
    return found


def _from_profile(environ: Mapping[str, str]) -> Credentials | None:
    profile = _profile(environ)
    access, secret = profile.get("aws_access_key_id"), profile.get("aws_secret_access_key")
    if access and secret:
        return Credentials(access, secret, profile.get("aws_session_token", ""))
    delegated = [key for key in _DELEGATED if key in profile]
    if delegated or (environ.get("AWS_PROFILE") and not profile):
        name = environ.get("AWS_PROFILE", "default")
        why = f"it uses {delegated[0]}, which zops does not" if delegated else "there is none of that name"
        raise SourceFailed(
            f"the AWS profile {name} gives no credentials: {why}",
            code="store-credentials-missing",
            hint='export them first: eval "$(aws configure export-credentials --format env)"',
        )
    return None


def _from_container(environ: Mapping[str, str]) -> Credentials | None:
    relative = environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    address = f"{_CONTAINER}{relative}" if relative else environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if not address:
        return None
    what = "the container's credentials"
    token = environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
    if file := environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        token = _read(Path(file), what)
    body = _ask(address, what, headers={"Authorization": token} if token else {})
    return _from_json(_parse_json(body, what), what)


def _from_instance(environ: Mapping[str, str]) -> Credentials | None:
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    base = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or environ.get("AWS_METADATA_ENDPOINT") or _METADATA
    base, what = base.rstrip("/"), "the instance's metadata"
    try:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
        answer = _ask(f"{base}/latest/api/token", what, method="PUT", headers=lifetime, timeout_s=_METADATA_TIMEOUT_S)
        token = {"X-aws-ec2-metadata-token": answer.decode("ascii", "replace").strip()}
        path = f"{base}/latest/meta-data/iam/security-credentials/"
        role = _ask(path, what, headers=token).decode("utf-8", "replace").split("\n")[0].strip()
    except SourceFailed:
        return None
    body = _ask(path + urllib.parse.quote(role, safe=""), what, headers=token)
    return _from_json(_parse_json(body, what), what)


def _from_json(body: Mapping[str, Any], what: str) -> Credentials:
    """Read credentials as every one of these services writes them, in one spelling or another."""
    try:
        expires = datetime.fromisoformat(str(body["Expiration"]))
        token = body.get("Token") or body.get("SessionToken") or ""
        return Credentials(str(body["AccessKeyId"]), str(body["SecretAccessKey"]), str(token), expires.astimezone(UTC))
    except (KeyError, ValueError):
        raise _unreadable(what) from None


def _parse_json(body: bytes, what: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise _unreadable(what)
    return parsed


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise _unreadable(f"{what} ({path})") from None


def _ask(
    address: str,
    what: str,
    *,
    method: str | None = None,
    data: bytes | None = None,
    headers: Mapping[str, str] = {},
    timeout_s: float = _TIMEOUT_S,
) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise _unreadable(what)
    request = urllib.request.Request(address, data, dict(headers), method=method)  # noqa: S310 - checked just above
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310 - as above
            return bytes(answer.read(_ANSWER_LIMIT))
    except (OSError, ValueError) as error:
        reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else "no answer"
        raise SourceFailed(
            f"{what} cannot be had: {reason}", code="store-credentials-missing", hint="look at the role and the network"
        ) from None


def _unreadable(what: str) -> SourceFailed:
    return SourceFailed(f"{what} cannot be read", code="store-credentials-missing", hint="look at its content and mode")


__all__ = ["Credentials", "find_credentials", "find_region", "parse_xml"]

"""Judging what a source delivered: by its hash, whatever the source says of it."""

import os
from collections.abc import Sequence
from pathlib import Path

from zops.cache.hashing import Hashed, git_sha1_file, sha256_file
from zops.cache.hubs import HubFailure, Listed
from zops.cache.manifest import stat_key
from zops.events import Report, Warned

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def accept(file: Listed, path: Path) -> Hashed:
    """Hash a file that arrived, make it durable and return its SHA-256; remove it when it is not what was listed.

    Raises:
        HubFailure: saying what differs.
    """
    try:
        stat = stat_key(path)
    except FileNotFoundError:
        raise HubFailure("the SDK reported success and left no file") from None
    sha256 = sha256_file(path)
    wrong = ""
    if stat[0] != file.size:
        wrong = f"{stat[0]} bytes arrived instead of {file.size}"
    elif file.sha256 is not None and sha256 != file.sha256:
        wrong = f"its SHA-256 is {sha256[:12]} instead of {file.sha256[:12]}"
    elif file.sha256 is None and file.git_sha1 is not None and git_sha1_file(path) != file.git_sha1:
        wrong = "its git hash is not the listed one"
    if wrong:
        path.unlink()
        raise HubFailure("the source sent 0 bytes" if sha256 == EMPTY_SHA256 else wrong)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256, stat


def warn_without_digests(files: Sequence[Listed], report: Report) -> bool:
    """Tell the operator of files that nobody but this disk vouches for; return whether there are any."""
    bare = [file.path for file in files if file.sha256 is None and file.git_sha1 is None]
    if bare:
        report(Warned(f"the source lists no hash of {len(bare)} file(s); what arrives is recorded as it is"))
    return bool(bare)

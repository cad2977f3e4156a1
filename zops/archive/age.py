"""The age format, version 1 (C2SP's age.md): its header, its recipients, and its payload read at any place.

Written out here, on the primitives of `cryptography`, for two things that no library at hand does: a passphrase without
the whole archive in memory, and seeking. The payload is sealed in chunks of 64 KiB, each on its own, so an encrypted
archive is checked and restored by the same code as any other: index first, then ranges of it in parallel.
"""

import base64
import hashlib
import hmac
import os
import threading
from abc import ABC, abstractmethod
from binascii import Error as Base64Error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from zops.archive.ranged import RangedFile
from zops.errors import ArchiveDamaged

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

VERSION = b"age-encryption.org/v1"
CHUNK = 64 << 10
SEALED_CHUNK = CHUNK + 16
HEADER_LIMIT = 1 << 20
"""A stanza takes some 200 bytes, so this is a header for thousands of recipients."""
FILE_KEY_SIZE = 16
_NONCE_SIZE = 16
_LINE = 64


class NoKey(Exception):
    """Raised when none of the identities opens an archive; `kinds` are those of its recipients."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__(", ".join(kinds))
        self.kinds = tuple(kinds)


@dataclass(frozen=True, slots=True)
class Stanza:
    """One wrapping of the file key: a kind with its arguments, and the wrapped key."""

    words: tuple[str, ...]
    body: bytes

    def as_bytes(self) -> bytes:
        """Return it as it stands in a header."""
        text = encode(self.body)
        # A body ends with a line shorter than the rest, an empty one if need be.
        lines = [text[start : start + _LINE] for start in range(0, len(text) + 1, _LINE)]
        return "\n".join([" ".join(["->", *self.words]), *lines, ""]).encode()


class Recipient(ABC):
    """Somebody for whom a file key is wrapped."""

    @abstractmethod
    def wrap(self, file_key: bytes) -> Stanza:
        """Wrap the file key."""


class Identity(ABC):
    """Somebody who unwraps file keys."""

    @abstractmethod
    def unwrap(self, stanza: Stanza) -> bytes | None:
        """Return the file key, None when the stanza is for somebody else."""


class Sealer:
    """Encrypts what is written here and passes it on, in bounded memory; `finish` writes the last chunk."""

    def __init__(self, write: Callable[[bytes], object], recipients: Sequence[Recipient]) -> None:
        file_key, nonce = os.urandom(FILE_KEY_SIZE), os.urandom(_NONCE_SIZE)
        self._write = write
        self._cipher = _payload_cipher(file_key, nonce)
        self._pending = bytearray()
        self._count = 0
        header = _header([recipient.wrap(file_key) for recipient in recipients], file_key) + nonce
        self.size = len(header)
        """Bytes passed on so far."""
        write(header)

    def write(self, data: bytes) -> None:
        """Take more bytes."""
        view = memoryview(data)
        sealed = bytearray()
        if self._pending:
            taken = CHUNK - len(self._pending)
            self._pending += view[:taken]
            view = view[taken:]
        # The last chunk carries a mark, so one is kept back until it is known that there are more.
        if view and len(self._pending) == CHUNK:
            sealed += self._seal(self._pending, last=False)
            self._pending.clear()
        while len(view) > CHUNK:
            sealed += self._seal(view[:CHUNK], last=False)
            view = view[CHUNK:]
        self._pending += view
        self._pass_on(sealed)

    def finish(self) -> None:
        """Seal what is left; only then is the archive one."""
        self._pass_on(self._seal(self._pending, last=True))

    def _seal(self, chunk: bytearray | memoryview, *, last: bool) -> bytes:
        sealed = self._cipher.encrypt(_chunk_nonce(self._count, last=last), chunk, None)
        self._count += 1
        return sealed

    def _pass_on(self, sealed: bytes | bytearray) -> None:
        if sealed:
            self._write(bytes(sealed))
            self.size += len(sealed)


class Opener(RangedFile):
    """What an encrypted stream says, readable at any place; every byte of it was authenticated before it is returned.

    Raises:
        NoKey: when no identity fits.
        ArchiveDamaged: when the stream is not age's, or was changed or cut.
    """

    def __init__(self, stream: BinaryIO, identities: Sequence[Identity]) -> None:
        super().__init__()
        self._stream = stream
        # A bucket is asked for several ranges at once; anything else has but one place at which it is read.
        self._ranged: Callable[[int, int], bytes] | None = getattr(getattr(stream, "raw", None), "read_range", None)
        self._lock = threading.Lock()
        self._sealed_size = sealed_size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        stanzas, start, file_key = _open_header(stream, identities)
        nonce = stream.read(_NONCE_SIZE)
        self._start = start + _NONCE_SIZE
        payload = sealed_size - self._start
        self._chunks = max(1, -(-payload // SEALED_CHUNK))
        self.size = payload - 16 * self._chunks
        # Only an archive without content ends with an empty chunk.
        if len(nonce) < _NONCE_SIZE or self.size < 0 or (self._chunks > 1 and self.size <= (self._chunks - 1) * CHUNK):
            raise _damaged("it is cut")
        self._cipher = _payload_cipher(file_key, nonce)
        self.kinds = tuple(stanza.words[0] for stanza in stanzas)
        # The last chunk proves that nothing was cut off behind it.
        self.read_range(max(0, self.size - 1), self.size)

    def close(self) -> None:
        """Close the stream below too."""
        self._stream.close()
        super().close()

    def read_range(self, start: int, end: int) -> bytes:
        """Return the content from `start` to `end`, less where it ends before; may be called from several threads."""
        end = min(end, self.size)
        if start >= end and (self.size or start):
            return b""
        first, last = start // CHUNK, max(start, end - 1) // CHUNK
        sealed = memoryview(self._sealed(self._start + first * SEALED_CHUNK, (last + 1 - first) * SEALED_CHUNK))
        content = bytearray()
        for number in range(first, last + 1):
            chunk = sealed[(number - first) * SEALED_CHUNK :][:SEALED_CHUNK]
            content += self._open(chunk, number)
        return bytes(content[start - first * CHUNK : end - first * CHUNK])

    def _sealed(self, start: int, size: int) -> bytes:
        size = min(size, self._sealed_size - start)
        if self._ranged is not None:
            return self._ranged(start, start + size)
        with self._lock:
            self._stream.seek(start)
            return _read_all(self._stream, size)

    def _open(self, chunk: memoryview, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - only encrypted archives pay for it

        try:
            return self._cipher.decrypt(_chunk_nonce(number, last=number == self._chunks - 1), chunk, None)
        except InvalidTag:
            raise _damaged("it is cut or changed") from None


def _read_all(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    while 0 < len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _header(stanzas: Sequence[Stanza], file_key: bytes) -> bytes:
    covered = VERSION + b"\n" + b"".join(stanza.as_bytes() for stanza in stanzas) + b"---"
    return covered + b" " + encode(_mac(covered, file_key)).encode() + b"\n"


def _open_header(stream: BinaryIO, identities: Sequence[Identity]) -> tuple[list[Stanza], int, bytes]:
    """Return a header's stanzas, where it ends, and the file key."""
    text = _read_all(stream, HEADER_LIMIT)
    mark = text.find(b"\n--- ")
    end = text.find(b"\n", mark + 1) + 1
    if not text.startswith(VERSION + b"\n") or mark < 0 or not end:
        raise _damaged("it does not begin as age's do")
    covered, mac = text[: mark + 4], text[mark + 5 : end - 1]
    stanzas = _parse_stanzas(text[len(VERSION) + 1 : mark + 1])
    kinds = [stanza.words[0] for stanza in stanzas]
    if "scrypt" in kinds and len(kinds) > 1:
        raise _damaged("it has a passphrase beside other recipients")
    for identity in identities:
        for stanza in stanzas:
            file_key = identity.unwrap(stanza)
            if file_key is not None:
                if not hmac.compare_digest(encode(_mac(covered, file_key)).encode(), mac):
                    raise _damaged("its header was changed")
                stream.seek(end)
                return stanzas, end, file_key
    raise NoKey(kinds)


def _parse_stanzas(text: bytes) -> list[Stanza]:
    stanzas = []
    lines = iter(text.decode("ascii", "replace").split("\n")[:-1])
    for line in lines:
        words = tuple(line.split(" ")[1:])
        if not line.startswith("-> ") or not all(words):
            raise _damaged("its header is none")
        body = ""
        while len(part := next(lines, "")) == _LINE:
            body += part
        stanzas.append(Stanza(words, decode(body + part)))
    return stanzas


def _mac(covered: bytes, file_key: bytes) -> bytes:
    return hmac.digest(derive(file_key, b"", b"header"), covered, "sha256")


def _payload_cipher(file_key: bytes, nonce: bytes) -> "ChaCha20Poly1305":
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # noqa: PLC0415 - as above

    return ChaCha20Poly1305(derive(file_key, nonce, b"payload"))


def _chunk_nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes by HKDF-SHA-256 (RFC 5869), of which that is one block."""
    return hmac.digest(hmac.digest(salt or bytes(32), key, "sha256"), info + b"\1", hashlib.sha256)


def encode(data: bytes) -> str:
    """Return base64 without its padding, as age writes it."""
    return base64.b64encode(data).decode().rstrip("=")


def decode(text: str) -> bytes:
    """Parse base64 without padding, in the one form that there is of each value.

    Raises:
        ArchiveDamaged: when it is none.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (Base64Error, ValueError):
        raise _damaged("its header is none") from None
    if encode(data) != text:
        raise _damaged("its header is none")
    return data


def _damaged(why: str) -> ArchiveDamaged:
    return ArchiveDamaged(f"the encrypted archive cannot be opened: {why}")


__all__ = ["CHUNK", "Identity", "NoKey", "Opener", "Recipient", "Sealer", "Stanza", "decode", "derive", "encode"]

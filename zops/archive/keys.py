"""Who may open an encrypted archive: age's own keys, SSH keys and passphrases, as recipients and as identities."""

import hashlib
import os
from typing import TYPE_CHECKING

from zops.archive.age import FILE_KEY_SIZE, Identity, Recipient, Stanza, decode, derive, encode
from zops.errors import UsageError, ZopsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.padding import OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

WORK_FACTOR = 18
"""Logarithm of scrypt's cost for a new archive: a second and 256 MB once, as the age program has it."""
WORK_FACTOR_LIMIT = 22
"""A hostile header must not make us compute for hours or take all memory: 4 GB."""

_X25519_INFO = b"age-encryption.org/v1/X25519"
_SCRYPT_SALT = b"age-encryption.org/v1/scrypt"
_ED25519_INFO = b"age-encryption.org/v1/ssh-ed25519"
_RSA_LABEL = b"age-encryption.org/v1/ssh-rsa"
_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_FIELD = (1 << 255) - 19


class X25519Recipient(Recipient):
    """`age1...`: the public half of an age key."""

    def __init__(self, text: str) -> None:
        self._public = _bech32(text, "age")

    def wrap(self, file_key: bytes) -> Stanza:
        ephemeral = os.urandom(32)
        share = _multiply(ephemeral)
        key = derive(_multiply(ephemeral, self._public), share + self._public, _X25519_INFO)
        return Stanza(("X25519", encode(share)), _seal(key, file_key))


class X25519Identity(Identity):
    """`AGE-SECRET-KEY-1...`: the secret half of an age key."""

    def __init__(self, text: str) -> None:
        self._secret = _bech32(text.lower(), "age-secret-key-")
        self._public = _multiply(self._secret)

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.words[0] != "X25519" or len(stanza.words) != 2 or len(share := decode(stanza.words[1])) != 32:
            return None
        shared = _shared(self._secret, share)
        return shared and _open(derive(shared, share + self._public, _X25519_INFO), stanza.body)


class Passphrase(Recipient, Identity):
    """A passphrase, for both ways; scrypt makes guessing it slow."""

    def __init__(self, passphrase: str) -> None:
        if not passphrase:
            raise UsageError("the passphrase is empty", hint="write it into the file as its first line")
        self._passphrase = passphrase.encode()

    def wrap(self, file_key: bytes) -> Stanza:
        salt = os.urandom(16)
        return Stanza(("scrypt", encode(salt), str(WORK_FACTOR)), _seal(self._key(salt, WORK_FACTOR), file_key))

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.words[0] != "scrypt" or len(stanza.words) != 3 or not stanza.words[2].isdecimal():
            return None
        factor, salt = int(stanza.words[2]), decode(stanza.words[1])
        if not 1 <= factor <= WORK_FACTOR_LIMIT:
            raise UsageError(
                f"the encrypted archive asks for 2^{factor} rounds of scrypt, more than 2^{WORK_FACTOR_LIMIT}",
                hint="decrypt it with the age program if you trust it",
            )
        return _open(self._key(salt, factor), stanza.body)

    def _key(self, salt: bytes, factor: int) -> bytes:
        cost = 1 << factor
        return hashlib.scrypt(
            self._passphrase, salt=_SCRYPT_SALT + salt, n=cost, r=8, p=1, maxmem=cost * 1024 + (1 << 20), dklen=32
        )


class Ed25519Recipient(Recipient):
    """`ssh-ed25519 AAAA...`."""

    def __init__(self, line: str) -> None:
        self._wire, raw = _ssh_wire(line), _ssh_wire(line)[-32:]
        self._public = _montgomery(raw)

    def wrap(self, file_key: bytes) -> Stanza:
        ephemeral = os.urandom(32)
        share = _multiply(ephemeral)
        shared = _multiply(_tweak(self._wire), _multiply(ephemeral, self._public))
        key = derive(shared, share + self._public, _ED25519_INFO)
        return Stanza(("ssh-ed25519", _tag(self._wire), encode(share)), _seal(key, file_key))


class Ed25519Identity(Identity):
    """The file of an Ed25519 SSH key."""

    def __init__(self, seed: bytes, line: str) -> None:
        self._wire = _ssh_wire(line)
        self._secret = hashlib.sha512(seed).digest()[:32]
        self._public = _multiply(self._secret)

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.words[:2] != ("ssh-ed25519", _tag(self._wire)) or len(stanza.words) != 3:
            return None
        share = decode(stanza.words[2])
        inner = _shared(self._secret, share) if len(share) == 32 else None
        shared = inner and _shared(_tweak(self._wire), inner)
        return shared and _open(derive(shared, share + self._public, _ED25519_INFO), stanza.body)


class RsaRecipient(Recipient):
    """`ssh-rsa AAAA...`."""

    def __init__(self, line: str, key: "RSAPublicKey") -> None:
        self._wire, self._key = _ssh_wire(line), key

    def wrap(self, file_key: bytes) -> Stanza:
        return Stanza(("ssh-rsa", _tag(self._wire)), self._key.encrypt(file_key, _oaep()))


class RsaIdentity(Identity):
    """The file of an RSA SSH key."""

    def __init__(self, key: "RSAPrivateKey", line: str) -> None:
        self._wire, self._key = _ssh_wire(line), key

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.words != ("ssh-rsa", _tag(self._wire)):
            return None
        try:
            file_key = self._key.decrypt(stanza.body, _oaep())
        except ValueError:
            return None
        return file_key if len(file_key) == FILE_KEY_SIZE else None


class BadKey(ZopsError):
    """Raised when a text is no key; says what is wrong with it, and nothing of a secret one."""


def read_recipient(text: str) -> Recipient:
    """Return the recipient that a line names: `age1...`, `ssh-ed25519 ...` or `ssh-rsa ...`.

    Raises:
        BadKey: when it is none of these.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - only encrypted archives pay for it
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key  # noqa: PLC0415

    if text.startswith("age1"):
        return X25519Recipient(text)
    if not text.startswith(("ssh-ed25519 ", "ssh-rsa ")):
        raise BadKey("it is neither age1..., ssh-ed25519 ... nor ssh-rsa ...")
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BadKey("it is no SSH public key") from None
    if isinstance(key, RSAPublicKey):
        if key.key_size < 2048:
            raise BadKey("an RSA key below 2048 bits protects nothing")
        return RsaRecipient(text, key)
    return Ed25519Recipient(text)


def read_identities(text: str, passphrase: "Callable[[], str] | None" = None) -> list[Identity]:
    """Return the identities in a file: lines of `AGE-SECRET-KEY-1...`, or one SSH private key.

    Args:
        text: of the file.
        passphrase: returns the passphrase of an SSH key; is called only for a key that has one.

    Raises:
        BadKey: when there is none, or one whose passphrase is not known or wrong.
    """
    if text.startswith("-----BEGIN"):
        return [_read_ssh_identity(text, passphrase)]
    if text.startswith("age-encryption.org/"):
        raise BadKey("it is encrypted itself; decrypt it first, with: age -d")
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not lines or not all(line.startswith("AGE-SECRET-KEY-1") for line in lines):
        raise BadKey("it holds neither AGE-SECRET-KEY-1... nor an SSH private key")
    return [X25519Identity(line) for line in lines]


def _read_ssh_identity(text: str, passphrase: "Callable[[], str] | None") -> Identity:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        PublicFormat,
        load_pem_private_key,
        load_ssh_private_key,
    )

    load = load_ssh_private_key if "OPENSSH" in text.partition("\n")[0] else load_pem_private_key
    given = b""
    try:
        try:
            key = load(text.encode(), password=None)
        except TypeError:
            given = passphrase().encode() if passphrase else b""
            if not given:
                raise BadKey("the SSH key is protected by a passphrase, and none is given") from None
            key = load(text.encode(), password=given)
    except ValueError:
        raise BadKey("the passphrase is wrong" if given else "it is no SSH private key") from None
    except UnsupportedAlgorithm as error:
        if "bcrypt" in str(error):
            raise BadKey("an SSH key with a passphrase needs the package bcrypt, which is not here") from None
        raise BadKey("it is an SSH key of a kind that is not known here") from None
    if not isinstance(key, Ed25519PrivateKey | RSAPrivateKey):
        raise BadKey("it is an SSH key of a kind that age does not know; ed25519 and rsa are")
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    if isinstance(key, RSAPrivateKey):
        return RsaIdentity(key, line)
    return Ed25519Identity(key.private_bytes_raw(), line)


def _oaep() -> "OAEP":
    from cryptography.hazmat.primitives.asymmetric import padding  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    return padding.OAEP(padding.MGF1(SHA256()), SHA256(), _RSA_LABEL)


def _seal(key: bytes, file_key: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # noqa: PLC0415 - as above

    # Each of these keys seals one file key only, so the nonce may be the same always.
    return ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)


def _open(key: bytes, body: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # noqa: PLC0415

    if len(body) != FILE_KEY_SIZE + 16:
        return None
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), body, None)
    except InvalidTag:
        return None


def _secret_key(secret: bytes) -> "X25519PrivateKey":
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415 - as above

    return X25519PrivateKey.from_private_bytes(secret)


def _multiply(secret: bytes, point: bytes | None = None) -> bytes:
    """Multiply a point of the curve, its base point unless given; raises ValueError for a point of low order."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey  # noqa: PLC0415 - as above

    if point is None:
        return _secret_key(secret).public_key().public_bytes_raw()
    return _secret_key(secret).exchange(X25519PublicKey.from_public_bytes(point))


def _shared(secret: bytes, point: bytes) -> bytes | None:
    """Return the shared secret, None for a share of low order, which somebody made up."""
    try:
        return _multiply(secret, point)
    except ValueError:
        return None


def _montgomery(edwards: bytes) -> bytes:
    """Return the point of Curve25519 that belongs to one of Ed25519 (RFC 7748, 4.1)."""
    y = int.from_bytes(edwards, "little") & ((1 << 255) - 1)
    return ((1 + y) * pow(1 - y, -1, _FIELD) % _FIELD).to_bytes(32, "little")


def _tweak(wire: bytes) -> bytes:
    return derive(b"", wire, _ED25519_INFO)


def _ssh_wire(line: str) -> bytes:
    import base64  # noqa: PLC0415 - for these keys alone

    return base64.b64decode(line.split()[1])


def _tag(wire: bytes) -> str:
    return encode(hashlib.sha256(wire).digest()[:4])


def _bech32(text: str, kind: str) -> bytes:
    """Decode the 32 bytes of a Bech32 text (BIP 173) whose readable part is `kind`.

    Raises:
        BadKey: when a character is wrong.
    """
    prefix, _, data = text.rpartition("1")
    values = [_ALPHABET.find(character) for character in data]
    if prefix != kind or min(values, default=-1) < 0 or _checksum(kind, values) != 1:
        raise BadKey("a character of it is wrong or missing")
    bits = 0
    for value in values[:-6]:
        bits = bits << 5 | value
    spare = len(values[:-6]) * 5 - 256
    if spare not in range(5) or bits & ((1 << spare) - 1):
        raise BadKey("it has the wrong length")
    return (bits >> spare).to_bytes(32, "big")


def _checksum(kind: str, values: list[int]) -> int:
    check = 1
    for value in [*(ord(c) >> 5 for c in kind), 0, *(ord(c) & 31 for c in kind), *values]:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    return check


__all__ = ["BadKey", "Passphrase", "read_identities", "read_recipient"]

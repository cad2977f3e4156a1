"""Archives that only some may read: from what an operator names to keys, and streams that encrypt and decrypt.

The format is age's (age.py, keys.py), so the age program opens our archives and we open what it encrypted.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from zops.archive.age import CHUNK, Identity, NoKey, Opener, Recipient, Sealer
from zops.archive.keys import BadKey, Passphrase, read_identities, read_recipient
from zops.errors import UsageError

if TYPE_CHECKING:
    from zops.archive.resume import Leftover as Resumable
    from zops.archive.store import ArchiveInfo, Leftover, Store, Writer

PASSPHRASE_VARIABLE = "ZOPS_PASSPHRASE"  # noqa: S105 - the name of the variable, not what is in it
IDENTITY_PASSPHRASE_VARIABLE = "ZOPS_IDENTITY_PASSPHRASE"  # noqa: S105 - as above
"""Holds the passphrase of SSH keys that are given as identities."""
_FILE_LIMIT = 1 << 20
# What is decrypted at once: enough that a request to a bucket is worth its time.
_READ_AHEAD = 16 * CHUNK


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """What opens encrypted archives; empty for who has none."""

    identities: tuple[Identity, ...] = ()

    def open(self, stream: BinaryIO, location: str) -> BinaryIO:
        """Return what an encrypted stream says, readable at any place; it owns the stream from then on.

        Raises:
            UsageError: when these keys do not open it.
            ArchiveDamaged: when it is cut or changed.
        """
        try:
            return cast("BinaryIO", io.BufferedReader(Opener(stream, self.identities), _READ_AHEAD))
        except NoKey as missing:
            stream.close()
            by = "a passphrase" if "scrypt" in missing.kinds else f"keys ({', '.join(sorted(set(missing.kinds)))[:80]})"
            was = "none of the given keys opens it" if self.identities else "no key was given"
            raise UsageError(
                f"{location} is encrypted by {by}, and {was}",
                code="archive-encrypted",
                hint=f"give --identity FILE, or --passphrase-file FILE, or set {PASSPHRASE_VARIABLE}",
            ) from None
        except BaseException:
            stream.close()
            raise


NO_KEYS = Keys()


def read_keys(
    identity_files: Sequence[str | Path] = (),
    passphrase_file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    ask: Callable[[str], str] | None = None,
) -> Keys:
    """Return the keys in these files and in the passphrase variable.

    Args:
        identity_files: files of keys.
        passphrase_file: file of the passphrase by which archives are encrypted.
        environ: the environment; one of its variables may hold the passphrase of SSH keys.
        ask: asks somebody for the passphrase of the SSH key in the file of that name; None where nobody can be asked.

    Raises:
        UsageError: when a file cannot be read or holds no key; no secret is in the message.
    """
    found: list[Identity] = []
    for file in identity_files:
        with _blamed(file):
            found += read_identities(_text(file), lambda file=file: _unlocking(file, environ, ask))  # type: ignore[misc] # the default binds the file of this turn
    passphrase = read_passphrase(passphrase_file, environ)
    return Keys((*found, *([passphrase] if passphrase else ())))


def _unlocking(file: str | Path, environ: Mapping[str, str], ask: Callable[[str], str] | None) -> str:
    """Return the passphrase of an SSH key, empty when there is none to be had."""
    return environ.get(IDENTITY_PASSPHRASE_VARIABLE) or (ask(str(file)) if ask else "")


def read_passphrase(file: str | Path | None, environ: Mapping[str, str] = os.environ) -> Passphrase | None:
    """Return the passphrase in the first line of a file, else the variable's, None when there is neither.

    Raises:
        UsageError: when the file cannot be read or is empty.
    """
    if file is not None:
        return Passphrase(_text(file).partition("\n")[0].rstrip("\r"))
    return Passphrase(environ[PASSPHRASE_VARIABLE]) if environ.get(PASSPHRASE_VARIABLE) else None


def read_recipients(named: Sequence[str], passphrase: Passphrase | None = None) -> tuple[Recipient, ...]:
    """Return whom to encrypt for: keys as `age1...` or `ssh-...`, or files with a key a line; or a passphrase.

    Raises:
        UsageError: when one is no key and no such file, or when there are keys and a passphrase.
    """
    found: list[Recipient] = []
    for each in named:
        with _blamed(each):
            lines = [each] if each.startswith(("age1", "ssh-")) else _text(each).splitlines()
            keys = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
            if not keys:
                raise BadKey("there is no key in it")
            found += [read_recipient(key) for key in keys]
    if found and passphrase:
        raise UsageError("an archive is encrypted for keys or by a passphrase, not both", hint="give one of them")
    return (*found, *([passphrase] if passphrase else ()))


class EncryptedStore:
    """A store into which archives are written encrypted, their names ending with `.age`; all else is the store's."""

    def __init__(self, store: "Store", recipients: Sequence[Recipient], keys: Keys = NO_KEYS) -> None:
        self.location = store.location
        self._store = store
        self._recipients = tuple(recipients)
        self._keys = keys

    @contextmanager
    def open_writer(
        self,
        name: str,
        *,
        size: int = 0,
        plan: Mapping[str, str] | None = None,  # noqa: ARG002 - see `resumable`
    ) -> "Iterator[Writer]":
        """See `Store`."""
        sealed_size = size + size // 1024 + (1 << 20) if size else 0
        with self._store.open_writer(sealed_name(name), size=sealed_size) as writer:
            sealer = Sealer(writer.write, self._recipients)
            yield sealer
            sealer.finish()

    def resumable(self) -> "Iterator[Resumable]":
        """See `Store`: nothing, for each run encrypts with a key of its own and so writes other bytes."""
        return iter(())

    def open_reader(self, name: str) -> BinaryIO:
        """See `Store`: what the archive says, decrypted."""
        stream = self._store.open_reader(sealed_name(name))
        return self._keys.open(stream, f"{self.location}/{sealed_name(name)}")

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return self._store.exists(sealed_name(name))

    def list(self) -> "list[ArchiveInfo]":
        """See `Store`."""
        return self._store.list()

    def size(self, name: str) -> int:
        """See `Store`: as it is stored."""
        return self._store.size(sealed_name(name))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """See `Store`: as it is stored."""
        return self._store.read_range(sealed_name(name), start, end)

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._store.delete(sealed_name(name))

    def read_note(self, name: str) -> bytes | None:
        """See `Store`."""
        return self._store.read_note(sealed_name(name))

    def write_note(self, name: str, text: bytes) -> None:
        """See `Store`."""
        self._store.write_note(sealed_name(name), text)

    def clean(self, *, dry_run: bool = False) -> "tuple[Leftover, ...]":
        """See `Store`."""
        return self._store.clean(dry_run=dry_run)


def sealed_name(name: str) -> str:
    """Return the name under which an archive is stored encrypted."""
    return name if name.endswith(".age") else f"{name}.age"


def _text(file: str | Path) -> str:
    path = Path(file).expanduser()
    try:
        with path.open("rb") as stream:
            return stream.read(_FILE_LIMIT).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or "no text") if isinstance(error, OSError) else "no text"
        raise UsageError(f"{path} cannot be read: {why}", hint="name a key, or a file that holds one") from None


@contextmanager
def _blamed(named: str | Path) -> Iterator[None]:
    try:
        yield
    except BadKey as error:
        raise UsageError(
            f"{str(named)[:80]} cannot be used: {error.message}",
            code="key-invalid",
            hint=_hint(error.message),
        ) from None


def _hint(message: str) -> str:
    if "bcrypt" in message:
        return "install it with: pip install bcrypt"
    if "passphrase" in message:
        return f"set {IDENTITY_PASSPHRASE_VARIABLE}, or run it in a terminal, where you are asked"
    return "make a pair with: age-keygen -o key.txt"


__all__ = [
    "IDENTITY_PASSPHRASE_VARIABLE",
    "NO_KEYS",
    "PASSPHRASE_VARIABLE",
    "EncryptedStore",
    "Keys",
    "read_keys",
    "read_passphrase",
    "read_recipients",
    "sealed_name",
]

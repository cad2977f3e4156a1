"""Encrypted archives: age's own program opens ours, we open what it made, and nobody gets a byte that was changed."""

import io
import os
import shutil
import subprocess

import pyrage
import pytest

from tests.support.archives import FILES, make_snapshot, tree
from zops.archive.age import CHUNK, NoKey, Opener, Sealer
from zops.archive.backup import backup
from zops.archive.encryption import EncryptedStore, read_keys, read_passphrase, read_recipients
from zops.archive.keys import Passphrase, read_identities, read_recipient
from zops.archive.restore import restore
from zops.archive.store import StoredArchive, open_archive, open_store
from zops.errors import ArchiveDamaged, UsageError

KINDS = ("age", "ed25519", "rsa")
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 200_000)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Return kind -> (recipient, file of its identity)."""
    directory = tmp_path_factory.mktemp("keys")
    identity = pyrage.x25519.Identity.generate()
    (directory / "age").write_text(f"# a comment\n{identity}\n")
    for kind, options in (("ed25519", []), ("rsa", ["-b", "2048"])):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", kind, *options, "-N", "", "-C", "", "-f", directory / kind], check=True
        )
    found = {"age": (str(identity.to_public()), directory / "age")}
    return found | {k: ((directory / f"{k}.pub").read_text().strip(), directory / k) for k in ("ed25519", "rsa")}


@pytest.fixture
def cheap(monkeypatch):
    """Let a passphrase cost little: what it costs is not what is tested."""
    monkeypatch.setattr("zops.archive.keys.WORK_FACTOR", 10)


def seal(content, recipients, step=30_001):
    out = io.BytesIO()
    sealer = Sealer(out.write, recipients)
    for start in range(0, len(content), step):
        sealer.write(memoryview(content)[start : start + step])
    sealer.finish()
    assert sealer.size == len(out.getvalue())
    return out.getvalue()


def identity_of(keys, kind):
    text = keys[kind][1].read_text()
    if kind == "age":
        return pyrage.x25519.Identity.from_str(text.splitlines()[1])
    return pyrage.ssh.Identity.from_buffer(text.encode())


@pytest.mark.parametrize("size", SIZES)
def test_another_program_must_open_what_was_sealed_for_several(keys, size):
    content = os.urandom(size)
    sealed = seal(content, [read_recipient(recipient) for recipient, _ in keys.values()])
    for kind in KINDS:
        assert pyrage.decrypt(sealed, [identity_of(keys, kind)]) == content
        opener = Opener(io.BytesIO(sealed), read_identities(keys[kind][1].read_text()))
        assert (opener.size, opener.read_range(0, size)) == (size, content)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_another_program_sealed_must_be_opened_at_any_place(keys, kind, size):
    content = os.urandom(size)
    make = pyrage.x25519.Recipient if kind == "age" else pyrage.ssh.Recipient
    sealed = pyrage.encrypt(content, [make.from_str(keys[kind][0])])
    reader = io.BufferedReader(Opener(io.BytesIO(sealed), read_identities(keys[kind][1].read_text())))
    assert reader.read() == content
    for start in (0, size // 3, size - 1 if size else 0):
        reader.seek(start)
        assert reader.read(1000) == content[start : start + 1000]


def test_a_passphrase_must_be_the_same_in_both_programs(cheap):
    sealed = seal(b"secret" * 20_000, [Passphrase("correct hörse")])
    assert pyrage.passphrase.decrypt(sealed, "correct hörse") == b"secret" * 20_000
    assert Opener(io.BytesIO(sealed), [Passphrase("correct hörse")]).read_range(5, 17) == b"tsecretsecre"
    with pytest.raises(NoKey):
        Opener(io.BytesIO(sealed), [Passphrase("wrong")])


@pytest.mark.skipif(not shutil.which("age"), reason="the age program is not installed")
def test_the_age_program_must_decrypt_an_archive_that_tar_extracts_and_we_restore_what_it_encrypted(keys, tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": os.urandom(9_000_000)})
    store = EncryptedStore(open_store(tmp_path / "store"), read_recipients([keys["age"][0]]))
    backup([snapshot], store)
    archive = next((tmp_path / "store").glob("*.tar.zst.age"))
    plain = tmp_path / archive.stem
    subprocess.run(["age", "-d", "-i", keys["age"][1], "-o", plain, archive], check=True)
    assert tree(restore(plain, tmp_path / "plain").snapshots[0].path) == tree(snapshot)
    again = tmp_path / f"{plain.name}.age"
    subprocess.run(["age", "-r", keys["ed25519"][0], "-o", again, plain], check=True)
    restored = restore(open_archive(again, read_keys([keys["ed25519"][1]])), tmp_path / "back")
    assert tree(restored.snapshots[0].path) == tree(snapshot)


@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
def test_an_encrypted_archive_must_be_listed_as_any_other_and_restored(keys, tmp_path, compression):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": os.urandom(9_000_000)})
    store = open_store(tmp_path / "store")
    backup([snapshot], EncryptedStore(store, read_recipients([keys["age"][0]])), compression=compression)
    (info,) = store.list()
    assert info.encrypted
    restored = restore(StoredArchive(store, info.name, read_keys([keys["age"][1]])), tmp_path / "back")
    assert tree(restored.snapshots[0].path) == tree(snapshot)


def test_without_the_key_nothing_must_be_restored_and_no_secret_told(keys, tmp_path):
    store = open_store(tmp_path / "store")
    backup([make_snapshot(tmp_path / "cache")], EncryptedStore(store, read_recipients([keys["age"][0]])))
    for found in (read_keys(), read_keys([keys["ed25519"][1]], environ={"ZOPS_PASSPHRASE": "wrong"})):
        with pytest.raises(UsageError) as caught:
            restore(StoredArchive(store, store.list()[0].name, found), tmp_path / "back")
        assert caught.value.code == "archive-encrypted"
        assert "wrong" not in caught.value.message
    assert not (tmp_path / "back").exists()


def test_every_flipped_bit_and_every_cut_must_be_found(keys):
    content = os.urandom(CHUNK + 500)
    sealed = bytearray(seal(content, [read_recipient(keys["age"][0])]))
    identities = read_identities(keys["age"][1].read_text())

    def opened(data):
        opener = Opener(io.BytesIO(bytes(data)), identities)
        return opener.read_range(0, opener.size)

    assert opened(sealed) == content
    places = [*range(230), *range(230, len(sealed), 1009), len(sealed) - 1]
    for place in places:
        sealed[place] ^= 1
        with pytest.raises((ArchiveDamaged, NoKey)):
            opened(sealed)
        sealed[place] ^= 1
    for size in (0, 10, 100, 200, CHUNK, CHUNK + 216, CHUNK + 250, len(sealed) - 16, len(sealed) - 1):
        with pytest.raises((ArchiveDamaged, NoKey)):
            opened(sealed[:size])
    with pytest.raises(ArchiveDamaged):
        opened(sealed + b"x")


def test_a_header_that_asks_for_endless_work_must_be_refused(cheap):
    sealed = seal(b"x", [Passphrase("p")]).replace(b" 10\n", b" 60\n", 1)
    with pytest.raises(UsageError, match="rounds of scrypt"):
        Opener(io.BytesIO(sealed), [Passphrase("p")])


@pytest.mark.parametrize(
    "named", ["age1nonsense", "ssh-ed25519 AAAA", "ssh-rsa nonsense", "/no/such/file", "hello", "ssh-ed25519", "age1"]
)
def test_what_is_no_key_must_be_refused_in_one_line(named):
    with pytest.raises(UsageError) as caught:
        read_recipients([named])
    assert "\n" not in caught.value.message


def test_what_is_no_identity_must_be_refused_without_showing_it(tmp_path):
    secret = "AGE-SECRET-KEY-1" + "Q" * 58
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "locked", "-f", tmp_path / "locked"], check=True)
    (tmp_path / "ed").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nQQ==\n")
    for name, text in (("a", secret), ("b", ""), ("c", "age-encryption.org/v1\n"), ("d", "hello")):
        (tmp_path / name).write_text(text)
    for name in ("a", "b", "c", "d", "ed", "locked", "missing"):
        with pytest.raises(UsageError) as caught:
            read_keys([tmp_path / name])
        assert "QQQQ" not in str(caught.value.as_json())


@pytest.fixture(params=["openssh", "pem"])
def locked(request, tmp_path):
    """An SSH key with the passphrase "sesame", in the form of OpenSSH and in the older one."""
    if request.param == "openssh":
        pytest.importorskip("bcrypt")
    kind = ["-t", "ed25519"] if request.param == "openssh" else ["-t", "rsa", "-b", "2048", "-m", "PEM"]
    subprocess.run(["ssh-keygen", "-q", *kind, "-N", "sesame", "-f", tmp_path / "locked"], check=True)
    return tmp_path / "locked", seal(b"secret", read_recipients([f"{tmp_path}/locked.pub"]))


def test_an_ssh_key_must_be_unlocked_by_the_variable_or_by_who_is_asked(locked):
    file, sealed = locked
    asked = []

    def ask(name):
        asked.append(name)
        return "sesame"

    for keys in (
        read_keys([file], environ={"ZOPS_IDENTITY_PASSPHRASE": "sesame"}, ask=ask),
        read_keys([file], environ={}, ask=ask),
    ):
        assert keys.open(io.BytesIO(sealed), "x").read() == b"secret"
    assert asked == [str(file)]


@pytest.mark.parametrize(
    ("environ", "why"), [({"ZOPS_IDENTITY_PASSPHRASE": "guess"}, "is wrong"), ({}, "none is given")]
)
def test_an_ssh_key_that_stays_locked_must_be_said_with_what_to_do(locked, environ, why):
    with pytest.raises(UsageError) as caught:
        read_keys([locked[0]], environ=environ)
    assert why in caught.value.message
    assert "ZOPS_IDENTITY_PASSPHRASE" in caught.value.hint
    assert "guess" not in str(caught.value.as_json())


def test_nobody_must_be_asked_for_a_key_without_a_passphrase(keys):
    files = [keys["ed25519"][1], keys["age"][1]]
    assert len(read_keys(files, environ={}, ask=lambda name: pytest.fail(f"asked for {name}")).identities) == 2


def test_a_passphrase_must_come_from_a_file_or_the_environment_and_never_with_keys(keys, tmp_path, cheap):
    (tmp_path / "p").write_text("from the file\nnot this\n")
    sealed = seal(b"x", [read_passphrase(tmp_path / "p", {"ZOPS_PASSPHRASE": "other"})])
    assert pyrage.passphrase.decrypt(sealed, "from the file") == b"x"
    assert read_passphrase(None, {}) is None
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError):
        read_passphrase(tmp_path / "empty", {})
    with pytest.raises(UsageError, match="not both"):
        read_recipients([keys["age"][0]], Passphrase("x"))

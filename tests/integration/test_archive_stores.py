"""What every store must do, a directory and a bucket alike; the bucket on moto's server."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.archives import FILES, MODEL, back_up, make_snapshot, tree
from tests.support.s3 import BUCKET, SECRET, serve_bucket, use_endpoint
from zops.archive.backup import backup
from zops.archive.names import archive_name, read_name
from zops.archive.restore import restore, verify_archive
from zops.archive.store import NOTE_LIMIT, newest, open_archive, open_store
from zops.cache.manifest import Manifest
from zops.errors import ArchiveDamaged, SourceFailed, UsageError

NAME = "acme--painter-0123456789ab-20260102T030405Z.tar.zst"
LATER = "acme--painter-0123456789ab-20260102T030406Z.tar"
OTHER = "acme--other-main-20260102T030407Z.tar.zst"


s3_endpoint = pytest.fixture(scope="module")(serve_bucket)


@pytest.fixture
def s3(s3_endpoint, monkeypatch, tmp_path):
    endpoint, client = s3_endpoint
    use_endpoint(monkeypatch, os.environ, endpoint, tmp_path)
    return client


@pytest.fixture(params=["directory", "bucket"])
def store(request, tmp_path):
    if request.param == "directory":
        return open_store(tmp_path / "deep" / "store")
    request.getfixturevalue("s3")
    return open_store(f"s3://{BUCKET}/{tmp_path.name}/deep")


def put(store, name, content=b"archive"):
    with store.open_writer(name) as writer:
        writer.write(content)


def test_a_store_must_give_back_what_it_was_given(store):
    content = os.urandom(40_000_000)
    with store.open_writer(NAME) as writer:
        for start in range(0, len(content), 3_000_000):
            writer.write(content[start : start + 3_000_000])
    with store.open_reader(NAME) as reader:
        assert reader.read() == content
        assert reader.seek(-5, os.SEEK_END) == len(content) - 5
        assert reader.read(100) == content[-5:]
        reader.seek(20_000_000)
        assert reader.read(10) == content[20_000_000:20_000_010]
        assert reader.tell() == 20_000_010
    assert store.list()[0].size == len(content)


def test_a_store_must_list_by_date_without_reading_and_pass_over_strangers(store):
    for name in (OTHER, LATER, NAME, "backup.tar.gz", "notes.txt", "acme--x-20269999T999999Z.tar"):
        put(store, name)
    assert [info.name for info in store.list()] == [NAME, LATER, OTHER]
    found = newest(store, MODEL)
    assert (found.name, found.model, found.created) == (LATER, MODEL, datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC))
    assert newest(store, "no/such") is None
    with open_archive(found.location).open() as reader:
        assert reader.read() == b"archive"


def test_an_empty_store_must_list_nothing(store):
    assert store.list() == []
    assert not store.exists(NAME)
    assert newest(store, MODEL) is None


def test_a_store_must_forget_what_is_deleted(store):
    put(store, NAME)
    assert store.exists(NAME)
    store.delete(NAME)
    assert not store.exists(NAME)
    assert store.list() == []


class Broken(Exception):
    pass


def break_off(store, sent):
    with store.open_writer(NAME) as writer:
        writer.write(bytes(sent))
        raise Broken


@pytest.mark.parametrize("sent", [0, 1000, 40_000_000])
def test_a_writer_that_is_left_by_an_error_must_leave_nothing(store, sent, request):
    with pytest.raises(Broken):
        break_off(store, sent)
    assert not store.exists(NAME)
    if store.location.startswith("s3://"):
        assert not request.getfixturevalue("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    else:
        assert list(Path(store.location).iterdir()) == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.open_reader(NAME),
        lambda store: store.size(NAME),
        lambda store: store.read_range(NAME, 0, 5),
    ],
)
def test_what_is_not_there_must_be_said(store, ask):
    with pytest.raises(SourceFailed) as caught:
        ask(store)
    assert caught.value.code == "archive-not-found"
    assert "\n" not in caught.value.message
    store.delete(NAME)


def test_ranges_must_be_exact_from_many_threads_and_none_may_lie_beyond_the_end(store):
    content = os.urandom(1_000_000)
    put(store, NAME, content)
    assert store.size(NAME) == len(content)
    spans = [(0, 1), (0, 1_000_000), (999_999, 1_000_000), (5, 5), *((i * 1000, i * 1500 + 7) for i in range(20))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: store.read_range(NAME, *span), spans))
    assert found == [content[start:end] for start, end in spans]
    with pytest.raises(SourceFailed):
        store.read_range(NAME, 999_990, 1_000_010)


def test_an_archive_must_never_be_replaced(store):
    put(store, NAME, b"first")
    with pytest.raises(SourceFailed) as caught:
        put(store, NAME, b"second")
    assert caught.value.code == "archive-exists"
    assert store.read_range(NAME, 0, 5) == b"first"


def test_two_writers_at_once_must_not_disturb_each_other(store):
    with store.open_writer(NAME) as one, store.open_writer(LATER) as other:
        for _ in range(20):
            one.write(b"1" * 500_000)
            other.write(b"2" * 500_000)
    assert store.read_range(NAME, 0, 10_000_000) == b"1" * 10_000_000
    assert store.read_range(LATER, 0, 10_000_000) == b"2" * 10_000_000


def test_a_store_must_take_buffers_that_are_used_again(store):
    buffer = bytearray(3_000_000)
    with store.open_writer(NAME) as writer:
        for value in range(8):
            buffer[:] = bytes([value]) * len(buffer)
            writer.write(memoryview(buffer))
    assert store.read_range(NAME, 0, 24_000_000) == b"".join(bytes([value]) * 3_000_000 for value in range(8))


def test_a_note_must_go_with_its_archive_and_be_no_archive(store):
    put(store, NAME)
    assert store.read_note(NAME) is None
    store.write_note(NAME, b"first")
    store.write_note(NAME, b"second")
    assert store.read_note(NAME) == b"second"
    assert [info.name for info in store.list()] == [NAME]
    store.write_note(NAME, bytes(NOTE_LIMIT + 1))
    assert store.read_note(NAME) is None
    store.delete(NAME)
    put(store, NAME)
    assert store.read_note(NAME) is None


HOSTILE = ["../acme--x-1-20260102T030405Z.tar", "acme--x\n-1-20260102T030405Z.tar", "--x-1-20260102T030405Z.tar",
           "..--x-1-20260102T030405Z.tar", "acme--x-1-20260102T030405Z-from-20270102T030405Z.tar",
           "acme--x-1-20260102T030405Z.tar.age.age", "acme--x/y-1-20260102T030405Z.tar",
           "acme--x-1-\u0662\u0660\u0662\u06660102T030405Z.tar"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_zops_did_not_give_must_be_passed_over(name):
    assert read_name(name, 1, "/store") is None


def test_a_backup_must_go_through_any_store_and_back(store, tmp_path):
    content = os.urandom(9_000_000) + bytes(9_000_000)
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": content})
    for compression in ("zstd", "none"):
        result = backup([snapshot], store, compression=compression)
        assert verify_archive(result.location).verified
        restored = restore(result.location, tmp_path / f"back-{compression}").snapshots[0].path
        assert tree(restored) == tree(snapshot)
    assert len(store.list()) == 2


def test_a_damaged_archive_in_a_bucket_must_not_be_restored(s3, tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    s3.put_object(Bucket=BUCKET, Key=f"bad/{archive.name}", Body=bytes(content))
    with pytest.raises(ArchiveDamaged):
        restore(f"s3://{BUCKET}/bad/{archive.name}", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_bucket_that_fails_must_be_said_without_its_secrets(s3, tmp_path):
    store = open_store("s3://no-such-bucket")
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": os.urandom(40_000_000)})
    with pytest.raises(SourceFailed) as caught:
        store.list()
    assert SECRET not in str(caught.value)
    with pytest.raises(SourceFailed):
        put(store, NAME, snapshot.joinpath("w.safetensors").read_bytes())
    with pytest.raises(SourceFailed):
        backup([snapshot], store)


@pytest.mark.parametrize("location", ["gs://bucket/x", "http://host/x", "s3:///prefix", "s3://"])
def test_what_is_no_store_must_be_refused(location):
    with pytest.raises(UsageError):
        open_store(location)


def test_a_store_that_cannot_be_written_must_be_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no directory"), open_store(tmp_path / "file").open_writer(NAME):
        pass


def test_a_name_must_tell_what_it_was_made_of(tmp_path):
    store = open_store(tmp_path)
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    manifests = [Manifest("Tongyi-MAI/Z-Image-Turbo", "f332072aa78be7aecdf3", ()), Manifest("a/b", "my-branch/x", ())]
    for chosen in (manifests[:1], manifests[1:], manifests):
        info = read_name(archive_name(chosen, created), 5, store.location)
        assert [model for model, _ in info.snapshots] == [m.model for m in chosen]
        assert info.created == created
    with pytest.raises(UsageError, match="too many"):
        archive_name(manifests * 10, created, compression="none")

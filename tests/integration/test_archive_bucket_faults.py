"""A bucket that errs, stalls, cuts and corrupts must be retried or named, and never give or take a wrong byte."""

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.archives import FILES, make_snapshot, tree
from tests.support.bucket_faults import PART, Scenario, Stage, hurried, play
from tests.support.kills import Work, kill_uploads
from tests.support.s3 import BUCKET, SECRET, Proxy, serve_bucket, use_endpoint
from tests.support.waiting import eventually
from zops.archive import bucket as buckets
from zops.archive.backup import backup
from zops.archive.restore import restore
from zops.archive.store import open_archive, open_store
from zops.archive.uploads import Bucket, Upload, abort_upload, list_uploads
from zops.errors import ArchiveDamaged, SourceFailed, UsageError

NAME = "acme--painter-0123456789ab-20260102T030405Z.tar.zst"
ROOT = Path(__file__).parents[2]
CONTENT = os.urandom(2 * PART + 1_234_567)

server = pytest.fixture(scope="module")(serve_bucket)


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    with hurried(), Proxy(server[0]) as proxy:
        use_endpoint(monkeypatch, os.environ, proxy.url, tmp_path)
        yield proxy


@pytest.fixture
def store(proxy, tmp_path):
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def put(store, content=CONTENT):
    with store.open_writer(NAME) as writer:
        for start in range(0, len(content), 1_000_000):
            writer.write(content[start : start + 1_000_000])


def uploads(server):
    return server[1].list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])


def failed(function):
    with pytest.raises(SourceFailed) as caught:
        function()
    assert "\n" not in caught.value.message
    assert SECRET not in str(caught.value.as_json())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("what", ["status", "drop", "stall", "cut"])
def test_a_fault_that_passes_must_only_cost_time(proxy, store, what):
    proxy.fail(what, "PUT", "partNumber=2", 1)
    put(store)
    proxy.fail(what, "GET", "bytes=", 1)
    assert store.read_range(NAME, 10, len(CONTENT)) == CONTENT[10:]
    assert sum(fault == what for _, _, fault in proxy.requests) == 2


@pytest.mark.parametrize("what", ["status", "drop", "stall", "refuse"])
def test_an_upload_that_goes_on_failing_must_be_named_in_time_and_leave_nothing(proxy, store, server, what):
    fault = proxy.fail(what, "PUT", "partNumber=2")
    began = time.monotonic()
    error = failed(lambda: put(store))
    assert error.code == ("store-refused" if what == "refuse" else "store-failed")
    assert time.monotonic() - began < 20
    fault.times = 0
    assert not store.exists(NAME)
    assert not uploads(server)


@pytest.mark.parametrize("what", ["status", "drop", "stall", "cut", "refuse"])
def test_a_read_that_goes_on_failing_must_be_named_in_time(proxy, store, what):
    put(store, b"x" * 100_000)
    proxy.fail(what, "GET", "bytes=")
    began = time.monotonic()
    error = failed(lambda: store.read_range(NAME, 0, 100_000))
    assert error.code == ("store-refused" if what == "refuse" else "store-failed")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("what", ["status", "refuse", "drop"])
def test_a_bucket_that_cannot_be_listed_must_be_named(proxy, store, what):
    proxy.fail(what, "GET", "list-type")
    failed(store.list)


def test_a_byte_that_changed_on_its_way_up_must_be_found_and_the_object_removed(proxy, store):
    proxy.fail("corrupt", "PUT", "partNumber=2", 1)
    assert failed(lambda: put(store)).code == "store-corrupted"
    assert not store.exists(NAME)


def test_where_the_store_names_objects_otherwise_they_must_be_read_back(proxy, store):
    proxy.fail("etag", "POST", "uploadId")
    put(store)
    read_back = [path for method, path, _ in proxy.requests if method == "GET" and NAME in path]
    assert len(read_back) == 3
    assert store.read_range(NAME, 0, len(CONTENT)) == CONTENT


def test_where_the_store_names_objects_otherwise_a_changed_byte_must_be_found_too(proxy, store):
    proxy.fail("etag", "POST", "uploadId")
    proxy.fail("corrupt", "PUT", "partNumber=1", 1)
    assert failed(lambda: put(store)).code == "store-corrupted"
    assert not store.exists(NAME)


def test_a_store_that_knows_no_ranges_must_be_read_all_the_same(proxy, store):
    put(store)
    proxy.fail("whole", "GET", "bytes=")
    with store.open_reader(NAME) as reader:
        assert reader.read() == CONTENT
        reader.seek(1_000_000)
        assert reader.read(5) == CONTENT[1_000_000:1_000_005]
    assert store.read_range(NAME, 5_000_000, 9_000_000) == CONTENT[5_000_000:9_000_000]


def test_a_byte_that_changed_on_its_way_down_must_never_be_restored(proxy, store, tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": CONTENT})
    location = backup([snapshot], store).location
    proxy.fail("flip", "GET", "bytes=")
    with pytest.raises((ArchiveDamaged, SourceFailed)):
        restore(location, tmp_path / "back")
    assert not list((tmp_path / "back").rglob("*.safetensors"))
    proxy.faults.clear()
    assert tree(restore(location, tmp_path / "back").snapshots[0].path) == tree(snapshot)


def begin_upload(server, key):
    return server[1].create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]


def test_uploads_of_dead_processes_of_this_host_must_go_and_others_stay(store, server, tmp_path, monkeypatch):
    # moto dates every upload to 2010.
    monkeypatch.setattr(buckets, "LEFTOVER_AGE", timedelta(days=36_500))
    mine, other, stranger = (f"{tmp_path.name}/{name}" for name in (NAME, NAME.replace("painter", "x"), "notes.txt"))
    ids = {key: begin_upload(server, key) for key in (mine, other, stranger)}
    try:
        word = tmp_path / "state" / "uploads" / "dead.json"
        word.parent.mkdir(parents=True)
        word.write_text(f'{{"url": "{Bucket.at(store.location).url}", "key": "{mine}"}}')
        assert [left.name for left in store.clean(dry_run=True)] == [NAME]
        assert {upload["Key"] for upload in uploads(server)} == {mine, other, stranger}
        assert [left.name for left in store.clean()] == [NAME]
        assert {upload["Key"] for upload in uploads(server)} == {other, stranger}
        assert not word.exists()
        assert store.clean() == ()
    finally:
        for key in (other, stranger):
            server[1].abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=ids[key])


def test_old_uploads_of_other_hosts_must_go(store, server, tmp_path):
    begin_upload(server, f"{tmp_path.name}/{NAME}")
    dated = [Upload(u.key, u.id, u.began) for u in list_uploads(Bucket.at(store.location))]
    assert len(dated) == 1
    assert len(store.clean()) == 1
    assert not uploads(server)
    abort_upload(Bucket.at(store.location), dated[0])


def test_a_backup_must_remove_leftovers_and_succeed_without_the_right_to(proxy, store, server, tmp_path):
    begin_upload(server, f"{tmp_path.name}/{NAME}")
    fault = proxy.fail("refuse", "GET", "uploads")
    put(store, b"1")
    fault.times = 0
    store.delete(NAME)
    put(store, b"2")
    assert not uploads(server)


def test_a_location_may_bring_its_own_endpoint_and_style(server, monkeypatch, tmp_path):
    use_endpoint(monkeypatch, os.environ, "http://127.0.0.1:1", tmp_path)
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}?endpoint={server[0]}&region=us-east-1&style=path")
    put(store, b"there")
    found = store.list()[0]
    assert found.location.endswith("&style=path")
    with open_archive(found.location).open() as reader:
        assert reader.read() == b"there"


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("", "https://s3.us-east-1.amazonaws.com/models"),
        ("?region=eu-west-1&style=virtual", "https://models.s3.eu-west-1.amazonaws.com"),
        ("?endpoint=https://oss.example.com&style=virtual", "https://models.oss.example.com"),
        ("?endpoint=https://models.oss.example.com/&style=virtual", "https://models.oss.example.com"),
        ("?endpoint=http://127.0.0.1:9000", "http://127.0.0.1:9000/models"),
    ],
)
def test_a_bucket_must_be_asked_where_it_answers(options, url):
    assert Bucket.at(f"s3://models/prefix{options}", {"HOME": "/nowhere"}).url == url


@pytest.mark.parametrize(
    "location", ["s3://b/p?style=round", "s3://b/p?secret=1", "s3://b/p?endpoint=ftp://x", "s3://"]
)
def test_a_location_that_is_written_otherwise_must_be_refused(location):
    with pytest.raises(UsageError):
        Bucket.at(location, {"HOME": "/nowhere"})


UPLOAD = """
import os, sys
from zops.archive import bucket
from zops.archive.store import open_store
bucket.PART = 5 << 20
with open_store(sys.argv[1]).open_writer(sys.argv[2]) as writer:
    while True:
        writer.write(bytes(1 << 20))
"""


def test_a_killed_upload_must_be_removed_by_the_next_one_and_leave_no_archive(proxy, store, server, monkeypatch):
    # moto dates every upload to 2010: only that this host knows its process to be dead may count.
    monkeypatch.setattr(buckets, "LEFTOVER_AGE", timedelta(days=36_500))
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, store.location, NAME], cwd=ROOT)
    try:
        eventually(lambda: any("partNumber=3" in path for _, path, _ in proxy.requests), "the third part is on its way")
        assert store.clean() == (), "it lives"
    finally:
        process.kill()
        process.wait()
    assert len(uploads(server)) == 1
    assert store.list() == []
    put(store)
    assert not uploads(server)
    assert store.read_range(NAME, 0, len(CONTENT)) == CONTENT


@pytest.fixture
def cut(proxy, store, server, tmp_path):
    """A snapshot whose backup was killed when the bucket had its first three parts, and what its upload is called."""
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.bin": os.urandom(6 * PART)})
    for number in (4, 5, 6):
        proxy.fail("stall", "PUT", f"partNumber={number}")

    def sent():
        key = next((upload["Key"] for upload in uploads(server)), None)
        parts = server[1].list_parts(Bucket=BUCKET, Key=key, UploadId=uploads(server)[0]["UploadId"]) if key else {}
        return {1, 2, 3} <= {part["PartNumber"] for part in parts.get("Parts", [])}

    Work("backup", snapshot, store.location, "zstd").run_until(sent, "the bucket has three parts")
    proxy.faults.clear()
    proxy.requests.clear()
    upload = uploads(server)[0]
    yield snapshot, {"Bucket": BUCKET, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    assert uploads(server) == []


def sent_again(proxy):
    numbers = (re.search(r"partNumber=(\d+)", path) for method, path, _ in proxy.requests if method == "PUT")
    return {int(number[1]) for number in numbers if number}


def test_a_killed_upload_must_be_gone_on_with_at_the_first_part_that_is_missing(proxy, store, cut, tmp_path):
    result = backup([cut[0]], store)
    assert sent_again(proxy) == {4, 5, 6, 7}
    assert result.resumed_size == 3 * PART
    assert cut[1]["Key"].endswith(result.name)
    assert tree(restore(result.location, tmp_path / "back").snapshots[0].path) == tree(cut[0])


def test_a_part_that_the_bucket_has_with_other_bytes_must_be_sent_again(proxy, store, server, cut, tmp_path):
    server[1].upload_part(**cut[1], PartNumber=2, Body=bytes(PART))
    result = backup([cut[0]], store)
    assert sent_again(proxy) == {2, 4, 5, 6, 7}
    assert result.resumed_size == 2 * PART
    assert tree(restore(result.location, tmp_path / "back").snapshots[0].path) == tree(cut[0])


def test_a_killed_upload_must_not_be_gone_on_with_when_another_thing_is_backed_up(proxy, store, cut, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.bin": os.urandom(6 * PART)})
    result = backup([snapshot], store)
    assert sent_again(proxy) == {1, 2, 3, 4, 5, 6, 7}
    assert result.resumed_size == 0
    assert tree(restore(result.location, tmp_path / "back").snapshots[0].path) == tree(snapshot)


def test_a_killed_upload_that_the_bucket_forgot_must_begin_anew(proxy, store, server, cut, tmp_path):
    server[1].abort_multipart_upload(**cut[1])
    result = backup([cut[0]], store)
    assert sent_again(proxy) == {1, 2, 3, 4, 5, 6, 7}
    assert tree(restore(result.location, tmp_path / "back").snapshots[0].path) == tree(cut[0])


def test_a_killed_upload_that_is_cleaned_away_must_not_be_gone_on_with(proxy, store, cut):
    assert [left.name for left in store.clean()] == [cut[1]["Key"].rpartition("/")[2]]
    assert list(store.resumable()) == []


def test_what_a_killed_upload_had_sent_must_not_be_mixed_with_another_compression(proxy, store, cut, tmp_path):
    result = backup([cut[0]], store, compression="gzip")
    assert result.name.endswith(".tar.gz")
    assert result.resumed_size == 0
    assert tree(restore(result.location, tmp_path / "back").snapshots[0].path) == tree(cut[0])


def test_a_backup_killed_at_any_moment_of_its_upload_must_leave_no_orphan_after_the_next(
    proxy, store, server, tmp_path
):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.bin": CONTENT})
    kills = kill_uploads(snapshot, tmp_path, store.location, 4, lambda: len(uploads(server)))
    assert kills.wrong == []
    assert kills.killed >= 1


@pytest.mark.parametrize(
    "case",
    [
        (Scenario("backup", "cut", "PUT", "partNumber=2", 1), "completed"),
        (Scenario("backup", "corrupt", "PUT", "partNumber=1", 1), "store-corrupted"),
        (Scenario("backup", "refuse", "POST", "upload", 1), "store-refused"),
        (Scenario("restore", "cut", "GET", "bytes=", 1), "completed"),
        (Scenario("restore", "drop", "GET", "bytes=", 1_000_000), "store-failed"),
    ],
    ids=lambda case: str(case[0]),
)
def test_a_whole_backup_and_restore_must_end_as_promised_whatever_the_bucket_does(proxy, store, server, tmp_path, case):
    scenario, end = case
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.bin": CONTENT})
    stage = Stage(proxy, store, snapshot, tmp_path / "back", lambda: len(uploads(server)))
    assert play(scenario, stage) == (end, [])

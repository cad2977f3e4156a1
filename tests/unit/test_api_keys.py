"""The file of API keys, and the keys of a running server."""

import hashlib
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zops.errors import SpecError, UsageError, ZopsError
from zops.serving.errors import ApiError
from zops.serving.keys import KeyRing
from zops.spec.keys import MAX_KEYS, ApiKey, add_key, hash_key, is_loopback, new_key, read_keys, remove_key

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
counts = st.none() | st.integers(1, 4096)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys" / "keys.yaml"


def listed(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def bearer(key: str) -> list[bytes]:
    return [f"Bearer {key}".encode()]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# --- the file


@settings(deadline=None)  # each write waits for the disk
@given(st.dictionaries(names, st.tuples(counts, counts, counts), min_size=1, max_size=8))
def test_what_is_written_must_be_what_is_read(tmp_path_factory, wanted):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {}
    for name, (requests, images, waiting) in wanted.items():
        made[name] = add_key(file, name, requests_per_minute=requests, images_per_minute=images, max_waiting=waiting)
    found = read_keys(file)
    assert list(found) == list(wanted)
    for name, key in found.items():
        assert key.sha256 == hashlib.sha256(made[name].encode()).hexdigest()
        assert (key.requests_per_minute, key.images_per_minute, key.max_waiting) == wanted[name]
        assert made[name] not in file.read_text()


def test_a_key_must_be_long_random_and_recognisable():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("zops_") and len(key) == 48 for key in keys)


def test_a_new_file_must_be_the_owners_alone_and_leave_nothing_beside_it(file):
    add_key(file, "web")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert listed(file.parent) == ["keys.yaml"]


def test_a_file_that_others_may_read_must_stay_so(file):
    add_key(file, "web")
    file.chmod(0o640)
    add_key(file, "shop")
    remove_key(file, "web")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(read_keys(file)) == ["shop"]


def test_a_file_behind_a_link_must_be_changed_where_it_is(file):
    add_key(file, "web")
    link = file.parent / "link.yaml"
    link.symlink_to(file)
    add_key(link, "shop")
    assert link.is_symlink()
    assert list(read_keys(file)) == ["web", "shop"]


def test_a_name_that_is_taken_or_unknown_must_be_refused_and_nothing_change(file):
    add_key(file, "web")
    before = file.read_bytes()
    for act, code in ((add_key, "key-exists"), (lambda f, _: remove_key(f, "shop"), "key-unknown")):
        with pytest.raises(UsageError) as raised:
            act(file, "web")
        assert raised.value.code == code
    assert file.read_bytes() == before


def test_a_directory_that_cannot_be_written_must_leave_the_file_as_it_is(file, monkeypatch):
    add_key(file, "web")
    before = file.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zops.spec.keys.os.fsync", full)
    with pytest.raises(ZopsError, match="No space left") as raised:
        add_key(file, "shop")
    assert raised.value.code == "file-not-written"
    assert file.read_bytes() == before
    assert listed(file.parent) == ["keys.yaml"]


SECRET = "zops_this-is-a-key-that-nobody-may-ever-see-aaaaaaaa"
HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "keys: [a]",
        "other: 1",
        "keys: {web: 5}",
        "keys: {web: {}}",
        f"keys: {{web: {{sha256: {SECRET}}}}}",
        f"keys: {{web: {{sha256: {HASH}, colour: {SECRET}}}}}",
        f"keys: {{web: {{sha256: {HASH}, requests_per_minute: 0}}}}",
        f"keys: {{web: {{sha256: {HASH}, expires: {SECRET}}}}}",
        f"keys: {{web: {{sha256: {HASH}}}, shop: {{sha256: {HASH}}}}}",
        f"keys: {{web: {{sha256: {HASH}}}, web: {{sha256: {HASH}}}}}",
        f"keys: {{'we b': {{sha256: {HASH}}}}}",
        f"keys: {{1: {{sha256: {HASH}}}}}",
        "keys: {web: {sha256: '" + "A" * 64 + "'}}",
        "keys: {",
        "\x00",
    ],
)
def test_a_broken_file_must_be_refused_by_name_without_a_word_of_its_values(file, body):
    file.write_text(body)
    with pytest.raises(SpecError) as raised:
        read_keys(file)
    assert str(file) in raised.value.message
    assert SECRET not in raised.value.message + raised.value.hint + str(raised.value.details)


def test_more_keys_than_a_server_compares_must_be_refused(file):
    file.write_text(yaml.safe_dump({"keys": {f"k{n}": {"sha256": f"{n:064x}"} for n in range(MAX_KEYS + 1)}}))
    with pytest.raises(SpecError, match="the limit is 1000"):
        read_keys(file)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_must_be_more_than_refused(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        read_keys(file)
    except SpecError:
        return
    assert yaml.safe_load(file.read_text(encoding="utf-8")) in (None, {}, {"keys": None}, {"keys": {}})


@pytest.mark.parametrize("text", ["2027-01-01", "2027-01-01T00:00:00Z", "2027-01-01 01:00:00+01:00", "'2027-01-01'"])
def test_an_end_must_be_understood_however_yaml_writes_it(file, text):
    file.write_text(f"keys: {{web: {{sha256: {HASH}, expires: {text}}}}}")
    end = datetime(2027, 1, 1, tzinfo=UTC)
    key = read_keys(file)["web"]
    assert key.expires == end
    assert not key.expired(end - timedelta(seconds=1))
    assert key.expired(end)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_must_be_told_from_the_rest(host, expected):
    assert is_loopback(host) is expected


# --- the keys of a server


def test_each_key_must_be_its_own_client(file):
    made = {name: add_key(file, name) for name in ("web", "shop", "ops")}
    ring = KeyRing(file)
    for name, key in made.items():
        assert ring.identify(bearer(key)).name == name
    assert ring.identify([f"bEARER  {made['web']} ".encode()]).name == "web"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing_api_key"),
        ([b""], "missing_api_key"),
        ([b"Bearer"], "missing_api_key"),
        ([b"Bearer "], "missing_api_key"),
        ([b"Basic d2ViOng="], "missing_api_key"),
        ([b"Bearer zops_wrong"], "invalid_api_key"),
        ([b"Bearer \xff\xfe"], "invalid_api_key"),
        ([b"Bearer " + b"x" * 10_000], "invalid_api_key"),
    ],
)
def test_whoever_has_no_key_must_be_told_which_it_is(file, headers, code):
    add_key(file, "web")
    with pytest.raises(ApiError) as raised:
        KeyRing(file).identify(headers)
    assert (raised.value.status, raised.value.code) == (401, code)
    assert "wrong" not in raised.value.message


def test_two_headers_must_be_refused_even_if_one_is_good(file):
    key = add_key(file, "web")
    with pytest.raises(ApiError, match="more than one"):
        KeyRing(file).identify(bearer(key) * 2)


def test_the_hash_itself_must_open_nothing(file):
    key = add_key(file, "web")
    with pytest.raises(ApiError):
        KeyRing(file).identify(bearer(hash_key(key)))


def test_a_key_must_end_at_its_moment(file):
    key = add_key(file, "web", expires=NOON)
    moments = [NOON - timedelta(seconds=1), NOON]
    ring = KeyRing(file, now=lambda: moments.pop(0))
    assert ring.identify(bearer(key)).name == "web"
    with pytest.raises(ApiError, match="web has expired"):
        ring.identify(bearer(key))


def test_a_change_of_the_file_must_be_seen_within_a_second(file):
    clock = Clock()
    old = add_key(file, "web")
    ring = KeyRing(file, clock=clock)
    new = add_key(file, "shop")
    remove_key(file, "web")
    clock.now += 1.0
    assert ring.identify(bearer(new)).name == "shop"
    with pytest.raises(ApiError):
        ring.identify(bearer(old))
    assert ring.names == {"shop"}


def test_a_change_in_place_must_be_seen_too(file):
    clock = Clock()
    key = add_key(file, "web")
    ring = KeyRing(file, clock=clock)
    with file.open("a") as stream:
        stream.write(f"  shop:\n    sha256: {hash_key('another')}\n")
    clock.now += 1.0
    assert ring.identify(bearer("another")).name == "shop"
    assert ring.identify(bearer(key)).name == "web"


@pytest.mark.parametrize(
    "harm", [lambda f: f.write_text("keys: {"), lambda f: f.unlink(), lambda f: f.write_text("[]")]
)
def test_a_file_that_breaks_must_keep_the_former_keys_and_one_that_is_mended_must_count(file, harm, caplog):
    clock = Clock()
    key = add_key(file, "web")
    whole = file.read_text()
    ring = KeyRing(file, clock=clock)
    harm(file)
    clock.now += 1.0
    assert ring.identify(bearer(key)).name == "web"
    assert ring.fault
    assert "broken" in caplog.text
    file.write_text(whole.replace("web:", "shop:"))
    clock.now += 1.0
    assert ring.identify(bearer(key)).name == "shop"
    assert ring.fault == ""


def test_a_server_must_not_start_with_a_broken_file(file):
    with pytest.raises(SpecError, match="no such file") as raised:
        KeyRing(file)
    assert "zops key new" in raised.value.hint


def test_every_key_must_be_compared_whichever_is_the_right_one(file, monkeypatch):
    """The time that it takes must not tell where in the file a key stands."""
    made = [add_key(file, f"k{n}") for n in range(5)]
    ring = KeyRing(file)
    compared = []
    monkeypatch.setattr("zops.serving.keys.hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    for key in (made[0], made[4], "zops_none"):
        compared.clear()
        try:
            ring.identify(bearer(key))
        except ApiError:
            assert key == "zops_none"
        assert len(compared) == 5


def test_a_key_must_not_show_its_hash_when_it_is_refused():
    with pytest.raises(ValueError, match="sha256") as raised:
        ApiKey.model_validate({"sha256": SECRET})
    assert SECRET not in str(raised.value)

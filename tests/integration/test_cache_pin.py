"""A manifest that says `upstream` must be the hub's word, and every file must have been held to it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.hub import Hub
from tests.support.snapshots import RUNTIME_FILES, write_pipeline
from tests.support.waiting import eventually
from zops.cache import fetch
from zops.cache.layout import is_verified
from zops.cache.manifest import read_manifest, require_verified
from zops.cache.pin import pin_from_hub
from zops.cache.pull import pull
from zops.cli.main import run
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import Event, Warned, silent
from zops.spec import Source, Spec

MODEL = "owner/name"
HUBS = ("modelscope", "huggingface")
SHARD = "transformer/shard-1-of-2.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=50_000)


@pytest.fixture
def hub(origin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.01)
    with Hub(origin, MODEL) as running:
        yield running


@pytest.fixture
def copy(tmp_path: Path, origin: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "copy"))


def hub_source(hub: Hub, kind: str, revision: str | None = None) -> Source:
    return Source(kind=kind, endpoint=hub.url, revision=revision)


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("revision", [None, "v1", "commit"])
def test_files_that_are_the_hubs_must_get_its_manifest_with_a_commit(
    copy: Path, hub: Hub, kind: str, revision: str | None
) -> None:
    revision = hub.commit if revision == "commit" else revision
    if kind == "modelscope" and revision == "v1":
        revision = "master"
    manifest = pin_from_hub(copy, MODEL, hub_source(hub, kind, revision), silent)
    assert (manifest.origin, manifest.revision) == ("upstream", hub.commit)
    assert manifest.source == f"{kind} {hub.url}"
    assert tuple(entry.path for entry in manifest.files) == RUNTIME_FILES
    assert require_verified(copy) == manifest
    assert hub.fetched() == []


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("name", [SHARD, "model_index.json", "vae/config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_file_that_is_not_the_hubs_must_be_named_and_nothing_written(
    copy: Path, hub: Hub, kind: str, name: str, damage: str
) -> None:
    path = copy / name
    content = path.read_bytes()
    if name == "model_index.json" and damage == "delete":
        path = copy / "transformer/config.json"
    match damage:
        case "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            path.write_bytes(content[:-1])
        case "delete":
            path.unlink()
    with pytest.raises(SnapshotDamaged) as caught:
        pin_from_hub(copy, MODEL, hub_source(hub, kind), silent)
    assert caught.value.code == "pin-differs"
    assert list(caught.value.details["files"]) == [path.relative_to(copy).as_posix()]
    assert "--from-disk" in caught.value.hint
    assert read_manifest(copy) is None
    assert not is_verified(copy)


def test_a_hub_without_hashes_must_not_make_a_manifest_upstream(copy: Path, origin: Path) -> None:
    events: list[Event] = []
    with Hub(origin, MODEL, digests=False) as hub:
        manifest = pin_from_hub(copy, MODEL, hub_source(hub, "modelscope"), events.append)
    assert manifest.origin == "local"
    assert any(isinstance(event, Warned) and "no hash" in event.text for event in events)


def test_a_directory_without_a_snapshot_must_be_told_before_the_hub_is_asked(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SnapshotMissing):
        pin_from_hub(tmp_path, MODEL, hub_source(hub, "modelscope"), silent)
    assert hub.requests == []


def test_what_huggingface_fetched_must_be_adopted_by_a_pull_though_small_files_have_no_sha256(
    tmp_path: Path, origin: Path, hub: Hub
) -> None:
    cache = tmp_path / "cache"
    other = cache / "models--owner--name" / "snapshots" / hub.commit
    shutil.copytree(origin, other)
    source = {"kind": "huggingface", "endpoint": hub.url}
    spec = Spec.model_validate({"model": MODEL, "source": source, "cache": {"dir": cache}})
    assert pull(spec, silent).snapshot.path == other
    assert hub.fetched() == []
    assert read_manifest(other).origin == "upstream"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = run(["cache", *arguments, "--model", MODEL, "--output", "json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or captured.err.splitlines()[-1])


def test_the_command_must_ask_the_hub_unless_the_operator_says_disk(
    copy: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_hub = ("--set", f"source.endpoint={hub.url}")
    code, body = call(capsys, "pin", str(copy), *at_hub)
    assert (code, body["origin"], body["revision"]) == (0, "upstream", hub.commit)
    assert body["source"] == f"modelscope {hub.url}"
    hub.requests.clear()
    code, body = call(capsys, "pin", str(copy), "--from-disk", *at_hub)
    assert (code, body["origin"]) == (0, "local")
    assert hub.requests == []
    elsewhere = ("--set", "source.kind=directory", "--set", f"source.path={tmp_path}")
    assert call(capsys, "pin", str(copy), *elsewhere)[1]["origin"] == "local"
    assert call(capsys, "pin", str(copy), "--from-hub", *elsewhere)[0] == 2


@pytest.mark.parametrize("kind", HUBS)
def test_a_token_must_come_from_the_environment_and_never_be_seen(tmp_path: Path, origin: Path, kind: str) -> None:
    secret = "secret-0123456789"
    variable = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}[kind]
    program = [sys.executable, "-m", "zops", "cache", "pull", "--model", MODEL, "--output", "json"]

    def pull_with(token: str, hub: Hub, cache: str) -> subprocess.CompletedProcess[str]:
        settings = {"cache.dir": tmp_path / cache, "source.kind": kind, "source.endpoint": hub.url}
        line = program + [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
        environ = os.environ | {variable: token, "HOME": str(tmp_path), "MODELSCOPE_HOME": str(tmp_path / "ms")}
        return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60)

    with Hub(origin, MODEL, token=secret) as hub:
        done = pull_with(secret, hub, "right")
        assert done.returncode == 0, done.stderr
        refused = pull_with("wrong-" + secret, hub, "wrong")
    assert refused.returncode == 9
    error = json.loads(refused.stderr.splitlines()[-1])["error"]
    assert error["code"] == "source-refused"
    for written in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert secret not in written
    for path in tmp_path.rglob(".zops/*"):
        assert secret not in path.read_text(), path


def test_the_password_of_a_mirror_must_not_get_into_the_manifest_or_the_lock(tmp_path: Path, hub: Hub) -> None:
    endpoint = hub.url.replace("://", "://joe:pass-word@")
    cache = tmp_path / "cache"
    program = [sys.executable, "-m", "zops", "cache", "pull", "--model", MODEL, "--output", "json"]
    # The endpoint first: a lock holds the beginning of a long command line only.
    settings = {"source.endpoint": endpoint, "source.kind": "huggingface", "cache.dir": cache}
    hub.hold_bodies(after=1)
    process = subprocess.Popen(
        program + [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(process.communicate, timeout=60)
        try:
            (lock,) = eventually(lambda: list(cache.rglob("lock")), "the lock is there")
            holder = eventually(lock.read_text, "the holder has signed")
        finally:
            hub.gate.set()
        out, errors = ended.result()
    assert process.returncode == 0, errors
    assert "cache pull" in holder
    manifests = [path.read_text() for path in cache.rglob("manifest.json")]
    assert len(manifests) == 1
    for text in (holder, out, errors, *manifests):
        assert "pass-word" not in text

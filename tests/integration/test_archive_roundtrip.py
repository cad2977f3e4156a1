"""Backup and restore on real files: what goes in comes out, byte by byte and mode by mode, here and through GNU tar."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.archives import FILES, MODEL, REVISION, back_up, foreign_tar, make_snapshot, member, tree, vouch
from zops.archive.backup import backup
from zops.archive.format import ALIGNMENT, CHUNK, INDEX_NAME, MANIFEST_NAME
from zops.archive.restore import read_manifest_of, restore, verify_archive
from zops.archive.store import DirectoryStore, newest
from zops.cache.layout import choose, is_verified, place
from zops.cache.manifest import read_manifest, require_verified
from zops.errors import ArchiveDamaged, LockHeld, SnapshotDamaged, SnapshotMissing, UsageError
from zops.events import Finished, Progressed, Warned

PARTS = st.text(st.sampled_from("abcXYZ019._-é日 "), min_size=1, max_size=30).filter(
    lambda p: p.strip(".") and p[0] != "."
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(
    PATHS, st.tuples(st.binary(max_size=3000), st.sampled_from([0o644, 0o600, 0o755, 0o444])), max_size=8
)


def below_a_file(paths) -> bool:
    return any(f"{a}/" == b[: len(a) + 1] for a in paths for b in paths)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES.filter(lambda t: not below_a_file(t)), st.sampled_from(["zstd", "none"]))
def test_any_tree_must_come_back_equal_here_and_through_gnu_tar(tmp_path_factory, files, compression):
    root = tmp_path_factory.mktemp("any")
    contents = {path: content for path, (content, _) in files.items()} | {"model_index.json": b"{}"}
    snapshot = make_snapshot(root / "cache", contents)
    for path, (_, mode) in files.items():
        (snapshot / path).chmod(mode)
    vouch(snapshot, list(contents))
    archive, _ = back_up(snapshot, root / "store", compression)
    restored = restore(archive, root / "back").snapshots[0].path
    assert tree(restored) == tree(snapshot)
    assert is_verified(restored)
    (root / "tar").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", root / "tar"], check=True)
    assert tree(place(root / "tar", MODEL, REVISION)) == tree(snapshot)
    shutil.rmtree(root)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_shards_of_many_chunks_must_come_back_equal(tmp_path, compression):
    sizes = {"one.safetensors": CHUNK, "two.safetensors": 2 * CHUNK + 1, "three.safetensors": CHUNK - 512}
    contents = {name: os.urandom(size // 2) + bytes(size - size // 2) for name, size in sizes.items()}
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, **contents})
    archive, result = back_up(snapshot, tmp_path / "store", compression)
    assert result.size == archive.stat().st_size
    assert (result.ratio < 0.7) == (compression == "zstd")
    done: list[object] = []
    restored = restore(archive, tmp_path / "back", report=done.append).snapshots[0]
    assert tree(restored.path) == tree(snapshot)
    assert restored.digest == result.digests[0]
    progressed = [event for event in done if isinstance(event, Progressed)]
    assert progressed[-1].done == progressed[-1].total > sum(sizes.values())
    assert isinstance(done[-1], Finished)


def test_the_tiny_model_must_come_back_equal_and_be_found_by_the_cache(tmp_path, tiny_model):
    archive, result = back_up(tiny_model, tmp_path / "store")
    restore(archive, tmp_path / "back")
    manifest = require_verified(tiny_model)
    found = choose(tmp_path / "back", manifest.model)
    assert require_verified(found.path).digest == manifest.digest == result.digests[0]
    assert newest(DirectoryStore(tmp_path / "store"), manifest.model).location == str(archive)


def test_other_readers_must_understand_an_archive(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": bytes(CHUNK + 5)})
    for compression, command in (("zstd", ["zstd", "-q", "-t"]), ("none", ["tar", "-tf"])):
        archive, _ = back_up(snapshot, tmp_path / "store", compression)
        subprocess.run([*command, archive], check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as plain:
        names = plain.getnames()
        assert names[0] == MANIFEST_NAME
        assert names[-1] == INDEX_NAME
        assert not any("verified.json" in name for name in names)
        data = [m for m in plain if m.isreg() and m.size and m.name != INDEX_NAME]
        assert len(data) == 6
        assert all(m.offset_data % ALIGNMENT == 0 for m in data)


def test_a_frame_must_begin_where_a_members_data_begins(tmp_path):
    import zstandard

    snapshot = make_snapshot(tmp_path / "cache", {**FILES, "w.safetensors": b"weights!" * 700_000})
    archive, _ = back_up(snapshot, tmp_path / "store")
    rest, starts = archive.read_bytes(), []
    while rest[:4] == b"\x28\xb5\x2f\xfd":
        codec = zstandard.ZstdDecompressor().decompressobj()
        starts.append(codec.decompress(rest))
        rest = codec.unused_data
    for content in [*FILES.values(), b"weights!" * 500_000]:
        assert not content or any(piece.startswith(content[:100]) for piece in starts)


def test_a_second_restore_must_find_nothing_to_do(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    first = restore(archive, tmp_path / "back")
    before = first.snapshots[0].path.stat().st_ino
    second = restore(archive, tmp_path / "back")
    assert (first.changed, second.changed) == (True, False)
    assert second.snapshots[0].path.stat().st_ino == before
    assert second.files == first.files == len(FILES)


@pytest.mark.parametrize("state", ["different", "incomplete", "unverified", "a link", "a file"])
def test_what_is_in_the_way_must_be_replaced_by_the_verified_snapshot(tmp_path, state):
    snapshot = make_snapshot(tmp_path / "cache")
    archive, _ = back_up(snapshot, tmp_path / "store")
    target = place(tmp_path / "back", MODEL, REVISION)
    target.parent.mkdir(parents=True)
    elsewhere = make_snapshot(tmp_path / "other", {"model_index.json": b"[1]", "old": b"x"})
    if state == "a link":
        target.symlink_to(elsewhere)
    elif state == "a file":
        target.write_text("in the way")
    else:
        shutil.copytree(elsewhere if state == "different" else snapshot, target)
        if state == "incomplete":
            (target / "vae/config.json").unlink()
        if state == "unverified":
            (target / ".zops/verified.json").unlink()
    assert restore(archive, tmp_path / "back").changed
    assert tree(target) == tree(snapshot)
    assert not target.is_symlink()
    assert [path.name for path in target.parent.iterdir()] == [REVISION]
    assert (elsewhere / "old").read_bytes() == b"x"


def test_links_must_stay_inside_and_become_files_where_they_leave(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", {"model_index.json": b"{}", "vae/a.json": b"same"})
    blob = tmp_path / "blob"
    blob.write_bytes(b"weights")
    (snapshot / "vae/w.safetensors").symlink_to(blob)
    (snapshot / "b.json").symlink_to("vae/a.json")
    vouch(snapshot, ["model_index.json", "vae/a.json", "vae/w.safetensors", "b.json"])
    archive, _ = back_up(snapshot, tmp_path / "store")
    restored = restore(archive, tmp_path / "back").snapshots[0].path
    assert not (restored / "vae/w.safetensors").is_symlink()
    assert (restored / "vae/w.safetensors").read_bytes() == b"weights"
    assert (restored / "b.json").readlink() == Path("vae/a.json")
    assert is_verified(restored)


def test_two_snapshots_must_share_an_archive_and_come_back_alone_or_together(tmp_path):
    one = make_snapshot(tmp_path / "cache")
    make_snapshot(tmp_path / "cache", {"model_index.json": b"[]"}, model="b/c", revision="main")
    store = DirectoryStore(tmp_path / "store")
    result = backup([one, choose(tmp_path / "cache", "b/c")], store)
    assert [info.snapshots for info in store.list()] == [((MODEL, REVISION[:12]), ("b/c", "main"))]
    assert newest(store, "b/c") == newest(store, MODEL)
    alone = restore(result.location, tmp_path / "alone", model="b/c")
    assert [s.model for s in alone.snapshots] == ["b/c"]
    assert not (tmp_path / "alone/models/acme--painter").exists()
    assert len(restore(result.location, tmp_path / "both").snapshots) == 2
    with pytest.raises(SnapshotMissing, match="no snapshot of x/y"):
        restore(result.location, tmp_path / "none", model="x/y")
    with pytest.raises(UsageError, match="twice"):
        backup([one, one], store)
    with pytest.raises(UsageError):
        backup([], store)


def test_a_second_backup_in_the_same_second_must_not_replace_the_first(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    names = {back_up(snapshot, tmp_path / "store")[0].name for _ in range(3)}
    assert len(names) == 3
    infos = DirectoryStore(tmp_path / "store").list()
    assert [info.created for info in infos] == sorted({info.created for info in infos})


def test_an_unverified_snapshot_must_not_be_backed_up(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    (snapshot / ".zops/verified.json").unlink()
    with pytest.raises(SnapshotMissing) as caught:
        back_up(snapshot, tmp_path / "store")
    assert caught.value.code == "snapshot-unverified"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "missing"])
def test_a_file_that_changed_behind_the_marker_must_leave_no_archive(tmp_path, damage, monkeypatch):
    snapshot = make_snapshot(tmp_path / "cache")
    victim = snapshot / "vae/model.safetensors"
    # The quick check sees times and sizes; it is stilled so that the hash of what is read must find the damage alone.
    manifest = require_verified(snapshot)
    monkeypatch.setattr("zops.archive.backup.require_verified", lambda _: manifest)
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
        victim.write_bytes({"flip": flipped, "shorter": content[:-1], "longer": content + b"x"}[damage])
    with pytest.raises(SnapshotDamaged, match=r"vae/model\.safetensors"):
        back_up(snapshot, tmp_path / "store")
    assert list((tmp_path / "store").glob("*")) == []  # glob finds names with a dot too, and no missing directory


def test_what_an_archive_says_of_itself_must_be_had_without_reading_it_whole(tmp_path):
    archive, result = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    manifest = read_manifest_of(archive)
    assert [m.digest for m in manifest.snapshots.values()] == list(result.digests)
    check = verify_archive(archive)
    assert (check.verified, check.manifest) == (True, manifest)


def test_two_restores_at_once_must_not_meet(tmp_path, monkeypatch):
    from zops.cache.lock import hold
    from zops.events import silent

    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store")
    target = place(tmp_path / "back", MODEL, REVISION)
    monkeypatch.setattr("zops.archive.restore.hold", lambda path, report: hold(path, report, timeout_s=0))
    with hold(target.with_name(f".{REVISION}.lock"), silent), pytest.raises(LockHeld):
        restore(archive, tmp_path / "back")
    assert not target.exists()


# --- archives of other programs


def article_cache(root: Path, layout: str) -> tuple[Path, Path]:
    """Lay the files out as another tool would and return the cache and the snapshot in it."""
    cache = root / "workspace/model_cache"
    places = {
        "modelscope": "models/acme--painter/snapshots/master",
        "legacy": "hub/models/acme/painter",
        "older": "acme/painter",
        "huggingface": f"models--acme--painter/snapshots/{REVISION}",
    }
    snapshot = cache / places[layout]
    for path, content in FILES.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        if layout == "huggingface":
            blob = cache / "models--acme--painter/blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
        else:
            (snapshot / path).write_bytes(content)
    (snapshot / "README.md").write_text("for people")
    return cache, snapshot


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("layout", ["modelscope", "legacy", "older", "huggingface"])
def test_the_articles_own_backup_must_be_restored(tmp_path, layout, suffix):
    cache, _ = article_cache(tmp_path, layout)
    archive = tmp_path / f"backup.{suffix}"
    subprocess.run(["tar", "-caf", archive, "-C", cache.parent, cache.name], check=True)
    warned: list[object] = []
    result = restore(archive, tmp_path / "back", report=warned.append)
    restored = result.snapshots[0]
    revision = {"modelscope": "master", "huggingface": REVISION}.get(layout, "local")
    assert (restored.model, restored.revision) == (MODEL, revision)
    assert {p: c for p, (_, _, c) in tree(restored.path).items() if p in FILES} == FILES
    assert read_manifest(restored.path).origin == "local"
    assert is_verified(restored.path)
    texts = [event.text for event in warned if isinstance(event, Warned)]
    assert any("nothing vouches" in text for text in texts)
    assert any("README.md" in text for text in texts)
    assert not verify_archive(archive).verified
    assert read_manifest_of(archive) is None


def test_a_given_manifest_must_be_held_against_an_archive_of_another_program(tmp_path):
    cache, snapshot = article_cache(tmp_path, "modelscope")
    manifest = require_verified(make_snapshot(tmp_path / "true"))
    archive = tmp_path / "backup.tar.gz"
    subprocess.run(["tar", "-caf", archive, "-C", cache.parent, cache.name], check=True)
    restored = restore(archive, tmp_path / "back", manifest=manifest).snapshots[0]
    assert (restored.revision, restored.digest) == (REVISION, manifest.digest)
    assert not restore(archive, tmp_path / "back", manifest=manifest).changed
    for damage in (b"{}\n" * 299 + b"{]\n", b"{}\n", None):
        (snapshot / "vae/config.json").unlink()
        if damage is not None:
            (snapshot / "vae/config.json").write_bytes(damage)
        subprocess.run(["tar", "-caf", archive, "-C", cache.parent, cache.name], check=True)
        (snapshot / "vae/config.json").touch()
        with pytest.raises(ArchiveDamaged, match=r"vae/config\.json"):
            restore(archive, tmp_path / "bad", manifest=manifest)
        assert not (tmp_path / "bad").exists()


def test_a_known_model_must_match_the_catalogs_manifest(tmp_path):
    archive = foreign_tar(
        tmp_path / "x.tar", [(member("m/models/Tongyi-MAI--Z-Image-Turbo/snapshots/master/model_index.json"), b"{}")]
    )
    with pytest.raises(ArchiveDamaged, match="missing in the archive or have another size"):
        restore(archive, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_our_own_archive_packed_anew_by_gnu_tar_must_keep_its_manifest(tmp_path):
    snapshot = make_snapshot(tmp_path / "cache")
    archive = tmp_path / "again.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", tmp_path / "cache", "models"], check=True)
    restored = restore(archive, tmp_path / "back").snapshots[0]
    assert (restored.revision, restored.digest) == (REVISION, require_verified(snapshot).digest)
    assert read_manifest(restored.path).origin == "upstream"


def test_an_archive_that_does_not_tell_its_model_must_be_told_it(tmp_path):
    archive = foreign_tar(tmp_path / "x.tar", [(member("model_index.json"), b"{}"), (member("vae/config.json"), b"{}")])
    with pytest.raises(SnapshotMissing, match="does not tell its model"):
        restore(archive, tmp_path / "back")
    restored = restore(archive, tmp_path / "back", model="me/mine").snapshots[0]
    assert (restored.model, restored.revision, restored.files) == ("me/mine", "local", 2)
    empty = foreign_tar(tmp_path / "y.tar", [(member("readme"), b"")])
    with pytest.raises(SnapshotMissing, match=r"no model_index\.json"):
        restore(empty, tmp_path / "back", model="me/mine")


def test_half_finished_downloads_in_an_archive_must_be_passed_over(tmp_path):
    archive = foreign_tar(
        tmp_path / "x.tar",
        [
            (member("c/._____temp/models/acme/painter/model_index.json"), b"half"),
            (member("c/models/acme/painter/model_index.json"), b"whole"),
        ],
    )
    restored = restore(archive, tmp_path / "back").snapshots
    assert [(s.path / "model_index.json").read_bytes() for s in restored] == [b"whole"]


def test_the_manifest_in_an_archive_must_be_readable_json(tmp_path):
    archive, _ = back_up(make_snapshot(tmp_path / "cache"), tmp_path / "store", "none")
    with tarfile.open(archive) as plain:
        body = json.load(plain.extractfile(MANIFEST_NAME))
    assert body["format"] == 1
    assert body["snapshots"][0]["path"] == f"models/acme--painter/snapshots/{REVISION}"
    assert body["snapshots"][0]["manifest"]["model"] == MODEL

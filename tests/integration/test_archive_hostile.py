"""Archives made to do harm: each is refused, and neither the cache nor anything outside it changes."""

import tarfile
from pathlib import Path

import pytest

from tests.support.archives import FILES, member, tree
from tests.support.hostile import FOREIGN, OWN, Forgery, harm, in_snapshot, make_world, plain
from zops.archive.restore import restore, verify_archive
from zops.errors import ArchiveDamaged, SnapshotMissing


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


def test_the_forgers_true_archive_must_be_restored(tmp_path, world):
    archive = Forgery().write(tmp_path / "true.tar.zst")
    assert verify_archive(archive).verified
    restored = restore(archive, world / "cache").snapshots[0]
    assert {p: c for p, (_, _, c) in tree(restored.path).items() if p in FILES} == FILES
    assert (world / "victim").read_text() == "untouched"


@pytest.mark.parametrize("name", OWN)
def test_a_forged_archive_must_be_refused(tmp_path, world, name):
    assert harm(OWN[name].write(tmp_path / "forged.tar.zst"), world) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_a_hostile_archive_of_another_program_must_be_refused(tmp_path, world, name):
    assert harm(FOREIGN[name](tmp_path / "hostile.tar"), world) == []


@pytest.mark.parametrize("link", ["/etc/passwd", "../../../../../../x", "../../../../../.."])
def test_a_link_that_leaves_must_be_called_what_it_is(tmp_path, link):
    archive = plain(in_snapshot("vae/x.json", tarfile.SYMTYPE, link))(tmp_path / "x.tar")
    with pytest.raises(ArchiveDamaged, match="leads out of the archive") as caught:
        restore(archive, tmp_path / "back")
    assert caught.value.code == "archive-hostile"


def test_a_link_out_of_an_archive_beside_its_snapshots_must_lead_to_nothing(tmp_path, world):
    archive = plain((member("c/other", tarfile.SYMTYPE, "/etc"), b""))(tmp_path / "x.tar")
    restored = restore(archive, world / "cache").snapshots[0]
    assert restored.files == len(FILES)
    assert not [path for path in world.rglob("*") if path.is_symlink()]


def test_a_snapshot_that_is_not_asked_for_must_not_be_restored(tmp_path, world):
    with pytest.raises(SnapshotMissing):
        restore(Forgery().write(tmp_path / "x.tar.zst"), world / "cache", model="other/model")

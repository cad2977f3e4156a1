"""A thousand random damages, of which a verification must find every one and nothing else."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from tests.support.snapshots import write_safetensors
from zops.cache.manifest import FileEntry, Manifest, read_manifest, read_marker, write_manifest
from zops.cache.verify import pin, verify
from zops.errors import SnapshotMissing
from zops.events import silent

DAMAGES = 1000
AT_A_TIME = 10


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A pipeline of 60 small files, among them two of the same size and two of the same content."""
    dice = random.Random(1)
    (tmp_path / "model_index.json").write_text("{}")
    for number in range(30):
        write_safetensors(tmp_path / "transformer" / f"shard-{number}.safetensors", {f"w{number}": 500 + 97 * number})
        path = tmp_path / "tokenizer" / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([dice.random() for _ in range(1 + number)]))
    names = {f"w{number}": f"shard-{number}.safetensors" for number in range(30)}
    (tmp_path / "transformer" / "shard.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "tokenizer" / "twin.json").write_bytes((tmp_path / "tokenizer" / "7.json").read_bytes())
    pin(tmp_path, "owner/name", "r1", silent)
    verify(tmp_path, deep=True, report=silent)
    return tmp_path


def look(snapshot: Path, *, reread: bool = False) -> dict[str, str]:
    found = verify(snapshot, deep=not reread, reread=reread, report=silent)
    return {finding.path: finding.status for finding in found.findings if finding.status != "ok"}


def damage(dice: random.Random, snapshot: Path, names: list[str]) -> dict[str, str]:
    """Damage the file at the end of `names` (a swap takes two); return what is to be found."""
    name = names.pop()
    path = snapshot / name
    content = path.read_bytes()
    stat = path.stat()
    kind = dice.choice(("flip", "flip", "cut", "swap", "delete"))
    if kind == "swap":
        other = snapshot / (taken := names.pop())
        if other.read_bytes() == content:
            return {}
        path.rename(snapshot / "aside")
        other.rename(path)
        (snapshot / "aside").rename(other)
        same = len(content) == path.stat().st_size
        return dict.fromkeys((name, taken), "corrupt" if same else "wrong-size")
    if kind == "delete":
        path.unlink()
        return {name: "missing"}
    if kind == "cut":
        os.truncate(path, dice.randrange(len(content)))
        return {name: "wrong-size"}
    flipped = bytearray(content)
    bit = dice.randrange(len(content) * 8)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    # As a disk does it: nothing but the content tells.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {name: "corrupt"}


def test_a_thousand_damages_must_be_found_and_nothing_reported_where_nothing_was_done(snapshot: Path) -> None:
    dice = random.Random(2)
    manifest = read_manifest(snapshot)
    sound = {entry.path: (snapshot / entry.path).read_bytes() for entry in manifest.files}
    marker = (snapshot / ".zops" / "verified.json").read_bytes()
    done = 0
    while done < DAMAGES:
        names = dice.sample(sorted(sound), 2 * AT_A_TIME)
        expected: dict[str, str] = {}
        for _ in range(dice.randint(1, AT_A_TIME)):
            expected |= damage(dice, snapshot, names)
            done += 1
        for reread in (True, False):
            # Each clears the marker, without which the other has nothing to go by.
            (snapshot / ".zops" / "verified.json").write_bytes(marker)
            assert look(snapshot, reread=reread) == expected
            assert (read_marker(snapshot) is None) == bool(expected)
        for name in expected:
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).write_bytes(sound[name])
    assert look(snapshot) == {}


def test_a_reread_must_find_nothing_wrong_where_nothing_is_and_take_the_files_as_they_are_now(snapshot: Path) -> None:
    before = read_marker(snapshot)
    for path in snapshot.rglob("*.json"):
        if ".zops" not in path.parts:
            os.utime(path)
    assert not verify(snapshot, deep=False, report=silent).ok
    assert verify(snapshot, deep=False, reread=True, report=silent).ok
    assert verify(snapshot, deep=False, report=silent).ok
    after = read_marker(snapshot)
    assert after.verified_at == before.verified_at, "SHA-256 was not compared"
    assert after.blake3 == before.blake3


def test_a_reread_must_be_refused_where_nothing_was_recorded_for_this_manifest(snapshot: Path) -> None:
    pin(snapshot, "owner/name", "r2", silent)
    with pytest.raises(SnapshotMissing, match="recorded") as caught:
        verify(snapshot, deep=False, reread=True, report=silent)
    assert caught.value.code == "digests-missing"
    verify(snapshot, deep=True, report=silent)
    (snapshot / "model_index.json").write_text("[]")
    manifest = read_manifest(snapshot)
    other = tuple(FileEntry(e.path, e.size, "0" * 64) if e.path == "model_index.json" else e for e in manifest.files)
    write_manifest(snapshot, Manifest(manifest.model, manifest.revision, other))
    with pytest.raises(SnapshotMissing):
        verify(snapshot, deep=False, reread=True, report=silent)


def test_a_later_deep_verification_must_keep_what_the_first_recorded(snapshot: Path) -> None:
    before = read_marker(snapshot)
    assert len(before.blake3) == len(read_manifest(snapshot).files)
    assert verify(snapshot, deep=True, report=silent).ok
    assert read_marker(snapshot).blake3 == before.blake3
    assert read_marker(snapshot).verified_at > before.verified_at


def test_a_thousand_files_must_be_verified_quickly_in_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for number in range(999):
        path = tmp_path / "tokenizer" / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
    assert len(pin(tmp_path, "owner/name", "r1", silent).files) == 1000
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert verify(tmp_path, deep=False, report=silent).ok
        times.append(time.perf_counter() - began)
    # The bar is 50 ms and kept by a factor (benchmarks/cache/verify.py); here the machine is shared.
    assert min(times) < 0.05

"""A slim snapshot must make the same images, be made whole or not at all, and cost its parent nothing."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import ROOT, Host
from zops.cache import room
from zops.cache.layout import choose, find, is_verified, meant, place
from zops.cache.manifest import Manifest, read_manifest, require_verified
from zops.cache.pull import pull
from zops.cache.repair import repair
from zops.cache.slim import check_replaceable, is_slim, plan_slim, replace_parent, slim
from zops.cache.verify import pin, verify
from zops.errors import HostShort, SnapshotDamaged, UsageError, ZopsError
from zops.events import Event, Progressed, Warned, silent
from zops.spec import Source, Spec

MODEL = "zops/synthetic-tiny"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
# Kills at random moments; each costs one short process.
KILLS = 16


@pytest.fixture
def parent(tmp_path: Path, tiny_model: Path) -> Path:
    """Return the tiny model as a verified snapshot in a cache of its own."""
    return put_parent(tmp_path / "cache", tiny_model)


def put_parent(cache: Path, tiny_model: Path) -> Path:
    path = place(cache, MODEL, "seed-0")
    shutil.copytree(tiny_model, path)
    verify(path, deep=True, report=silent).require()
    return path


def cache_of(snapshot: Path) -> Path:
    return snapshot.parents[3]


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def size_of(snapshot: Path, path: str) -> int:
    return (snapshot / path).stat().st_size


def specify(path: Path, **changes: Any) -> Spec:
    return Spec.model_validate({"model": MODEL, "cache": {"dir": cache_of(path)}} | changes)


# --- what it holds


def test_a_slim_snapshot_must_be_verified_name_its_parent_and_weigh_what_was_planned(parent: Path) -> None:
    before = tree(parent)
    plan = plan_slim(parent)
    assert not plan.target.exists(), "planning must write nothing"
    result = slim(plan, silent)
    manifest = require_verified(result.path)
    assert result.path == parent.with_name("seed-0-bf16")
    assert (manifest.parent, manifest.derived) == (plan.manifest.digest, "bf16")
    assert (manifest.revision, manifest.base_revision, manifest.origin) == ("seed-0-bf16", "seed-0", "local")
    assert manifest.size == plan.size == sum(size_of(result.path, entry.path) for entry in manifest.files)
    assert verify(result.path, deep=True, report=silent).ok
    assert tree(parent) == before, "the parent was touched"
    assert {p.name for p in (result.path / ".zops").iterdir()} == {"manifest.json", "verified.json"}


def test_no_file_of_a_slim_snapshot_must_be_its_parents(parent: Path) -> None:
    result = slim(plan_slim(parent), silent)
    inodes = {path.stat().st_ino for path in parent.rglob("*") if path.is_file()}
    assert not inodes & {path.stat().st_ino for path in result.path.rglob("*") if path.is_file()}
    (result.path / "vae" / "config.json").write_text("{}")
    assert verify(parent, deep=True, report=silent).ok


def test_the_index_must_name_the_new_total_and_the_configuration_the_new_type(parent: Path) -> None:
    import torch
    from safetensors.torch import load_file

    config = parent / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float32"}))
    pin(parent, MODEL, "seed-0", silent)
    result = slim(plan_slim(parent), silent)
    index = json.loads((result.path / INDEX).read_text())
    assert index["weight_map"] == json.loads((parent / INDEX).read_text())["weight_map"]
    total = 0
    for name in sorted(set(index["weight_map"].values())):
        before, after = (load_file(root / "transformer" / name) for root in (parent, result.path))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor.to(torch.bfloat16)), key
        total += sum(tensor.nbytes for tensor in after.values())
    assert index["metadata"]["total_size"] == total
    assert json.loads((result.path / "transformer" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_images_of_a_slim_snapshot_must_equal_those_of_its_parent_in_bfloat16(
    parent: Path,
) -> None:
    # No HF_HUB_OFFLINE: read at the first import, it would hold for the hub tests of the same process too.
    import numpy as np
    import torch
    from diffusers import ZImagePipeline

    def images(snapshot: Path) -> Any:
        pipe = ZImagePipeline.from_pretrained(snapshot, local_files_only=True, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 0.0, "output_type": "np"}
        return pipe(["a red kite", "a harbour at dawn"], generator=generators, **options).images

    slimmed = slim(plan_slim(parent), silent)
    from_parent, from_slim = images(parent), images(slimmed.path)
    assert np.ptp(from_parent) > 0.1, "an empty picture proves nothing"
    np.testing.assert_array_equal(from_parent, from_slim)


def test_float32_weights_of_other_components_must_stay_and_be_told(parent: Path) -> None:
    from safetensors.torch import load_file, save_file

    vae = parent / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(vae).items()}, vae, metadata={"format": "pt"})
    pin(parent, MODEL, "seed-0", silent)
    told: list[Event] = []
    result = slim(plan_slim(parent), told.append)
    assert vae.read_bytes() == (result.path / vae.relative_to(parent)).read_bytes()
    assert next(event.text for event in told if isinstance(event, Warned)).startswith("vae/")


# --- run again, killed, out of room


def test_a_second_run_must_find_it_and_write_nothing(parent: Path) -> None:
    first = slim(plan_slim(parent), silent)
    stats = stats_of(first.path)
    second = slim(plan_slim(parent), silent)
    assert (first.changed, second.changed) == (True, False)
    assert stats_of(first.path) == stats
    assert is_slim(first.path)
    assert is_slim(parent) is None


def test_a_slim_snapshot_that_was_damaged_must_be_made_anew(parent: Path) -> None:
    first = slim(plan_slim(parent), silent)
    digest = first.manifest.digest
    with (first.path / SHARD).open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff")
    again = slim(plan_slim(parent), silent)
    assert again.changed
    assert again.manifest.digest == digest
    assert verify(first.path, deep=True, report=silent).ok


def test_no_hub_must_be_asked_for_the_files_of_a_slim_snapshot(parent: Path) -> None:
    made = slim(plan_slim(parent), silent).path
    (made / SHARD).write_bytes(b"damaged")
    with pytest.raises(UsageError) as caught:
        repair(made, Source(endpoint="http://127.0.0.1:9"), silent)
    assert caught.value.code == "source-lacks-derived"
    assert "zops cache slim" in caught.value.hint


def test_a_slim_snapshot_of_another_parent_must_be_made_anew(parent: Path) -> None:
    slim(plan_slim(parent), silent)
    (parent / "README.md").write_text("something else")
    pin(parent, MODEL, "seed-0", silent)
    again = slim(plan_slim(parent), silent)
    assert again.changed
    assert again.manifest.parent == require_verified(parent).digest


def stats_of(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


# Counts everything that is done to a file, and every block, and kills itself at the n-th; prints the count with n = 0.
DOOMED = """
import os, signal, sys
from pathlib import Path
from zops.cache import derive
from zops.cache.slim import plan_slim, slim
derive.BLOCK = 1 << 16
plan, deadline, count = plan_slim(Path(sys.argv[1])), int(sys.argv[2]), 0
def step(event, *_):
    global count
    if not isinstance(event, str) or event in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime"}:
        count += 1
        if count == deadline:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(step)
slim(plan, step)
print(count)
"""


def doomed(parent: Path, moment: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DOOMED, str(parent), str(moment)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_must_leave_nothing_half_and_go_on(parent: Path) -> None:
    whole = doomed(parent, 0)
    assert whole.returncode == 0, whole.stderr
    total = int(whole.stdout)
    target = plan_slim(parent).target
    digest = require_verified(target).digest
    moments = sorted(random.Random(7).sample(range(1, total + 1), KILLS))  # the seed names the moments
    # The last ones are where files move into place and the marker is written.
    for moment in [*moments, total - 6, total - 3, total - 1]:
        shutil.rmtree(target)
        killed = doomed(parent, moment)
        if killed.returncode == 0:
            # Its imports count too, and the first run may have compiled some of them: then the last moments never come.
            assert total - 6 <= int(killed.stdout) < moment
            continue
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not is_verified(target) or require_verified(target).digest == digest
        assert is_verified(choose(cache_of(parent), MODEL).path), "what was served before must still be"
        assert verify(parent, deep=False, report=silent).ok
        kept = recorded(target)
        result = slim(plan_slim(parent), silent)
        assert result.manifest.digest == digest, moment
        assert verify(target, deep=True, report=silent).ok
        assert {p.name for p in (target / ".zops").iterdir()} == {"manifest.json", "verified.json"}
        for path, stat in kept.items():
            found = (target / path).stat()
            assert (found.st_size, found.st_mtime_ns, found.st_ino) == stat, f"{path} was made twice"


def recorded(target: Path) -> dict[str, tuple[int, int, int]]:
    """Return the files that a killed run had finished, and how they looked."""
    try:
        body = json.loads((target / ".zops" / "incoming.json").read_text())
    except FileNotFoundError:
        return {}
    return {path: tuple(stat) for path, (_, *stat) in body["checked"].items()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        stream.truncate(0)
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave
        while left > 0:
            left -= stream.write(bytes(min(left, 1 << 20)))
    return ballast


def test_a_disk_that_fills_up_must_end_in_a_clear_error_with_the_parent_intact(
    small_disk: Path, tiny_model: Path
) -> None:
    parent = put_parent(small_disk / "cache", tiny_model)
    before = tree(parent)
    filled: list[Path] = []

    def report(event: Event) -> None:
        if isinstance(event, Progressed) and event.done and not filled:
            filled.append(fill(small_disk))

    with pytest.raises(HostShort) as caught:
        slim(plan_slim(parent), report)
    assert caught.value.code == "disk-full"
    assert tree(parent) == before
    assert is_verified(parent)
    assert choose(small_disk / "cache", MODEL).path == parent
    filled[0].unlink()
    assert verify(slim(plan_slim(parent), silent).path, deep=True, report=silent).ok


def test_too_little_room_must_be_told_before_anything_is_written(small_disk: Path, tiny_model: Path) -> None:
    parent = put_parent(small_disk / "cache", tiny_model)
    fill(small_disk, leave=room.RESERVE_BYTES)
    with pytest.raises(HostShort, match=r"GB free, .* GB are needed") as caught:
        slim(plan_slim(parent), silent)
    assert caught.value.code == "disk-full"
    assert [snapshot.path for snapshot in find(small_disk / "cache")] == [parent], "something was left behind"


# --- what it refuses


@pytest.mark.parametrize(
    "path", [SHARD, "text_encoder/model-00001-of-00003.safetensors", "tokenizer/vocab.json", INDEX]
)
def test_a_corrupt_parent_must_be_refused_and_not_be_served_any_more(parent: Path, path: str) -> None:
    stat = (parent / path).stat()
    data = bytearray((parent / path).read_bytes())
    data[-100] ^= 4
    (parent / path).write_bytes(data)
    os.utime(parent / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_verified(parent), "the flipped bit must not show in a stat"
    with pytest.raises(SnapshotDamaged, match=path) as caught:
        slim(plan_slim(parent), silent)
    assert caught.value.details["files"] == {path: "corrupt"}
    assert not is_verified(parent)
    assert not is_verified(parent.with_name("seed-0-bf16"))


def test_a_parent_that_lacks_a_file_must_be_refused_before_anything_is_written(parent: Path) -> None:
    (parent / SHARD).unlink()
    with pytest.raises(SnapshotDamaged, match=SHARD):
        plan_slim(parent)


def test_a_class_that_may_keep_weights_in_float32_must_be_refused(parent: Path) -> None:
    (parent / "transformer" / "config.json").write_text('{"_class_name": "SomeTransformer"}')
    pin(parent, MODEL, "seed-0", silent)
    with pytest.raises(UsageError, match="SomeTransformer") as caught:
        plan_slim(parent)
    assert caught.value.code == "slim-unknown-class"


def test_a_snapshot_without_float32_weights_must_be_refused(parent: Path) -> None:
    slimmed = slim(plan_slim(parent), silent).path
    other = place(cache_of(parent), MODEL, "other")
    shutil.copytree(slimmed, other, ignore=shutil.ignore_patterns(".zops"))
    pin(other, MODEL, "other", silent)
    with pytest.raises(UsageError) as caught:
        plan_slim(other)
    assert caught.value.code == "nothing-to-slim"


def test_another_snapshot_at_its_place_must_be_left_alone(parent: Path) -> None:
    target = parent.with_name("seed-0-bf16")
    shutil.copytree(parent, target, ignore=shutil.ignore_patterns(".zops"))
    before = tree(target)
    with pytest.raises(UsageError) as caught:
        slim(plan_slim(parent), silent)
    assert caught.value.code == "directory-not-empty"
    assert tree(target) == before


# --- which one is served


def test_choose_must_prefer_the_verified_slim_snapshot_of_the_wanted_revision(parent: Path) -> None:
    cache = cache_of(parent)
    slimmed = slim(plan_slim(parent), silent).path
    assert choose(cache, MODEL).path == slimmed
    assert choose(cache, MODEL, "seed-0").path == slimmed
    assert choose(cache, MODEL, "seed-0", full=True).path == parent
    assert choose(cache, MODEL, full=True).path == parent
    (slimmed / "model_index.json").touch()
    assert choose(cache, MODEL).path == parent, "one that changed since it was verified is not preferred"


def test_a_slim_snapshot_of_an_older_revision_must_not_pass_for_the_newest(parent: Path) -> None:
    newer = place(cache_of(parent), MODEL, "newer")
    shutil.copytree(parent, newer, ignore=shutil.ignore_patterns(".zops"))
    pin(newer, MODEL, "newer", silent)
    for path, moment in ((parent, 1e9), (newer, 1.1e9)):
        os.utime(path, (moment, moment))
    slim(plan_slim(parent), silent)
    assert choose(cache_of(parent), MODEL).path == newer
    slimmed = slim(plan_slim(newer), silent).path
    assert choose(cache_of(parent), MODEL).path == slimmed


def test_weights_that_are_loaded_as_float32_must_come_from_the_parent(parent: Path) -> None:
    slimmed = slim(plan_slim(parent), silent).path
    cases = {
        parent: ({"serve": {"dtype": "float32"}}, {"gpus": "none"}),
        slimmed: ({}, {"serve": {"dtype": "bfloat16"}, "gpus": "none"}),
    }
    for path, settings in cases.items():
        for setting in settings:
            assert meant(specify(parent, **setting)).path == path, setting


def test_a_branch_must_mean_the_slim_snapshot_of_what_it_holds(parent: Path) -> None:
    branch = parent.rename(parent.with_name("master"))
    slimmed = slim(plan_slim(branch), silent).path
    assert choose(cache_of(branch), MODEL, "master").path == slimmed


def test_a_pull_must_be_content_with_a_slim_snapshot_whose_parent_is_gone(parent: Path) -> None:
    slimmed = slim(plan_slim(parent), silent)
    replace_parent(slimmed, dict, silent)
    spec = specify(parent, source={"kind": "modelscope", "endpoint": "http://127.0.0.1:9", "revision": "seed-0"})
    result = pull(spec, silent)
    assert (result.snapshot.path, result.changed) == (slimmed.path, False)
    assert meant(specify(parent, gpus="none")).path == slimmed.path


def test_an_older_reader_must_see_a_plain_manifest(parent: Path) -> None:
    body = slim(plan_slim(parent), silent).manifest.as_json()
    assert Manifest.from_json({key: value for key, value in body.items() if key not in {"parent", "derived"}})
    full = read_manifest(parent)
    assert full is not None
    assert not {"parent", "derived"} & full.as_json().keys()


# --- instead of its parent


def test_a_parent_must_go_only_after_every_byte_of_the_slim_snapshot_was_right(parent: Path) -> None:
    slimmed = slim(plan_slim(parent), silent)
    shard = slimmed.path / SHARD
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SnapshotDamaged, match=SHARD):
        replace_parent(slimmed, dict, silent)
    assert is_verified(parent)
    again = slim(plan_slim(parent), silent)
    assert replace_parent(again, dict, silent) == again.size_before
    assert not parent.exists()
    assert [path.name for path in parent.parent.iterdir()] == ["seed-0-bf16"]
    assert choose(cache_of(parent), MODEL, "seed-0").path == again.path


@pytest.mark.parametrize("used", ["itself", "a file in it", "the whole cache"])
def test_a_parent_that_an_instance_uses_must_stay(parent: Path, used: str) -> None:
    place_used = {"itself": parent, "a file in it": parent / "vae", "the whole cache": cache_of(parent)}[used]
    slimmed = slim(plan_slim(parent), silent)

    def ask() -> dict[Path, tuple[str, ...]]:
        return {place_used.resolve(): ("demo (docker)",)}

    for attempt in (lambda: check_replaceable(parent, ask), lambda: replace_parent(slimmed, ask, silent)):
        with pytest.raises(ZopsError, match="demo") as caught:
            attempt()
        assert caught.value.code == "snapshot-in-use"
    assert is_verified(parent)


def test_a_link_and_huggingfaces_layout_must_never_be_removed(parent: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(parent)
    foreign = tmp_path / "hub" / "models--o--n" / "snapshots" / "c0ffee"
    shutil.copytree(parent, foreign)
    for path in (link, foreign):
        with pytest.raises(UsageError) as caught:
            check_replaceable(path, dict)
        assert caught.value.code == "snapshot-not-removable"
    slimmed = slim(plan_slim(foreign), silent).path
    assert slimmed == place(tmp_path / "hub", MODEL, "seed-0-bf16"), "another tool's layout gets nothing of ours"


@pytest.mark.slow
def test_the_command_must_refuse_while_an_instance_serves_the_parent_and_then_replace_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    host = Host(tmp_path / "host", tiny_model, name="slim", runtime="process")
    host.run("cache", "pull")
    try:
        served = Path(host.json("up", "--no-wait")["snapshot"])
        assert host.error("cache", "slim", "--replace", "--yes", status=1) == "snapshot-in-use"
        assert host.error("cache", "slim", str(served), "--replace", "--yes", status=1) == "snapshot-in-use"
    finally:
        host.run("down")
    assert host.error("cache", "slim", "--replace", status=2) == "needs-yes"
    assert not list(host.cache.rglob("*-bf16")), "what was refused must not have begun"
    assert host.json("cache", "slim", "--replace", "--yes")["removed_bytes"] > 0
    assert not served.exists()
    assert host.json("cache", "slim")["changed"] is False
    assert host.json("cache", "pull")["changed"] is False
    assert host.json("cache", "verify", "--deep")["revision"] == "seed-0-bf16"


@pytest.mark.slow
def test_provisioning_must_take_to_the_slim_snapshot_once_and_then_find_everything_done(
    tmp_path: Path, tiny_model: Path
) -> None:
    host = Host(tmp_path / "host", tiny_model, name="slimmed", runtime="process")
    serve = {"port": host.port, "warmup_size": 64, "startup_timeout_s": 120, "dtype": "bfloat16"}
    host.write(serve=serve)

    def provision() -> dict[str, str]:
        return {step["step"]: step["state"] for step in host.json("provision")["steps"]}

    try:
        provision()
        (parent,) = host.json("cache", "status")
        assert host.json("cache", "slim")["changed"]
        assert host.error("cache", "slim", "--replace", "--yes", status=1) == "snapshot-in-use"
        assert provision()["up"] == "done", "the instance must be made anew from the slim snapshot"
        assert set(provision().values()) == {"found"}
        assert host.json("cache", "slim", "--replace", "--yes")["removed_bytes"] == parent["size_bytes"]
        assert set(provision().values()) == {"found"}
        (only,) = host.json("cache", "status")
        assert (only["slim_of"], only["used_by"]) == ("seed-0", ["slimmed (process)"])
        assert host.json("cache", "prune", "--yes")["items"] == []
    finally:
        host.run("down")

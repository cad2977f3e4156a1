"""Pruning must take what nobody needs, say why, and never what somebody does."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.host import Host
from tests.support.snapshots import write_pipeline
from zops.cache.layout import choose, is_verified, place
from zops.cache.manifest import clear_marker, sidecar
from zops.cache.prune import Item, Rules, plan_prune, prune
from zops.cache.slim import plan_slim, slim
from zops.cache.verify import pin
from zops.catalog import Z_IMAGE_TURBO
from zops.events import silent

MODEL = "o/n"
HOUR = 3600.0
Outcome = dict[str, tuple[str, str]]


def snapshot(cache: Path, revision: str, *, age_h: float, model: str = MODEL, verified: bool = True) -> Path:
    """Put a snapshot into a cache, as old as is said."""
    path = write_pipeline(place(cache, model, revision), shard_bytes=10)
    (path / "README.md").write_text(revision)  # so that no two are alike
    (path / "vae" / "config.json").write_text(f'{{"revision": "{revision}"}}')
    pin(path, model, revision, silent)
    if not verified:
        clear_marker(path)
    made_old(path, age_h)
    return path


def made_old(path: Path, age_h: float) -> Path:
    for each in (*path.rglob("*"), path):
        if each.name == "verified.json" or each.is_dir() or SIDE in each.parts:
            os.utime(each, (time.time() - age_h * HOUR,) * 2)
    return path


SIDE = ".zops"


def look(cache: Path, model: str | None = MODEL, *, used=None, wanted=(), **rules) -> Outcome:
    """Return kind and state (with its reason where it is spared) of everything that could go, by its name."""
    return told(plan_prune(cache, model, Rules(**rules), used=used or {}, wanted=wanted))


def told(items: list[Item]) -> Outcome:
    return {item.path.name: (item.kind, item.state) for item in items}


def carry_out(cache: Path, *, used=None, ask=None, **rules) -> Outcome:
    items = plan_prune(cache, MODEL, Rules(**rules), used=used or {})
    return told(prune(items, ask or (lambda: used or {}), silent))


# --- superseded


def test_what_a_newer_verified_snapshot_supersedes_must_go_and_the_newest_stay(tmp_path: Path) -> None:
    old, older, new = (snapshot(tmp_path, r, age_h=h) for r, h in (("old", 20), ("older", 30), ("new", 10)))
    assert look(tmp_path) == {"old": ("superseded", "would"), "older": ("superseded", "would")}
    assert old.exists(), "looking must change nothing"
    assert carry_out(tmp_path) == {"old": ("superseded", "removed"), "older": ("superseded", "removed")}
    assert (old.exists(), older.exists(), is_verified(new)) == (False, False, True)
    assert sorted(path.name for path in new.parent.iterdir()) == ["new"]


def test_as_many_revisions_must_stay_as_are_to_be_kept(tmp_path: Path) -> None:
    for revision, age_h in (("a", 40), ("b", 30), ("c", 20), ("d", 10)):
        snapshot(tmp_path, revision, age_h=age_h)
    assert look(tmp_path, keep=2).keys() == {"a", "b"}
    assert look(tmp_path, keep=4) == {}


def test_the_only_verified_snapshot_must_never_go(tmp_path: Path) -> None:
    snapshot(tmp_path, "verified", age_h=99)
    snapshot(tmp_path, "newer", age_h=1, verified=False)
    assert look(tmp_path) == {}
    snapshot(tmp_path, "older", age_h=100, verified=False)
    assert look(tmp_path) == {"older": ("superseded", "would")}


def test_without_a_verified_snapshot_nothing_complete_must_go(tmp_path: Path) -> None:
    snapshot(tmp_path, "a", age_h=2, verified=False)
    snapshot(tmp_path, "b", age_h=1, verified=False)
    assert look(tmp_path) == {}


def test_the_pinned_commit_must_stay_though_another_is_newer(tmp_path: Path) -> None:
    model, commit = Z_IMAGE_TURBO.id, Z_IMAGE_TURBO.commit
    snapshot(tmp_path, commit, age_h=9, model=model)
    snapshot(tmp_path, "newer", age_h=1, model=model)
    assert look(tmp_path, model) == {"newer": ("superseded", "would")}
    assert choose(tmp_path, model).path.name == commit


def test_what_the_specification_means_must_stay_though_it_is_older(tmp_path: Path) -> None:
    old = snapshot(tmp_path, "old", age_h=20)
    snapshot(tmp_path, "new", age_h=1)
    assert look(tmp_path, wanted=[old]) == {"old": ("superseded", "spared")}


def test_another_model_must_not_count(tmp_path: Path) -> None:
    snapshot(tmp_path, "old", age_h=20)
    snapshot(tmp_path, "new", age_h=1, model="o/other")
    assert look(tmp_path) == {}
    assert look(tmp_path, None) == {}


def test_younger_ones_than_asked_for_must_stay(tmp_path: Path) -> None:
    for revision, age_h in (("a", 40), ("b", 20), ("c", 10)):
        snapshot(tmp_path, revision, age_h=age_h)
    assert look(tmp_path, older_than_s=30 * HOUR) == {"a": ("superseded", "would"), "b": ("superseded", "spared")}


# --- in use


def test_what_an_instance_uses_must_stay_even_when_it_was_started_after_the_look(tmp_path: Path) -> None:
    old = snapshot(tmp_path, "old", age_h=20)
    snapshot(tmp_path, "new", age_h=1)
    used = {old.resolve(): ("demo (docker)",)}
    assert look(tmp_path, used=used) == {"old": ("superseded", "spared")}
    assert carry_out(tmp_path, ask=lambda: used) == {"old": ("superseded", "spared")}
    assert is_verified(old)


def test_what_another_zops_works_on_must_stay(tmp_path: Path) -> None:
    old = snapshot(tmp_path, "old", age_h=20)
    snapshot(tmp_path, "new", age_h=1)
    items = plan_prune(tmp_path, MODEL, Rules(), used={})
    with (sidecar(old) / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert look(tmp_path) == {"old": ("superseded", "spared")}
        assert told(prune(items, dict, silent)) == {"old": ("superseded", "spared")}
    assert is_verified(old)


def test_what_stands_for_it_must_still_be_verified_when_something_goes(tmp_path: Path) -> None:
    old, new = snapshot(tmp_path, "old", age_h=20), snapshot(tmp_path, "new", age_h=1)
    items = plan_prune(tmp_path, MODEL, Rules(), used={})
    clear_marker(new)
    assert told(prune(items, dict, silent)) == {"old": ("superseded", "spared")}
    assert is_verified(old)


# --- slim ones and their parents


def test_the_parent_of_a_verified_slim_snapshot_must_go_and_the_slim_one_stay(tmp_path: Path, tiny_model: Path) -> None:
    parent = place(tmp_path, MODEL, "r1")
    shutil.copytree(tiny_model, parent, ignore=shutil.ignore_patterns(SIDE))
    pin(parent, MODEL, "r1", silent)
    snapshot(tmp_path, "old", age_h=20)
    slimmed = slim(plan_slim(parent), silent).path
    assert look(tmp_path, wanted=[parent]) == {"r1": ("slimmed", "spared"), "old": ("superseded", "would")}
    assert carry_out(tmp_path) == {"r1": ("slimmed", "removed"), "old": ("superseded", "removed")}
    assert is_verified(slimmed)
    assert not parent.exists()
    assert look(tmp_path) == {}


def test_the_parent_of_a_slim_snapshot_that_changed_must_stay(tmp_path: Path, tiny_model: Path) -> None:
    parent = place(tmp_path, MODEL, "r1")
    shutil.copytree(tiny_model, parent, ignore=shutil.ignore_patterns(SIDE))
    pin(parent, MODEL, "r1", silent)
    slimmed = slim(plan_slim(parent), silent).path
    (slimmed / "model_index.json").touch()
    assert "r1" not in look(tmp_path)


# --- leftovers


def test_a_pull_that_never_ended_must_go_and_so_must_what_a_repair_left(tmp_path: Path) -> None:
    begun = place(tmp_path, MODEL, "begun")
    (sidecar(begun) / "incoming" / "vae").mkdir(parents=True)
    (sidecar(begun) / "incoming" / "vae" / "part.incomplete").write_bytes(bytes(1000))
    good = snapshot(tmp_path, "good", age_h=1)
    (sidecar(good) / "incoming").mkdir()
    (sidecar(good) / "incoming.json").write_text("{}")
    assert look(tmp_path) == {"begun": ("leftover", "would"), SIDE: ("leftover", "would")}
    assert look(tmp_path, older_than_s=HOUR)["begun"] == ("leftover", "spared")
    carry_out(tmp_path)
    assert not begun.exists()
    assert is_verified(good)
    assert {path.name for path in sidecar(good).iterdir()} == {"manifest.json", "verified.json"}


@pytest.mark.parametrize("name", [".good.restoring", ".good.part"])
def test_what_killed_commands_left_under_hidden_names_must_go_once_it_is_idle(tmp_path: Path, name: str) -> None:
    good = snapshot(tmp_path, "good", age_h=1)
    left = good.with_name(name)
    left.mkdir()
    (left / "half").write_bytes(bytes(10))
    assert look(tmp_path) == {}, "somebody may be at work on it"
    for path in (left, left / "half"):
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    assert carry_out(tmp_path) == {name: ("leftover", "removed")}
    assert not left.exists()


def test_a_snapshot_that_was_moved_aside_must_never_be_taken_for_a_leftover(tmp_path: Path) -> None:
    good = snapshot(tmp_path, "good", age_h=50)
    aside = good.rename(good.with_name(".good.replaced"))
    for path in (aside, *aside.rglob("*")):
        os.utime(path, (time.time() - 50 * HOUR,) * 2)
    assert look(tmp_path) == {}
    assert aside.exists()


def test_a_removal_that_was_killed_must_be_finished_by_the_next(tmp_path: Path) -> None:
    snapshot(tmp_path, "new", age_h=1)
    old = snapshot(tmp_path, "old", age_h=20)
    script = """
import os, shutil, signal, sys
from pathlib import Path
from zops.cache.remove import remove_snapshot
from zops.events import silent
shutil.rmtree = lambda path: os.kill(os.getpid(), signal.SIGKILL)
remove_snapshot(Path(sys.argv[1]), dict, silent)
"""
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", script, str(old)], env=os.environ | {"PYTHONPATH": root}, check=False)
    assert not old.exists(), "it must go from everybody's sight at once"
    assert carry_out(tmp_path) == {".removed-old.part": ("leftover", "removed")}
    assert [path.name for path in old.parent.iterdir()] == ["new"]


# --- what belongs to others


def test_what_another_tool_fetched_must_stay_unless_it_is_asked_for(tmp_path: Path) -> None:
    snapshot(tmp_path, "new", age_h=1)
    foreign = made_old(write_pipeline(place(tmp_path, MODEL, "master"), shard_bytes=10), 30)
    legacy = made_old(write_pipeline(tmp_path / "hub" / "o" / "n", shard_bytes=10), 30)
    part = foreign / "vae" / "w.safetensors.incomplete"
    part.write_bytes(bytes(9))
    os.utime(part, (time.time() - 2 * HOUR,) * 2)
    os.utime(foreign, (time.time() - 30 * HOUR,) * 2)
    everything = {"master", "n", part.name}
    assert {name for name, (_, state) in look(tmp_path).items() if state == "spared"} == everything
    assert {name for name, (_, state) in look(tmp_path, all_layouts=True).items() if state == "would"} == everything
    carry_out(tmp_path)
    assert foreign.exists()
    carry_out(tmp_path, all_layouts=True)
    assert (foreign.exists(), legacy.exists()) == (False, False)


def test_huggingfaces_snapshots_must_stay_whatever_is_asked_for(tmp_path: Path) -> None:
    snapshot(tmp_path, "new", age_h=1)
    theirs = write_pipeline(tmp_path / "models--o--n" / "snapshots" / "abc", shard_bytes=10)
    pin(theirs, MODEL, "abc", silent)
    made_old(theirs, 30)
    assert look(tmp_path, all_layouts=True) == {"abc": ("superseded", "spared")}


def test_a_directory_that_is_a_snapshot_must_not_be_judged(tmp_path: Path) -> None:
    pin(write_pipeline(tmp_path, shard_bytes=10), MODEL, "r1", silent)
    clear_marker(tmp_path)
    assert look(tmp_path) == {}


# --- as it is typed


@pytest.mark.slow
def test_the_command_must_only_list_until_it_is_told_to_remove(tmp_path: Path, tiny_model: Path) -> None:
    host = Host(tmp_path / "host", tiny_model, name="prune", runtime="process", serve={"dtype": "bfloat16"})
    host.run("cache", "pull")
    parent = host.json("cache", "slim")["parent"]
    listed = host.json("cache", "prune")
    assert [(item["path"], item["kind"], item["state"]) for item in listed["items"]] == [(parent, "slimmed", "would")]
    assert listed["dry_run"]
    assert is_verified(Path(parent))
    assert host.json("cache", "prune", "--older-than", "1h", "--yes")["items"][0]["state"] == "spared"
    assert host.error("cache", "prune", "--older-than", "soon", status=2) == "usage"
    done = host.json("cache", "prune", "--yes")
    assert (done["items"][0]["state"], done["freed_bytes"]) == ("removed", listed["freed_bytes"])
    assert not Path(parent).exists()
    assert host.json("cache", "prune")["items"] == []
    assert host.json("cache", "verify")["revision"] == "seed-0-bf16"

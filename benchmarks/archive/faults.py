"""How backups and restores end when they are killed, damaged, starved and lied to: counted, as a table.

    python -m benchmarks.archive.faults [--kills 100] [--flips 2000] [--only kills,flips,...] [--json FILE]

Needs the packages of the tests, age's Python binding among them; the full disks need root. Exit status 1 when a promise
was broken: a byte restored that was not backed up, a damage not found, something left behind, a next run that fails.
"""

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyrage

from benchmarks.measure import print_table
from tests.support.archives import FILES, back_up, make_snapshot
from tests.support.bucket_faults import Stage, hurried, play, scenarios
from tests.support.damage import try_damages
from tests.support.full_disk import fill_backups, fill_restores, small_disk
from tests.support.hostile import FOREIGN, OWN, harm, make_world
from tests.support.kills import kill_backups, kill_restores, kill_uploads
from tests.support.s3 import BUCKET, Proxy, serve_bucket, settings
from zops.archive.backup import backup
from zops.archive.encryption import NO_KEYS, EncryptedStore, Keys, read_recipients
from zops.archive.format import Compression
from zops.archive.keys import read_identities
from zops.archive.store import DirectoryStore, open_store

KINDS: tuple[Compression, ...] = ("zstd", "none", "gzip")


@dataclass
class Count:
    """What was done, how often, and how it ended; `broken` names every broken promise."""

    what: str
    tried: int
    ended: str
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """What all of it plays with: a small and a larger verified snapshot, room, and how often."""

    scratch: Path
    kills: int
    flips: int

    def small(self) -> Path:
        """Return a snapshot whose archive is damaged bit by bit."""
        chance = random.Random(2)
        return self._snapshot("small", {"transformer/w.safetensors": chance.randbytes(150_000), "vae/z.bin": bytes(99)})

    def large(self) -> Path:
        """Return a snapshot of 30 MB in files of several chunks."""
        chance = random.Random(3)
        sizes = {"a/one.bin": 15_000_000, "b/two.bin": 9_000_000}
        return self._snapshot(
            "large", {name: chance.randbytes(size) for name, size in sizes.items()} | {"c/three.bin": bytes(6_000_000)}
        )

    def room(self, name: str) -> Path:
        """Return an empty directory."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def _snapshot(self, name: str, files: dict[str, bytes]) -> Path:
        return make_snapshot(self.room(name), {**FILES, **files})


def play_kills(world: World) -> Iterator[Count]:
    """SIGKILL at random moments of backups and restores, then the same again."""
    snapshot = world.large()
    for compression in KINDS:
        kills = kill_backups(snapshot, world.room("kills"), world.kills, compression=compression)
        ended = f"{kills.killed} killed in time, {kills.resumed} gone on with"
        yield Count(f"backup killed ({compression}), run again", kills.tried, ended, kills.wrong)
    for compression in KINDS:
        archive, _ = back_up(snapshot, world.room("store"), compression)
        for over_another in (False, True):
            count = -(-world.kills // 6)
            kills = kill_restores(archive, world.room("kills"), count, over_another=over_another)
            ended = f"{kills.killed} killed in time, {kills.resumed} gone on with"
            over = "over another snapshot" if over_another else "into an empty cache"
            yield Count(f"restore killed ({compression}), {over}, run again", kills.tried, ended, kills.wrong)


def play_uploads(world: World) -> Iterator[Count]:
    """SIGKILL at random moments of uploads, then the same again."""
    with _bucket() as (endpoint, uploads), _environ(endpoint, world):
        kills = kill_uploads(world.large(), world.room("kills"), f"s3://{BUCKET}/kills", world.kills, uploads)
    ended = f"{kills.killed} killed in time, {kills.resumed} left parts, which the next run did not send again"
    yield Count("upload to S3 killed, run again", kills.tried, ended, kills.wrong)


def play_flips(world: World) -> Iterator[Count]:
    """Flip bits of archives and cut them; verify and restore must both find every damage."""
    snapshot = world.small()
    for compression in KINDS:
        archive, _ = back_up(snapshot, world.room("store"), compression)
        yield _damaged(archive, world, NO_KEYS)
    secret = pyrage.x25519.Identity.generate()
    keys, recipients = Keys(tuple(read_identities(str(secret)))), read_recipients([str(secret.to_public())])
    for compression in KINDS:
        store = DirectoryStore(world.room("store"))
        backup([snapshot], EncryptedStore(store, recipients, keys), compression=compression)
        yield _damaged(Path(store.list()[0].location), world, keys)


def _damaged(archive: Path, world: World, keys: Keys) -> Count:
    outcome = try_damages(archive, world.scratch / "back", world.flips, keys=keys)
    broken = outcome.wrong + [f"{outcome.harmless} damages were not found by restore"] * bool(outcome.harmless)
    kind = archive.name[archive.name.index(".tar") :]
    ended = f"{outcome.refused} found by verify and by restore"
    return Count(f"bit flipped or cut short, {kind}", outcome.tried, ended, broken)


def play_full_disks(world: World) -> Iterator[Count]:
    """Let a disk fill up behind the back of backups and restores, with more and more room left."""
    if os.geteuid() != 0:
        print("full disks are not played: they need root", file=sys.stderr)
        return
    chance = random.Random(4)
    files = {**FILES, "a/one.bin": chance.randbytes(5_000_000), "b/two.bin": chance.randbytes(4_000_000)}
    snapshot = make_snapshot(world.room("nine"), files)
    sizes = list(range(0, 9_600_000, 200_000))
    for compression in KINDS:
        archive, _ = back_up(snapshot, world.room("store"), compression)
        with small_disk(world.scratch / "disk") as disk:
            backups = fill_backups(snapshot, disk, compression, sizes)
            restores = fill_restores(archive, disk, snapshot, sizes)
        (world.scratch / "disk").rmdir()
        for what, filled in (("backup", backups), ("restore", restores)):
            ended = f"{filled.full} said so, {filled.tried - filled.full} fitted"
            yield Count(f"disk full during {what} ({compression})", filled.tried, ended, filled.wrong)


def play_bucket(world: World) -> Iterator[Count]:
    """Let a bucket answer errors, stall, drop, cut and change bytes."""
    snapshot = world.large()
    counts: dict[str, Count] = {}
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    with _bucket() as (endpoint, uploads), Proxy(endpoint) as proxy, hurried(), _environ(proxy.url, world):
        stage = Stage(proxy, open_store(f"s3://{BUCKET}/faults"), snapshot, world.scratch / "back", uploads)
        for scenario in scenarios():
            what = f"S3 during {scenario.work}: {scenario.what}"
            count = counts.setdefault(what, Count(what, 0, ""))
            end, wrong = play(scenario, stage)
            count.tried += 1
            count.broken += [f"{scenario}: {each}" for each in wrong]
            ends[what][end] += 1
    for what, count in counts.items():
        count.ended = ", ".join(f"{number} {end}" for end, number in sorted(ends[what].items()))
        yield count


def play_hostile(world: World) -> Iterator[Count]:
    """Restore archives that were made to do harm."""
    ours = {name: forgery.write for name, forgery in OWN.items()}
    for what, archives in (("our format", ours), ("other programs' formats", FOREIGN)):
        count = Count(f"hostile archives of {what}", len(archives), "")
        for name, write in archives.items():
            directory = make_world(world.room("world"))
            archive = write(world.scratch / "hostile.tar")
            count.broken += [f"{name}: {each}" for each in harm(archive, directory)]
        count.ended = f"{count.tried - len(count.broken)} refused"
        yield count


@contextmanager
def _bucket() -> Iterator[tuple[str, Callable[[], int]]]:
    """Give the address of an empty bucket, and what counts its unfinished uploads."""
    # It logs every request, and what it makes of those that are cut.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with contextmanager(serve_bucket)() as (endpoint, client):
        yield endpoint, lambda: len(client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


@contextmanager
def _environ(endpoint: str, world: World) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(settings(endpoint, world.room("home")))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


SECTIONS: dict[str, Callable[[World], Iterator[Count]]] = {
    "kills": play_kills,
    "uploads": play_uploads,
    "flips": play_flips,
    "full": play_full_disks,
    "bucket": play_bucket,
    "hostile": play_hostile,
}


def main() -> int:
    """Play everything, print what came of it, and return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--flips", type=int, default=2000, help="of each kind of archive (default: %(default)s)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="zops-faults-") as scratch:
        world = World(Path(scratch), given.kills, given.flips)
        for name in given.only.split(","):
            began = time.monotonic()
            for count in SECTIONS[name](world):
                counts.append(count)
                print(f"{count.what}: {count.tried}, {count.ended}, {len(count.broken)} broken", flush=True)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print()
    print_table(
        ("what", "times", "how it ended", "broken"), ((c.what, c.tried, c.ended, len(c.broken)) for c in counts)
    )
    broken = [promise for count in counts for promise in count.broken]
    print("\n".join(["", *broken, f"promises broken: {len(broken)}"]))
    if given.json:
        given.json.write_text(json.dumps([asdict(count) for count in counts], indent=1) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())

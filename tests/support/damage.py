"""Archives damaged at random, with a count of what became of each.

The short forms run in the suite, the long ones (2,000 damages of each kind) in benchmarks/archive.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.archives import tree
from zops.archive.encryption import NO_KEYS, Keys
from zops.archive.restore import restore, verify_archive
from zops.archive.store import open_archive
from zops.cache.manifest import Manifest
from zops.errors import ZopsError


@dataclass
class Outcome:
    """How often something was tried, was refused, or did no harm; what went wrong, in words."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: list[str] = field(default_factory=list)


def damages(whole: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` damaged forms of an archive: a flipped bit, or cut at a random place."""
    chance = random.Random(seed)
    for number in range(count):
        if number % 3 == 2:
            place = chance.randrange(len(whole))
            yield f"cut at {place}", whole[:place]
        else:
            place = chance.randrange(len(whole) * 8)
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            yield f"bit {place} flipped", bytes(changed)


def try_damages(
    archive: Path,
    scratch: Path,
    count: int,
    *,
    seed: int = 7,
    manifest: Manifest | None = None,
    verify: bool = True,
    keys: Keys = NO_KEYS,
) -> Outcome:
    """Restore damaged forms of an archive into `scratch`, which must not exist then or hold exactly the true files.

    Args:
        archive: a sound archive; it is left as it was.
        scratch: where to restore to.
        count: how many forms.
        seed: of the random places.
        manifest: what an archive of another program must contain.
        verify: whether `verify_archive` must find each damage too (one of another program cannot tell).
        keys: what opens it, where it is encrypted.
    """
    whole = archive.read_bytes()
    true = _contents(restore(open_archive(archive, keys), scratch, manifest=manifest).snapshots[0].path)
    shutil.rmtree(scratch)
    outcome = Outcome()
    victim = archive.with_name(f"damaged-{archive.name}")
    for what, content in damages(whole, count, seed):
        victim.write_bytes(content)
        outcome.tried += 1
        if verify and not _refuses(lambda: verify_archive(open_archive(victim, keys))):
            outcome.wrong.append(f"{what}: verify found nothing")
        if _refuses(lambda: restore(open_archive(victim, keys), scratch, manifest=manifest)):
            outcome.refused += 1
            if scratch.exists():
                outcome.wrong.append(f"{what}: refused, but something was left")
        elif _contents(next(scratch.glob("models/*/snapshots/*"))) == true:
            outcome.harmless += 1
        else:
            outcome.wrong.append(f"{what}: wrong files were restored")
        shutil.rmtree(scratch, ignore_errors=True)
    victim.unlink()
    return outcome


def _refuses(function: Callable[[], object]) -> bool:
    try:
        function()
    except ZopsError:
        return True
    return False


def _contents(snapshot: Path) -> dict[str, bytes]:
    return {path: content for path, (_, _, content) in tree(snapshot).items() if content}

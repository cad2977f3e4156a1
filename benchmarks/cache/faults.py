"""How pulls end when hubs misbehave and processes are killed: every schedule and 50 kills, as a table.

Run from the repository: `python -m benchmarks.cache.faults [--kills 50]`. Exit status 1 when a promise was broken.
"""

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support import faults, small_ranges
from tests.support.snapshots import write_pipeline


def main(argv: list[str]) -> int:
    """Play everything and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="moments at which a pull is killed (default: 50)")
    options = parser.parse_args(argv)
    os.environ.update(faults.TIMEOUTS)
    small_ranges.shrink()
    with tempfile.TemporaryDirectory() as scratch:
        origin = write_pipeline(Path(scratch) / "origin", shard_bytes=3_000_000)
        broken = play_schedules(origin, Path(scratch)) + play_kills(origin, Path(scratch), options.kills)
    print(f"\npromises broken: {broken}")
    return 1 if broken else 0


def play_schedules(origin: Path, scratch: Path) -> int:
    """Play every schedule of faults; return how many ended otherwise than promised."""
    print(f"{'HUB':<12}{'FAULT':<10}{'WITHOUT':<9}{'SEED':>4}{'FAULTS':>8}{'REQUESTS':>10}  {'END':<10}NAMED")
    ends: collections.Counter[str] = collections.Counter()
    broken = 0
    for number, schedule in enumerate(faults.schedules()):
        left = f"{schedule.hub:<12}{schedule.kind:<10}{schedule.unable:<9}{schedule.seed:>4}"
        try:
            end = faults.play(schedule, origin, scratch / f"faults-{number}")
        except Exception as error:  # noqa: BLE001 - a broken promise is a row of the table
            broken += 1
            print(f"{left}{'':>18}  BROKEN    {type(error).__name__}: {error}")
            continue
        ends[end.outcome] += 1
        print(f"{left}{end.faults:>8}{end.requests:>10}  {end.outcome:<10}{', '.join(end.named)}")
    print(
        f"\n{sum(ends.values()) + broken} schedules: {ends['verified']} ended verified, {ends['refused']} with an error"
    )
    return broken


def play_kills(origin: Path, scratch: Path, count: int) -> int:
    """Kill pulls at random moments; return how many were not completed well by the next run."""
    dice = random.Random(50)
    print(f"\n{'HUB':<12}{'KILLED AT':>10}{'KEPT MB':>9}{'FILES':>7}{'AGAIN':>7}")
    broken = ended = 0
    began = time.monotonic()
    for number in range(count):
        kind, share = faults.HUBS[number % 2], dice.uniform(0, 1.15)
        try:
            killed = faults.kill(kind, share, origin, scratch / f"kill-{number}")
        except Exception as error:  # noqa: BLE001 - as above
            broken += 1
            print(f"{kind:<12}{share:>9.0%}  BROKEN {type(error).__name__}: {error}")
            continue
        broken += killed.bytes_sent_again > 0
        ended += killed.ended_before
        kept = killed.bytes_kept / 1e6
        print(f"{kind:<12}{share:>9.0%}{kept:>9.2f}{killed.files_kept:>7}{killed.bytes_sent_again:>7}")
    seconds = time.monotonic() - began
    print(
        f"\n{count} kills in {seconds:.0f} s ({ended} came after the end); every other next run completed: {not broken}"
    )
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

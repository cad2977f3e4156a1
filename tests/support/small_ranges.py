"""`zops` with ranges of a size that a test can afford: `python -m tests.support.small_ranges cache pull ...`."""

import os
import sys

from zops.cache import fetch, ranges
from zops.cli.main import run

RANGE_BYTES = 256 << 10


def shrink() -> None:
    """Fetch files of half a megabyte and more in ranges, and do not wait long after a failure."""
    ranges.RANGE_BYTES = RANGE_BYTES
    ranges.RANGED_BYTES = 2 * RANGE_BYTES
    fetch.FIRST_WAIT_S = 0.01


def command(*arguments: str) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "tests.support.small_ranges", *arguments]


if __name__ == "__main__":
    shrink()
    if moment := os.environ.get("TEST_EXIT_AT"):
        from tests.support.crash import exit_at

        exit_at(int(moment), os.environ["TEST_EXIT_BELOW"])
    sys.exit(run(sys.argv[1:]))

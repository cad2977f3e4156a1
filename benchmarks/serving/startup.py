"""How long `zops serve` takes until it is ready, with the tiny model, and in which phases.

    python -m benchmarks.serving.startup [--runs 5] [--cold] [--json FILE]

Bar: 8 s, warm. --cold adds a run whose imports come from the disk: everything that the server and the worker import is
dropped from the page cache first; what could not be dropped, because a running process has it mapped, is named.
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.measure import describe_host, evict, print_table
from tests.support.serving import start_server, stop_hard
from zops.cache.synthetic import synthesize_snapshot
from zops.serving.messages import PHASES

BAR_S = 8.0
GIVE_UP_S = 120.0


def start(snapshot: Path, directory: Path) -> dict[str, float]:
    """Start a server and stop it; return when it answered, when it was ready, and the seconds of each phase."""
    began = time.monotonic()
    server = start_server(snapshot, directory, OMP_NUM_THREADS="1")
    found: dict[str, float] = {}
    try:
        while "ready" not in found:
            assert time.monotonic() - began < GIVE_UP_S, server.log.read_text(encoding="utf-8")
            assert server.process.poll() is None, server.log.read_text(encoding="utf-8")
            time.sleep(0.02)
            try:
                answer = server.call("GET", "/readyz")
            except OSError:
                continue
            found.setdefault("answers", time.monotonic() - began)
            if answer.status == 200:
                found["ready"] = time.monotonic() - began
        return found | answer.json["phases"]
    finally:
        stop_hard(server)


def drop_imports() -> str:
    """Drop the interpreter's libraries from the page cache; return what of them is still there, in words."""
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib")}
    try:
        evict(path for root in roots for path in Path(root).rglob("*") if path.is_file() and path.stat().st_size)
    except AssertionError as error:
        return str(error)
    return "nothing is still in memory"


def main() -> int:
    """Measure, print, and return 1 when the bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="zops-startup-") as scratch:
        snapshot = synthesize_snapshot(Path(scratch) / "tiny", "tiny").path
        start(snapshot, Path(scratch))  # fills the page cache, and compiles what was not yet
        for number in range(given.runs):
            runs[f"warm {number + 1}"] = start(snapshot, Path(scratch))
        warm = list(runs.values())
        if given.cold:
            left = drop_imports()
            runs[f"cold imports ({left})"] = start(snapshot, Path(scratch))
    middle = {name: statistics.median(run[name] for run in warm) for name in warm[0]}
    runs["median, warm"] = middle
    columns = ("answers", "ready", *PHASES)
    print(f"{describe_host()}; seconds from the start of the process; phases are the worker's, and some overlap")
    print_table(("run", *columns), [(name, *(f"{run[each]:.2f}" for each in columns)) for name, run in runs.items()])
    kept = middle["ready"] <= BAR_S
    print(f"ready within {BAR_S:g} s: {'PASS' if kept else 'missed'}")
    if given.json:
        given.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())

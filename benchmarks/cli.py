"""How fast the command line answers, beside the hubs' own: medians of whole processes, interleaved in one run.

    python -m benchmarks.cli [--runs 15]

Bar: `zops --help` under 200 ms.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "zops --help": [str(BIN / "zops"), "--help"],
    "zops config show": [str(BIN / "zops"), "config", "show"],
    "zops model list": [str(BIN / "zops"), "model", "list"],
    "zops cache status": [str(BIN / "zops"), "cache", "status"],
    "hf --help": [str(BIN / "hf"), "--help"],
    "modelscope --help": [str(BIN / "modelscope"), "--help"],
}


def seconds(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):  # the first round warms the page cache and is dropped
        for name, argv in COMMANDS.items():
            taken[name].append(seconds(argv))
    print(f"{'command':<20} {'median':>9} {'fastest':>9}   of {runs} runs, warm")
    for name, times in taken.items():
        print(f"{name:<20} {statistics.median(times[1:]) * 1000:>6.0f} ms {min(times[1:]) * 1000:>6.0f} ms")


if __name__ == "__main__":
    main()

"""How long `zops health` takes, as a whole process, on one instance that is well; beside what else one would type.

    python -m benchmarks.health.probe --runtime docker --name zops [--runs 25]

Run it where the instance runs. What else: `docker inspect` for the state and `curl` for /readyz, one after the other,
which tell neither of the GPU, nor of the disk, nor of the queue. Interleaved in one run; the first round is dropped.
Bar: median under 300 ms.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ZOPS = str(Path(sys.executable).parent / "zops")
BAR_S = 0.3
# As for users: what was compiled once is kept.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", default="docker", choices=["docker", "process"])
    parser.add_argument("--name", default="zops")
    parser.add_argument("--runs", type=int, default=25)
    asked = parser.parse_args()
    own = [ZOPS, "health", "--runtime", asked.runtime, "--name", asked.name]
    seen = subprocess.run([*own, "--output", "json"], capture_output=True, text=True, check=False)
    if seen.returncode:
        sys.exit(f"the instance must be well to be measured: {seen.stderr or seen.stdout}")
    listed = subprocess.run(
        [ZOPS, "ps", "--runtime", asked.runtime, "--output", "json"], capture_output=True, text=True, check=True
    )
    url = next(one["url"] for one in json.loads(listed.stdout) if one["name"] == asked.name)
    commands = {
        "zops health": [own],
        "zops health --format nagios": [[*own, "--format", "nagios"]],
        "zops --version": [[ZOPS, "--version"]],
        "python -c pass": [[sys.executable, "-c", "pass"]],
        "curl /readyz": [["curl", "-fsS", f"{url}/readyz"]],
    }
    if asked.runtime == "docker":
        inspect = ["docker", "inspect", f"zops-{asked.name}"]
        commands["docker inspect + curl /readyz"] = [inspect, *commands["curl /readyz"]]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(asked.runs + 1):
        for name, calls in commands.items():
            began = time.perf_counter()
            for call in calls:
                subprocess.run(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT, check=True)
            taken[name].append(time.perf_counter() - began)
    print(f"{'command':<32} {'median':>9} {'p95':>9}   of {asked.runs} runs, warm, runtime {asked.runtime}")
    for name, times in taken.items():
        p95 = statistics.quantiles(times[1:], n=20)[-1]
        print(f"{name:<32} {statistics.median(times[1:]) * 1000:>6.0f} ms {p95 * 1000:>6.0f} ms")
    median = statistics.median(taken["zops health"][1:])
    print(f"bar: {BAR_S * 1000:.0f} ms; {'held' if median < BAR_S else 'MISSED'}")


if __name__ == "__main__":
    main()

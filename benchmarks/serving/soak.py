"""Fifteen minutes of everything at once, while workers are killed: is any promise of the server broken?

    python -m benchmarks.serving.soak [--minutes 15] [--clients 64] [--workers 2] [--json FILE]

Exit status 1 when one was. tests/integration/test_serving_soak.py plays it in short.
"""

import argparse
import collections
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.measure import describe_host, print_table
from benchmarks.serving.clients import LEFT, Client, Ending, Keys
from benchmarks.serving.recipes import Golden, recipes
from benchmarks.serving.watch import Strike, Watch, children_of, descriptors, is_lively, resident_bytes, strike
from tests.support.serving import Server, start_server, stop_hard
from tests.support.waiting import eventually
from zops.cache.synthetic import synthesize_snapshot
from zops.spec.keys import hash_key, new_key

GROWTH_BYTES = 50_000_000
"""How much the HTTP process may grow after its first minute under load."""
SETTLE_S = 60.0
"""Within it all must be quiet and whole after the load."""
EVERY_WORKER = 5
"""Each strike of this number hits all workers, so that there is a time without any."""


@dataclass(frozen=True)
class Plan:
    """How hard and how long."""

    seconds: float
    clients: int
    workers: int
    strike_every_s: float = 20.0
    recipes: int = 27
    seed: int = 0
    hold_s: float = 60.0
    """Time at the beginning in which memory may still grow."""


@dataclass
class Findings:
    """What came of it."""

    plan: Plan
    endings: list[Ending]
    strikes: list[Strike]
    faults: list[str]
    memory: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.faults


def soak(plan: Plan, root: Path) -> Findings:
    """Play a plan in a directory."""
    snapshot = synthesize_snapshot(root / "tiny", "tiny").path
    keys, file = write_keys(root / "keys")
    bearer = {"Authorization": f"Bearer {keys.good[0]}"}
    settings = {
        "ZOPS_SERVE_API_KEYS": str(file),
        "ZOPS_SERVE_MAX_QUEUE": "24",
        "ZOPS_SERVE_MAX_BATCH": "4",
        # As much as a few hundred of these small images: the store must have reached its bound in the first minute.
        "ZOPS_SERVE_RESULTS_BYTES": "4MiB",
    }
    alone = start_server(snapshot, root / "alone", **settings | {"ZOPS_SERVE_WORKERS": "1", "ZOPS_SERVE_MAX_BATCH": "1"})
    try:
        golden = Golden(alone.wait_ready(), recipes(plan.recipes), bearer)
    finally:
        stop_hard(alone)
    server = start_server(snapshot, root / "soak", **settings | {"ZOPS_SERVE_WORKERS": str(plan.workers)})
    try:
        server.wait_ready()
        eventually(lambda: all_ready(server), "all workers", timeout_s=60)
        return play(plan, server, golden, keys)
    finally:
        stop_hard(server)


def play(plan: Plan, server: Server, golden: Golden, keys: Keys) -> Findings:
    """Put a server under load, strike its workers, and judge."""
    dice, stop = random.Random(plan.seed), threading.Event()
    watch = Watch(server.port, server.process.pid)
    descriptors_before = descriptors(watch.pid)
    clients = [
        Client(server.port, golden, keys, random.Random(plan.seed * 1000 + number), stop)
        for number in range(plan.clients)
    ]
    threads = [threading.Thread(target=each.run, daemon=True) for each in (watch, *clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    strikes: list[Strike] = []
    count = 0
    while (left_s := began + plan.seconds - time.monotonic()) > 0:
        time.sleep(min(plan.strike_every_s, left_s))
        if left_s > plan.strike_every_s:
            count += 1
            number = signal.SIGKILL if count % 2 else signal.SIGSTOP
            strikes += strike(watch, number, dice, every=count % EVERY_WORKER == 0)
            print(f"{time.monotonic() - began:6.0f} s  {number.name}  {tell(watch, clients)}", file=sys.stderr)
    stop.set()
    deadline = time.monotonic() + SETTLE_S + max(0.0, 200 - SETTLE_S)
    for thread in threads[1:]:
        thread.join(max(0.0, deadline - time.monotonic()))
    faults = [f"client {n} is still not answered" for n, thread in enumerate(threads[1:]) if thread.is_alive()]
    faults += judge_quiet(server, descriptors_before)
    watch.stop.set()
    threads[0].join(40)
    endings = [ending for client in clients for ending in client.endings]
    faults += [f"{ending.kind}: {ending.fault}" for ending in endings if ending.fault]
    faults += watch.judge(strikes, endings)
    memory = judge_memory(watch, began + plan.hold_s, faults)
    metrics = read_metrics(server)
    faults += judge_stop(server, watch)
    return Findings(plan, endings, strikes, faults, memory, metrics)


def judge_quiet(server: Server, descriptors_before: int) -> list[str]:
    """Return what is not empty, not whole or not closed a while after the load."""

    def quiet() -> list[str]:
        queue, metrics = server.state["queue"], read_metrics(server)
        open_now = descriptors(server.process.pid)
        checks = {
            f"the queue is {queue}": queue["waiting"] == queue["running"] == 0,
            "jobs are open": metrics["zops_jobs"] == 0,
            "not all workers are ready": all_ready(server),
            # One or two for the connection that asks.
            f"{open_now} descriptors are open, {descriptors_before} were": open_now <= descriptors_before + 3,
        }
        return [text for text, fine in checks.items() if not fine]

    deadline = time.monotonic() + SETTLE_S
    while (faults := quiet()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [f"{SETTLE_S:g} s after the load {fault}" for fault in faults]


def judge_memory(watch: Watch, since: float, faults: list[str]) -> dict[str, float]:
    """Add a fault when the HTTP process grew; return the figures in MB."""
    early = [size for at, size in watch.memory if at <= since]
    late = [size for at, size in watch.memory if at > since]
    held = early[-1]
    most = max(late, default=held)
    if most - held > GROWTH_BYTES:
        faults.append(f"the HTTP process grew by {(most - held) / 1e6:.0f} MB")
    figures = {"at first": early[0], "after warm-up": held, "most later": most, "at the end": watch.memory[-1][1]}
    return {name: round(size / 1e6, 1) for name, size in figures.items()}


def judge_stop(server: Server, watch: Watch) -> list[str]:
    """Stop the server; return what it left behind."""
    family = watch.workers | children_of(server.process.pid)
    began = time.monotonic()
    status = server.stop()
    faults = [] if status == 0 else [f"the server ended with {status}"]
    if (took := time.monotonic() - began) > 10:
        faults.append(f"an idle server took {took:.1f} s to stop")
    deadline = time.monotonic() + 5
    while (left := [pid for pid in family if is_lively(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    faults += [f"process {pid} was left behind" for pid in left]
    log = server.log.read_text(encoding="utf-8")
    if "Traceback" in log or '"traceback"' in log:
        at = log.lower().index("traceback")
        faults.append(f"a traceback is in the log: {log[max(0, at - 300) : at + 1500]}")
    return faults


def write_keys(directory: Path) -> tuple[Keys, Path]:
    """Write a file of API keys."""
    directory.mkdir()
    keys = Keys((new_key(), new_key(), new_key()), limited=new_key(), narrow=new_key())
    named = {f"good-{n}": (key, "") for n, key in enumerate(keys.good)}
    named |= {
        "limited": (keys.limited, "\n    requests_per_minute: 30"),
        "narrow": (keys.narrow, "\n    max_waiting: 1"),
    }
    text = "".join(f"  {name}:\n    sha256: {hash_key(key)}{more}\n" for name, (key, more) in named.items())
    file = directory / "keys.yaml"
    file.write_text("keys:\n" + text, encoding="utf-8")
    file.chmod(0o600)
    return keys, file


def all_ready(server: Server) -> bool:
    """Tell whether every worker takes pictures."""
    return all(worker["phase"] == "ready" for worker in server.state["workers"])


def read_metrics(server: Server) -> dict[str, float]:
    """Return the metrics by name and labels."""
    text = server.call("GET", "/metrics").body.decode()
    return {name: float(value) for name, value in re.findall(r"^(zops_\S+) (\S+)$", text, re.MULTILINE)}


def tell(watch: Watch, clients: Sequence[Client]) -> str:
    """Return where the soak is."""
    endings = [ending for client in clients for ending in list(client.endings)]
    broken = sum(bool(ending.fault) for ending in endings)
    pictures = sum(ending.pictures for ending in endings)
    return f"{len(endings)} calls, {pictures} pictures, {broken} broken, {resident_bytes(watch.pid) / 1e6:.0f} MB"


def show(findings: Findings) -> None:
    """Print what came of it."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for ending in findings.endings:
        status = {LEFT: "left", -1: "BROKEN"}.get(ending.status, str(ending.status))
        counts[ending.kind, f"{status} {ending.code}".strip()] += 1
    rows = []
    for (kind, status), count in sorted(counts.items()):
        times = [e.seconds for e in findings.endings if e.kind == kind and status == "200" == str(e.status)]
        rows.append((kind, status, count, *(f"{value:.2f}" for value in percentiles(times))))
    print_table(("kind", "ending", "calls", "p50 s", "p99 s"), rows)
    metrics = findings.metrics
    lost = {name: int(value) for name, value in metrics.items() if "restarts_total{" in name or "dropped_total{" in name}
    print(f"\n{describe_host()}; {findings.plan}")
    print(f"{len(findings.endings)} calls, {sum(e.pictures for e in findings.endings)} pictures compared with golden ones")
    print(f"{len(findings.strikes)} workers struck, {int(metrics['zops_retried_total'])} pictures made again; {lost}")
    print(f"HTTP process, MB: {findings.memory}")
    for fault, count in collections.Counter(findings.faults).most_common():
        print(f"BROKEN {count}x: {fault}")
    print(f"verdict: {'every promise kept' if findings.kept else f'{len(findings.faults)} promises broken'}")


def percentiles(times: Sequence[float]) -> tuple[float, ...]:
    """Return median and 99th percentile; nothing of nothing."""
    if len(times) < 2:
        return tuple(times) * 2
    return statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")[98]


def main() -> int:
    """Play, print, and return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strike-every", type=float, default=20.0, metavar="S")
    parser.add_argument("--dir", type=Path, help="keep everything here (default: a temporary directory)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    seconds = given.minutes * 60
    plan = Plan(
        seconds, given.clients, given.workers, given.strike_every, seed=given.seed, hold_s=min(60.0, seconds / 3)
    )
    with tempfile.TemporaryDirectory(prefix="zops-soak-") as scratch:
        findings = soak(plan, given.dir or Path(scratch))
    show(findings)
    if given.json:
        tree = {"plan": asdict(plan), "faults": findings.faults, "memory_mb": findings.memory, "metrics": findings.metrics}
        tree["endings"] = [asdict(ending) for ending in findings.endings]
        given.json.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return int(not findings.kept)


if __name__ == "__main__":
    sys.exit(main())

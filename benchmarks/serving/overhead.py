"""What HTTP, the queue and the hop to another process cost, beside the pipeline called in a loop in one process.

    python -m benchmarks.serving.overhead [--requests 400] [--threads 1] [--json FILE]

Both make the same images with the tiny model and as many threads; blocks of either take turns, so that what else the
machine does meets both alike. Bars: for one client at most 5 ms more at the median and 15 ms at the 99th percentile;
with 16 clients at least 0.95 of the loop's images a second.
"""

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import describe_host, print_table
from benchmarks.serving.loop import FORWARDS, PROMPT, SIZE, Loop
from tests.support.serving import Server, start_server, stop_hard
from zops.cache.synthetic import synthesize_snapshot

BLOCK = 20
CLIENTS = 16
BLOCK_EACH = 4
"""Images of each client in a block of the throughput."""
MEDIAN_BAR_S, LATE_BAR_S, THROUGHPUT_BAR = 0.005, 0.015, 0.95


@dataclass(frozen=True)
class Figure:
    """What was measured, what it is compared to, and how far apart they may be."""

    what: str
    server: str
    loop: str
    compared: str
    bar: str
    verdict: str


class Line:
    """One client with one connection that is kept."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def make(self, seed: int) -> tuple[float, dict[str, float]]:
        """Make one image; return the seconds until it was here, and those that the receipt tells of each phase."""
        fields = {"prompt": PROMPT, "size": f"{SIZE}x{SIZE}", "seed": seed, "num_inference_steps": FORWARDS}
        began = time.perf_counter()
        body = json.dumps(fields).encode()
        self._connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        took = time.perf_counter() - began
        assert answer.status == 200, content[:300]
        [item] = json.loads(content)["data"]
        return took, item["receipt"]["seconds"]


def measure_one_client(server: Server, loop: Loop, requests: int) -> list[Figure]:
    """Compare single requests, and look into where the time goes."""
    line = Line(server.port)
    for seed in range(BLOCK):
        line.make(seed)
    asked: list[tuple[float, dict[str, float]]] = []
    alone: list[float] = []
    for first in range(0, requests, BLOCK):
        asked += [line.make(first + number) for number in range(BLOCK)]
        alone += loop.make(BLOCK, first)
    walls = [wall for wall, _ in asked]
    figures = []
    for what, bar_s, pick in (("median", MEDIAN_BAR_S, statistics.median), ("p99", LATE_BAR_S, _late)):
        more_s = pick(walls) - pick(alone)
        figures.append(
            Figure(f"one client, {what}", _ms(pick(walls)), _ms(pick(alone)), f"{_ms(more_s)} more", _ms(bar_s),
                   "PASS" if more_s <= bar_s else "missed")
        )  # fmt: skip
    made = [sum(seconds[phase] for phase in ("text", "denoise", "decode")) for _, seconds in asked]
    around = [wall - inside for wall, inside in zip(walls, made, strict=True)]
    figures += [
        Figure("the worker's own phases, median", _ms(statistics.median(made)), _ms(statistics.median(alone)),
               f"{_ms(statistics.median(made) - statistics.median(alone))} more", "", ""),
        Figure("all around them, median", _ms(statistics.median(around)), "", "", "", ""),
        Figure("all around them, p99", _ms(_late(around)), "", "", "", ""),
    ]  # fmt: skip
    for phase in ("queue", "text", "denoise", "decode", "encode"):
        values = [seconds[phase] for _, seconds in asked]
        figures.append(Figure(f"  {phase}, median", _ms(statistics.median(values)), "", "", "", ""))
    return figures


def measure_throughput(server: Server, loop: Loop, images: int, what: str) -> Figure:
    """Compare images a second, with 16 clients."""
    lines = [Line(server.port) for _ in range(CLIENTS)]
    _all_at_once(lines, 2)
    rates, alone = [], []
    count = CLIENTS * BLOCK_EACH
    for first in range(0, images, count):
        rates.append(count / _seconds(lambda: _all_at_once(lines, BLOCK_EACH)))
        alone.append(count / _seconds(lambda: loop.make(count, first)))  # noqa: B023 - called at once
    server_rate, loop_rate = statistics.median(rates), statistics.median(alone)
    # Of each block and the one right after it, which had the same company on the machine.
    ratio = statistics.median(rate / other for rate, other in zip(rates, alone, strict=True))
    return Figure(
        f"{CLIENTS} clients, {what}", f"{server_rate:.2f} images/s", f"{loop_rate:.2f} images/s", f"{ratio:.3f}",
        f"{THROUGHPUT_BAR}", "PASS" if ratio >= THROUGHPUT_BAR else "missed",
    )  # fmt: skip


def _all_at_once(lines: list[Line], each: int) -> None:
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(each):
                lines[number].make(number * each + turn)
        except BaseException as error:  # noqa: BLE001 - raised below
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _late(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def main() -> int:
    """Measure, print, and return 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--images", type=int, default=512, help="of each case of throughput")
    parser.add_argument("--threads", type=int, default=1, help="of the worker's torch, and of the loop's")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(prefix="zops-overhead-") as scratch:
        snapshot = synthesize_snapshot(Path(scratch) / "tiny", "tiny").path
        loop = Loop(snapshot, given.threads)
        try:
            for what, settings in (
                ("default batching (1 on a CPU)", {}),
                ("max_batch 4", {"ZOPS_SERVE_MAX_BATCH": "4"}),
            ):
                server = start_server(snapshot, Path(scratch), OMP_NUM_THREADS=str(given.threads), **settings)
                try:
                    server.wait_ready()
                    if not settings:
                        figures += measure_one_client(server, loop, given.requests)
                    figures.append(measure_throughput(server, loop, given.images, what))
                finally:
                    stop_hard(server)
        finally:
            loop.close()
    print(f"{describe_host()}; {SIZE}x{SIZE}, {FORWARDS} forwards, threads: {given.threads}")
    print_table(("what", "server", "loop", "compared", "bar", ""), [tuple(asdict(each).values()) for each in figures])
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n", encoding="utf-8")
    # Batches of the tiny model on a CPU are shown, not judged: by default there are none.
    return int(any(each.verdict == "missed" for each in figures[:-1]))


if __name__ == "__main__":
    sys.exit(main())

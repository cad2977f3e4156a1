"""A healthy server that is as busy as it can be, under watch: is it ever healed, which it must not be?

    python -m benchmarks.health.calm [--minutes 30] [--clients 16] [--image zops-inference] [--json FILE]

Needs root and a Docker engine with the inference image. The watch has its default thresholds at a short interval, and
makes a canary each minute in the midst of the load. Exit status 1 when anything was healed.
"""

import argparse
import base64
import http.client
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import describe_host
from tests.support.engine_faults import Victim, fill_cache
from tests.support.host import free_port
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.watching import Watching, watching

SIZES = ("64x64", "64x64", "64x64", "128x128", "256x256", "512x512")
"""What clients ask for: many small pictures, and a few that hold everybody up for seconds."""
LOOK_EVERY_S = 2.0


@dataclass
class Calm:
    """What came of it."""

    seconds: float
    pictures: int
    refused: int
    """Requests that found the queue full, which is as it should be."""
    failed: list[str]
    heals: int
    verdicts: list[str]
    """Every change of the verdict after the first, with its code."""
    loud: list[str]
    slowest_probe_s: float
    """Of the watch's own."""
    canaries_s: list[float] = field(default_factory=list)
    """What each canary took, its time in the queue included."""

    @property
    def kept(self) -> bool:
        """Whether nothing was healed, the server was busy, and every answer was right."""
        return self.heals == 0 and self.pictures > 0 and not self.failed


class Crowd:
    """Clients that ask for one picture after another."""

    def __init__(self, port: int, count: int) -> None:
        self.pictures = self.refused = 0
        self.failed: list[str] = []
        self._port, self._stop, self._lock = port, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Ask for no more, and wait for the answers that are due."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        dice = random.Random(number)
        while not self._stop.is_set():
            try:
                status, body = self._ask(dice)
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, repr(error).encode()
            with self._lock:
                if status == 200:
                    base64.b64decode(json.loads(body)["data"][0]["b64_json"])
                    self.pictures += 1
                elif status == 429:
                    self.refused += 1
                else:
                    self.failed.append(f"{status} {body[:200].decode(errors='replace')}")
            if status != 200:
                self._stop.wait(0.2)

    def _ask(self, dice: random.Random) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            request = {"prompt": "a busy street", "size": dice.choice(SIZES), "seed": dice.randrange(1 << 30)}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", json.dumps(request), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def keep_calm(engine: PrivateEngine, root: Path, *, seconds: float, clients: int, canary_every_s: float) -> Calm:
    """Load a server for so long while it is watched."""
    victim = Victim.of(engine, fill_cache(root / "cache"), "busy", serve={"request_timeout_s": 120})
    victim.up()
    try:
        victim.wait_ready()
        page = f"127.0.0.1:{free_port()}"
        settings = {"interval_s": LOOK_EVERY_S, "canary_every_s": canary_every_s, "listen": page}
        with watching(root / "watch", engine=engine.url, watch=settings) as watch:
            first = watch.expect(0, "verdict", instance=victim.name, verdict="ok")["seconds_at"]
            began, started = time.monotonic(), victim.state["StartedAt"]
            crowd = Crowd(victim.spec.serve.port, clients)
            figures = Figures(page)
            while time.monotonic() - began < seconds:
                time.sleep(min(LOOK_EVERY_S, max(0.0, began + seconds - time.monotonic())))
                figures.look()
                assert watch.process.poll() is None, watch.errors
            crowd.leave()
            calm = _sum_up(watch, victim, crowd, first, figures)
            calm.seconds = time.monotonic() - began
            if victim.state["StartedAt"] != started:
                calm.failed.append("the container was started anew")
            return calm
    finally:
        victim.remove()


class Figures:
    """What the watch's page of metrics said, look by look."""

    def __init__(self, page: str) -> None:
        self.slowest_probe_s = 0.0
        self.canaries: dict[float, float] = {}
        self._url = f"http://{page}/metrics"

    def look(self) -> None:
        """Read the page once."""
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            text = answer.read().decode()
        found = {
            name: float(value) for name, value in re.findall(r"^zops_watch_(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)
        }
        self.slowest_probe_s = max(self.slowest_probe_s, found.get("probe_seconds", 0.0))
        if "canary_seconds" in found:
            self.canaries[found["last_canary_timestamp_seconds"]] = found["canary_seconds"]


def _sum_up(watch: Watching, victim: Victim, crowd: Crowd, since: float, figures: Figures) -> Calm:
    def told(event: dict[str, Any]) -> str:
        return f"{event['was']} -> {event['verdict']} {event['code']} {event['reason']}".strip()

    events = [
        one for one in watch.events if one["seconds_at"] > since and one.get("instance", victim.name) == victim.name
    ]
    return Calm(
        seconds=0.0,
        pictures=crowd.pictures,
        refused=crowd.refused,
        failed=crowd.failed[:5],
        heals=len(watch.since(since, "healing", instance=victim.name)),
        verdicts=[told(event) for event in events if event["event"] == "verdict"],
        loud=[event["event"] for event in events if event["event"] in {"gave-up", "warning", "engine-unreachable"}],
        slowest_probe_s=figures.slowest_probe_s,
        canaries_s=list(figures.canaries.values()),
    )


def main() -> int:
    """Run, print, and return 1 when anything was healed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--canary-every", type=float, default=60.0, metavar="S")
    parser.add_argument("--image", default="zops-inference")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zops-calm-") as scratch, private_engine(given.image) as engine:
        calm = keep_calm(
            engine,
            Path(scratch),
            seconds=given.minutes * 60,
            clients=given.clients,
            canary_every_s=given.canary_every,
        )
    print(f"{describe_host()}; {calm.seconds / 60:.1f} minutes, {given.clients} clients")
    print(
        f"{calm.pictures} pictures, {calm.refused} requests refused for a full queue, failed: {calm.failed or 'none'}"
    )
    print(f"slowest probe {calm.slowest_probe_s:.3f} s; changes of the verdict: {len(calm.verdicts)}")
    for text in calm.verdicts:
        print(f"  {text}")
    if calm.canaries_s:
        middle, most = statistics.median(calm.canaries_s), max(calm.canaries_s)
        print(f"{len(calm.canaries_s)} canaries (queue included): median {middle:.2f} s, longest {most:.2f} s")
    print(f"heals: {calm.heals} (must be 0): {'kept' if calm.kept else 'BROKEN'}")
    if given.json:
        given.json.write_text(json.dumps(asdict(calm)) + "\n")
    return int(not calm.kept)


if __name__ == "__main__":
    sys.exit(main())

"""An instance of the process runtime that does what a file beside it says: where `zops serve` would stand.

{"ready": 503, "hang": ["/livez"], "black": true, "refuse": true, "readiness": {...}, "slow_s": 3}
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.instance import Behaviour, picture, png, running

POLL_S = 0.02


def black(width: int, height: int) -> bytes:
    """Return a PNG without anything on it."""
    return png(width, height, lambda _x, _y: b"\x00\x00\x00")


def follow(file: Path, behaviour: Behaviour, over: threading.Event) -> None:
    """Take up what the file says, again and again."""
    while not over.wait(POLL_S):
        try:
            said: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        behaviour.ready = said.get("ready", 200)
        behaviour.readiness = {"status": "ready", "phase": "ready", "reason": ""} | said.get("readiness", {})
        behaviour.hang = set(said.get("hang", []))
        paint = black if said.get("black") else picture
        slow_s = said.get("slow_s", 0.0)
        behaviour.image = lambda width, height, paint=paint, slow_s=slow_s: time.sleep(slow_s) or paint(width, height)
        full = {"error": {"message": "the queue is full", "type": "server_error", "code": "queue_full"}}
        behaviour.refusal = (429, full) if said.get("refuse") else None


if __name__ == "__main__":
    # What is waited for must be blocked, in every thread, or it ends the process with a status of its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    ended = threading.Event()
    with running(int(os.environ["ZOPS_SERVE_PORT"])) as (_, made):
        threading.Thread(target=follow, args=(Path(sys.argv[1]), made, ended), daemon=True).start()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        ended.set()

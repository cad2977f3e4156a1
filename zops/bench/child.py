"""Measurements in a fresh process: it gets a task as JSON, and tells figures and progress as JSON lines.

Fresh, because an allocator, an imported library or a warm kernel of the case before would be part of the next figure.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from zops.errors import ZopsError

_GRACE_S = 5.0


def run_inside(kind: str, task: Mapping[str, Any], *, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Run `zops.bench.inside` on a task and yield what it tells, as it does; it ends with the iteration.

    Raises:
        ZopsError: `bench-failed` when it ends with an error or takes longer than `timeout_s`, with its last line.
    """
    argv = [sys.executable, "-m", "zops.bench.inside", kind]
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            argv, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )

        def give_up() -> None:
            late.set()
            child.kill()

        clock = threading.Timer(timeout_s, give_up)
        clock.daemon = True  # Ctrl-C may come before it is in our hands; no end may wait for it
        try:
            clock.start()
            assert child.stdin, "asked for above"
            assert child.stdout, "asked for above"
            with child.stdin as into:
                into.write(json.dumps(task))
            for line in child.stdout:
                # Libraries print too; what is ours is one JSON object a line.
                if line.startswith("{"):
                    yield json.loads(line)
            status = child.wait()
        except BrokenPipeError:
            status = child.wait()
        finally:
            clock.cancel()
            _end(child)
        if status != 0:
            said.seek(0)
            why = f"it took longer than {timeout_s:.0f} s" if late.is_set() else _last_line(said.read(), status)
            raise ZopsError(f"a measurement of {kind} ended without a result: {why}", code="bench-failed")


def _environment() -> dict[str, str]:
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # As the worker of `zops serve` sets it: equal seeds must give equal images.
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        # The child finds this very zops, installed or not.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",
    }


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for pipe in filter(None, (child.stdin, child.stdout)):
        with suppress(BrokenPipeError):
            pipe.close()


def _last_line(text: str, status: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"status {status}"

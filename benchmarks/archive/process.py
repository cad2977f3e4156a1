"""The programs that are measured, each in a process of its own: zops, and those that it is held against."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Runs a command of zops and says at the end, on another pipe, how much memory it had at most: what the kernel tells
# the parent of a child counts the parent's own memory too, at the moment of the fork.
_CHILD = """
import os, sys
from zops.cli.main import main
try:
    main()
finally:
    with open("/proc/self/status") as status, open(int(os.environ["BENCH_PEAK"]), "w") as told:
        told.write(status.read().partition("VmHWM:")[2].split()[0])
"""


@dataclass(frozen=True)
class Ran:
    """A command of zops that has ended.

    Attributes:
        seconds: from the start of the process to its end.
        peak: bytes of memory at most.
        answer: its JSON.
    """

    seconds: float
    peak: int
    answer: Any


def run_zops(*arguments: str | Path, cwd: Path, environ: Mapping[str, str] | None = None) -> Ran:
    """Run a command of zops; its answer is JSON.

    Raises:
        RuntimeError: with what it said, when it fails.
    """
    reader, writer = os.pipe()
    variables = {**os.environ, **(environ or {}), "PYTHONPATH": str(ROOT), "BENCH_PEAK": str(writer)}
    command = [sys.executable, "-c", _CHILD, *map(str, arguments), "--output", "json"]
    began = time.perf_counter()
    done = subprocess.run(
        command, check=False, cwd=cwd, env=variables, pass_fds=[writer], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    os.close(writer)
    with os.fdopen(reader) as told:
        peak = told.read()
    if done.returncode:
        raise RuntimeError(f"zops {arguments[0]} {arguments[1]} failed: {done.stdout}{done.stderr}")
    return Ran(seconds, int(peak) * 1024, json.loads(done.stdout))


def run_shell(command: str, *, environ: Mapping[str, str] | None = None, **places: str | Path) -> None:
    """Run a line of shell, in which `$NAME` is a place; raises when it, or anything in a pipe, fails."""
    variables = {**os.environ, **(environ or {}), **{name: str(place) for name, place in places.items()}}
    line = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(line, check=False, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr.decode(errors='replace')}")

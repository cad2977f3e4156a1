"""Faults of an instance in a container, each made on a real engine and taken back, whatever a test made of it.

Processes are found and struck from outside, as this host's own kernel would: the engine must run on this host and the
tests as root.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker.errors

from tests.support.host import ROOT, free_port
from tests.support.private_engine import PrivateEngine
from tests.support.waiting import eventually
from zops.cache.manifest import read_manifest
from zops.cache.synthetic import synthesize_snapshot
from zops.health.canary import PROMPT, SEED
from zops.health.client import Client
from zops.host.engine import inspect
from zops.runtime.base import LABEL, Deployment, Instance, labels
from zops.runtime.container import compile_volume, container_name, container_options
from zops.runtime.docker import DockerRuntime
from zops.runtime.replacing import remove_volume
from zops.spec import Spec

START_TIMEOUT_S = 90.0
MODEL = "zops/synthetic-tiny"
PROC = Path("/proc")
TESTDATA = ROOT / "tests" / "testdata"
# More than an instance of the tiny model takes (400 MiB), and soon eaten.
MEMORY_MIB = 700
VAE = "vae/diffusion_pytorch_model.safetensors"


def place_in(cache: Path) -> Path:
    """Return where the tiny model's snapshot lies in a cache."""
    return cache / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0"


def fill_cache(cache: Path, *, seed: int = 0) -> Path:
    """Make a tiny model at its place in a cache that a container's user may read."""
    target = place_in(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    synthesize_snapshot(target, "tiny", seed=seed)
    for directory in (cache, *cache.parents[:3]):
        directory.chmod(0o755)
    return target


@dataclass
class Victim:
    """One instance in a container of a private engine, to which faults are done.

    `change` may alter the body of `POST /containers/create`: an instance of ours in all that it says of itself, with
    something done to it that no specification would ask for.
    """

    engine: PrivateEngine
    spec: Spec
    snapshot: Path
    change: Callable[[dict[str, Any]], None] = lambda _options: None
    runtime: DockerRuntime = field(init=False)

    def __post_init__(self) -> None:
        self.runtime = DockerRuntime(self.spec)

    @classmethod
    def of(cls, engine: PrivateEngine, snapshot: Path, name: str, **settings: Any) -> "Victim":
        """Describe a victim that serves a snapshot of a cache; nothing is started."""
        serve = {"port": free_port(), "warmup_size": 64, "startup_timeout_s": 120, "request_timeout_s": 30}
        spec = Spec.model_validate(
            {
                "name": name,
                "model": MODEL,
                "engine": engine.url,
                "cache": {"dir": snapshot.parents[3]},
                "gpus": "none",
                "image": {"name": engine.image},
                "serve": serve | settings.pop("serve", {}),
                **settings,
            }
        )
        return cls(engine, spec, snapshot)

    @property
    def name(self) -> str:
        """Name of the deployment."""
        return self.spec.name

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"http://127.0.0.1:{self.spec.serve.port}"

    @property
    def deployment(self) -> Deployment:
        """What runs."""
        manifest = read_manifest(self.snapshot)
        assert manifest
        return Deployment(self.spec, self.snapshot, manifest.revision, manifest.digest)

    @property
    def container(self) -> Any:
        """The container as the engine has it now."""
        return self.engine.client.containers.get(container_name(self.name))

    @property
    def state(self) -> dict[str, Any]:
        """What the engine says of the container's state."""
        return dict(self.container.attrs["State"])

    @property
    def instance(self) -> Instance:
        """The instance as its runtime sees it."""
        found = self.runtime.find(self.name)
        assert found
        return found

    # --- up and down

    def up(self) -> None:
        """Make the container and start it."""
        wanted = self.deployment
        # No engine without a GPU makes a container that asks for one; in all that it says of itself it does.
        without = replace(wanted, spec=wanted.spec.model_copy(update={"gpus": "none"}))
        options = container_options(without, inspect(self.engine.url))
        options["Labels"] = labels(wanted)
        self.engine.borrow(options)
        # Threads that spin for each other make the tiny model ten times slower on cores that others use too.
        options["Env"].append("OMP_NUM_THREADS=1")
        self.change(options)
        made = self.engine.client.api.create_container_from_config(options, container_name(self.name))
        self.engine.client.api.start(made["Id"])

    @property
    def client(self) -> Client:
        """Asks it through its published port."""
        return Client(self.url, timeout_s=5)

    def is_ready(self) -> bool:
        """Tell whether it answers through its published port that it is ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait_ready(self) -> None:
        """Return once it is ready."""
        eventually(self.is_ready, f"readiness of {self.name}", timeout_s=START_TIMEOUT_S)

    def remove(self) -> None:
        """Leave nothing of it on the engine."""
        label = {"label": f"{LABEL}.deployment={self.name}"}
        for container in self.engine.client.containers.list(all=True, filters=label, ignore_removed=True):
            with suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)
        with suppress(docker.errors.NotFound):
            remove_volume(self.engine.client.volumes.get(compile_volume(self.name)))

    # --- its processes, by their numbers on this host

    @property
    def init_pid(self) -> int:
        """The first process in the container."""
        return int(self.state["Pid"])

    @property
    def http_pid(self) -> int:
        """The process that answers HTTP."""
        return _only(children(self.init_pid), "process under the container's first")

    @property
    def worker_pid(self) -> int:
        """The process that makes the pictures."""
        return _only(children(self.http_pid), "worker")


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(child) for child in (PROC / str(pid) / "task" / str(pid) / "children").read_text().split()]


def _only(pids: list[int], what: str) -> int:
    assert len(pids) == 1, f"one {what} expected, not {pids}"
    return pids[0]


# --- the faults


def kill(victim: Victim) -> None:
    """Kill it through the engine, which then takes it for stopped on purpose and does not start it again."""
    victim.container.kill()


def crash(victim: Victim) -> None:
    """Kill its first process behind the engine's back, which starts it again."""
    os.kill(victim.init_pid, signal.SIGKILL)


def strike(pid: int) -> None:
    """Kill a process."""
    os.kill(pid, signal.SIGKILL)


@contextmanager
def looping(victim: Victim) -> Iterator[None]:
    """Have it die at each start, for its snapshot is gone; the engine starts it again and again."""
    with moved_away(victim.snapshot):
        crash(victim)
        yield


def remake_cache(victim: Victim) -> None:
    """Lose the whole cache and put it back: what is mounted is still the directory that was lost."""
    cache = victim.spec.cache.dir
    lost = cache.with_name(f".{cache.name}.lost")
    cache.rename(lost)
    cache.mkdir(mode=0o755)
    (lost / "models").rename(cache / "models")
    shutil.rmtree(lost)


@contextmanager
def paused(victim: Victim) -> Iterator[None]:
    """Freeze it through the engine."""
    container = victim.container
    container.pause()
    try:
        yield
    finally:
        with suppress(docker.errors.APIError):
            container.unpause()


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """Stop a process so that it lives and does nothing."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGCONT)
        os.close(descriptor)


def proxies(victim: Victim) -> list[int]:
    """Return the engine's processes that listen on the published port; none where the kernel alone forwards it."""
    port = ["-host-port", str(victim.spec.serve.port)]
    found = []
    for directory in PROC.glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "cmdline").read_text().split("\0")
            if words[0].endswith("docker-proxy") and port in [words[at : at + 2] for at in range(len(words))]:
                found.append(int(directory.name))
    return found


def unpublish(victim: Victim) -> None:
    """End what listens on its port, as when the engine's proxy crashed."""
    for pid in proxies(victim):
        os.kill(pid, signal.SIGKILL)


def disconnect(victim: Victim) -> None:
    """Take it off its network."""
    victim.engine.client.networks.get("bridge").disconnect(victim.container, force=True)


def unmount(victim: Victim) -> None:
    """Take the cache away inside the container alone, as a disk that went away and came back at the same place."""
    subprocess.run(
        ["nsenter", "--target", str(victim.init_pid), "--mount", "--pid", "umount", "--lazy", "/cache"], check=True
    )


@contextmanager
def moved_away(directory: Path) -> Iterator[Path]:
    """Rename a directory."""
    aside = directory.with_name(f".{directory.name}.aside")
    directory.rename(aside)
    try:
        yield aside
    finally:
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)


@contextmanager
def swapped(directory: Path, *, seed: int) -> Iterator[None]:
    """Put another model at the place of a snapshot."""
    with moved_away(directory):
        synthesize_snapshot(directory, "tiny", seed=seed)
        yield


@contextmanager
def throttled(victim: Victim, share: float) -> Iterator[None]:
    """Give its processes but a share of one core."""
    _update(victim, cpu_period=100_000, cpu_quota=round(share * 100_000))
    try:
        yield
    finally:
        _update(victim, cpu_quota=-1)


@contextmanager
def starved(victim: Victim) -> Iterator[None]:
    """Have the kernel kill its HTTP process for want of memory, and the engine leave it at that.

    Instances are restarted by the engine even so; without its policy there is time to see what happened.
    """
    _update(victim, restart_policy={"Name": "no"})
    try:
        with exhausted(victim):
            yield
    finally:
        _update(victim, restart_policy={"Name": "unless-stopped"})


@contextmanager
def exhausted(victim: Victim) -> Iterator[None]:
    """Have the kernel kill its HTTP process for want of memory."""
    (PROC / str(victim.http_pid) / "oom_score_adj").write_text("1000")
    _update(victim, mem_limit=f"{MEMORY_MIB}m", memswap_limit=f"{MEMORY_MIB}m")
    try:
        # It may itself be killed with the container.
        with suppress(docker.errors.APIError):
            victim.container.exec_run(["python", "-c", f"held = bytearray({MEMORY_MIB} << 20)"])
        yield
    finally:
        _update(victim, mem_limit="64g", memswap_limit="64g")


def _update(victim: Victim, **options: Any) -> None:
    with suppress(docker.errors.NotFound):
        victim.engine.client.api.update_container(victim.container.id, **options)


@dataclass(frozen=True)
class FakeGpu:
    """NVML's C library and a sound GPU, in a directory that is mounted into containers."""

    directory: Path

    @classmethod
    def build(cls, directory: Path) -> "FakeGpu":
        """Compile the library."""
        directory.mkdir()
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler, "no C compiler here: run scripts/ensure-test-tools"
        target = directory / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, TESTDATA / "fake_nvml.c"], check=True)
        for name in ("h200", "taken-away"):
            shutil.copyfile(TESTDATA / "nvml" / f"{name}.nvml", directory / name)
        for path in (directory, *directory.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return cls(directory)

    def take_from(self, victim: Victim) -> None:
        """Take it from a container that runs; the next one has it again."""
        inside = ["nsenter", "--target", str(victim.init_pid), "--mount", "--pid"]
        subprocess.run([*inside, "mount", "--bind", "/nvml/taken-away", "/nvml/h200"], check=True)

    def mount(self, options: dict[str, Any]) -> None:
        """Change the body of a container's creation so that it sees this GPU."""
        options["HostConfig"]["Mounts"].append(
            {"Type": "bind", "Source": str(self.directory), "Target": "/nvml", "ReadOnly": True}
        )
        options["Env"] += ["LD_LIBRARY_PATH=/nvml", "FAKE_NVML=/nvml/h200"]


def tell_truth_of(victim: Victim, directory: Path) -> Victim:
    """Describe an instance that repeats what another says now, and lies once there is a file `lie` in the directory."""
    directory.mkdir()
    picture = {"prompt": PROMPT, "size": "64x64", "seed": SEED, "n": 1, "response_format": "b64_json"}
    request = urllib.request.Request(
        f"{victim.url}/v1/images/generations",
        json.dumps(picture | {"output_format": "png"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        (directory / "picture").write_bytes(answer.read())
    for path in ("livez", "readyz", "v1/zops/info"):
        with urllib.request.urlopen(f"{victim.url}/{path}", timeout=5) as answer:
            (directory / path.replace("/", "-")).write_bytes(answer.read())
    shutil.copyfile(ROOT / "tests" / "support" / "liar.py", directory / "liar.py")
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    liar = Victim.of(victim.engine, victim.snapshot, "liar")

    def change(options: dict[str, Any]) -> None:
        options["Entrypoint"] = ["tini", "--", "python", "/liar/liar.py"]
        options["HostConfig"]["Mounts"].append(
            {"Type": "bind", "Source": str(directory), "Target": "/liar", "ReadOnly": True}
        )

    liar.change = change
    return liar


def zero_weights_in_memory(victim: Victim) -> None:
    """Overwrite the last layer of the VAE's decoder in the worker's memory: all it makes from now on is flat.

    Weights that are bad on disk never get so far: a server refuses to start with a model whose first picture is black.
    """
    weights = _read_tensor(victim.snapshot / VAE, "decoder.conv_out.weight")
    # It computes in float32 here: the same bits, and two bytes of zeros below them.
    found = _zero(victim.worker_pid, b"".join(b"\0\0" + weights[at : at + 2] for at in range(0, len(weights), 2)))
    assert found, "the weights are nowhere in the worker's memory"


def _read_tensor(file: Path, name: str) -> bytes:
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:begin])[name]
    assert entry["dtype"] == "BF16"
    first, last = entry["data_offsets"]
    return data[begin + first : begin + last]


def _zero(pid: int, pattern: bytes) -> int:
    """Overwrite a pattern with zeros wherever a process has it; return how often that was."""
    found = 0
    with (PROC / str(pid) / "mem").open("r+b", buffering=0) as memory:
        for line in (PROC / str(pid) / "maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            if not permissions.startswith("rw"):
                continue
            first, last = (int(part, 16) for part in span.split("-"))
            memory.seek(first)
            try:
                content = memory.read(last - first)
            except OSError:  # what a driver or the kernel itself maps there
                continue
            at = content.find(pattern)
            while at >= 0:
                memory.seek(first + at)
                memory.write(bytes(len(pattern)))
                found += 1
                at = content.find(pattern, at + 1)
    return found

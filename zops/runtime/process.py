"""Instances as supervised processes of this host: the same entrypoint as in a container, without an engine.

Everything that is known of one lies in a directory, so that it survives the command that started it. What it is given
of the caller's environment is listed here: keys and tokens of the operator are not.
"""

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from zops import __version__
from zops.errors import HostShort, ZopsError
from zops.events import Finished, Report, Started, Warned, task
from zops.host.gpu import read_gpus
from zops.host.paths import state_dir
from zops.host.ports import find_listener, why_not_bindable
from zops.runtime.asking import ASK_MODULE, WAY_S, question_environment, read_answer, too_late
from zops.runtime.base import (
    CLAIM_TIMEOUT_S,
    HEAL_GRACE_S,
    Deployment,
    Instance,
    State,
    drift,
    serve_environment,
)
from zops.runtime.claim import claim
from zops.runtime.logfile import read_lines
from zops.runtime.place import Place, end_instance
from zops.runtime.supervisor import read_status, write_file
from zops.spec import Spec

SERVE_ARGV = (sys.executable, "-m", "zops", "serve")
# Starting a Python interpreter from a cold disk takes seconds.
START_TIMEOUT_S = 30.0

_KEPT = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
})  # fmt: skip
_KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "GOMP_", "MKL_", "TORCH_", "PYTORCH_")


class ProcessRuntime:
    """Instances as processes.

    Args:
        spec: the specification; nothing of it is needed to find instances.
        argv: what is run as an instance; `zops serve` with this very interpreter by default.
    """

    WRITES = frozenset({"up", "down", "obtain_image", "claim", "restart", "recreate", "stop"})

    def __init__(self, spec: Spec | None = None, *, argv: Sequence[str] = SERVE_ARGV) -> None:
        del spec  # taken so that every runtime is made in the same way
        self._argv = tuple(argv)
        self._state = state_dir()

    # --- reads

    def check(self) -> str:
        """Return the version of zops and the directory that knows the instances."""
        return f"zops {__version__} in {self._state}"

    def instances(self) -> list[Instance]:
        """Return every instance that this user's state directory knows, stopped ones included."""
        found = (self.find(path.parent.name) for path in sorted(self._state.glob("instances/*/instance.json")))
        return [instance for instance in found if instance]

    def find(self, name: str) -> Instance | None:
        """Return the instance of a deployment, None when there is none."""
        place = self._place(name)
        record = place.record
        return None if record is None else _instance(name, place, record)

    def has_image(self, spec: Spec) -> bool:
        """Return True: a process needs no image."""
        del spec
        return True

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield the instance's log lines without their line ends; following ends with the instance.

        Raises:
            ZopsError: `instance-missing` when there is no such instance.
        """
        place = self._place(name)
        if place.record is None:
            raise _missing(name)
        return read_lines(place.path / "log", tail=tail, going_on=lambda: follow and place.supervisor is not None)

    # --- writes

    def obtain_image(self, spec: Spec, report: Report) -> None:
        """Do nothing: a process needs no image."""

    def up(self, deployment: Deployment, report: Report) -> Instance:
        """Make the deployment's process run, starting it anew if it drifted; return it. Does not wait until ready.

        Raises:
            HostShort: when the port or a GPU is missing; what ran before runs again.
            ZopsError: `start-failed` when the process could not be started at all.
        """
        _require_gpus(deployment)
        if deployment.spec.resources.memory:
            report(Warned("resources.memory is not enforced by runtime: process"))
        self._require_state()
        with self.claim(deployment.name, report):
            old = self.find(deployment.name)
            differs = old is not None and bool(drift(deployment, old))
            if old and not differs and old.state in {"running", "restarting"}:
                return old
            with task(report, "up", f"{'recreating' if differs else 'starting'} {deployment.name}"):
                self._start(deployment, old, report)
        started = self.find(deployment.name)
        assert started, "it was just started under a lock"
        return started

    def down(self, name: str, report: Report, *, volumes: bool = False) -> bool:
        """Stop and remove the process, letting it finish its requests; return whether there was one."""
        place = self._place(name)
        there = place.path.exists()
        if there:
            with self.claim(name, report):
                began = time.monotonic()
                report(Started("down", f"stop {name}"))
                end_instance(place)
                shutil.rmtree(place.path)
                report(Finished("down", f"stopped and removed {name}", time.monotonic() - began))
        if volumes:
            shutil.rmtree(self._compile_dir(name), ignore_errors=True)
        return there

    def claim(self, name: str, report: Report, *, timeout_s: float = CLAIM_TIMEOUT_S) -> AbstractContextManager[None]:
        """Keep everybody else from changing the deployment."""
        return claim(f"process:{self._state}", name, report, timeout_s=timeout_s)

    def restart(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the process and start it again as it was started the last time."""
        with self.claim(name, report, timeout_s=0):
            place, record = self._recorded(name)
            with task(report, "restart", f"restarting {name}"):
                end_instance(place, grace_s)
                self._launch(place, record)
            return _instance(name, place, record)

    def recreate(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Do what `restart` does: a new process has new devices, and the mounts are the host's own."""
        return self.restart(name, report, grace_s=grace_s)

    def stop(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the process and its supervisor; what is known of it stays."""
        with self.claim(name, report, timeout_s=0):
            place, record = self._recorded(name)
            with task(report, "stop", f"stopping {name}"):
                end_instance(place, grace_s)
            return _instance(name, place, record)

    def ask(
        self, name: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float, key: str = ""
    ) -> tuple[int, bytes]:
        """Put an HTTP question to the server with its own interpreter; return status and body of the answer."""
        _, record = self._recorded(name)
        question = question_environment(method, path, body, timeout_s=timeout_s, key=key)
        try:
            asked = subprocess.run(
                [sys.executable, "-m", ASK_MODULE],
                env=record["environment"] | question,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s + WAY_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise too_late(name) from error
        return read_answer(name, asked.returncode, asked.stdout, asked.stderr)

    # --- how

    def _recorded(self, name: str) -> tuple[Place, dict[str, Any]]:
        place = self._place(name)
        record = place.record
        if record is None:
            raise _missing(name)
        return place, record

    def _place(self, name: str) -> Place:
        return Place(self._state / "instances" / name)

    def _compile_dir(self, name: str) -> Path:
        return self._state / "compile" / name

    def _require_state(self) -> None:
        try:
            (self._state / "instances").mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HostShort(
                f"cannot write in {error.filename}: {error.strerror}",
                code="state-not-writable",
                hint="name a directory for state that this user may write in ZOPS_STATE_DIR",
            ) from error

    def _start(self, deployment: Deployment, old: Instance | None, report: Report) -> None:
        place = self._place(deployment.name)
        former = place.record
        if old is None or old.url != deployment.url:
            _require_port(deployment)  # before anything that runs is stopped
        if former:
            end_instance(place)
        try:
            _require_port(deployment)
            self._launch(place, self._record(deployment, place))
        except BaseException:
            if former and old and old.running:
                report(Warned(f"starting the previous {deployment.name} again"))
                self._launch(place, former)
            elif not former:
                shutil.rmtree(place.path, ignore_errors=True)
            raise

    def _record(self, deployment: Deployment, place: Place) -> dict[str, Any]:
        resources = deployment.spec.resources
        return {
            "name": deployment.name,
            "model": deployment.spec.model,
            "revision": deployment.revision,
            "manifest": deployment.manifest_digest,
            "snapshot": str(deployment.snapshot),
            "spec": deployment.spec_digest,
            "traits": deployment.traits(),
            "url": deployment.url,
            "argv": list(self._argv),
            "environment": self._environment(deployment, place),
            "grace_s": deployment.stop_timeout_s,
            "log_bytes": int(resources.log_bytes),
            "log_files": resources.log_files,
        }

    def _environment(self, deployment: Deployment, place: Place) -> dict[str, str]:
        spec = deployment.spec
        environment = _inherited(os.environ) | serve_environment(
            deployment,
            snapshot=str(deployment.snapshot),
            cache_dir=str(spec.cache.dir),
            host=spec.serve.host,
            port=spec.serve.port,
        )
        compiled = spec.cache.kernels or self._compile_dir(deployment.name)
        environment |= {
            # An empty specification: what the instance is, these variables say, and no file of the host beside them.
            "ZOPS_FILE": str(place.path / "zops.yaml"),
            "ZOPS_CACHE_KERNELS": str(compiled),
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
            "TRITON_CACHE_DIR": str(compiled / "triton"),
        }
        if spec.gpus == "none":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif spec.gpus != "all":
            # The numbers are those of nvidia-smi, which counts in the order of the bus; CUDA's own order is by speed.
            environment |= {
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus)),
            }
        return environment

    def _launch(self, place: Place, record: dict[str, Any]) -> None:
        """Start a supervisor and wait until it has started its child."""
        place.path.mkdir(mode=0o700, exist_ok=True)
        (place.path / "status.json").unlink(missing_ok=True)
        (place.path / "zops.yaml").write_text("# Set by the environment of the instance.\n", encoding="utf-8")
        write_file(place.path / "instance.json", record)
        reading, writing = os.pipe()
        with os.fdopen(reading, encoding="utf-8") as answer, (place.path / "log").open("ab") as log:
            try:
                subprocess.run(
                    [sys.executable, "-m", "zops.runtime.supervisor", str(place.path), "--ready-fd", str(writing)],
                    env=_inherited(os.environ),
                    cwd=place.path,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing,),
                    check=False,
                )
            finally:
                os.close(writing)
            said = answer.read() if select.select([answer], [], [], START_TIMEOUT_S)[0] else "no answer in time"
        if said != "started":
            end_instance(place)
            last = list(read_lines(place.path / "log", tail=1))
            raise ZopsError(
                f"{record['name']} could not be started: {said or ''.join(last) or 'its supervisor ended'}",
                code="start-failed",
            )


def _instance(name: str, place: Place, record: Mapping[str, Any]) -> Instance:
    supervisor = place.supervisor
    status = read_status(place.path)
    state: State = "exited"
    if supervisor:
        state = "running" if status.child and status.child.alive else "restarting"
    traits = record.get("traits")
    return Instance(
        name=name,
        id=str(supervisor.pid) if supervisor else "",
        runtime="process",
        state=state,
        url=str(record.get("url", "")),
        model=str(record.get("model", "")),
        snapshot=str(record.get("snapshot", "")),
        manifest_digest=str(record.get("manifest", "")),
        spec_digest=str(record.get("spec", "")),
        started_at=status.started_at,
        exit_code=status.exit_code,
        restarts=status.restarts,
        traits=dict(traits) if isinstance(traits, dict) else {},
    )


def _missing(name: str) -> ZopsError:
    return ZopsError(f"there is no instance {name}", code="instance-missing", hint="start it with: zops up")


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


def _require_port(deployment: Deployment) -> None:
    serve = deployment.spec.serve
    reason = why_not_bindable(serve.host, serve.port)
    if not reason:
        return
    if reason == "in use":
        raise HostShort(
            f"port {serve.port} on {serve.host} is already taken by {find_listener(serve.port) or 'another process'}",
            code="port-taken",
            hint="stop what holds it, or choose another: --port",
        )
    raise HostShort(
        f"port {serve.port} on {serve.host} cannot be used: {reason}",
        code="port-unusable",
        hint="choose another: --port, or set serve.host",
    )


def _require_gpus(deployment: Deployment) -> None:
    wanted = deployment.spec.gpus
    if wanted == "none":
        return
    facts = read_gpus()
    known = {gpu.index for gpu in facts.gpus} | {gpu.uuid for gpu in facts.gpus}
    # Parts of a partitioned GPU are not listed among GPUs; CUDA judges them.
    missing = [] if wanted == "all" else [gpu for gpu in wanted if gpu not in known and not str(gpu).startswith("MIG-")]
    if missing or not facts.gpus:
        what = f"GPU {', '.join(map(str, missing))}" if missing else "a GPU"
        has = len(facts.gpus) or "none"
        raise HostShort(
            f"{what} is wanted, but this host has {has}{f': {facts.reason}' if facts.reason else ''}",
            code="gpu-missing",
            hint="choose with --gpus; without a GPU: --gpus none",
        )

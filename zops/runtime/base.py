"""What every runtime promises, and what a deployment looks like to it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from zops.events import Report
from zops.spec import Serve, Spec, variable

State = Literal["created", "running", "restarting", "paused", "exited", "dead"]

# Where things are inside an instance, whatever the runtime; a process sees the host's own paths instead.
CACHE_MOUNT = "/cache"
COMPILE_MOUNT = "/compile-cache"
# The directory of the API keys: a file that is replaced would stay the old one where only the file is mounted.
KEYS_MOUNT = "/keys"
SERVE_PORT = 8000
# Docker's default of ten seconds would cut a running generation; the server drains within request_timeout_s.
STOP_GRACE_S = 15.0
# What a sick instance gets to finish what it does before it is killed: long enough for an answer that is being sent.
HEAL_GRACE_S = 3.0
# Whoever deploys waits for another deploy of the same name: an image to be built, weights to be loaded.
CLAIM_TIMEOUT_S = 3600.0

LABEL = "io.zops"
"""Prefix of every label: `io.zops.deployment`, `.model`, `.manifest`, `.spec`, `.snapshot`, `.url`. Nothing without
the first of them is ever touched."""


def address(spec: Spec) -> str:
    """Return the URL at which this host reaches the instance of a specification."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(spec.serve.host, spec.serve.host)  # noqa: S104 - compared, not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{spec.serve.port}"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is to run: the specification plus the very snapshot that it resolved to."""

    spec: Spec
    snapshot: Path
    """Directory of the snapshot, inside `spec.cache.dir`, as the host sees it."""
    revision: str
    manifest_digest: str

    @property
    def name(self) -> str:
        """Name of the deployment."""
        return self.spec.name

    @property
    def url(self) -> str:
        """Address of the instance as this host reaches it."""
        return address(self.spec)

    @property
    def stop_timeout_s(self) -> int:
        """Seconds that an instance gets to finish its requests when it is stopped."""
        return int(self.spec.serve.request_timeout_s + STOP_GRACE_S)

    @property
    def spec_digest(self) -> str:
        """Hash of everything that makes an instance what it is; a different one means drift."""
        return hashlib.sha256(json.dumps(self.traits(), sort_keys=True).encode()).hexdigest()[:16]

    def traits(self) -> dict[str, object]:
        """Return, as plain JSON values, everything whose change means that the instance must be made anew.

        How long to wait for it, where weights come from and where backups go are no part of the instance.
        """
        body = self.spec.model_dump(mode="json", include={"name", "model", "runtime", "gpus", "serve", "resources"})
        body["serve"].pop("startup_timeout_s")
        body["image"] = self.spec.image.name if self.spec.runtime != "process" else ""
        body["snapshot"] = str(self.snapshot)
        body["manifest"] = self.manifest_digest
        return body


# These are about the host: where an instance is published, how long it is waited for, where the keys' file lies.
_OF_THE_HOST = {"host", "port", "startup_timeout_s", "api_keys"}


def _changed(serve: Serve, already: set[str]) -> dict[str, str]:
    """Return the variables of all other keys of `serve` that somebody set: what is default here is default inside."""
    names = {name: variable(f"serve.{name}") for name in Serve.model_fields if name not in _OF_THE_HOST}
    default = Serve()
    return {
        key: str(value).lower() if isinstance(value, bool) else str(value)
        for name, key in names.items()
        if key not in already and (value := getattr(serve, name)) != getattr(default, name)
    }


def serve_environment(
    deployment: Deployment, *, snapshot: str, cache_dir: str, host: str, port: int, keys_dir: Path | str | None = None
) -> dict[str, str]:
    """Return the environment with which `zops serve` runs in any runtime.

    `zops serve` reads the same specification as every command; here it gets it as `ZOPS_*` variables. The hubs are
    switched off: an instance serves what is mounted or nothing.

    Args:
        deployment: what runs.
        snapshot: the snapshot's directory as the instance sees it.
        cache_dir: the cache's root as the instance sees it.
        host: address that the server binds inside the instance.
        port: port that it binds there.
        keys_dir: directory of the file of API keys as the instance sees it; None where it sees the host's.
    """
    serve = deployment.spec.serve
    chosen = {
        "ZOPS_MODEL": deployment.spec.model,
        "ZOPS_NAME": deployment.name,
        "ZOPS_CACHE_DIR": cache_dir,
        "ZOPS_SNAPSHOT": snapshot,
        "ZOPS_SERVE_HOST": host,
        "ZOPS_SERVE_PORT": str(port),
        "ZOPS_SERVE_DTYPE": serve.dtype,
        "ZOPS_SERVE_PRESET": serve.preset,
        "ZOPS_SERVE_FP8_TEXT": str(serve.fp8_text).lower(),
        "ZOPS_SERVE_FORCE_PRESET": str(serve.force_preset).lower(),
        "ZOPS_SERVE_VERIFY_ON_LOAD": str(serve.verify_on_load).lower(),
        "ZOPS_SERVE_MAX_PIXELS": str(serve.max_pixels),
        "ZOPS_SERVE_MAX_IMAGES": str(serve.max_images),
        "ZOPS_SERVE_WORKERS": str(serve.workers),
        "ZOPS_SERVE_MAX_BATCH": str(serve.max_batch),
        "ZOPS_SERVE_MAX_QUEUE": str(serve.max_queue),
        "ZOPS_SERVE_WARMUP_SIZE": str(serve.warmup_size),
        "ZOPS_SERVE_REQUEST_TIMEOUT_S": str(serve.request_timeout_s),
        "MODELSCOPE_CACHE": cache_dir,
        "HF_HOME": cache_dir,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    chosen |= _changed(serve, set(chosen))
    if serve.api_keys is not None:
        chosen["ZOPS_SERVE_API_KEYS"] = str(Path(keys_dir or serve.api_keys.parent) / serve.api_keys.name)
    return chosen


def container_environment(deployment: Deployment, *, snapshot: str) -> dict[str, str]:
    """Return the environment of an instance in a container or pod, whose root file system is read-only.

    Whatever is written goes to memory or to the volume of compiled kernels.

    Args:
        deployment: what runs.
        snapshot: the snapshot's directory inside the container.
    """
    inside = serve_environment(
        deployment,
        snapshot=snapshot,
        cache_dir=CACHE_MOUNT,
        host="0.0.0.0",  # noqa: S104 - inside; who reaches it is for the published port or the Service to say
        port=SERVE_PORT,
        keys_dir=KEYS_MOUNT,
    )
    return inside | {
        "HOME": "/tmp",  # noqa: S108 - inside, and its own
        "ZOPS_CACHE_KERNELS": COMPILE_MOUNT,
        "TORCHINDUCTOR_CACHE_DIR": f"{COMPILE_MOUNT}/inductor",
        "TRITON_CACHE_DIR": f"{COMPILE_MOUNT}/triton",
        "CUDA_CACHE_PATH": f"{COMPILE_MOUNT}/cuda",
    }


def labels(deployment: Deployment) -> dict[str, str]:
    """Return the labels by which an instance is found again and compared; they are the only record of it."""
    return {
        f"{LABEL}.deployment": deployment.name,
        f"{LABEL}.model": deployment.spec.model,
        f"{LABEL}.revision": deployment.revision,
        f"{LABEL}.manifest": deployment.manifest_digest,
        f"{LABEL}.snapshot": str(deployment.snapshot),
        f"{LABEL}.spec": deployment.spec_digest,
        f"{LABEL}.traits": json.dumps(deployment.traits(), sort_keys=True),
        f"{LABEL}.url": deployment.url,
    }


@dataclass(frozen=True, slots=True)
class Instance:
    """One running (or stopped) instance as its runtime knows it."""

    name: str
    id: str
    runtime: str
    state: State
    url: str
    model: str
    snapshot: str
    manifest_digest: str
    spec_digest: str
    image: str = ""
    health: str = ""
    """What the engine's own health check says: starting, healthy, unhealthy or nothing."""
    started_at: str = ""
    """ISO 8601 in UTC."""
    exit_code: int | None = None
    oom_killed: bool = False
    restarts: int = 0
    traits: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def running(self) -> bool:
        """Whether the process of the instance exists and may run."""
        return self.state == "running"


def drift(deployment: Deployment, instance: Instance) -> list[str]:
    """Return, in words, what of a running instance differs from the deployment; empty when nothing does."""
    wanted, present = _flat(deployment.traits()), _flat(instance.traits)
    return [
        f"{key}: {present.get(key)} -> {wanted.get(key)}"
        for key in sorted(wanted.keys() | present.keys())
        if wanted.get(key) != present.get(key)
    ]


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Runtime(Protocol):
    """What runs instances. Reads may be called at any time; writes only by a command that was asked to change things.

    Every method raises `RuntimeUnreachable` when the engine cannot be talked to.
    """

    WRITES: frozenset[str]
    """Names of the methods that change anything; `read_only` refuses them."""

    def check(self) -> str:
        """Return what answers (name and version), so that an operator can see which engine was meant."""
        ...

    def instances(self) -> list[Instance]:
        """Return every instance that carries our label, stopped ones included."""
        ...

    def find(self, name: str) -> Instance | None:
        """Return the instance of a deployment, None when there is none."""
        ...

    def has_image(self, spec: Spec) -> bool:
        """Tell whether the image is there (always, for a runtime without images)."""
        ...

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield the instance's log lines without their line ends."""
        ...

    def obtain_image(self, spec: Spec, report: Report) -> None:
        """Build or pull the image."""
        ...

    def up(self, deployment: Deployment, report: Report) -> Instance:
        """Make the deployment's instance run, recreating it only if it drifted; return it. Does not wait until ready.

        Raises:
            HostShort: when the port is taken, a GPU is missing or memory does not suffice; nothing is left behind.
        """
        ...

    def down(self, name: str, report: Report, *, volumes: bool = False) -> bool:
        """Stop and remove the instance, letting it finish its requests; return whether there was one.

        What it compiled is kept for the next one, unless `volumes` says to remove that too.
        """
        ...

    def claim(self, name: str, report: Report, *, timeout_s: float = CLAIM_TIMEOUT_S) -> AbstractContextManager[None]:
        """Keep everybody else of this host from changing the deployment; see `zops.runtime.claim`.

        Raises:
            LockHeld: when another process holds it longer than `timeout_s`, naming that process.
        """
        ...

    # What heals. These three never wait for somebody who deploys: they raise `LockHeld` at once. They need no
    # specification: everything is taken from the instance as it is. Each lets it finish what it does for `grace_s`,
    # kills it then, and raises `ZopsError` with code `instance-missing` when there is no such instance.

    def restart(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the instance and start the very same one again; one that is only paused is resumed."""
        ...

    def recreate(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Put a new instance with the same options in the place of the old one: its devices and mounts are new."""
        ...

    def stop(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the instance so that nothing but `restart`, `recreate` or `up` starts it again; it is not removed."""
        ...

    def ask(
        self, name: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float, key: str = ""
    ) -> tuple[int, bytes]:
        """Put an HTTP question to the server from inside the instance; return status and body of the answer.

        For instances whose port cannot be reached from here, because their engine is another host's.

        Args:
            name: of the deployment.
            method: for example GET.
            path: for example /readyz.
            body: JSON to send.
            timeout_s: longest time from the question to the last byte of the answer.
            key: API key; it is passed on where no list of processes shows it.

        Raises:
            RuntimeUnreachable: `instance-unreachable` or `instance-timeout` when the instance does not answer.
            ZopsError: `instance-missing` when there is none.
        """
        ...


class WriteRefused(AssertionError):
    """Raised when a dry run reached a method that changes things: a bug in zops, never the operator's fault."""


class ReadOnly:
    """A runtime that passes reads on and refuses writes: what a dry run is given instead of the real one."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> object:
        if name in self._runtime.WRITES:
            raise WriteRefused(f"a dry run called {type(self._runtime).__name__}.{name}")
        return getattr(self._runtime, name)

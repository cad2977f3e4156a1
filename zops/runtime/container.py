"""What a deployment is as a container: the body that the Engine API is given, and what the engine says back.

Nothing here talks to an engine, so every option can be looked at without one.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from zops.errors import HostShort, SnapshotMissing, SpecError
from zops.host.engine import EngineFacts, gpu_request
from zops.runtime.base import (
    CACHE_MOUNT,
    COMPILE_MOUNT,
    KEYS_MOUNT,
    LABEL,
    SERVE_PORT,
    Deployment,
    Instance,
    State,
    container_environment,
    labels,
)
from zops.spec.keys import read_keys

# The image's own user; docs/reference/image.md.
USER_ID = 10001
GROUP_ID = 10001
# Where a snapshot is mounted that lies outside the cache.
SNAPSHOT_MOUNT = "/snapshot"
# Threads count as well: a worker a GPU, a thread a core in each, and the compilers that torch forks.
PIDS_LIMIT = 8192
# Said because it would be that of the image's directory otherwise; before runc 1.2 it is that all the same.
TMPFS_OPTIONS = "rw,noexec,nosuid,nodev,mode=1777,size=1g"
HEALTH_INTERVAL_S = 10
HEALTH_TIMEOUT_S = 6
HEALTH_RETRIES = 3
# The probe is asked this often while an instance starts; engines before 25.0 (API 1.44) know no such thing.
START_INTERVAL_S = 5
START_INTERVAL_SINCE = (1, 44)
_NANOSECONDS = 1_000_000_000


def container_name(deployment_name: str) -> str:
    """Return the name of a deployment's container."""
    return f"zops-{deployment_name}"


def compile_volume(deployment_name: str) -> str:
    """Return the name of the volume that keeps a deployment's compiled kernels."""
    return f"zops-{deployment_name}-compile"


def container_options(deployment: Deployment, facts: EngineFacts) -> dict[str, Any]:
    """Return the body of `POST /containers/create` for a deployment, under all the restrictions that it can bear.

    Raises:
        HostShort: when the engine cannot give the GPUs or the memory that are wanted.
    """
    serve = deployment.spec.serve
    port = f"{SERVE_PORT}/tcp"
    return {
        "Image": deployment.spec.image.name,
        "Hostname": deployment.name,
        "User": f"{USER_ID}:{GROUP_ID}",
        "Env": [f"{name}={value}" for name, value in sorted(_environment(deployment, facts).items())],
        "Labels": labels(deployment),
        "ExposedPorts": {port: {}},
        "Healthcheck": _health_check(deployment, facts),
        "StopSignal": "SIGTERM",
        "StopTimeout": deployment.stop_timeout_s,
        "HostConfig": {
            "Mounts": _mounts(deployment),
            "PortBindings": {port: [{"HostIp": _address(serve.host), "HostPort": str(serve.port)}]},
            "RestartPolicy": {"Name": "unless-stopped"},
            "LogConfig": _logging(deployment),
            "ShmSize": int(deployment.spec.resources.shm),
            "PidsLimit": PIDS_LIMIT,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "Privileged": False,
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": TMPFS_OPTIONS},  # noqa: S108 - inside the container, and its own
            **_memory(deployment, facts),
            **_gpus(deployment, facts),
        },
    }


def same_options(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of `POST /containers/create` for a container that is as an existing one was made.

    It names the very image of that one, by its hash: a tag may mean another image by now, and who heals updates
    nothing. What the image itself says (environment, test of health) is in the answer too and the same once more.

    Args:
        attributes: the body of `GET /containers/ID/json`.
    """
    config, host = dict(attributes["Config"]), dict(attributes["HostConfig"])
    config["Image"] = attributes["Image"]
    return config | {"HostConfig": host}


def _environment(deployment: Deployment, facts: EngineFacts) -> dict[str, str]:
    environment = container_environment(deployment, snapshot=snapshot_inside(deployment))
    # Inside, every address is bound: only out here is it known who reaches the port.
    environment["ZOPS_PUBLISHED"] = _address(deployment.spec.serve.host)
    request = gpu_request(facts, deployment.spec.gpus)
    if request is None or request["Driver"] == "cdi":
        # CUDA images ask for all GPUs in their environment, and an engine whose default runtime is NVIDIA's obeys.
        environment["NVIDIA_VISIBLE_DEVICES"] = "void"
    return environment


def snapshot_inside(deployment: Deployment) -> str:
    """Return the path of the snapshot as the container sees it."""
    snapshot, cache = deployment.snapshot.resolve(), deployment.spec.cache.dir.resolve()
    if snapshot.is_relative_to(cache):
        return str(Path(CACHE_MOUNT) / snapshot.relative_to(cache))
    return SNAPSHOT_MOUNT


def _mounts(deployment: Deployment) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"Type": "bind", "Source": str(root), "Target": target, "ReadOnly": True}
        for root, target in _read_only_roots(deployment).items()
    ]
    mounts.append(
        {
            "Type": "volume",
            "Source": compile_volume(deployment.name),
            "Target": COMPILE_MOUNT,
            "VolumeOptions": {"Labels": {f"{LABEL}.deployment": deployment.name}},
        }
    )
    return mounts


def _read_only_roots(deployment: Deployment) -> dict[Path, str]:
    roots = {deployment.spec.cache.dir.resolve(): CACHE_MOUNT}
    if snapshot_inside(deployment) == SNAPSHOT_MOUNT:
        roots[deployment.snapshot.resolve()] = SNAPSHOT_MOUNT
    keys = deployment.spec.serve.api_keys
    return roots if keys is None else roots | {keys.parent.resolve(): KEYS_MOUNT}


def _address(host: str) -> str:
    """Return the address on which to publish; the engine takes no names."""
    return "127.0.0.1" if host == "localhost" else host.strip("[]")


def _logging(deployment: Deployment) -> dict[str, Any]:
    resources = deployment.spec.resources
    return {
        "Type": "json-file",
        "Config": {"max-size": str(int(resources.log_bytes)), "max-file": str(resources.log_files)},
    }


def _health_check(deployment: Deployment, facts: EngineFacts) -> dict[str, Any]:
    """Keep the image's test and set its times: loading takes as long as the specification allows, not the image."""
    check = {
        "Interval": HEALTH_INTERVAL_S * _NANOSECONDS,
        "Timeout": HEALTH_TIMEOUT_S * _NANOSECONDS,
        "Retries": HEALTH_RETRIES,
        "StartPeriod": int(deployment.spec.serve.startup_timeout_s * _NANOSECONDS),
    }
    version = tuple(int(part) for part in facts.api_version.split(".") if part.isdigit())
    if version >= START_INTERVAL_SINCE:
        check["StartInterval"] = START_INTERVAL_S * _NANOSECONDS
    return check


def _memory(deployment: Deployment, facts: EngineFacts) -> dict[str, Any]:
    limit = deployment.spec.resources.memory
    if limit is None:
        return {}
    if facts.memory_bytes and limit > facts.memory_bytes:
        raise HostShort(
            f"resources.memory is {limit} bytes, but {facts.name} has only {facts.memory_bytes}",
            code="memory-short",
            hint="lower it, or leave it empty for no limit",
        )
    # The same number for memory and swap together means no swap: a pipeline that swaps is worse than one that stops.
    return {"Memory": int(limit), "MemorySwap": int(limit)}


def _gpus(deployment: Deployment, facts: EngineFacts) -> dict[str, Any]:
    request = gpu_request(facts, deployment.spec.gpus)
    return {"DeviceRequests": [request]} if request else {}


# --- can the container's user read it?


def require_readable(deployment: Deployment, facts: EngineFacts) -> None:
    """Refuse a snapshot that the container's user cannot read, before a container exists that would fail to start.

    Judged by the classic permission bits; access lists are not looked at.

    Raises:
        SnapshotMissing: when a file vanished.
        HostShort: when a file is not readable, or is a link that leads out of what is mounted.
        SpecError: when the file of API keys is broken, or shares its directory with other things.
    """
    identity = None if facts.remaps_users else (USER_ID, GROUP_ID)
    if deployment.spec.serve.api_keys is not None:
        _require_keys(deployment.spec.serve.api_keys, identity)
    for mounted in _read_only_roots(deployment):
        inside = deployment.snapshot.resolve()
        if not inside.is_relative_to(mounted):
            continue
        for path in (mounted, *_between(mounted, inside), *_beneath(inside)):
            _require_access(path, mounted, identity)


def _require_keys(keys: Path, identity: tuple[int, int] | None) -> None:
    """Refuse a file of API keys that the container could not read, or whose directory would show it more than that."""
    read_keys(keys)
    others = sorted(path.name for path in keys.parent.iterdir() if path != keys and not path.name.startswith("."))
    if others:
        raise SpecError(
            f"{keys.parent} holds {others[0]} beside {keys.name}, and containers are given the whole directory",
            code="keys-not-alone",
            hint=f"mkdir '{keys.parent}/keys' && mv '{keys}' '{keys.parent}/keys/', and name it in serve.api_keys",
            path="serve.api_keys",
        )
    for path, need in ((keys.parent.resolve(), 0o5), (keys, 0o4)):
        found = path.stat()
        if _granted(found, identity) & need != need:
            raise HostShort(
                f"{path} (mode {stat.S_IMODE(found.st_mode):04o}) is not readable for the container's user {USER_ID}",
                code="keys-unreadable",
                hint=f"sudo chgrp {GROUP_ID} '{path}' && sudo chmod g+rX '{path}'",
                path=str(path),
            )


def _between(root: Path, inside: Path) -> Iterator[Path]:
    step = root
    for part in inside.relative_to(root).parts:
        step /= part
        yield step


def _beneath(directory: Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(directory):
        yield from (Path(parent) / name for name in directories + files)


def _require_access(path: Path, mounted: Path, identity: tuple[int, int] | None) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise SnapshotMissing(
            f"{path} cannot be looked at: {error.strerror}", hint="see what is wrong with: zops cache verify"
        ) from error
    if path.is_symlink() and not path.resolve().is_relative_to(mounted):
        raise HostShort(
            f"{path} is a link to {path.resolve()}, which is not mounted into the container",
            code="cache-links-outside",
            hint=f"copy it: cp --remove-destination '{path.resolve()}' '{path}'",
        )
    need = stat.S_IROTH | stat.S_IXOTH if stat.S_ISDIR(found.st_mode) else stat.S_IROTH
    if _granted(found, identity) & need != need:
        raise HostShort(
            f"{path} (mode {stat.S_IMODE(found.st_mode):04o}) is not readable for the container's user {USER_ID}",
            code="cache-unreadable",
            hint=f"sudo chmod -R a+rX '{mounted}'",
            path=str(path),
        )


def _granted(found: os.stat_result, identity: tuple[int, int] | None) -> int:
    """Return the permission bits that count for a user (None: for any), in the lowest three."""
    if identity and found.st_uid == identity[0]:
        return found.st_mode >> 6
    if identity and found.st_gid == identity[1]:
        return found.st_mode >> 3
    return found.st_mode


# --- what the engine says back


def instance_of(attributes: Mapping[str, Any], *, image_id: str = "") -> Instance:
    """Return a container of ours as an instance; labels that somebody broke read as differing from everything.

    Args:
        attributes: the body of `GET /containers/ID/json`.
        image_id: what the container's image name means now, empty when it means nothing. Where the container was made
            of another image, that is a difference in its traits too.
    """
    config, state = attributes["Config"], attributes["State"]
    found: Mapping[str, str] = config.get("Labels") or {}
    traits = _traits(found.get(f"{LABEL}.traits", ""))
    image = image_name(attributes)
    if image_id and attributes.get("Image") != image_id and "image" in traits:
        traits["image"] = f"{image} (an older one, {str(attributes.get('Image'))[:19]})"
    return Instance(
        name=found.get(f"{LABEL}.deployment", ""),
        id=attributes["Id"],
        runtime="docker",
        state=_state(state.get("Status", "")),
        url=found.get(f"{LABEL}.url", ""),
        model=found.get(f"{LABEL}.model", ""),
        snapshot=found.get(f"{LABEL}.snapshot", ""),
        manifest_digest=found.get(f"{LABEL}.manifest", ""),
        spec_digest=found.get(f"{LABEL}.spec", ""),
        image=image,
        health=_health(state),
        started_at=_moment(state.get("StartedAt", "")),
        exit_code=state.get("ExitCode") if state.get("Status") in {"exited", "dead", "restarting"} else None,
        oom_killed=bool(state.get("OOMKilled")),
        restarts=int(attributes.get("RestartCount") or 0),
        traits=traits,
    )


def image_name(attributes: Mapping[str, Any]) -> str:
    """Return the name of a container's image as the deployment has it; one that was recreated names a hash itself."""
    config = attributes["Config"]
    asked = _traits((config.get("Labels") or {}).get(f"{LABEL}.traits", "")).get("image")
    return str(asked or config.get("Image", ""))


def _traits(text: str) -> dict[str, object]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _state(status: str) -> State:
    # "removing" is the only other word that engines use, and what is being removed runs no more.
    return next((state for state in get_args(State) if state == status), "dead")


def _health(state: Mapping[str, Any]) -> str:
    status = str((state.get("Health") or {}).get("Status", ""))
    return "" if status == "none" else status


def _moment(text: str) -> str:
    """Return the engine's time without its fraction; an instance that never started has none."""
    return "" if text.startswith("0001-") or not text else text[:19] + "Z"

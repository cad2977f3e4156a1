"""What a result was measured on: this machine and the model, as far as figures depend on them."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from zops.cache.manifest import read_manifest
from zops.cache.safetensors import read_header
from zops.errors import SnapshotMissing
from zops.host.disk import disk_of
from zops.host.gpu import read_clocks, read_gpus
from zops.host.memory import read_memory

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton")
# Figures of two machines that differ in one of these are not each other's regressions.
IDENTITY = ("gpus", "driver", "cpu", "cores", "disk")


def describe_machine(snapshot: Path | None) -> dict[str, Any]:
    """Return the facts of this machine; `snapshot` tells which disk matters."""
    gpus, memory = read_gpus(), read_memory()
    facts: dict[str, Any] = {
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_total_bytes} for gpu in gpus.gpus],
        "no_gpu_because": "" if gpus.gpus else gpus.reason,
        "clocks": [clock.as_json() for clock in read_clocks()],
        "driver": gpus.driver,
        "cuda": gpus.cuda,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory.total_bytes if memory.limit_bytes is None else memory.limit_bytes,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "disk": _disk(snapshot) if snapshot else "",
    }
    return facts


def describe_model(snapshot: Path) -> dict[str, Any]:
    """Return the facts of a snapshot: what it is, how large, in which types.

    Raises:
        SnapshotMissing: when there is no model.
    """
    if not (snapshot / "model_index.json").is_file():
        raise SnapshotMissing(
            f"there is no model in {snapshot}", hint="make one with: zops model synthesize DIR --size full"
        )
    manifest = read_manifest(snapshot)
    files = weight_files(snapshot)
    dtypes: dict[str, set[str]] = {}
    parameters = 0
    for path in files:
        header = read_header(path)
        dtypes.setdefault(path.parent.name, set()).update(header.dtypes)
        for tensor in header.tensors.values():
            count = 1
            for edge in tensor.shape:
                count *= edge
            parameters += count
    name = manifest.model if manifest else ""
    return {
        "model": name,
        "revision": manifest.revision if manifest else "",
        "manifest_digest": manifest.digest if manifest else "",
        "snapshot": str(snapshot),
        "slim": bool(manifest and manifest.derived),
        "synthetic": "synthetic" in name,
        "size_bytes": manifest.size if manifest else sum(p.stat().st_size for p in snapshot.rglob("*") if p.is_file()),
        "weight_bytes": sum(path.stat().st_size for path in files),
        "parameters": parameters,
        "dtypes": {component: sorted(found) for component, found in sorted(dtypes.items())},
    }


def weight_files(snapshot: Path) -> list[Path]:
    """Return every file of weights in a snapshot, in a stable order."""
    return sorted(snapshot.glob("*/*.safetensors"))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return, in words, in what two machines differ so that their figures cannot be held to each other."""
    found = []
    for key in IDENTITY:
        before, after = one.get(key), other.get(key)
        if before != after:
            found.append(f"{key}: {_say(before)} -> {_say(after)}")
    return found


def title(machine: Mapping[str, Any]) -> str:
    """Return a machine in a few words: its GPUs, or else its processor."""
    names = [str(gpu.get("name", "GPU")) for gpu in machine.get("gpus") or []]
    if not names:
        return f"{machine.get('cores', '?')} cores of {machine.get('cpu') or 'an unknown processor'}, no GPU"
    kinds = list(dict.fromkeys(names))
    return ", ".join(f"{names.count(kind)} x {kind}" if names.count(kind) > 1 else kind for kind in kinds)


def _say(fact: Any) -> str:
    if isinstance(fact, list):
        return (
            ", ".join(str(each.get("name", each)) if isinstance(each, dict) else str(each) for each in fact) or "none"
        )
    return str(fact) if fact else "none"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _disk(snapshot: Path) -> str:
    disk = disk_of(snapshot)
    kind = {True: ", rotating", False: "", None: ""}[disk.rotational]
    return f"{disk.mount.system} on {disk.mount.source}{kind}"

"""The zops.yaml that `zops init` writes: commented, and fitted to what this host has."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from zops.cache.manifest import Manifest
from zops.catalog import Z_IMAGE_TURBO
from zops.host.capacity import ACTIVATION_BYTES_A_PIXEL, LARGEST_EDGE, largest_edge
from zops.host.disk import Disk, local_disks
from zops.host.gpu import GpuFacts, read_gpus

# The snapshot, a slim or newer one beside it, and an archive while it is written.
ROOM_FACTOR = 2.5

TEMPLATE = """\
# What zops deploys on this host. Every key with its value and origin: zops config show --origin
# A flag beats a ZOPS_* variable (serve.port: ZOPS_SERVE_PORT), which beats this file, which beats the default.

name: zops                           # the container is called zops-NAME
model: {model}

source:
  kind: modelscope                   # modelscope | huggingface | directory | archive
  # endpoint: http://mirror:8080     # a mirror of the hub
  # path: /mnt/weights               # for kind: directory or archive

cache:
  dir: {cache_dir}  # {cache_why}

runtime: docker                      # docker | process (no engine needed) | kubernetes
engine: local                        # local | context:NAME | ssh://user@host

gpus: {gpus}  # {gpus_why}

serve:
  host: 127.0.0.1                    # 0.0.0.0 opens it to the network: put a proxy with keys before it
  port: 8000
  dtype: auto                        # bfloat16 on a GPU, float32 on a CPU; float16 gives black images
  max_pixels: {max_pixels:<23}# {edge} x {edge}{pixels_why}
  max_images: 4                      # of one request
  max_queue: 16                      # waiting requests before new ones get 429

backup:
  to: {backup}  # or s3://bucket/prefix; better on another disk or host
"""


@dataclass(frozen=True, slots=True)
class Starter:
    """A starting specification and what led to it."""

    text: str
    cache_dir: Path
    gpus: str
    notes: tuple[str, ...]


def starter() -> Starter:
    """Look at this host's GPUs and disks and write the specification that fits them."""
    return compose(read_gpus(), local_disks())


def compose(facts: GpuFacts, disks: list[Disk]) -> Starter:
    """Write the specification for these GPUs and disks.

    Args:
        facts: what NVML told.
        disks: the writable local disks, best first.
    """
    notes: list[str] = []
    needed = int(Manifest.from_json(Z_IMAGE_TURBO.pinned() or {}).size * ROOM_FACTOR)
    disk = next((disk for disk in disks if disk.free_bytes >= needed), None)
    if disk is None:
        disk = max(disks, key=lambda disk: disk.free_bytes, default=None)
        notes.append(f"no local disk has the {needed / 1e9:.0f} GB free that {Z_IMAGE_TURBO.id} wants with its backup")
    cache_dir = _inside(disk, "cache")
    if disk and disk.is_system:
        notes.append(f"{cache_dir} lies on the system disk: a reset of the machine would wipe the cache")
    if facts.gpus:
        gpus, why = "all", ", ".join(f"{gpu.name} {gpu.memory_total_bytes / 1e9:.0f} GB" for gpu in facts.gpus)
    else:
        gpus, why = "none", f"none was found: {facts.reason}"
        notes.append(f"gpus: none, because {facts.reason}")
    edge = _edge(facts)
    text = TEMPLATE.format(
        model=Z_IMAGE_TURBO.id,
        cache_dir=json.dumps(str(cache_dir)),
        cache_why=f"{disk.free_bytes / 1e9:.0f} GB free on {disk.mount.source}" if disk else "no local disk was found",
        gpus=gpus,
        gpus_why=why,
        max_pixels=edge * edge,
        edge=edge,
        pixels_why="" if edge == LARGEST_EDGE else ", the most that fits: zops doctor --capacity",
        backup=json.dumps(str(_inside(disk, "backup"))),
    )
    return Starter(text, cache_dir, gpus, tuple(notes))


def _edge(facts: GpuFacts) -> int:
    """Return the edge of the largest image for which every GPU has room; the default's where none has, or none is."""
    smallest = min((gpu.memory_total_bytes for gpu in facts.gpus), default=0)
    fits = largest_edge(smallest, Z_IMAGE_TURBO.resident_bytes, ACTIVATION_BYTES_A_PIXEL)
    return min(fits or LARGEST_EDGE, LARGEST_EDGE)


def _inside(disk: Disk | None, leaf: str) -> Path:
    """Return a directory of ours on a disk; on the system disk the place where services keep their data."""
    if disk is None or disk.mount.path == Path("/"):
        return Path("/var/lib/zops" if os.geteuid() == 0 else "~/.cache/zops").expanduser() / leaf
    return disk.mount.path / "zops" / leaf

"""Memory of this machine, and the limit that a control group sets below it."""

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes. `limit_bytes` is what this process' control group may use, None without a limit."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """What a new process can take: available memory, or the control group's limit where that is less."""
        return self.available_bytes if self.limit_bytes is None else min(self.available_bytes, self.limit_bytes)


def read_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Memory:
    """Read memory from /proc/meminfo and the control group (version 2, else 1) of this process."""
    fields = {}
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024 if rest.strip().endswith("kB") else 0
    total = fields["MemTotal"]
    # Kernels before 3.14 have no MemAvailable.
    available = fields.get("MemAvailable", fields.get("MemFree", 0))
    return Memory(total, available, _limit(proc, cgroups, total))


def read_shared_memory(directory: Path = Path("/dev/shm")) -> int | None:  # noqa: S108 - nothing is made in it
    """Return the size in bytes of this machine's shared memory, None where there is none."""
    try:
        space = os.statvfs(directory)
    except OSError:
        return None
    return space.f_blocks * space.f_frsize


def _limit(proc: Path, cgroups: Path, total: int) -> int | None:
    """Return the tightest limit of the control groups above this process; one beyond all memory is none."""
    limits = []
    for directory, name in _groups(proc, cgroups):
        try:
            text = (directory / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < total:
            limits.append(int(text))
    return min(limits, default=None)


def _groups(proc: Path, cgroups: Path) -> list[tuple[Path, str]]:
    """Return each control group of this process, up to the root, with the file that holds its limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container the group's own path may not be visible; its limit then stands at the root.
        parts = Path(path.lstrip("/"))
        found += [(root / step, name) for step in (parts, *parts.parents)]
    return found

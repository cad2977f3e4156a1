"""Disks of this machine: where a path really lies, how much room is there, and which disks could hold the cache."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
SYS = Path("/sys")

# Names as the kernel prints them. Reading a 10 GB shard through mmap over these is 10 to 50 times slower than locally.
NETWORK_SYSTEMS = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "afs",
    "fuse.sshfs", "fuse.s3fs", "fuse.goofys", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs", "fuse.glusterfs",
    "fuse.mount-s3",
})  # fmt: skip
VOLATILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
DISK_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs"})

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    path: Path
    system: str
    """Type of the file system."""
    source: str
    """What is mounted, for example /dev/nvme1n1."""
    device: str
    """Device number as major:minor."""
    read_only: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system in which a path lies."""

    mount: Mount
    free_bytes: int
    """Bytes that an ordinary user may still write."""
    total_bytes: int
    free_inodes: int | None
    """None where the file system makes inodes as it needs them."""
    is_system: bool
    """Whether it is the file system of /, which a reset or reinstallation of the machine would wipe."""
    rotational: bool | None
    """Whether it spins; None where the kernel does not say."""

    @property
    def is_network(self) -> bool:
        """Whether every read goes over a network."""
        return self.mount.system in NETWORK_SYSTEMS

    @property
    def is_volatile(self) -> bool:
        """Whether it lies in memory and ends with the machine."""
        return self.mount.system in VOLATILE_SYSTEMS


def read_mounts(mounts: Path = MOUNTS) -> list[Mount]:
    """Return every mount that this process sees, in the kernel's order."""
    found = []
    # Split at newlines only: the kernel escapes those in names, and no other character that ends a line in Unicode.
    for line in mounts.read_bytes().decode("utf-8", "surrogateescape").rstrip("\n").split("\n"):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        system, source, _options = after.split(" ", 2)
        found.append(
            Mount(
                path=Path(_unescape(fields[4])),
                system=system,
                source=_unescape(source),
                device=fields[2],
                read_only="ro" in fields[5].split(","),
            )
        )
    return found


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return next(step for step in (path, *path.parents) if step.exists())


def disk_of(path: Path, mounts: Path = MOUNTS, system: Path = SYS) -> Disk:
    """Return the file system in which a path lies, or would lie once it is made; links are followed."""
    place = nearest_existing(path).resolve()
    table = read_mounts(mounts)
    # Of several mounts on one point the last covers the others.
    mount = max(
        (m for m in table if place.is_relative_to(m.path)),
        key=lambda m: (len(m.path.parts), table.index(m)),
        default=Mount(Path("/"), "unknown", "", "0:0", read_only=False),
    )
    space = os.statvfs(place)
    return Disk(
        mount=mount,
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
        free_inodes=space.f_favail if space.f_files else None,
        is_system=place.stat().st_dev == Path("/").stat().st_dev,
        rotational=_rotational(mount.device, system),
    )


def local_disks(mounts: Path = MOUNTS, system: Path = SYS) -> list[Disk]:
    """Return the writable local disks on which a cache could live, best first.

    Best is: not the system disk, does not spin, more free bytes. A disk that is mounted twice is listed once.
    """
    found: dict[str, Disk] = {}
    for mount in read_mounts(mounts):
        if mount.system not in DISK_SYSTEMS or mount.read_only or not mount.path.is_dir() or mount.device in found:
            continue
        if not os.access(mount.path, os.W_OK) and mount.path != Path("/"):
            continue
        found[mount.device] = disk_of(mount.path, mounts, system)
    return sorted(found.values(), key=lambda disk: (disk.is_system, bool(disk.rotational), -disk.free_bytes))


def measure_read(file: Path, *, limit_s: float = 1.0, limit_bytes: int = 1 << 30) -> float | None:
    """Read a file from its start, past the page cache where that is possible, and return bytes a second.

    Args:
        file: a large file; less than one MiB gives no meaningful number.
        limit_s: time after which reading stops.
        limit_bytes: bytes after which it stops.

    Returns:
        Bytes a second, None when the file is too small or cannot be read.
    """
    try:
        descriptor = _open_past_cache(file)
    except OSError:
        return None
    # mmap gives memory aligned to pages, which O_DIRECT asks for.
    import mmap  # noqa: PLC0415 - only this measurement needs it

    try:
        with mmap.mmap(-1, 8 * _BLOCK) as buffer:
            done, began = 0, time.perf_counter()
            while done < limit_bytes and time.perf_counter() - began < limit_s:
                count = os.readv(descriptor, [buffer])
                if count <= 0:
                    break
                done += count
            seconds = time.perf_counter() - began
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return done / seconds if done >= _BLOCK else None


def _open_past_cache(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        # tmpfs and some network file systems have no O_DIRECT: drop what is cached and read as usual.
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor


def _rotational(device: str, system: Path) -> bool | None:
    """Ask /sys; a partition has no queue of its own, so its parent disk is asked."""
    block = system / "dev" / "block" / device
    if not block.exists():
        return None
    for place in (block.resolve(), block.resolve().parent):
        try:
            return (place / "queue" / "rotational").read_text(encoding="ascii").strip() == "1"
        except OSError:
            continue
    return None


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

"""The doctor's checks of the cache: where it lies, how much room and speed it has there, and who may read it."""

import os
from pathlib import Path

from zops.errors import HostShort, ZopsError
from zops.host.context import Context
from zops.host.disk import nearest_existing
from zops.host.doctor import Check, Finding, fail, gigabytes, ok, skipped, unseen, warn

# Left free when the cache is full: lock files, manifests, partial downloads of the largest shard's neighbour.
SPARE_BYTES = 1_000_000_000
# Less says more about the start of the reading than about the disk.
LEAST_MEASURED_BYTES = 64 * 1024 * 1024
# What a container's own files lie on; read through it, a file is also slower than on the disk below.
LAYERS = frozenset({"overlay", "aufs", "fuse.fuse-overlayfs"})
# A SATA SSD reads 550 MB/s, a spinning disk 150 to 250: what is slower than this is no local SSD.
SLOW_BYTES_A_SECOND = 400e6


def _cache_directory(context: Context) -> Finding:
    """Whether the cache's directory is there, or can be made, and can be written to."""
    directory = context.spec.cache.dir
    place = nearest_existing(directory)
    who = f"uid {os.getuid()}"
    if not place.is_dir():
        return fail(f"{place} is no directory", f"mv {place} {place}.old", path=str(place))
    if context.disk.mount.read_only:
        remedy = f"mount -o remount,rw {context.disk.mount.path}"
        return fail(f"{context.disk.mount.path} is mounted read-only", remedy, path=str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        remedy = f"sudo install -d -o {os.getuid()} -g {os.getgid()} {directory}"
        return fail(f"{place} cannot be written to by {who}", remedy, path=str(place))
    state = "is there and can be written to" if place == directory else f"can be made in {place}"
    return ok(f"{directory} {state}", path=str(directory), exists=place == directory)


def _cache_file_system(context: Context) -> Finding:
    """The type of the file system of the cache: local, network, memory, or the layer of a container."""
    disk, directory = context.disk, context.spec.cache.dir
    seen = {"type": disk.mount.system, "mount": str(disk.mount.path), "source": disk.mount.source}
    move = "set cache.dir to a directory on a local SSD; see candidates with: zops init --force"
    if disk.is_network:
        reason = f"{directory} lies on {disk.mount.system}: loading over a network is many times slower"
        return warn(reason, move, **seen)
    if disk.mount.system in LAYERS:
        return warn(f"{directory} lies in a container's own layer ({disk.mount.system}) and goes with it", move, **seen)
    if disk.is_volatile:
        return warn(f"{directory} lies in memory ({disk.mount.system}) and ends with the machine", move, **seen)
    return ok(f"{disk.mount.system} on {disk.mount.source}", **seen, rotational=disk.rotational)


def _cache_system_disk(context: Context) -> Finding:
    """Whether the cache lies on the disk of the system, which a reset of the host wipes."""
    disk = context.disk
    if disk.is_system:
        reason = f"{context.spec.cache.dir} lies on the system disk, a reset of this host would wipe it"
        remedy = "set cache.dir to a directory on a data disk, or keep an archive: zops cache backup"
        return warn(reason, remedy, mount=str(disk.mount.path))
    return ok(f"on its own file system, {disk.mount.path}", mount=str(disk.mount.path))


def _cache_space(context: Context) -> Finding:
    """Free bytes and inodes against what the cache still lacks of the model."""
    disk, need = context.disk, context.need
    free = gigabytes(disk.free_bytes)
    seen = {"free_bytes": disk.free_bytes, "free_inodes": disk.free_inodes, "missing_bytes": need.disk_bytes}
    if need.disk_bytes is None:
        return skipped(f"the size of {context.spec.model} is not known before it is pulled ({free} free)")
    if need.disk_bytes == 0:
        return ok(f"nothing is missing, {free} free", **seen)
    remedy = f"free space on {disk.mount.path} (zops cache status), or set cache.dir to a larger disk"
    if disk.free_bytes < need.disk_bytes:
        reason = f"{gigabytes(need.disk_bytes)} are missing in the cache, {disk.mount.path} has {free} free"
        return fail(reason, remedy, **seen)
    if disk.free_inodes is not None and disk.free_inodes < need.files:
        return fail(f"{need.files} files are missing, {disk.mount.path} has {disk.free_inodes} inodes", remedy, **seen)
    if disk.free_bytes < need.disk_bytes + SPARE_BYTES:
        return warn(f"{gigabytes(need.disk_bytes)} will just fit into {free}", remedy, **seen)
    return ok(f"{gigabytes(need.disk_bytes)} will fit into {free}", **seen)


def _cache_speed(context: Context) -> Finding:
    """Bytes a second that the disk gives for a second, read past the page cache from a file of the cache."""
    need = context.need
    file = _largest_file(need.snapshot)
    if file is None:
        return skipped("the cache holds no large file to read yet")
    speed = context.senses.measure_read(file)
    if speed is None:
        return unseen(f"{file} cannot be read")
    seen = {"file": str(file), "bytes_per_second": round(speed), "cold_start_bytes": need.read_bytes}
    seconds = need.read_bytes / speed
    reason = f"{speed / 1e6:.0f} MB/s: a cold start reads {gigabytes(need.read_bytes)} in {seconds:.0f} s"
    slimmer = need.slim_bytes and need.slim_bytes < need.read_bytes * 0.9
    if slimmer:
        reason += f" ({gigabytes(need.slim_bytes)} in {need.slim_bytes / speed:.0f} s when slim)"
    if speed >= SLOW_BYTES_A_SECOND and seconds < context.spec.serve.startup_timeout_s:
        return ok(reason, **seen)
    remedy = "move the cache to a local SSD (cache.dir), or keep it in memory: zops cache warm"
    return warn(reason, f"read less: zops cache slim; {remedy}" if slimmer else remedy, **seen)


def _largest_file(snapshot: Path | None) -> Path | None:
    files = snapshot.rglob("*.safetensors") if snapshot else ()
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    return largest if largest and sizes[largest] >= LEAST_MEASURED_BYTES else None


def _cache_access(context: Context) -> Finding:
    """Whether whoever serves may read every file of the snapshot, and no link leads out of what is mounted."""
    if context.need.snapshot is None:
        return skipped("the cache holds no snapshot yet")
    facts = context.engine if context.spec.runtime == "docker" else None
    if isinstance(facts, Exception):
        return unseen("the engine does not answer, so its users are not known")
    if context.readable is None:
        return skipped("nobody but the one who asks will read it")
    seen = {"snapshot": str(context.need.snapshot)}
    try:
        context.readable(facts)
    except HostShort as error:
        finding = fail(error.message, error.hint, **seen, code=error.code)
        opened = ("chmod", "-R", "a+rX", str(context.spec.cache.dir))
        return finding.fixed_by(*opened) if error.code == "cache-unreadable" else finding
    except ZopsError as error:
        # Not complete or not verified yet: the steps that bring it say so themselves.
        return skipped(error.message)
    return ok("every file can be read, no link leads out", **seen)


CACHE_CHECKS: tuple[Check, ...] = (
    Check("cache-directory", "cache directory", _cache_directory, here=True),
    Check("cache-file-system", "cache file system", _cache_file_system, here=True),
    Check("cache-system-disk", "cache apart from the system", _cache_system_disk, here=True),
    Check("cache-space", "room in the cache", _cache_space, here=True),
    Check("cache-speed", "speed of the cache's disk", _cache_speed, here=True),
    Check("cache-access", "who may read the cache", _cache_access, here=True),
)

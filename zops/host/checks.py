"""The checks that the doctor knows. Each reads one thing and judges it; the first line of its docstring says what.

Documented one by one in docs/reference/doctor.md (a test holds the page to this registry).
"""

import importlib.util
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import zops
from zops.errors import HostShort, RuntimeUnreachable
from zops.host.disk import nearest_existing
from zops.host.doctor import Check, Context, Finding, fail, ok, skipped, warn
from zops.host.engine import gpu_request
from zops.host.gpu_checks import GPU_CHECKS
from zops.host.ports import Listener

PYTHON_SINCE = (3, 11)
SERVE_MODULES = ("torch", "diffusers", "transformers", "accelerate", "fastapi", "uvicorn", "PIL", "prometheus_client")
# A clock that is a day off breaks nothing here; one that stands before our own files were written breaks TLS.
CLOCK_TOLERANCE_S = 86_400
SYNCHRONISED = (Path("/run/systemd/timesync/synchronized"), Path("/run/chrony/chronyd.pid"), Path("/run/ntpd.pid"))
# Left free when the cache is full: lock files, manifests, partial downloads of the largest shard's neighbour.
SPARE_BYTES = 1_000_000_000


def _spec(context: Context) -> Finding:
    """Whether a zops.yaml was found, or everything is default."""
    if context.file is None:
        return warn("no zops.yaml was found, every value is a default, a flag or a variable", "zops init")
    return ok(f"{context.file}", file=str(context.file), deployment=context.spec.name)


def _python(_context: Context) -> Finding:
    """The version of the Python that runs zops."""
    version = platform.python_version()
    if sys.version_info < PYTHON_SINCE:
        needed = ".".join(map(str, PYTHON_SINCE))
        return fail(f"Python {version} is too old", f"install Python {needed} or newer", version=version)
    return ok(f"Python {version}", version=version, executable=sys.executable)


def _serve_extra(context: Context) -> Finding:
    """Whether what `zops serve` imports is installed beside zops (looked up, not imported)."""
    if context.spec.runtime != "process":
        return skipped(f"only runtime: process serves with this Python, this is {context.spec.runtime}")
    missing = [name for name in SERVE_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "in the source checkout of zops: pip install '.[serve]'"
        return fail(f"not installed: {', '.join(missing)}", remedy, missing=missing)
    return ok("everything that serving imports is installed", modules=list(SERVE_MODULES))


def _engine(context: Context) -> Finding:
    """Whether the container engine answers, and its version."""
    if context.spec.runtime != "docker":
        return skipped(f"runtime: {context.spec.runtime} needs no container engine")
    facts = context.engine
    if isinstance(facts, Exception):
        return fail(facts.message, facts.hint, engine=context.spec.engine, code=facts.code)
    seen = {
        "engine": context.spec.engine,
        "version": facts.version,
        "api_version": facts.api_version,
        "runtimes": list(facts.runtimes),
        "cgroup": f"v{facts.cgroup_version} {facts.cgroup_driver}",
    }
    where = "" if facts.is_local else f" on {facts.name}"
    return ok(f"Docker {facts.version}{where}", **seen)


def _engine_gpu(context: Context) -> Finding:
    """Whether the engine can hand out the GPUs that are asked for: CDI devices or the nvidia runtime."""
    if context.spec.runtime != "docker" or context.spec.gpus == "none":
        return skipped("no container with a GPU is asked for")
    facts = context.engine
    if isinstance(facts, Exception):
        return skipped("the engine does not answer")
    try:
        request = gpu_request(facts, context.spec.gpus)
    except HostShort as error:
        return fail(error.message, error.hint, cdi=list(facts.gpu_devices), runtimes=list(facts.runtimes))
    seen = {"request": request, "cdi": list(facts.gpu_devices), "runtimes": list(facts.runtimes)}
    way = "CDI devices" if request and request["Driver"] == "cdi" else "the nvidia runtime"
    return ok(f"GPUs are handed out through {way}", **seen)


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
    """The type of the file system of the cache: local, network or memory."""
    disk, directory = context.disk, context.spec.cache.dir
    seen = {"type": disk.mount.system, "mount": str(disk.mount.path), "source": disk.mount.source}
    move = "set cache.dir to a directory on a local SSD; see candidates with: zops init --force"
    if disk.is_network:
        reason = f"{directory} lies on {disk.mount.system}: loading over a network is many times slower"
        return warn(reason, move, **seen)
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
    free = _gigabytes(disk.free_bytes)
    seen = {"free_bytes": disk.free_bytes, "free_inodes": disk.free_inodes, "missing_bytes": need.disk_bytes}
    if need.disk_bytes is None:
        return skipped(f"the size of {context.spec.model} is not known before it is pulled ({free} free)")
    if need.disk_bytes == 0:
        return ok(f"nothing is missing, {free} free", **seen)
    remedy = f"free space on {disk.mount.path} (zops cache status), or set cache.dir to a larger disk"
    if disk.free_bytes < need.disk_bytes:
        reason = f"{_gigabytes(need.disk_bytes)} are missing in the cache, {disk.mount.path} has {free} free"
        return fail(reason, remedy, **seen)
    if disk.free_inodes is not None and disk.free_inodes < need.files:
        return fail(f"{need.files} files are missing, {disk.mount.path} has {disk.free_inodes} inodes", remedy, **seen)
    if disk.free_bytes < need.disk_bytes + SPARE_BYTES:
        return warn(f"{_gigabytes(need.disk_bytes)} will just fit into {free}", remedy, **seen)
    return ok(f"{_gigabytes(need.disk_bytes)} will fit into {free}", **seen)


def _memory(context: Context) -> Finding:
    """Memory against what loading the model takes at its peak."""
    memory, need = context.memory, context.need.load_bytes
    usable = _gigabytes(memory.usable_bytes)
    seen = {
        "total_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "limit_bytes": memory.limit_bytes,
        "needed_bytes": need,
    }
    if not need:
        return ok(f"{usable} available; what this model needs is not known", **seen)
    granted = context.spec.resources.memory
    if granted is not None and granted < need:
        reason = f"resources.memory grants {_gigabytes(granted)}, loading takes {_gigabytes(need)}"
        return fail(reason, f"set resources.memory to at least {_gigabytes(need)}", **seen)
    ceiling = min(memory.total_bytes, memory.limit_bytes or memory.total_bytes)
    if ceiling < need:
        remedy = "use a host with more memory, or a GPU instead of gpus: none"
        return fail(f"loading takes {_gigabytes(need)}, this host has {_gigabytes(ceiling)}", remedy, **seen)
    if memory.usable_bytes < need:
        remedy = "stop what uses memory; see it with: ps aux --sort -rss | head"
        return warn(f"loading takes {_gigabytes(need)}, only {usable} are available now", remedy, **seen)
    return ok(f"{usable} available, loading takes {_gigabytes(need)}", **seen)


def _port(context: Context) -> Finding:
    """Whether the port of the instance is free, or an instance of ours serves on it already."""
    serve = context.spec.serve
    seen = {"host": serve.host, "port": serve.port}
    if serve.port in context.own_ports:
        return ok(f"port {serve.port} is served by our own instance", **seen)
    reason = context.senses.why_not_bindable(serve.host, serve.port)
    if not reason:
        return ok(f"{serve.host}:{serve.port} is free", **seen)
    remedy = "set serve.port to another one: --port PORT"
    if reason == "in use":
        holder = context.senses.listener(serve.port) or Listener()
        return fail(f"port {serve.port} is taken by {holder}", f"stop it, or {remedy}", **seen, pid=holder.pid)
    return fail(f"{serve.host}:{serve.port} cannot be bound: {reason}", remedy, **seen)


def _clock(_context: Context) -> Finding:
    """The clock against the age of zops itself, and whether a time service keeps it (no network is asked)."""
    now, written = time.time(), Path(zops.__file__).stat().st_mtime
    seen = {"now": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")}
    remedy = "sudo timedatectl set-ntp true"
    if now < written - CLOCK_TOLERANCE_S:
        return fail("the clock stands before zops was installed: certificates will be refused", remedy, **seen)
    keeper = next((str(path) for path in SYNCHRONISED if path.exists()), None)
    if keeper is None:
        return skipped("nothing here says whether the clock is synchronised, and no network is asked")
    return ok("the clock is kept by a time service", **seen, seen=keeper)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


CHECKS: tuple[Check, ...] = (
    Check("spec", "zops.yaml", _spec),
    Check("python", "Python", _python),
    Check("serve-extra", "what serving imports", _serve_extra),
    Check("clock", "clock", _clock),
    *GPU_CHECKS,
    Check("engine", "container engine", _engine, error=RuntimeUnreachable),
    Check("engine-gpu", "GPUs through the engine", _engine_gpu),
    Check("memory", "memory for loading", _memory, here=True),
    Check("cache-directory", "cache directory", _cache_directory, here=True),
    Check("cache-file-system", "cache file system", _cache_file_system, here=True),
    Check("cache-system-disk", "cache apart from the system", _cache_system_disk, here=True),
    Check("cache-space", "room in the cache", _cache_space, here=True),
    Check("port", "port", _port, here=True),
)

"""The checks that the doctor knows. Each reads one thing and judges it; the first line of its docstring says what.

Documented one by one in docs/reference/doctor.md (a test holds the page to this registry).
"""

import importlib.util
import platform
import sys

from zops.host.cache_checks import CACHE_CHECKS
from zops.host.context import Context
from zops.host.doctor import Check, Finding, fail, gigabytes, ok, skipped, warn
from zops.host.engine_checks import ENGINE_CHECKS
from zops.host.gpu_checks import GPU_CHECKS
from zops.host.gpu_condition import GPU_CONDITION_CHECKS
from zops.host.network_checks import NETWORK_CHECKS
from zops.host.ports import Listener

PYTHON_SINCE = (3, 11)
SERVE_MODULES = ("torch", "diffusers", "transformers", "accelerate", "fastapi", "uvicorn", "PIL", "prometheus_client")


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


def _memory(context: Context) -> Finding:
    """Memory against what loading the model takes at its peak."""
    memory, need = context.memory, context.need.load_bytes
    usable = gigabytes(memory.usable_bytes)
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
        reason = f"resources.memory grants {gigabytes(granted)}, loading takes {gigabytes(need)}"
        return fail(reason, f"set resources.memory to at least {gigabytes(need)}", **seen)
    ceiling = min(memory.total_bytes, memory.limit_bytes or memory.total_bytes)
    if ceiling < need:
        remedy = "use a host with more memory, or a GPU instead of gpus: none"
        return fail(f"loading takes {gigabytes(need)}, this host has {gigabytes(ceiling)}", remedy, **seen)
    if memory.usable_bytes < need:
        remedy = "stop what uses memory; see it with: ps aux --sort -rss | head"
        return warn(f"loading takes {gigabytes(need)}, only {usable} are available now", remedy, **seen)
    return ok(f"{usable} available, loading takes {gigabytes(need)}", **seen)


def _memory_warm(context: Context) -> Finding:
    """Memory for the page cache to keep the snapshot in, so that the next start need not read the disk."""
    memory, need = context.memory, context.need
    if not need.read_bytes or not need.load_bytes:
        return skipped("what would have to be kept is not known")
    # A control group's limit counts the pages that its own programs read, so the host's memory is what matters.
    free = memory.available_bytes - need.load_bytes
    seen = {"available_bytes": memory.available_bytes, "load_bytes": need.load_bytes, "keep_bytes": need.read_bytes}
    if free >= need.read_bytes:
        return ok(f"{gigabytes(need.read_bytes)} of weights can stay in memory between starts", **seen)
    reason = f"{gigabytes(max(free, 0))} are left for keeping {gigabytes(need.read_bytes)}: every start reads the disk"
    if 0 < need.slim_bytes <= free and need.slim_bytes < need.read_bytes:
        return warn(reason, f"keep less, {gigabytes(need.slim_bytes)}: zops cache slim", **seen)
    return warn(reason, "stop what uses memory; see it with: ps aux --sort -rss | head", **seen)


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


CHECKS: tuple[Check, ...] = (
    Check("spec", "zops.yaml", _spec),
    Check("python", "Python", _python),
    Check("serve-extra", "what serving imports", _serve_extra),
    Check("memory", "memory for loading", _memory, here=True),
    Check("memory-warm", "memory for staying warm", _memory_warm, here=True),
    Check("port", "port", _port, here=True),
    *NETWORK_CHECKS,
    *GPU_CHECKS,
    *GPU_CONDITION_CHECKS,
    *ENGINE_CHECKS,
    *CACHE_CHECKS,
)

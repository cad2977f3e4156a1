"""The doctor's checks of what runs containers: it answers, and they get their GPUs and memory from it and keep them."""

from zops.errors import HostShort, RuntimeUnreachable
from zops.host.cdi import CdiSpec
from zops.host.context import Context
from zops.host.doctor import Check, Finding, fail, ok, skipped, unseen, warn
from zops.host.engine import EngineFacts, gpu_request
from zops.spec import Spec

CDI_FILE = "/etc/cdi/nvidia.yaml"
# The first with cgroup v2, and the oldest that still gets fixes anywhere (Debian 11).
OLD_MAJOR = 20
# What an engine gives a container that asks for nothing; torch's workers die of a bus error with less.
LEAST_SHM_BYTES = 64 * 1024 * 1024
SHM = "/dev/shm"  # noqa: S108 - only named, nothing is made in it


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
    major = facts.version.partition(".")[0]
    if major.isdigit() and int(major) < OLD_MAJOR:
        remedy = "install a current Docker Engine (docs.docker.com/engine/install)"
        return warn(f"Docker {facts.version} gets no fixes any more", remedy, **seen)
    where = "" if facts.is_local else f" on {facts.name}"
    return ok(f"Docker {facts.version}{where}", **seen)


def _engine_gpu(context: Context) -> Finding:
    """Whether the engine can hand out the GPUs that are asked for: CDI devices or the nvidia runtime."""
    if context.spec.runtime != "docker" or context.spec.gpus == "none":
        return skipped("no container with a GPU is asked for")
    facts = context.engine
    if isinstance(facts, Exception):
        return unseen("the engine does not answer")
    try:
        request = gpu_request(facts, context.spec.gpus)
    except HostShort as error:
        return fail(error.message, error.hint, cdi=list(facts.gpu_devices), runtimes=list(facts.runtimes))
    seen = {"request": request, "cdi": list(facts.gpu_devices), "runtimes": list(facts.runtimes)}
    way = "CDI devices" if request and request["Driver"] == "cdi" else "the nvidia runtime"
    return ok(f"GPUs are handed out through {way}", **seen)


def _engine_cdi(context: Context) -> Finding:
    """The CDI specifications of NVIDIA GPUs against the driver, its files and the wanted GPUs."""
    facts = _local_gpu_engine(context)
    if isinstance(facts, Finding):
        return facts
    cdi = context.senses.cdi(facts.cdi_spec_dirs)
    seen = {
        "files": [str(spec.file) for spec in cdi.specs],
        "devices": sorted(cdi.devices),
        "drivers": sorted({driver for spec in cdi.specs for driver in spec.drivers}),
        "driver": context.gpus.driver,
    }
    if cdi.unreadable:
        return warn(f"a CDI specification cannot be read: {cdi.unreadable[0]}", _generate(CDI_FILE), **seen)
    if not cdi.specs:
        return skipped(f"there is no CDI specification{', the nvidia runtime is used' if facts.nvidia_driver else ''}")
    file, why = next(
        ((str(spec.file), why) for spec in cdi.specs if (why := _stale(spec, context.gpus.driver))),
        (str(cdi.specs[0].file), _unlisted(context, cdi.devices)),
    )
    if not why:
        return ok(f"{', '.join(str(spec.file) for spec in cdi.specs)} fits the driver and the GPUs", **seen)
    # Where the nvidia runtime is asked the specification may never be read.
    judge = fail if _uses_cdi(facts, context.spec) else warn
    return judge(f"{file} is out of date: {why}", _generate(file), **seen).fixed_by(*_argv(file))


def _unlisted(context: Context, devices: frozenset[str]) -> str:
    """Return which wanted GPUs no specification lists, empty when none."""
    wanted = context.spec.gpus
    missing = [str(name) for name in (["all"] if wanted == "all" else wanted) if str(name) not in devices]
    missing += [str(gpu.index) for gpu in context.wanted_gpus if not {str(gpu.index), gpu.uuid} & devices]
    return f"it does not list GPU {', '.join(dict.fromkeys(missing))}" if missing else ""


def _uses_cdi(facts: EngineFacts, spec: Spec) -> bool:
    try:
        request = gpu_request(facts, spec.gpus)
    except HostShort:
        return True
    return request is not None and request["Driver"] == "cdi"


def _stale(spec: CdiSpec, driver: str) -> str:
    """Return why a specification no longer fits this host, empty when it does."""
    others = [version for version in spec.drivers if driver and version != driver]
    if others:
        return f"it is for driver {others[0]}, {driver} is loaded"
    return f"it names {spec.missing[0]}, which is not there" if spec.missing else ""


def _argv(file: str) -> tuple[str, ...]:
    return ("nvidia-ctk", "cdi", "generate", f"--output={file}")


def _generate(file: str) -> str:
    return f"sudo {' '.join(_argv(file))}"


def _engine_cgroup(context: Context) -> Finding:
    """Whether containers would lose their GPUs with `systemctl daemon-reload`: systemd's control groups without CDI."""
    facts = _local_gpu_engine(context)
    if isinstance(facts, Finding):
        return facts
    seen = {"cgroup": f"v{facts.cgroup_version} {facts.cgroup_driver}"}
    if _uses_cdi(facts, context.spec):
        return ok("GPUs come through CDI, which survives a reload of systemd", **seen)
    if facts.cgroup_driver != "systemd":
        return ok(f"control groups are kept by {facts.cgroup_driver or 'the engine'}, not by systemd", **seen)
    missing = context.senses.missing_char_links()
    if not missing:
        whole = ok("every NVIDIA device has its link in /dev/char", **seen)
        return unseen("no device nodes of the NVIDIA driver here") if missing is None else whole
    links = ("nvidia-ctk", "system", "create-dev-char-symlinks", "--create-all")
    reason = "systemctl daemon-reload would take the GPUs from running containers: /dev/char lacks NVIDIA's devices"
    remedy = f"sudo {' '.join(links)} (at every boot: a udev rule), or use CDI: {_generate(CDI_FILE)}"
    return warn(reason, remedy, **seen, missing=list(missing)).fixed_by(*links)


def _local_gpu_engine(context: Context) -> EngineFacts | Finding:
    """Return the engine that hands GPUs of this very host out, or the finding where there is none to judge."""
    if context.spec.runtime != "docker" or context.spec.gpus == "none":
        return skipped("no container with a GPU is asked for")
    facts = context.engine
    return unseen("the engine does not answer") if isinstance(facts, Exception) else facts


def _shm(context: Context) -> Finding:
    """Shared memory (/dev/shm) that an instance gets."""
    if context.spec.runtime != "docker":
        size = context.senses.shared_memory() or 0
        if size < LEAST_SHM_BYTES:
            reason = (
                f"this host has {size / 1e6:.0f} MB of shared memory: torch dies of a bus error where it needs more"
            )
            return warn(reason, f"sudo mount -o remount,size=1G {SHM}", size_bytes=size)
        return ok(f"this host has {size / 1e9:.1f} GB", size_bytes=size)
    granted = int(context.spec.resources.shm)
    seen = {"granted_bytes": granted}
    if granted < LEAST_SHM_BYTES:
        reason = f"resources.shm grants {granted / 1e6:.0f} MB: torch dies of a bus error where it needs more"
        return warn(reason, "set resources.shm to 1GiB", **seen)
    if context.on_this_host and granted > context.memory.total_bytes:
        reason = f"resources.shm grants {granted / 1e9:.1f} GB, more than this host's memory"
        return warn(reason, "set resources.shm to 1GiB", **seen)
    return ok(f"an instance gets {granted / 1e9:.1f} GB", **seen)


ENGINE_CHECKS: tuple[Check, ...] = (
    Check("engine", "container engine", _engine, error=RuntimeUnreachable),
    Check("engine-gpu", "GPUs through the engine", _engine_gpu),
    Check("engine-cdi", "CDI specifications", _engine_cdi, here=True),
    Check("engine-cgroup", "GPUs and control groups", _engine_cgroup, here=True),
    Check("shm", "shared memory", _shm, here=True),
)

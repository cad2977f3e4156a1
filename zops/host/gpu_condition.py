"""The doctor's checks of how the GPUs are: errors, slowdowns, their link, and what the kernel's log says of them."""

import time
from collections import Counter

from zops.host.context import Context
from zops.host.doctor import Check, Finding, fail, ok, skipped, unseen, warn
from zops.host.gpu import Gpu
from zops.host.gpu_checks import UNASKED, unasked
from zops.host.kernel_log import Action, Xid

# Where the driver does not tell the threshold: data centre cards slow down from 85 to 92 degrees, others from 83.
HOT_C = 85
# So near to its threshold a GPU slows down with the next request.
MARGIN_C = 3
# From here on NVIDIA takes a board back (GPU memory error management, dynamic page retirement).
MANY_RETIRED_PAGES = 60
# What is worst is said first.
SEVERITY: dict[Action, int] = {"replace": 5, "reboot": 4, "reset": 3, "look-up": 2, "restart": 1, "none": 0}


def _gpu_condition(context: Context) -> Finding:
    """Memory errors of each wanted GPU that could not be corrected, and repairs of its memory that wait or failed."""
    if found := unasked(context):
        return found
    seen = {
        gpu.uuid: {
            "uncorrected": gpu.ecc_uncorrected,
            "uncorrected_ever": gpu.ecc_uncorrected_ever,
            "retired_pages": gpu.retired_pages,
            "remapped_rows": gpu.remapped_rows,
            "repair_pending": gpu.repair_pending,
            "repair_failed": gpu.repair_failed,
        }
        for gpu in context.wanted_gpus
    }
    for gpu in context.wanted_gpus:
        if gpu.repair_failed or (gpu.retired_pages or 0) >= MANY_RETIRED_PAGES:
            reason = f"GPU {gpu.index} has run out of spare memory for broken cells"
            return fail(reason, f"replace it; leave it out meanwhile: {_without(context, gpu)}", gpus=seen)
    for gpu in context.wanted_gpus:
        if gpu.ecc_uncorrected:
            reason = f"GPU {gpu.index} counted {gpu.ecc_uncorrected} uncorrectable memory errors"
            return fail(reason, f"stop what uses it, then: {_reset(gpu)}; replace it if they return", gpus=seen)
    for gpu in context.wanted_gpus:
        if gpu.repair_pending:
            reason = f"GPU {gpu.index} must be reset to take broken memory out of use"
            return warn(reason, f"stop what uses it, then: {_reset(gpu)}", gpus=seen)
    if all(gpu.ecc_uncorrected is None for gpu in context.wanted_gpus):
        return ok("these GPUs count no memory errors (no ECC), none waits for a repair", gpus=seen)
    return ok("no uncorrectable memory errors, no repair waits", gpus=seen)


def _gpu_fenced(context: Context) -> Finding:
    """Whether `zops watch` fenced a GPU that is asked for, because it failed."""
    if context.spec.gpus == "none":
        return skipped(UNASKED)
    fences = [fence for fence in context.fences if fence.hits(context.spec.gpus)]
    if not fences:
        return ok("no GPU that is asked for is fenced", fenced=[fence.name for fence in context.fences])
    first = fences[0]
    gpu = next((gpu for gpu in context.wanted_gpus if first.is_for(gpu)), None)
    lift = f"then: zops watch --unfence {first.name}"
    cures = {
        "reset": f"stop what uses it, then: {_reset(gpu)}; {lift}" if gpu else "sudo reboot",
        "reboot": "sudo reboot, which lifts it",
        "replace": f"have it replaced; {lift}",
    }
    cure = cures.get(first.action, lift)
    rest = f"; leave it out meanwhile: {_without(context, gpu)}" if gpu else ""
    seen = [fence.name for fence in fences]
    return fail(f"GPU {first.name} is fenced: {first.because}", f"{cure}{rest}", fenced=seen)


def _gpu_slowdown(context: Context) -> Finding:
    """What holds the clocks of the wanted GPUs down now, and how near they are to the temperature that does."""
    if found := unasked(context):
        return found
    seen = {
        gpu.uuid: {"slowdowns": gpu.slowdowns, "celsius": gpu.temperature_c, "slowdown_celsius": gpu.slowdown_c}
        for gpu in context.wanted_gpus
    }
    look = "see the reason with: nvidia-smi -q -d PERFORMANCE,TEMPERATURE"
    for gpu in context.wanted_gpus:
        if gpu.slowdowns:
            reason = f"GPU {gpu.index} is slowed down now: {', '.join(gpu.slowdowns)}"
            if gpu.temperature_c is not None:
                reason += f" (at {gpu.temperature_c} degrees Celsius)"
            return warn(reason, f"check fans, airflow and power cables; {look}", gpus=seen)
    for gpu in context.wanted_gpus:
        limit = HOT_C if gpu.slowdown_c is None else gpu.slowdown_c - MARGIN_C
        if (gpu.temperature_c or 0) >= limit:
            at = f", it slows down at {gpu.slowdown_c}" if gpu.slowdown_c else ""
            reason = f"GPU {gpu.index} is at {gpu.temperature_c} degrees Celsius{at}"
            return warn(reason, f"check fans and airflow; {look}", gpus=seen)
    return ok("not slowed down, not hot", gpus=seen)


def _gpu_persistence(context: Context) -> Finding:
    """Whether the driver stays loaded while nobody uses the wanted GPUs."""
    if found := unasked(context):
        return found
    states = {gpu.uuid: gpu.persistence for gpu in context.wanted_gpus}
    if all(state is None for state in states.values()):
        return unseen("the driver does not tell")
    if False not in states.values():
        return ok("the driver stays loaded", gpus=states)
    reason = "persistence mode is off: the driver unloads when idle, the next start waits for it and forgets settings"
    remedy = "sudo nvidia-smi -pm 1; for good: sudo systemctl enable --now nvidia-persistenced"
    return warn(reason, remedy, gpus=states).fixed_by("nvidia-smi", "-pm", "1")


def _gpu_link(context: Context) -> Finding:
    """The PCIe link of each wanted GPU against the most that card and slot allow."""
    if found := unasked(context):
        return found
    linked = [(gpu, gpu.link) for gpu in context.wanted_gpus if gpu.link]
    if not linked:
        return unseen("the driver does not tell (a virtual machine may hide it)")
    seen = {gpu.uuid: str(link) for gpu, link in linked}
    for gpu, link in linked:
        # An idle GPU lowers its generation to save power, never its width.
        if link.width < link.max_width or (gpu.at_full_speed and link.generation < link.max_generation):
            look = f"sudo lspci -vv -s {gpu.pci} | grep -E 'LnkCap|LnkSta'"
            return warn(
                f"GPU {gpu.index} runs at {link}", f"reseat it and check the slot, riser and BIOS; {look}", gpus=seen
            )
    return ok(", ".join(dict.fromkeys(str(link) for _, link in linked)), gpus=seen)


def _gpu_xid(context: Context) -> Finding:
    """What NVIDIA's driver wrote into the kernel's log about the wanted GPUs (Xid events) since the start."""
    if context.spec.gpus == "none":
        return skipped(UNASKED)
    log = context.kernel_log
    if not log.source:
        return unseen(log.reason)
    others = {gpu.pci for gpu in context.gpus.gpus} - {gpu.pci for gpu in context.wanted_gpus}
    # An address that no GPU has now is one that fell off the bus.
    events = [event for event in log.xids if event.pci not in others]
    seen = {"source": log.source, "events": [_line(event) for event in events[-20:]]}
    if not any(event.meaning.action != "none" for event in events):
        return ok(f"none that asks for anything in {log.source}", **seen)
    worst = max(events, key=lambda event: (SEVERITY[event.meaning.action], event.seconds))
    count = Counter(event.number for event in events)[worst.number]
    times = f", {count} times" if count > 1 else ""
    where = next((f"GPU {gpu.index}" for gpu in context.wanted_gpus if gpu.pci == worst.pci), f"the GPU at {worst.pci}")
    reason = f"Xid {worst.number} on {where}, {_age(worst)} ago{times}: {worst.meaning.text}"
    remedy = _advice(context, worst)
    return fail(reason, remedy, **seen) if worst.is_fatal else warn(reason, remedy, **seen)


def _advice(context: Context, event: Xid) -> str:
    gpu = next((gpu for gpu in context.gpus.gpus if gpu.pci == event.pci), None)
    done = "once that is done: sudo dmesg --clear"
    reset = f"stop what uses it, then: {_reset(gpu)}" if gpu else "sudo reboot"
    advice: dict[Action, str] = {
        "none": "",
        "restart": "restart the program if it still runs: zops down && zops up",
        "reset": f"{reset}; {done}",
        "reboot": "sudo reboot; if it returns, check power, seating and cooling, then have the GPU replaced",
        "replace": f"have the GPU replaced; until then: {_without(context, gpu) if gpu else 'leave it out of gpus'}",
        "look-up": f"look it up in NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors); {done}",
    }
    return advice[event.meaning.action]


def _line(event: Xid) -> str:
    return f"{event.pci} Xid {event.number} ({event.meaning.action}): {event.detail}"[:240]


def _age(event: Xid) -> str:
    minutes = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - event.seconds) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _reset(gpu: Gpu) -> str:
    return f"sudo nvidia-smi --gpu-reset -i {gpu.index}"


def _without(context: Context, gpu: Gpu) -> str:
    rest = [str(other.index) for other in context.wanted_gpus if other != gpu]
    return f"--gpus {','.join(rest) or 'none'}"


GPU_CONDITION_CHECKS: tuple[Check, ...] = (
    Check("gpu-condition", "memory errors of the GPUs", _gpu_condition, here=True),
    Check("gpu-fenced", "GPUs that zops watch fenced", _gpu_fenced, here=True, code="gpu-fenced"),
    Check("gpu-slowdown", "clocks and temperature of the GPUs", _gpu_slowdown, here=True),
    Check("gpu-persistence", "persistence mode", _gpu_persistence, here=True),
    Check("gpu-link", "PCIe link of the GPUs", _gpu_link, here=True),
    Check("gpu-xid", "Xid events", _gpu_xid, here=True),
)

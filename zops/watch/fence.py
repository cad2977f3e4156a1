"""Which GPUs must not be used any more: decided from the kernel's log and NVML, nothing is asked or written here."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from zops.host.fences import Fence
from zops.host.gpu import Gpu, GpuFacts
from zops.host.kernel_log import KernelLog, Xid

# So often in a row NVML must miss a GPU that it had: one answer may come from a driver that is just being reloaded.
LOST_ROUNDS = 2


class Suspicion:
    """Which GPUs NVML had, and how often in a row it misses one that it had."""

    def __init__(self) -> None:
        self.known: dict[str, Gpu] = {}
        """Every GPU that was ever seen, by UUID."""
        self._missed: dict[str, int] = {}

    def lost(self, facts: GpuFacts) -> list[Gpu]:
        """Take what NVML says now and return the GPUs that are gone for good.

        Where the driver itself is gone, or says that all is well with fewer GPUs (somebody took one out), none is.
        """
        present = {gpu.uuid for gpu in facts.gpus}
        self.known |= {gpu.uuid: gpu for gpu in facts.gpus}
        for uuid in self.known:
            gone = uuid not in present and bool(facts.lost)
            self._missed[uuid] = self._missed.get(uuid, 0) + 1 if gone else 0
        return [gpu for uuid, gpu in self.known.items() if self._missed[uuid] >= LOST_ROUNDS]


def new_fences(
    log: KernelLog,
    facts: GpuFacts,
    suspicion: Suspicion,
    fences: Sequence[Fence],
    *,
    boot_id: str,
    now: float,
    since_boot_s: float,
) -> list[Fence]:
    """Return the fences that must be put up now, one a GPU.

    Args:
        log: the Xid events since boot.
        facts: what NVML says now.
        suspicion: what it said before.
        fences: those that there are, lifted ones included: what happened before one was lifted is dealt with.
        boot_id: this boot.
        now: seconds since the epoch.
        since_boot_s: seconds since boot, as the kernel's log counts.
    """
    found: dict[str, Fence] = {}

    def put_up(fence: Fence) -> None:
        if not any(_same(fence, old) and old.stands(boot_id) for old in fences):
            found.setdefault(fence.name, fence)

    lost = suspicion.lost(facts)
    base = Fence("", "", -1, "", "", now, boot_id, seconds=since_boot_s)
    for event in log.xids:
        gpu = next((gpu for gpu in suspicion.known.values() if gpu.pci and gpu.pci == event.pci), None)
        fence = replace(_about(base, gpu), pci=event.pci, because=_told(event), action=event.meaning.action)
        if event.is_fatal and event.seconds > _dealt_with(fences, fence, boot_id).seconds:
            put_up(fence)
    for gpu in facts.gpus:
        fence = _about(base, gpu)
        count, before = gpu.ecc_uncorrected or 0, _dealt_with(fences, fence, boot_id).ecc_uncorrected
        if count > before:
            put_up(replace(fence, because=f"{count - before} uncorrectable memory errors", action="reset"))
    for gpu in lost:
        fence = _about(base, gpu)
        if not _dealt_with(fences, fence, boot_id).lifted_at:
            put_up(replace(fence, because=facts.reason or "NVML does not see it any more", action="reboot"))
    return list(found.values())


def outlived(fences: Iterable[Fence], boot_id: str) -> list[Fence]:
    """Return the fences that a reboot has lifted, and the notes on lifted ones of earlier boots."""
    return [fence for fence in fences if fence.boot_id != boot_id and not fence.stands(boot_id)]


def _about(base: Fence, gpu: Gpu | None) -> Fence:
    if gpu is None:
        return base
    return replace(base, uuid=gpu.uuid, pci=gpu.pci, index=gpu.index, ecc_uncorrected=gpu.ecc_uncorrected or 0)


def _dealt_with(fences: Sequence[Fence], fence: Fence, boot_id: str) -> Fence:
    """Return the note on this GPU in this boot that was lifted last; an empty one where there is none."""
    lifted = [old for old in fences if _same(old, fence) and old.lifted_at is not None and old.boot_id == boot_id]
    nothing = replace(fence, seconds=-1.0, ecc_uncorrected=0)
    return max(lifted, key=lambda old: old.lifted_at or 0.0, default=nothing)


def _same(one: Fence, other: Fence) -> bool:
    if one.uuid and other.uuid:
        return one.uuid == other.uuid
    return bool(one.pci) and one.pci == other.pci


def _told(event: Xid) -> str:
    return f"Xid {event.number}: {event.meaning.text}"

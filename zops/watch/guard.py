"""The guard of the GPUs: looks at them, puts fences up, and takes the instances down that use a fenced one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from zops.cache.manifest import write_json
from zops.errors import UsageError, ZopsError
from zops.events import silent
from zops.host.fences import Fence, as_json, fence_dirs, fence_path, read_boot_id, read_fences
from zops.host.gpu import GpuFacts, read_gpus
from zops.host.kernel_log import KernelLog, read_xids
from zops.runtime.base import Instance, Runtime
from zops.watch.fence import Suspicion, new_fences, outlived
from zops.watch.station import Station


class Guard:
    """Keeps fences.

    Args:
        station: orders, clock and whom to tell.
        log: reads the kernel's log.
        gpus: asks NVML on the host.
        since_boot_s: the clock of the kernel's log.
    """

    def __init__(
        self,
        station: Station,
        *,
        log: Callable[[], KernelLog] = read_xids,
        gpus: Callable[[], GpuFacts] = read_gpus,
        since_boot_s: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_MONOTONIC),
    ) -> None:
        self._station = station
        self._log = log
        self._gpus = gpus
        self._since_boot_s = since_boot_s
        self._suspicion = Suspicion()
        self._boot_id = read_boot_id()
        self._directories = fence_dirs()
        self._standing: dict[str, Fence] = {}
        self._said: set[str] = set()
        self.has_looked = False
        """Whether the GPUs were looked at once."""

    def standing(self) -> tuple[Fence, ...]:
        """Return the fences that stand, as of the last look."""
        return tuple(self._standing.values())

    def look(self) -> None:
        """Look at the GPUs, put up fences and take down those that a reboot or a person lifted."""
        fences = read_fences(self._directories)
        log, facts = self._log(), self._gpus()
        if not log.source and (facts.gpus or facts.lost):
            self._warn_once(f"no Xid event can be seen, only what NVML says: {log.reason}")
        self._take_down(fences)
        for fence in new_fences(
            log,
            facts,
            self._suspicion,
            fences,
            boot_id=self._boot_id,
            now=self._station.now(),
            since_boot_s=self._since_boot_s(),
        ):
            if not self._station.orders.dry_run:
                self._write(fence)
            fences = (*(old for old in fences if old.name != fence.name), fence)
        self._note({fence.name: fence for fence in fences if fence.stands(self._boot_id)})
        self.has_looked = True

    def clear(self, runtime: Runtime, instances: Sequence[Instance]) -> None:
        """Stop the instances that run on a fenced GPU; who deploys now is left alone until the next look."""
        for instance in instances:
            wanted = instance.traits.get("gpus", "none")
            fence = next((fence for fence in self.standing() if fence.hits(wanted)), None)
            if fence and instance.state in {"running", "restarting", "paused"}:
                self._stop(runtime, instance, fence)

    def _stop(self, runtime: Runtime, instance: Instance, fence: Fence) -> None:
        result = "stopped"
        if not self._station.orders.touches:
            result = "would be stopped"
        else:
            try:
                runtime.stop(instance.name, silent)
            except ZopsError as error:
                result = error.message
        mark = f"{instance.runtime}/{instance.name}/{instance.id}/{fence.name}/{result}"
        if mark in self._said:
            return
        self._said.add(mark)
        self._station.tell(
            "instance-fenced",
            instance=instance.name,
            runtime=instance.runtime,
            id=instance.id,
            gpu=fence.name,
            because=fence.because,
            result=result,
        )

    def _take_down(self, fences: Sequence[Fence]) -> None:
        for fence in outlived(fences, self._boot_id):
            if self._station.orders.dry_run:
                continue
            for directory in self._directories:
                try:
                    fence_path(directory, fence).unlink(missing_ok=True)
                except OSError as error:
                    self._warn_once(f"the fence {fence_path(directory, fence)} cannot be removed: {error.strerror}")
            if fence.lifted_at is None:
                self._station.tell("fence-lifted", gpu=fence.name, pci=fence.pci, because="the host was rebooted")

    def _write(self, fence: Fence) -> None:
        path = fence_path(self._directories[0], fence)
        try:
            write_json(path, as_json(fence))
            path.chmod(0o644)
        except OSError as error:
            # It stands in this watch's memory all the same.
            self._warn_once(f"the fence {path} cannot be written: {error.strerror}")

    def _note(self, standing: dict[str, Fence]) -> None:
        for name, fence in standing.items():
            if name not in self._standing:
                self._station.tell(
                    "gpu-fenced",
                    gpu=name,
                    pci=fence.pci,
                    index=fence.index,
                    because=fence.because,
                    action=fence.action,
                )
        for name in self._standing.keys() - standing.keys():
            self._station.tell("fence-lifted", gpu=name, pci=self._standing[name].pci, because="somebody lifted it")
        self._standing = standing
        figures = self._station.figures
        figures.set("fenced_gpus", len(standing))
        figures.replace("gpu_fenced", {(name, one.pci, one.action): 1.0 for name, one in standing.items()})

    def _warn_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._station.tell("warning", text=text)


def lift(gpu: str, *, facts: GpuFacts | None = None) -> Fence:
    """Lift the fence of a GPU: what happened to it until now is dealt with.

    Args:
        gpu: its UUID, PCI address or index, as the fence has it.
        facts: what NVML says now, asked when empty.

    Raises:
        UsageError: `fence-missing` when no fence of it stands.
        ZopsError: when it cannot be written.
    """
    boot_id, directories = read_boot_id(), fence_dirs()
    standing = [fence for fence in read_fences(directories) if fence.stands(boot_id)]
    fence = next((one for one in standing if gpu in {one.name, one.uuid, one.pci, str(one.index)} - {"", "-1"}), None)
    if fence is None:
        there = ", ".join(one.name for one in standing) or "none"
        raise UsageError(f"no fence of GPU {gpu} stands", code="fence-missing", hint=f"fenced now: {there}")
    seen = (read_gpus() if facts is None else facts).gpus
    present = next((one for one in seen if fence.is_for(one)), None)
    lifted = replace(
        fence,
        lifted_at=time.time(),
        boot_id=boot_id,
        seconds=time.clock_gettime(time.CLOCK_MONOTONIC),
        ecc_uncorrected=(present.ecc_uncorrected or 0) if present else 0,
    )
    for directory in directories:
        path = fence_path(directory, fence)
        if path.exists():
            _rewrite(path, lifted)
    return lifted


def _rewrite(path: Path, fence: Fence) -> None:
    try:
        write_json(path, as_json(fence))
        path.chmod(0o644)
    except OSError as error:
        raise ZopsError(
            f"the fence {path} cannot be lifted: {error.strerror}",
            code="file-not-written",
            hint="try it as the user who runs zops watch, or with sudo",
        ) from error

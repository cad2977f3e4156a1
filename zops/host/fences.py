"""Fences: which GPUs of this host must not be used, one small file each, until a reboot or a person lifts them."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zops.host.gpu import Gpu
from zops.host.paths import SYSTEM_STATE_DIR, state_dir

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# State of systemd/zops-watch.service: it must not become the owner of what others keep in the system's.
UNIT_STATE_DIR = Path("/var/lib/zops-watch")
# Actions of a fault that a reboot is a cure for; a GPU that is to be replaced is the same one afterwards.
CURED_BY_REBOOT = frozenset({"reset", "reboot"})


@dataclass(frozen=True, slots=True)
class Fence:
    """Why a GPU is not to be used. What is not known is empty, an index -1.

    Attributes:
        uuid: NVML's name of the GPU.
        pci: its address as the kernel's log has it.
        index: its number when it was fenced; others may move up when one is lost.
        because: what happened, for people.
        action: what it takes: reset, reboot or replace.
        at: when, in seconds since the epoch.
        boot_id: in which boot of the host.
        ecc_uncorrected: what its counter of uncorrectable errors said.
        seconds: when, in seconds since that boot: older Xid events are dealt with.
        lifted_at: when a person lifted it, in seconds since the epoch; None while it stands.
    """

    uuid: str
    pci: str
    index: int
    because: str
    action: str
    at: float
    boot_id: str
    ecc_uncorrected: int = 0
    seconds: float = 0.0
    lifted_at: float | None = None

    @property
    def name(self) -> str:
        """How it is called: its UUID where that is known."""
        return self.uuid or self.pci or f"index-{self.index}"

    def stands(self, boot_id: str) -> bool:
        """Tell whether it holds in this boot."""
        if self.lifted_at is not None:
            return False
        return self.boot_id == boot_id or self.action not in CURED_BY_REBOOT

    def is_for(self, gpu: Gpu) -> bool:
        """Tell whether it is this GPU's."""
        if self.uuid or self.pci:
            return (bool(self.uuid) and self.uuid == gpu.uuid) or (bool(self.pci) and self.pci == gpu.pci)
        return self.index == gpu.index

    def hits(self, wanted: object) -> bool:
        """Tell whether `gpus` of a deployment (all, none, or a list of indices and UUIDs) asks for this GPU."""
        if wanted == "all":
            return True
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):
            return False
        return any(name in {self.uuid, self.index} for name in wanted if name != "")


def read_boot_id(path: Path = BOOT_ID) -> str:
    """Return what names this boot of the host; empty where the kernel does not tell."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def fence_dirs(environ: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """Return where fences lie, the first of them where a new one goes.

    In this user's state, and where a watch of root, or the unit that is shipped, leaves them. `ZOPS_STATE_DIR` means
    that directory alone.
    """
    environ = os.environ if environ is None else environ
    own = state_dir(environ) / "fences"
    if environ.get("ZOPS_STATE_DIR"):
        return (own,)
    return tuple(dict.fromkeys((own, SYSTEM_STATE_DIR / "fences", UNIT_STATE_DIR / "fences")))


def read_fences(directories: Iterable[Path] | None = None) -> tuple[Fence, ...]:
    """Return every fence, lifted ones included; a file that makes no sense is none."""
    found: dict[str, Fence] = {}
    for directory in fence_dirs() if directories is None else directories:
        try:
            paths = sorted(directory.glob("*.json"))
        except OSError:
            continue
        for path in paths:
            fence = _read(path)
            if fence is not None:
                found.setdefault(fence.name, fence)
    return tuple(found.values())


def standing_fences() -> tuple[Fence, ...]:
    """Return the fences that hold now."""
    boot_id = read_boot_id()
    return tuple(fence for fence in read_fences() if fence.stands(boot_id))


def fence_path(directory: Path, fence: Fence) -> Path:
    """Return the file of a fence."""
    return directory / f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in fence.name)}.json"


def as_json(fence: Fence) -> dict[str, Any]:
    """Return a fence as its file has it."""
    return asdict(fence)


def _read(path: Path) -> Fence | None:
    try:
        body = json.loads(path.read_bytes())
        return Fence(
            uuid=str(body["uuid"]),
            pci=str(body["pci"]),
            index=int(body["index"]),
            because=str(body["because"]),
            action=str(body["action"]),
            at=float(body["at"]),
            boot_id=str(body["boot_id"]),
            ecc_uncorrected=int(body.get("ecc_uncorrected") or 0),
            seconds=float(body.get("seconds") or 0.0),
            lifted_at=None if body.get("lifted_at") is None else float(body["lifted_at"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None

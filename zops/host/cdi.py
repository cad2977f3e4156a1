"""CDI specifications of NVIDIA GPUs on this host: whether what they name is still there.

The toolkit writes them once (`nvidia-ctk cdi generate`), with the path of every library of the driver in it. After an
update of the driver they still name the old one, and containers fail to start or see half a driver. Format: the
Container Device Interface specification of the CNCF.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zops.host.engine import CDI_GPU

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
# nvidia-ctk writes some 50 kB for eight GPUs; anything much larger is none of its.
LARGEST_BYTES = 4_000_000

# The driver's own libraries end in its version: libcuda.so.580.65.06.
_VERSIONED = re.compile(r"lib(?:cuda|nvidia-ml|nvidia-ptxjitcompiler)\.so\.(\d{3,}\.\d+(?:\.\d+)?)$")


@dataclass(frozen=True, slots=True)
class CdiSpec:
    """One file for NVIDIA GPUs: the devices that it offers, and the host's paths that it would mount."""

    file: Path
    devices: tuple[str, ...]
    paths: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Those of the paths that are not there."""

    @property
    def drivers(self) -> tuple[str, ...]:
        """Versions of the driver, by the names of its libraries."""
        return tuple(sorted({match[1] for path in self.paths if (match := _VERSIONED.search(path))}))


@dataclass(frozen=True, slots=True)
class CdiFacts:
    """The specifications in effect (a later directory covers an earlier one), and the files that make no sense."""

    specs: tuple[CdiSpec, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def devices(self) -> frozenset[str]:
        """Every device by its name, such as 0, GPU-8f6e... or all."""
        return frozenset(device for spec in self.specs for device in spec.devices)


def read_cdi(directories: Sequence[str] = DIRECTORIES) -> CdiFacts:
    """Read the CDI specifications of NVIDIA GPUs; directories that are not there hold none.

    Args:
        directories: in rising priority, as the engine tells them; its defaults when empty.
    """
    covering: dict[str, CdiSpec] = {}
    unreadable = []
    for directory in directories or DIRECTORIES:
        for file in sorted(Path(directory).glob("*")):
            if file.suffix not in {".yaml", ".json"}:
                continue
            try:
                spec = _read(file)
            except (OSError, ValueError) as error:
                unreadable.append(f"{file}: {' '.join(str(error).split())}")
                continue
            for device in spec.devices:
                covering[device] = spec
    return CdiFacts(tuple({str(spec.file): spec for spec in covering.values()}.values()), tuple(unreadable))


def _read(file: Path) -> CdiSpec:
    import yaml  # noqa: PLC0415 - only hosts with such a file need it

    if file.stat().st_size > LARGEST_BYTES:
        raise ValueError("too large for a CDI specification")
    text = file.read_text(encoding="utf-8")
    try:
        # The C loader is ten times faster, and not in every build of PyYAML; both make plain data only.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        body = json.loads(text) if file.suffix == ".json" else yaml.load(text, loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(body, dict):
        raise ValueError("no mapping at its top")  # noqa: TRY004 - what is wrong is the file, not a type of ours
    if body.get("kind") != CDI_GPU:
        return CdiSpec(file, (), ())
    devices = _mappings(body, "devices")
    edits = [body.get("containerEdits"), *(device.get("containerEdits") for device in devices)]
    names = tuple(str(device.get("name", "")) for device in devices)
    paths = tuple(dict.fromkeys(path for edit in edits for path in _paths(edit)))
    return CdiSpec(file, names, paths, tuple(path for path in paths if not Path(path).exists()))


def _paths(edits: Any) -> Iterator[str]:
    """Yield what the edits take from the host: mounted files, and device nodes."""
    if not isinstance(edits, dict):
        return
    for key in ("mounts", "deviceNodes"):
        for entry in _mappings(edits, key):
            if path := entry.get("hostPath") or entry.get("path"):
                yield str(path)


def _mappings(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the mappings in a list; whatever else stands there is left to the engine to refuse."""
    entries = body.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

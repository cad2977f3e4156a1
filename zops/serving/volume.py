"""What a host keeps of compilations and comparisons, so that only the first start pays for them.

Everything that depends on the GPU, its driver or a library lies in a directory of its own for that combination; an
update begins a new one. Images of eager depend on the snapshot alone (nearly), so that a GPU which cannot hold eager
is judged by what a larger one made.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zops import __version__
from zops.host.gpu import GpuFacts, read_gpus
from zops.serving.messages import Gate

_LIBRARIES = ("torch", "triton", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class Volume:
    """The directory of one combination of GPU, driver and libraries."""

    root: Path
    traits: Mapping[str, str]

    @property
    def path(self) -> Path:
        """Where this combination's files are."""
        return self.root / _digest(self.traits)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables by which compilers find their caches; to be set before they are imported."""
        return {
            "TRITON_CACHE_DIR": str(self.path / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.path / "inductor"),
            "CUDA_CACHE_PATH": str(self.path / "cuda"),
        }

    def find_gate(self, **key: Any) -> Gate | None:
        """Return the verdict that was kept for a key; None when there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return Gate(**json.loads(self._gate(key).read_text(encoding="utf-8"))["gate"])
        return None

    def keep_gate(self, gate: Gate, **key: Any) -> None:
        """Keep a verdict for the next start; a volume that cannot be written keeps nothing."""
        body = json.dumps({"gate": asdict(gate), "key": key, "traits": dict(self.traits)}, indent=1)
        with contextlib.suppress(OSError), _replacing(self._gate(key)) as partial:
            partial.write_text(body, encoding="utf-8")

    def find_references(self, **key: Any) -> list[Any] | None:
        """Return eager's images for a key as float32 tensors 0..1; None when there are none that can be read."""
        from safetensors.torch import load_file  # noqa: PLC0415 - imports torch

        try:
            images = load_file(self._references(key))
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it is made anew
            return None
        return [images[name].float() / 255 for name in sorted(images)]

    def keep_references(self, images: Sequence[Any], **key: Any) -> None:
        """Keep eager's images, in 8 bits."""
        from safetensors.torch import save_file  # noqa: PLC0415 - imports torch

        bytes_ = {f"{i:02}": (image * 255).round().byte().contiguous() for i, image in enumerate(images)}
        with contextlib.suppress(OSError), _replacing(self._references(key)) as partial:
            save_file(bytes_, partial)

    def _gate(self, key: Mapping[str, Any]) -> Path:
        return self.path / "gates" / f"{_digest(key)}.json"

    def _references(self, key: Mapping[str, Any]) -> Path:
        return self.root / "references" / f"{_digest(key)}.safetensors"


def open_volume(root: str | None, gpus: str | None, read: Callable[[], GpuFacts] = read_gpus) -> Volume | None:
    """Return the volume in a directory, made if need be; None without a directory, or one that cannot be written.

    Args:
        root: the directory.
        gpus: the worker's CUDA_VISIBLE_DEVICES; None when the environment has it, or all are visible.
        read: asks for the GPUs of this host.
    """
    if root is None:
        return None
    volume = Volume(Path(root), _traits(os.environ.get("CUDA_VISIBLE_DEVICES") if gpus is None else gpus, read))
    try:
        volume.path.mkdir(parents=True, exist_ok=True)
        about = volume.path / "about.json"
        if not about.exists():
            with _replacing(about) as partial:
                partial.write_text(json.dumps(dict(volume.traits), indent=1), encoding="utf-8")
    except OSError:
        return None
    return volume if os.access(volume.path, os.W_OK) else None


def _traits(gpus: str | None, read: Callable[[], GpuFacts]) -> dict[str, str]:
    facts = GpuFacts() if not gpus and gpus is not None else read()
    names = {name for gpu in facts.gpus for name in (gpu.uuid, str(gpu.index)) if gpus and name in gpus.split(",")}
    mine = next((gpu for gpu in facts.gpus if gpu.uuid in names or str(gpu.index) in names), None)
    mine = mine or next(iter(facts.gpus), None)
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {"gpu": mine.name if mine else "none", "driver": facts.driver, "zops": __version__} | libraries


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(traits: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(traits), sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside the wanted one; what was written there takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""What a deployment will ask of its host, as far as catalog, cache, specification and environment know."""

import base64
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from zops.cache.layout import find, meant, place
from zops.cache.manifest import FileEntry, Manifest, read_manifest
from zops.catalog import Model, lookup
from zops.errors import SnapshotDamaged, SnapshotMissing, ZopsError
from zops.host.capacity import ACTIVATION_BYTES_A_PIXEL, DTYPES
from zops.host.context import Need
from zops.host.engine import read_labels
from zops.spec import Source, Spec

# Peak of anonymous memory with device_map="cuda" was 0.7 GB; torch, CUDA and the HTTP process take the rest.
GPU_LOAD_BYTES = 4_000_000_000
# On images: the version of torch, and with `.cuda` behind it for which CUDA that is built (docs/reference/image.md).
TORCH_LABEL = "io.zops.torch"
# What PyPI's torch is built for, by its minor version (the release notes of PyTorch); the image pins one of them.
CUDA_OF_TORCH = {"2.11": "13.0", "2.12": "13.0", "2.13": "13.0"}


def needs(spec: Spec, environ: Mapping[str, str] | None = None) -> Need:
    """Return what a deployment will ask of its host, as far as catalog, cache and environment know."""
    environ = os.environ if environ is None else environ
    model = lookup(spec.model)
    wide = DTYPES["float32" if _float32(spec) else "bfloat16"]
    weights = model.resident_bytes * wide
    missing = _missing(spec, model)
    on_gpu = spec.gpus != "none"
    snapshot, read_bytes = _to_read(spec, model)
    torch_cuda, torch_from = _torch_cuda(spec)
    hub, authorization = _hub(spec.source, spec.model, environ)
    return Need(
        gpu_weights_bytes=weights,
        gpu_activation_bytes=int(spec.serve.max_pixels * ACTIVATION_BYTES_A_PIXEL * wide) if weights else 0,
        load_bytes=0 if not weights else GPU_LOAD_BYTES if on_gpu else weights + GPU_LOAD_BYTES,
        disk_bytes=None if missing is None else sum(entry.size for entry in missing),
        files=len(missing or ()),
        read_bytes=read_bytes,
        slim_bytes=0 if _float32(spec) else model.resident_bytes,
        snapshot=snapshot,
        torch_cuda=torch_cuda,
        torch_from=torch_from,
        hub=hub,
        authorization=authorization,
        has_other_source=spec.backup.to is not None,
    )


def _float32(spec: Spec) -> bool:
    return spec.serve.dtype == "float32" or (spec.serve.dtype == "auto" and spec.gpus == "none")


def _missing(spec: Spec, model: Model) -> list[FileEntry] | None:
    """Return the files that the cache lacks; None when nobody can say which there must be."""
    for snapshot in find(spec.cache.dir, spec.model):
        with suppress(SnapshotDamaged):
            manifest = read_manifest(snapshot.path)
            if manifest is not None:
                return [entry for entry in manifest.files if not _is_there(snapshot.path / entry.path, entry.size)]
    pinned = model.pinned()
    if pinned is None:
        return None
    manifest = Manifest.from_json(pinned)
    directory = place(spec.cache.dir, spec.model, manifest.revision)
    return [entry for entry in manifest.files if not _is_there(directory / entry.path, entry.size)]


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _to_read(spec: Spec, model: Model) -> tuple[Path | None, int]:
    """Return the snapshot that would be served, and the bytes of it (else of the pinned one) that a start reads."""
    snapshot = manifest = None
    with suppress(SnapshotMissing, SnapshotDamaged):
        snapshot = meant(spec).path
        manifest = read_manifest(snapshot)
    if manifest is None and (pinned := model.pinned()):
        manifest = Manifest.from_json(pinned)
    return snapshot, manifest.size if manifest else 0


def _torch_cuda(spec: Spec) -> tuple[str, str]:
    """Return for which CUDA the torch that will serve is built, and how that is known; empty where it is not."""
    if spec.runtime == "process":
        return _installed_torch_cuda()
    if spec.runtime == "docker" and (labelled := _labelled_cuda(spec)):
        return labelled
    if not spec.image.build:
        return "", ""
    if spec.image.torch_index:
        # PyTorch's own indexes end in the variant: .../whl/cu126, .../whl/cpu.
        variant = re.search(r"/(?:cu(\d{2,})(\d)|(cpu))/?$", spec.image.torch_index)
        if not variant:
            return "", ""
        return variant[3] or f"{variant[1]}.{variant[2]}", "image.torch_index"
    pinned = re.search(r"^torch==(\d+\.\d+)", _constraints(), re.MULTILINE)
    return (CUDA_OF_TORCH.get(pinned[1], ""), f"torch {pinned[1]} of the image") if pinned else ("", "")


def _labelled_cuda(spec: Spec) -> tuple[str, str] | None:
    """Return what the image itself says; None where the engine has none yet, or it was built without saying so."""
    try:
        labels = read_labels(spec.engine, spec.image.name) or {}
    except ZopsError:
        return None  # that the engine does not answer is another check's finding
    cuda = labels.get(f"{TORCH_LABEL}.cuda")
    return (cuda, f"torch {labels.get(TORCH_LABEL, '')} of {spec.image.name}") if cuda else None


def _constraints() -> str:
    """Return the versions that images are built with: from the wheel, else from the source checkout."""
    packed = resources.files("zops").joinpath("_assets", "constraints.txt")
    checkout = Path(__file__).parents[2] / "constraints.txt"
    for file in (packed, checkout):
        with suppress(OSError):
            return file.read_text(encoding="utf-8")
    return ""


def _installed_torch_cuda() -> tuple[str, str]:
    """Read torch's own version module as text: importing torch takes seconds and opens the GPU."""
    found = find_spec("torch")
    if found is None or not found.origin:
        return "", ""
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return "", ""
    version, cuda = (re.search(rf"^{name}\b[^=\n]*= *(.+)$", text, re.MULTILINE) for name in ("__version__", "cuda"))
    if not version or not cuda:
        return "", ""
    built = cuda[1].strip("'\" ")
    return "cpu" if built == "None" else built, f"installed torch {version[1].strip(chr(39))}"


def _hub(source: Source, model: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the address at a hub that the SDK asks first, and the header with our token; both empty without a hub."""
    if source.kind == "modelscope":
        endpoint = source.endpoint or environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
        path, token = f"/api/v1/models/{model}/revisions", environ.get("MODELSCOPE_API_TOKEN", "")
    elif source.kind == "huggingface":
        endpoint = source.endpoint or environ.get("HF_ENDPOINT") or "https://huggingface.co"
        path, token = f"/api/models/{model}/revision/{source.revision or 'main'}", _huggingface_token(environ)
    else:
        return "", ""
    address = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    authorization = f"Bearer {token}" if token else ""
    if address.username:
        pair = f"{unquote(address.username)}:{unquote(address.password or '')}"
        authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
    # Without user and password: the address is shown.
    shown = address._replace(netloc=address.netloc.rpartition("@")[2], path=address.path.rstrip("/") + path)
    return shown.geturl(), authorization


def _huggingface_token(environ: Mapping[str, str]) -> str:
    if environ.get("HF_TOKEN"):
        return environ["HF_TOKEN"].strip()
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    with suppress(OSError):
        return (
            Path(environ.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser().read_text(encoding="utf-8").strip()
        )
    return ""

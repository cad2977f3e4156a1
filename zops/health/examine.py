"""The doctor's visit: what the deployment will need, what of ours runs already, and then every check."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from zops.cache.layout import find, place
from zops.cache.manifest import FileEntry, Manifest, read_manifest
from zops.catalog import Model, lookup
from zops.errors import SnapshotDamaged, ZopsError
from zops.events import Report, silent
from zops.health.backups import BACKUP_CHECKS
from zops.host.checks import CHECKS
from zops.host.doctor import Context, Diagnosis, Need, Senses, diagnose
from zops.runtime.base import Runtime
from zops.spec import Loaded, Spec

# Transformer and VAE peaked at 15.2 GB for one image of 1024 x 1024 on an H200 (eager, bfloat16), of which 12.5 GB are
# weights. More pixels are counted in proportion, which was not measured.
ACTIVATION_BYTES_A_PIXEL = 2_700_000_000 / (1024 * 1024)
# Peak of anonymous memory with device_map="cuda" was 0.7 GB; torch, CUDA and the HTTP process take the rest.
GPU_LOAD_BYTES = 4_000_000_000


def examine_host(
    loaded: Loaded,
    *,
    runtime: Runtime | None = None,
    only: Sequence[str] = (),
    senses: Senses | None = None,
    report: Report = silent,
) -> Diagnosis:
    """Run the doctor's checks for a specification.

    Args:
        loaded: the specification and where it came from.
        runtime: where instances of ours may run already; none when it cannot be reached.
        only: ids of the checks to run, all when empty.
        senses: how facts are read.
        report: where progress goes.

    Raises:
        UsageError: when `only` names a check that does not exist.
    """
    context = Context(
        spec=loaded.spec,
        file=loaded.file,
        need=needs(loaded.spec),
        own_ports=_own_ports(loaded.spec, runtime),
        senses=senses or Senses(),
    )
    return diagnose(context, (*CHECKS, *BACKUP_CHECKS), only=only, report=report)


def needs(spec: Spec) -> Need:
    """Return what a deployment will ask of its host, as far as catalog and cache know."""
    model = lookup(spec.model)
    weights = model.resident_bytes * (2 if _float32(spec) else 1)
    missing = _missing(spec, model)
    on_gpu = spec.gpus != "none"
    return Need(
        gpu_weights_bytes=weights,
        gpu_activation_bytes=int(spec.serve.max_pixels * ACTIVATION_BYTES_A_PIXEL) if weights else 0,
        load_bytes=0 if not weights else GPU_LOAD_BYTES if on_gpu else weights + GPU_LOAD_BYTES,
        disk_bytes=None if missing is None else sum(entry.size for entry in missing),
        files=len(missing or ()),
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


def _own_ports(spec: Spec, runtime: Runtime | None) -> frozenset[int]:
    """Return the port of our own instance when it runs: a port that it holds is not taken."""
    if runtime is None:
        return frozenset()
    try:
        instance = runtime.find(spec.name)
    except ZopsError:
        return frozenset()
    port = urlsplit(instance.url).port if instance and instance.running else None
    return frozenset({port}) if port else frozenset()

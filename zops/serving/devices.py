"""Which workers to start: one for each GPU (or few GPUs) that this process may use, found without CUDA."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from zops.errors import HostShort
from zops.host.gpu import GpuFacts, read_gpus
from zops.spec import Spec

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker runs."""

    gpus: str | None
    """Its CUDA_VISIBLE_DEVICES: its GPUs, "" for none, None to leave the environment as it is."""
    threads: int | None = None
    """Threads of each process of a worker on the CPU; None leaves torch's own choice."""
    cards: int = 1
    """GPUs that it has; on the CPU, as how many it does as if."""


def plan_workers(
    spec: Spec, environ: Mapping[str, str] = os.environ, read: Callable[[], GpuFacts] = read_gpus
) -> tuple[Seat, ...]:
    """Return a seat for each worker: `serve.workers` of them, or as many as the visible GPUs allow, or one on the CPU.

    A worker has one GPU, or `serve.gpus_per_worker` where `serve.parallel` says that several work together.

    What the runtime has set as CUDA_VISIBLE_DEVICES is kept, and divided. Else NVML counts the GPUs; they are named by
    UUID, because CUDA numbers them in another order (fastest first) than NVML and nvidia-smi do (by PCI bus).

    Raises:
        HostShort: when more workers are asked for than the visible GPUs allow.
    """
    each = 1 if spec.serve.parallel == "replicas" else spec.serve.gpus_per_worker
    wanted = None if spec.serve.workers == "auto" else spec.serve.workers
    gpus = [] if spec.gpus == "none" else _visible(spec, environ, read)
    if not gpus:
        return _on_cpu(wanted or 1, None if spec.gpus != "none" else "", spec)
    if (wanted or 1) * each > len(gpus):
        takes = "one" if each == 1 else f"{each} (serve.parallel: {spec.serve.parallel})"
        raise HostShort(
            f"serve.workers is {spec.serve.workers}, but {len(gpus)} GPUs are visible and each worker takes {takes}",
            code="gpu-missing",
            hint="set serve.workers: auto, or give the instance more GPUs with: gpus: all",
            visible=len(gpus),
        )
    # All GPUs need no names, so that one which NVML does not tell by its right name (MIG) works as well.
    alone = len(gpus) == each and (VISIBLE in environ or spec.gpus == "all")
    groups = [gpus[first : first + each] for first in range(0, len(gpus) - each + 1, each)]
    return tuple(Seat(None if alone else ",".join(group), cards=each) for group in groups[:wanted])


def wanted_gpus(spec: Spec, environ: Mapping[str, str] = os.environ) -> tuple[str, ...] | None:
    """Return the names (index or UUID) of the GPUs that this process may use; None for all, empty for none."""
    if spec.gpus == "none":
        return ()
    if VISIBLE in environ:
        return tuple(_listed(environ[VISIBLE]))
    return None if spec.gpus == "all" else tuple(str(gpu) for gpu in spec.gpus)


def _visible(spec: Spec, environ: Mapping[str, str], read: Callable[[], GpuFacts]) -> list[str]:
    """Return the names of the visible GPUs; empty when there is none or it cannot be told."""
    if VISIBLE in environ:
        return _listed(environ[VISIBLE])
    found = read().gpus
    if spec.gpus == "all":
        return [gpu.uuid for gpu in found]
    names = {gpu.index: gpu.uuid for gpu in found}
    return [str(names.get(gpu, gpu) if isinstance(gpu, int) else gpu) for gpu in spec.gpus]


def _listed(text: str) -> list[str]:
    """Split a CUDA_VISIBLE_DEVICES as CUDA does: what follows the first invalid entry is not visible."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))) or name in names:
            break
        names.append(name)
    return names


def _on_cpu(count: int, gpus: str | None, spec: Spec) -> tuple[Seat, ...]:
    cards = 1 if spec.serve.parallel == "replicas" else spec.serve.gpus_per_worker
    processes = count * (cards if spec.serve.parallel == "context" else 1)
    threads = None if processes == 1 else max(1, len(os.sched_getaffinity(0)) // processes)
    return tuple(Seat(gpus, threads, cards) for _ in range(count))

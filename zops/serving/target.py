"""What a worker runs on: its cards, and the environment that the libraries read when they are imported."""

import os
from dataclasses import dataclass
from typing import Any

from zops.errors import HostShort
from zops.serving.accelerate.choice import Device, has_triton
from zops.serving.messages import WorkerSettings
from zops.serving.volume import Volume


@dataclass(frozen=True, slots=True)
class Target:
    """Where the weights go, and as what."""

    cards: tuple[str, ...]
    """Devices of torch: cuda:0 and so on, or cpu."""
    dtype: Any
    """A torch.dtype."""

    @property
    def on_gpu(self) -> bool:
        """Whether the cards are GPUs."""
        return self.cards[0].startswith("cuda")


def prepare_environment(settings: WorkerSettings, volume: Volume | None = None) -> None:
    """Set what the libraries read when they are imported: no hub, no telemetry, threads, where compilers keep files."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # cuBLAS picks its workspace by stream otherwise, and equal seeds could give unequal images.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Weights that are narrowed on arrival leave holes of all sizes; pages can be given back, whole segments could not.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if volume is not None:
        os.environ |= volume.environment
    if settings.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpus
    # Threads that spin for each other on cores that others use too make an image up to a hundred times slower. So many
    # rounds, of libgomp's own 300,000, cost nothing where the cores are ours.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)


def find_target(settings: WorkerSettings, *, first: int = 0) -> Target:
    """Return the cards of this process and the type of its weights; `first` counts among those of the worker.

    Raises:
        HostShort: when torch sees fewer GPUs than the worker is to have.
    """
    import torch  # noqa: PLC0415 - imported already

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < seen < settings.cards:
        raise HostShort(
            f"this worker is to have {settings.cards} GPUs, and torch sees {seen}",
            code="gpu-missing",
            hint="give the instance more GPUs with: gpus: all; or set serve.parallel: replicas",
            visible=seen,
        )
    chosen = {"auto": "bfloat16" if seen else "float32"}.get(settings.dtype, settings.dtype)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    count = settings.cards if settings.parallel == "split" else 1
    kind = "cuda" if seen else "cpu"  # torch takes cpu:1 for cpu: nothing but the names differs there
    cards = tuple(f"{kind}:{index}" for index in range(first, first + count)) if seen or count > 1 else ("cpu",)
    return Target(cards, {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen])


def describe_device(target: Target) -> Device:
    """Return what the choice of a preset must know; of several GPUs the oldest decides what can be computed."""
    import torch  # noqa: PLC0415 - imported already

    if not target.on_gpu:
        return Device("cpu")
    cards = [torch.cuda.get_device_properties(card) for card in target.cards]
    oldest = min((card.major, card.minor) for card in cards)
    return Device("cuda", oldest, cards[0].total_memory, has_triton(), tuple(card.total_memory for card in cards[1:]))


def name_device(target: Target) -> str:
    """Return the name of the first GPU, or cpu."""
    import torch  # noqa: PLC0415 - imported already

    return str(torch.cuda.get_device_name(target.cards[0])) if target.on_gpu else "cpu"

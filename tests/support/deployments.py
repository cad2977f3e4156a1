"""Deployments as k8s/ writes them down: the default specification, and the CPU overlay's."""

from pathlib import Path

from zops.catalog import SYNTHETIC_TINY, Z_IMAGE_TURBO
from zops.runtime.base import Deployment
from zops.spec import Spec

CACHE_DIR = Path("/var/lib/zops/cache")


def kubernetes_deployment(**changes) -> Deployment:
    """Return the default deployment on Kubernetes with changes to its specification."""
    settings = {"runtime": "kubernetes", "cache": {"dir": CACHE_DIR}} | changes
    commit = Z_IMAGE_TURBO.commit
    snapshot = CACHE_DIR / "models" / "Tongyi-MAI--Z-Image-Turbo" / "snapshots" / commit
    return Deployment(Spec.model_validate(settings), snapshot, commit, Z_IMAGE_TURBO.pinned()["digest"])


def cpu_deployment() -> Deployment:
    """Return what k8s/overlays/cpu serves; the digest of a synthetic model depends on who made it."""
    wanted = kubernetes_deployment(
        model=SYNTHETIC_TINY.id, gpus="none", resources={"memory": "2GiB"}, serve={"warmup_size": 64}
    )
    snapshot = CACHE_DIR / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0"
    return Deployment(wanted.spec, snapshot, "seed-0", "0" * 64)

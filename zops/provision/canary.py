"""The first image of an instance, kept: the proof that it serves, and the golden image of later ones."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from zops.cache.manifest import sync_directory, write_json
from zops.errors import ZopsError
from zops.health.canary import paint
from zops.host.paths import state_dir
from zops.runtime.base import Deployment, Instance


@dataclass(frozen=True, slots=True)
class Kept:
    """A canary image on disk: where it lies, its SHA-256 and how many seconds it took."""

    path: Path
    sha256: str
    seconds: float


def recorded(instance: Instance) -> Kept | None:
    """Return the canary of this very instance (same id, same start), None when it has made none."""
    picture = _directory() / f"{instance.name}.png"
    try:
        body = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        same = body["instance"] == [instance.id, instance.started_at] and picture.is_file()
        return Kept(picture, str(body["sha256"]), float(body["seconds"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make(deployment: Deployment, instance: Instance) -> Kept:
    """Make the canary image of an instance, look at it and keep it.

    Raises:
        ZopsError: when the instance refuses, fails, or sends an image that shows nothing.
    """
    serve = deployment.spec.serve
    made = paint(instance.url, edge=serve.warmup_size, timeout_s=serve.request_timeout_s)
    if made.fault:
        raise ZopsError(
            f"the canary of {instance.name} shows nothing: {made.fault}",
            code="canary-failed",
            hint="check the weights with: zops cache verify --deep; see what it did with: zops logs",
        )
    picture = _directory() / f"{instance.name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    part = picture.with_suffix(".part")
    part.write_bytes(made.image.data)
    part.replace(picture)
    sync_directory(picture.parent)
    kept = Kept(picture, hashlib.sha256(made.image.data).hexdigest(), made.seconds)
    body = {
        "instance": [instance.id, instance.started_at],
        "sha256": kept.sha256,
        "seconds": kept.seconds,
        "receipt": made.image.receipt,
    }
    write_json(picture.with_suffix(".json"), body)
    return kept


def _directory() -> Path:
    return state_dir() / "canaries"

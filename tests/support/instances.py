"""Deployments with a snapshot on disk that runtimes can be given without a model behind it."""

import json
from pathlib import Path

from zops.host.engine import EngineFacts
from zops.runtime.base import Deployment
from zops.spec import Spec

ENGINES = Path(__file__).parent.parent / "testdata" / "engine"


def recorded(name: str, api_version: str = "1.41", **changes) -> EngineFacts:
    """Return the facts of a recorded engine."""
    return EngineFacts.from_info(json.loads((ENGINES / f"{name}.json").read_text()) | changes, api_version=api_version)


def deployment(root: Path, **changes) -> Deployment:
    """Return a deployment whose snapshot, in a cache below `root`, is two files that everybody may read."""
    cache = root / "cache"
    snapshot = cache / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0"
    (snapshot / "vae").mkdir(parents=True, exist_ok=True)
    for name in ("model_index.json", "vae/config.json"):
        (snapshot / name).write_text("{}")
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    settings = {"name": "demo", "model": "zops/synthetic-tiny", "cache": {"dir": cache}, "gpus": "none"} | changes
    return Deployment(Spec.model_validate(settings), snapshot, "seed-0", "ab" * 32)

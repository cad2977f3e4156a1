"""What was done to which instance, in a file: a watch that is started anew must not begin its budget anew.

Whatever is wrong with that file, the watch goes on without it: nothing here raises.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zops.cache.manifest import write_json
from zops.watch.healing import Heal

Key = tuple[str, str]
"""Runtime and name of an instance."""


def read_heals(path: Path) -> tuple[dict[Key, tuple[str, list[Heal]]], str]:
    """Return for each instance its id and its heals, and why nothing could be read (empty when all is well)."""
    try:
        body = json.loads(path.read_bytes())
        return {_key(name): (str(one["id"]), _heals(one["heals"])) for name, one in body["instances"].items()}, ""
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, "it makes no sense"


def write_heals(path: Path, known: Mapping[Key, tuple[str, Sequence[Heal]]]) -> str:
    """Replace the file and return why that failed, empty when it did not."""
    body = {
        "instances": {
            "/".join(key): {"id": instance_id, "heals": [asdict(heal) for heal in heals]}
            for key, (instance_id, heals) in known.items()
            if heals
        }
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, body)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _key(text: str) -> Key:
    runtime, _, name = text.partition("/")
    return runtime, name


def _heals(entries: Sequence[Mapping[str, Any]]) -> list[Heal]:
    heals = [
        Heal(
            at=float(one["at"]),
            action="recreate" if one["action"] == "recreate" else "restart",
            code=str(one["code"]),
            problem_since=float(one["problem_since"]),
            done_at=None if one["done_at"] is None else float(one["done_at"]),
            recovered_at=None if one["recovered_at"] is None else float(one["recovered_at"]),
        )
        for one in entries
    ]
    return sorted(heals, key=lambda heal: heal.at)

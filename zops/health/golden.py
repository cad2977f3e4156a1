"""What a deployment's canary looked like and how long it took when it was first made: golden image and baseline.

One file a deployment, below the state directory. A golden counts for the very same snapshot, preset, dtype, device,
size and number of forwards: anything else makes other images, at another speed, and gets a golden of its own.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf, log10
from statistics import median
from typing import Any

from zops.cache.manifest import write_json
from zops.host.paths import state_dir

FORMAT = 1
# How many first canaries make the baseline: their median is deaf to two that were slow by chance.
BASELINE_COUNT = 5
# Goldens that a file keeps: one for each way of serving that was tried lately.
MOST = 8


@dataclass(frozen=True, slots=True)
class Golden:
    """A canary that was sound, as later ones are compared with it."""

    sha256: str
    thumbnail: bytes
    """The image, made small: see `zops.health.png.THUMBNAIL_EDGE`."""
    seconds: tuple[float, ...]
    """What the first canaries took, at most `BASELINE_COUNT` of them."""
    recorded_at: str = ""

    @property
    def baseline_s(self) -> float:
        """What a canary usually takes."""
        return median(self.seconds)

    def joined_by(self, seconds: float) -> "Golden":
        """Return it with another measurement, or itself where there are enough."""
        if len(self.seconds) >= BASELINE_COUNT:
            return self
        return replace(self, seconds=(*self.seconds, seconds))

    def as_json(self) -> dict[str, Any]:
        """Return it as it lies on disk."""
        return {
            "sha256": self.sha256,
            "thumbnail": base64.b64encode(self.thumbnail).decode(),
            "seconds": [round(value, 4) for value in self.seconds],
            "recorded_at": self.recorded_at,
        }


def new_golden(image: bytes, thumbnail: bytes, seconds: float) -> Golden:
    """Return the golden of a canary that was just made."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Golden(hashlib.sha256(image).hexdigest(), thumbnail, (seconds,), now)


class Album:
    """The goldens of one deployment.

    Args:
        name: the deployment.
        host: its host's name in `hosts:`, empty for the specification's own engine.
    """

    def __init__(self, name: str, host: str = "") -> None:
        self.file = state_dir() / "canaries" / f"{name}{'@' * bool(host)}{host}.golden.json"

    def find(self, key: Mapping[str, Any]) -> Golden | None:
        """Return the golden for a way of serving, None when there is none that can be read."""
        body = self._read().get(_digest(key))
        try:
            return body and Golden(
                sha256=str(body["sha256"]),
                thumbnail=base64.b64decode(body["thumbnail"], validate=True),
                seconds=tuple(float(value) for value in body["seconds"][:BASELINE_COUNT]) or (inf,),
                recorded_at=str(body["recorded_at"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
            return None

    def keep(self, key: Mapping[str, Any], golden: Golden) -> None:
        """Write a golden durably; the oldest go where there are too many.

        Raises:
            OSError: when the file cannot be written.
        """
        goldens = self._read()
        goldens.pop(_digest(key), None)
        goldens[_digest(key)] = {"key": dict(key), **golden.as_json()}
        write_json(self.file, {"format": FORMAT, "goldens": dict(list(goldens.items())[-MOST:])})

    def _read(self) -> dict[str, Any]:
        try:
            body = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Whoever damaged it lost the comparison, not the verdict.
            return {}
        if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("goldens"), dict):
            return {}
        return dict(body["goldens"])


def similarity_db(one: bytes, other: bytes) -> float:
    """Return the peak signal-to-noise ratio of two thumbnails in dB: infinite for equal ones, 0 for unlike sizes.

    Unrelated pictures lie around 10 dB; the same picture, made by another version of a library, above 30.
    """
    if len(one) != len(other) or not one:
        return 0.0
    squared = sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)
    return inf if squared == 0 else 10 * log10(255**2 / squared)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]

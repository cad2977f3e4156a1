"""The canary: one small image with a fixed seed, made through the instance's own HTTP door, looked at and compared."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isinf
from typing import Any

from zops.errors import ZopsError
from zops.health.client import KEY_CODES, Ask, Client, GeneratedImage
from zops.health.golden import Album, Golden, new_golden, similarity_db
from zops.health.patient import Patient
from zops.health.png import Look, look_at
from zops.health.verdict import Probe, degraded, failed, passed

PROMPT = "a lighthouse on a rocky coast at dawn, photograph"
SEED = 20251127
DEFAULT_EDGE = 512

SIMILAR_DB = 22.0
"""Below this a canary shows something else than its golden: between unrelated pictures (about 10 dB) and the same one
with other kernels or libraries (above 30 dB)."""
SLOW, TOO_SLOW = 2.0, 5.0
"""Multiples of the baseline from which a canary is degraded, and failed."""
NOISE_S = 0.25
"""What a canary may take longer whatever the multiple: a host that is busy for a moment."""
MOST_DB = 99.0
"""Equal images have an infinite ratio, which JSON cannot tell."""

_CHECK_WEIGHTS = "check the weights with: zops cache verify --deep; see what it did with: zops logs"


@dataclass(frozen=True, slots=True)
class Canary:
    """A canary image: what came back, what it looks like, and how many seconds it took."""

    edge: int
    image: GeneratedImage
    look: Look
    seconds: float

    @property
    def fault(self) -> str:
        """Why the image cannot be what the model makes; empty when it may be."""
        if (self.look.width, self.look.height) != (self.edge, self.edge):
            return (
                f"the image has {self.look.width} x {self.look.height} pixels, {self.edge} x {self.edge} were asked for"
            )
        return f"the image is {self.look.fault}" if self.look.fault else ""

    @property
    def work_s(self) -> float:
        """Seconds without those in the queue, which say how busy an instance is and nothing of how it is."""
        spent = self.image.receipt.get("seconds")
        waited = spent.get("queue") if isinstance(spent, Mapping) else None
        return max(self.seconds - waited, 0.0) if isinstance(waited, int | float) else self.seconds

    @property
    def alone(self) -> bool:
        """Whether it was made by itself; together with other pictures it takes longer."""
        return bool(self.image.receipt.get("batch_size", 1) == 1)


def paint(url: str, *, edge: int, timeout_s: float, ask: Ask | None = None) -> Canary:
    """Make the canary image.

    Args:
        url: address of the instance.
        edge: width and height in pixels.
        timeout_s: longest wait in seconds.
        ask: how to ask an instance whose address cannot be reached from here.

    Raises:
        ZopsError: when the instance does not answer, refuses, fails, or sends what is no image.
    """
    made = Client(url, timeout_s=timeout_s, ask=ask).generate(PROMPT, size=f"{edge}x{edge}", seed=SEED)
    image = made.images[0]
    return Canary(edge, image, look_at(image.data), made.seconds)


def judge_canary(patient: Patient, *, record: bool = False) -> Probe:
    """Make a canary and judge the image, its likeness to the golden one, and the time that it took.

    The first sound canary becomes the golden one, as does, with `record`, the present one.
    """
    serve = patient.asked.get("serve")
    edge = int(serve.get("warmup_size", DEFAULT_EDGE)) if isinstance(serve, Mapping) else DEFAULT_EDGE
    try:
        made = paint(patient.instance.url, edge=edge, timeout_s=patient.canary_timeout_s, ask=patient.ask)
    except ZopsError as error:
        return _unmade(patient, error)
    seen: dict[str, Any] = {
        "sha256": hashlib.sha256(made.image.data).hexdigest(),
        "seconds": round(made.seconds, 3),
        "work_s": round(made.work_s, 3),
        "width": made.look.width,
        "height": made.look.height,
        "mean": round(made.look.mean, 2),
        "deviation": round(made.look.deviation, 2),
        "seed": SEED,
    }
    if made.fault:
        return failed(
            "canary", "canary-black" if made.look.fault else "canary-failed", made.fault, _CHECK_WEIGHTS, **seen
        )
    return _compare(patient, made, seen, record=record)


def _unmade(patient: Patient, error: ZopsError) -> Probe:
    if error.code in KEY_CODES:
        # It is our key that is wrong; an instance must not be replaced for that.
        return degraded("canary", "key-refused", error.message, error.hint, cause=error.code)
    if error.code == "instance-busy" or (error.code == "instance-timeout" and _moved_on(patient)):
        return passed("canary", f"no image was made, others' requests came first: {error.message}", skipped=True)
    return failed("canary", "canary-failed", error.message, error.hint or _CHECK_WEIGHTS, cause=error.code)


def _moved_on(patient: Patient) -> bool:
    """Tell whether the instance made others' pictures while it did not come to ours."""
    try:
        queue = replace(patient).queue  # a fresh look: what was asked before is not copied
    except ZopsError:
        return False
    before = patient.queue
    others = (before.get("waiting") or 0) + (before.get("running") or 0)
    return bool(others) and (queue.get("made") or 0) > (before.get("made") or 0)


def _compare(patient: Patient, made: Canary, seen: dict[str, Any], *, record: bool) -> Probe:
    album, key = Album(patient.instance.name, patient.host), _key(patient, made)
    golden = None if record else album.find(key)
    if golden is None:
        golden = new_golden(made.image.data, made.look.thumbnail, made.work_s)
        seen |= {"golden": "recorded", "baseline_s": round(golden.baseline_s, 3)}
        trouble = _keep(album, key, golden)
        text = f"an image of {made.edge} x {made.edge} in {made.work_s:.2f} s"
        return passed("canary", f"{text}, {trouble or 'recorded as the one to compare with'}", **seen)
    likeness = similarity_db(made.look.thumbnail, golden.thumbnail)
    times = made.work_s / golden.baseline_s
    seen |= {
        "golden": "equal" if seen["sha256"] == golden.sha256 else "similar" if likeness >= SIMILAR_DB else "different",
        "golden_sha256": golden.sha256,
        "golden_recorded_at": golden.recorded_at,
        "similarity_db": MOST_DB if isinf(likeness) else round(likeness, 1),
        "baseline_s": round(golden.baseline_s, 3),
        "alone": made.alone,
    }
    anew = f"zops health --deep --record {patient.named}"
    if likeness < SIMILAR_DB:
        reason = (
            f"the image is not the one of {golden.recorded_at}: {likeness:.0f} dB alike, {SIMILAR_DB:.0f} are needed"
        )
        remedy = f"{_CHECK_WEIGHTS}; if it was to change: {anew}"
        return failed("canary", "canary-differs", reason, remedy, **seen)
    slow = made.alone and made.work_s - golden.baseline_s > NOISE_S
    if slow and times >= SLOW:
        judge = failed if times >= TOO_SLOW else degraded
        reason = f"the image took {made.work_s:.2f} s, {times:.1f} times the usual {golden.baseline_s:.2f} s"
        remedy = f"see what slows it down with: zops doctor; if it was to change: {anew}"
        return judge("canary", "canary-slow", reason, remedy, **seen)
    if made.alone and golden.joined_by(made.work_s) is not golden:
        _keep(album, key, golden.joined_by(made.work_s))
    text = f"an image of {made.edge} x {made.edge} in {made.work_s:.2f} s (usually {golden.baseline_s:.2f} s)"
    return passed("canary", f"{text}, {seen['golden']} to the golden one", **seen)


def _key(patient: Patient, made: Canary) -> dict[str, Any]:
    """Return everything on which the image and its time depend by right."""
    facts, receipt = patient.facts, made.image.receipt
    return {
        "manifest": str(facts.get("manifest_digest") or ""),
        "preset": facts.get("preset"),
        "dtype": facts.get("dtype"),
        "device": facts.get("device"),
        "size": made.edge,
        "forwards": receipt.get("forwards"),
    }


def _keep(album: Album, key: dict[str, Any], golden: Golden) -> str:
    """Keep a golden; return why that could not be."""
    try:
        album.keep(key, golden)
    except OSError as error:
        return f"not recorded: {album.file} cannot be written ({error.strerror})"
    return ""

"""The quality gate of a start: a preset is served when its images are still eager's, on this host, or by force.

The verdict is kept beside the compiled kernels, for the same snapshot, GPU, driver and libraries; so are eager's
images. Only the first start on a host makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zops import __version__
from zops.errors import ZopsError
from zops.serving.accelerate.choice import Choice
from zops.serving.messages import Gate, GateResult
from zops.serving.volume import Volume

# Equal images have an infinite ratio, which JSON cannot tell; beyond this all are equal for 8 bits.
_MOST_DB = 99.0


class PresetRefused(ZopsError):
    """Raised when the gate refuses a preset."""

    default_code = "preset-refused"

    def __init__(self, preset: str, trouble: str) -> None:
        super().__init__(
            f"the preset {preset} fails the quality gate on this host: {trouble}",
            code="preset-refused",
            hint="set serve.preset: eager; or serve.force_preset: true if these pictures are good enough",
        )
        self.trouble = trouble


@dataclass(frozen=True, slots=True)
class Exam:
    """What is judged, and where earlier verdicts lie."""

    choice: Choice
    manifest_digest: str
    size: int
    forwards: int
    forced: bool
    volume: Volume | None

    @property
    def known(self) -> Gate | None:
        """The verdict of an earlier start, where it passed."""
        return self._kept("passed")

    @property
    def refused(self) -> Gate | None:
        """The verdict of an earlier start, where it failed and nothing was forced."""
        return None if self.forced else self._kept("refused")

    def _kept(self, result: GateResult) -> Gate | None:
        gate = self.volume.find_gate(**self._key) if self.volume else None
        return gate if gate and gate.result == result else None

    @property
    def needs_references(self) -> bool:
        """Whether eager's images must be had before the pipeline is changed."""
        return self.choice.preset != "eager" and self.known is None

    @property
    def _key(self) -> dict[str, Any]:
        return self._images_key | {
            "preset": self.choice.preset,
            "fp8_text": self.choice.fp8_text,
            "zops": __version__,
        }

    @property
    def _images_key(self) -> dict[str, Any]:
        return {"manifest": self.manifest_digest, "size": self.size, "forwards": self.forwards}

    def find_references(self, make: Callable[[], list[Any]]) -> list[Any] | None:
        """Return eager's images: made now where its weights fit, else those that are kept; None without either."""
        if self.choice.eager_fits:
            images = make()
            if self.volume:
                self.volume.keep_references(images, **self._images_key)
            return images
        return self.volume.find_references(**self._images_key) if self.volume else None

    def judge(self, references: list[Any] | None, make: Callable[[], list[Any]]) -> Gate:
        """Return what the gate says of the preset.

        Args:
            references: eager's images, where there are any.
            make: makes the preset's images of the same prompts and seeds.

        Raises:
            PresetRefused: when it failed and is not forced; a broken image cannot be forced.
        """
        from zops.serving.accelerate.gate import judge  # noqa: PLC0415 - imports torch

        if self.choice.preset == "eager":
            return Gate("reference")
        if known := self.known:
            return known
        if references is None:
            return Gate("not judged", trouble="eager does not fit into this GPU's memory, and no images of it are kept")
        verdict = judge(self.choice.preset, make(), references)
        figures = (min(verdict.psnr_db, _MOST_DB), round(verdict.ssim, 5))
        if verdict.passed:
            gate = Gate("passed", *figures)
            if self.volume:
                self.volume.keep_gate(gate, **self._key)
            return gate
        if verdict.broken or not self.forced:
            if self.volume:
                self.volume.keep_gate(Gate("refused", *figures, trouble=verdict.trouble), **self._key)
            raise PresetRefused(self.choice.preset, verdict.trouble)
        return Gate("forced", *figures, trouble=verdict.trouble)

"""The models that zops knows: where their hubs keep them, what files they must have, how they want to be called."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class CallDefaults:
    """How a model wants to be called.

    Attributes:
        forwards: passes of the transformer an image; what diffusers calls num_inference_steps since 0.38.
        guidance_scale: any value above zero doubles the work.
        size: edge of the default image in pixels.
    """

    forwards: int
    guidance_scale: float
    size: int


@dataclass(frozen=True, slots=True)
class Model:
    """A catalog entry. `commit` is the revision whose manifest is pinned, empty when none is."""

    id: str
    text: str
    defaults: CallDefaults
    commit: str = ""
    manifest_file: str = ""
    patterns: tuple[str, ...] = ()
    """What of the repository is needed at run time, as globs."""
    resident_bytes: int = 0
    """Memory of all weights in bfloat16; 0 when it is not known or not worth a thought."""

    def pinned(self) -> dict[str, Any] | None:
        """Return the JSON of the manifest that ships with zops, None for a model without one."""
        if not self.manifest_file:
            return None
        text = resources.files(__name__).joinpath("manifests", self.manifest_file).read_text(encoding="utf-8")
        body: dict[str, Any] = json.loads(text)
        return body


# 6,154,908,736 + 4,022,468,096 + 83,819,683 parameters of two bytes: transformer, text encoder, VAE.
Z_IMAGE_RESIDENT_BYTES = 20_522_393_030

# What any diffusers pipeline needs at run time; README, pictures and git's own files are left at the hub.
RUNTIME_PATTERNS = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja")

# Numbers: the model card, with diffusers' meaning of a step since its pull request 13730 (eight steps, eight forwards).
Z_IMAGE_TURBO = Model(
    id="Tongyi-MAI/Z-Image-Turbo",
    text="text to image, 6.15 B transformer + 4 B text encoder, 8 forwards, no guidance",
    defaults=CallDefaults(forwards=8, guidance_scale=0.0, size=1024),
    commit="f332072aa78be7aecdf3ee76d5c247082da564a6",
    manifest_file="z-image-turbo.json",
    patterns=RUNTIME_PATTERNS,
    resident_bytes=Z_IMAGE_RESIDENT_BYTES,
)
SYNTHETIC_TINY = Model(
    id="zops/synthetic-tiny",
    text="random weights in the real layout, 4 MB, 64x64 in tenths of a second on a CPU",
    defaults=CallDefaults(forwards=8, guidance_scale=0.0, size=64),
    patterns=RUNTIME_PATTERNS,
)
SYNTHETIC_FULL = Model(
    id="zops/synthetic-full",
    text="random weights in Z-Image-Turbo's shapes and dtypes, 32.8 GB, to accept a host before the weights arrive",
    defaults=CallDefaults(forwards=8, guidance_scale=0.0, size=1024),
    patterns=RUNTIME_PATTERNS,
    resident_bytes=Z_IMAGE_RESIDENT_BYTES,
)
MODELS = {model.id: model for model in (Z_IMAGE_TURBO, SYNTHETIC_TINY, SYNTHETIC_FULL)}


def lookup(model_id: str) -> Model:
    """Return the catalog entry; a model that the catalog does not know gets the call defaults of Z-Image-Turbo."""
    known = MODELS.get(model_id)
    return known or Model(
        id=model_id, text="not in the catalog", defaults=Z_IMAGE_TURBO.defaults, patterns=RUNTIME_PATTERNS
    )

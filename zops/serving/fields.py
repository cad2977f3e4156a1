"""The fields that a client may send: OpenAI's and ours, with their types and bounds. Nothing here depends on a spec."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_PROMPT_CHARS = 32_000
"""OpenAI's own limit. The real one is counted in tokens."""
MULTIPLE = 16
MAX_EDGE = 8192
"""512 entries of the rotary tables, 16 pixels each."""
MAX_SEED = (1 << 53) - 1
"""The largest whole number that every JSON reader keeps exact."""
DEFAULT_STRENGTH = 0.6
"""ZImageImg2ImgPipeline's own default."""
DEFAULT_QUALITY = 95

Format = Literal["png", "jpeg", "webp"]
Transport = Literal["b64_json", "url"]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be, both ends included, and the code of the error when it is not."""

    code: str
    least: float
    most: float


BOUNDS: dict[str, Bound] = {
    "num_inference_steps": Bound("steps_out_of_range", 1, 200),
    "guidance_scale": Bound("guidance_out_of_range", 0, 20),
    "output_compression": Bound("compression_out_of_range", 0, 100),
    "seed": Bound("seed_out_of_range", 0, MAX_SEED),
    "partial_images": Bound("partial_images_out_of_range", 0, 3),
    # Of the most forwards, less leaves none to run.
    "strength": Bound("strength_out_of_range", 1 / 200, 1),
}
"""Of every server; the bound of `n` is the operator's (`serve.max_images`)."""

OPENAI_ONLY = frozenset({"complexity", "frame_count", "frame_duration_ms", "markup", "mask", "svg"})
"""Fields of OpenAI's that are refused by name, in whatever form they come."""


def _whole(value: object) -> object:
    """Take 8.0 for 8: JSON knows one kind of number, and its schema calls both an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class GenerationBody(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="what the image shows; at most 512 tokens with the model's template")
    model: str | None = Field(None, description="must be the served model when given")
    n: Whole | None = Field(None, description="images to make, 1 when empty; seeds count up from the first")
    size: str | None = Field(None, description="WIDTHxHEIGHT, both multiples of 16, or auto")
    response_format: Transport | None = Field(None, description="b64_json when empty")
    output_format: Format | None = Field(None, description="png when empty")
    output_compression: Whole | None = Field(None, description="quality of jpeg and webp, 95 when empty")
    seed: Whole | None = Field(None, description="random when empty; only its lower 32 bits matter")
    num_inference_steps: Whole | None = Field(
        None, description="forwards of the transformer; the model's own when empty"
    )
    guidance_scale: float | None = Field(None, description="the model's own when empty; any value above 0 costs double")
    negative_prompt: str | None = Field(None, description="what the image must not show; needs guidance_scale above 0")
    stream: bool | None = Field(None, description="true: answer as server-sent events")
    partial_images: Whole | None = Field(None, description="previews of each image; needs stream")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="ignored"
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="ignored")
    style: Literal["vivid", "natural"] | None = Field(None, description="ignored")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="transparent is not supported"
    )


class EditBody(GenerationBody):
    """Fields of the form of `POST /v1/images/edits`, without its files; as text, so types are read from text."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

    size: str | None = Field(None, description="WIDTHxHEIGHT, both multiples of 16; as near to the upload's when empty")
    strength: float | None = Field(
        None, description=f"how much of the upload is replaced, {DEFAULT_STRENGTH} when empty"
    )
    input_fidelity: Literal["low", "high"] | None = Field(None, description="ignored; strength is what counts here")

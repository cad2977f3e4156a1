"""What crosses the pipe between the HTTP process and its worker: plain data, no torch on either side."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Phases of a start in their order; /readyz and the metrics name them.
PHASES = ("imports", "verify", "load", "warmup")
MAX_PROMPT_TOKENS = 512
"""What ZImagePipeline gives its text encoder (max_sequence_length); it would cut a longer prompt without a word."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is started with."""

    snapshot: str
    model: str
    dtype: str
    """bfloat16, float32, or auto: bfloat16 on a GPU, float32 on a CPU."""
    gpus: str | None
    """Value for CUDA_VISIBLE_DEVICES ("" hides all GPUs); None leaves the environment as it is."""
    forwards: int
    guidance_scale: float
    warmup_size: int


# --- to the worker


@dataclass(frozen=True, slots=True)
class Job:
    """Images to make: one for each seed."""

    id: str
    prompt: str = field(repr=False)
    width: int
    height: int
    seeds: tuple[int, ...]
    forwards: int
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this job any more."""

    id: str


# --- from the worker


@dataclass(frozen=True, slots=True)
class Entered:
    """The worker's start reached a phase."""

    phase: str


@dataclass(frozen=True, slots=True)
class Passed:
    """The worker's start left a phase behind."""

    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A warm-up image was made and looked at. Names what the worker runs on."""

    device: str
    dtype: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The worker cannot start; it exits after this."""

    message: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """One image as 8-bit RGB, row by row."""

    width: int
    height: int
    seed: int
    rgb: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Done:
    """All images of a job."""

    id: str
    images: tuple[RawImage, ...]
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that gave no image: `code` is one of `serving.errors.ERROR_CODES`."""

    id: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A job that was given up because it was cancelled."""

    id: str


ToWorker = Job | Cancel
Answer = Done | Failed | Cancelled
FromWorker = Entered | Passed | Ready | StartFailed | Answer

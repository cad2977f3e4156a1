"""What crosses the pipe between the HTTP process and its workers: plain data, no torch on either side.

The unit of work is a picture: one image of one request. Pictures that have the same `Shape` may be made together, in a
batch, and a request of several pictures may be spread over several workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Phases of a start in their order; /readyz and the metrics name them.
PHASES = ("verify", "imports", "read", "build", "gate", "warmup")
MAX_PROMPT_TOKENS = 512
"""What ZImagePipeline gives its text encoder (max_sequence_length); it would cut a longer prompt without a word."""
BUCKET_TOKENS = 32
"""The transformer pads captions to a multiple of this; with equal padded lengths it needs no attention mask."""
BEAT_S = 0.5
"""A worker that lives sends a `Beat` this often, from a thread of its own, also in the midst of a forward."""

Mode = Literal["generate", "edit"]
Parallel = Literal["replicas", "split", "context"]
"""How a worker uses cards: `replicas` one; `split` has components on several; `context` several work on each image."""
GateResult = Literal["reference", "passed", "forced", "not judged", "refused"]
"""`reference`: eager itself. `forced`: it failed and is served because the operator says so. `not judged`: eager does
not fit into this device's memory and no images of it were kept. `refused`: it failed; never served, but remembered."""


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
    threads: int | None = None
    """Threads of a worker on a CPU; None leaves torch's own choice."""
    preset: str = "auto"
    """eager, bf16, fp8, or auto: see `accelerate.choice`."""
    fp8_text: bool | None = None
    """Whether the preset fp8 takes the text encoder as well; None: where it does not fit otherwise."""
    force_preset: bool = False
    """Serve a preset that the gate fails, or that this device computes by reference only."""
    verify_on_load: bool = False
    """Compare every byte of the weights with its recorded digest on the way to the device."""
    kernels: str | None = None
    """Directory for compiled kernels and verdicts of the gate; None keeps neither."""
    sizes: tuple[int, ...] = ()
    """Edges of further square images that the warm-up makes, so that no request waits for what a first one costs."""
    parallel: Parallel = "replicas"
    cards: int = 1
    """Cards that this worker has; one with `replicas`."""


@dataclass(frozen=True, slots=True)
class Post:
    """What a follower is started with: the process of one more card of a worker, see `followers`."""

    settings: WorkerSettings
    preset: str
    rank: int
    """1 for the first follower: the worker's own process is 0."""
    meeting: str
    """File by which the processes find each other."""
    leader: int
    """Process that it must not outlive."""


# --- to a worker


@dataclass(frozen=True, slots=True)
class Shape:
    """What pictures must have in common to be made in one batch."""

    mode: Mode
    width: int
    height: int
    forwards: int
    guidance_scale: float
    bucket: int
    """Tokens of the caption, rounded up to a multiple of `BUCKET_TOKENS`; of the longer one with a negative prompt."""
    strength: float = 1.0
    """How much of the source an edit replaces, 0 to 1; `int(forwards * strength)` forwards are run."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image to make."""

    id: str
    """Unique for the life of the server, the same when the picture is tried again on another worker."""
    prompt: str = field(repr=False)
    seed: int
    negative_prompt: str = field(default="", repr=False)
    source: bytes | None = field(default=None, repr=False)
    """8-bit RGB of the size in the shape: what an edit begins with."""
    previews: int = 0
    """How many `Preview`s to send, spread evenly over the forwards."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures for a worker to make now, together. A worker has one batch at a time."""

    id: int
    shape: Shape
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this picture any more."""

    picture: str


# --- from a worker


@dataclass(frozen=True, slots=True)
class Entered:
    """The worker's start reached a phase."""

    phase: str


@dataclass(frozen=True, slots=True)
class Passed:
    """The worker's start left a phase behind. Phases may overlap: the seconds need not add up."""

    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Gate:
    """What the quality gate said of the preset, on this host."""

    result: GateResult
    psnr_db: float | None = None
    """Of the image that is furthest from what eager makes of the same prompt and seed; None without a comparison."""
    ssim: float | None = None
    trouble: str = ""
    """Why it did not pass."""


@dataclass(frozen=True, slots=True)
class Noticed:
    """Something that an operator should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A warm-up image was made and looked at. Names what the worker runs on, and what only it can know."""

    device: str
    dtype: str
    versions: Mapping[str, str]
    memory_free: int | None = None
    """Bytes of the device that are left for activations once the weights are there; None when it cannot be told."""
    pixel_bytes: float | None = None
    """Bytes that one more pixel of an image takes while it is made, measured by the warm-up; None as above."""
    template: tuple[str, str] = ("", "")
    """What the model's chat template puts before and behind a prompt, so that the HTTP process can count tokens."""
    cache_bytes: int = 0
    """Bytes of weights that were read from the snapshot on local disk."""
    cache_seconds: float = 0.0
    preset: str = "eager"
    gate: Gate = Gate("reference")
    packs: bool = False
    """Whether captions of different lengths go into one batch at no cost."""
    notes: tuple[str, ...] = ()
    """What was done to the pipeline, and what was left out and why."""
    fallback: str = ""
    """Which presets `auto` would rather have served, and why it did not; empty when the first was good."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The worker cannot start; it exits after this."""

    message: str


@dataclass(frozen=True, slots=True)
class Beat:
    """The worker lives. `forwards` counts those that its batch has finished."""

    batch: int | None
    forwards: int
    memory: tuple[tuple[int, int], ...] = ()
    """Used and total bytes of each of its cards; empty where that cannot be told."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A small view of an unfinished picture as 8-bit RGB; `index` counts from 0."""

    picture: str
    index: int
    width: int
    height: int
    rgb: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Made:
    """A finished picture as 8-bit RGB, row by row."""

    picture: str
    width: int
    height: int
    seed: int
    rgb: bytes = field(repr=False)
    prompt_tokens: int
    truncated: bool
    """Whether the prompt was cut to `MAX_PROMPT_TOKENS`."""
    forwards: int
    """Forwards that were really run."""
    batch_size: int
    seconds: Mapping[str, float]
    """Of its batch, by phase: text, denoise, decode."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A picture that could not be made: `code` is one of `serving.errors.ERROR_CODES`."""

    picture: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A picture that was given up because it was cancelled."""

    picture: str


@dataclass(frozen=True, slots=True)
class Free:
    """The batch is over, each of its pictures was answered, and the worker takes the next one.

    `fits` is the largest batch of this shape that fits into memory where the worker had to make it smaller, else None.
    """

    batch: int
    fits: int | None = None


ToWorker = Batch | Cancel
Answer = Made | Failed | Cancelled
FromWorker = Entered | Passed | Noticed | Ready | StartFailed | Beat | Preview | Answer | Free

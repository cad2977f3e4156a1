"""The keys of zops.yaml: their types, limits, defaults and the combinations that are possible."""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from zops import __version__

ENV_PREFIX = "ZOPS_"

GIB = 1 << 30


class _Section(BaseModel):
    # Built when first used, all at once in the outermost: every command waits for it.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)


class Source(_Section):
    """Where the weights come from when the cache does not have them."""

    kind: Literal["modelscope", "huggingface", "directory", "archive"] = "modelscope"
    revision: str | None = Field(None, description="branch, tag or commit; the catalog's pinned commit when empty")
    endpoint: str | None = Field(None, description="a mirror of the hub, as http(s)://host[:port]")
    path: str | None = Field(None, description="the directory or the archive (a file or s3://bucket/key)")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Source":
        hub = self.kind in {"modelscope", "huggingface"}
        if hub and self.path:
            raise ValueError(f"path is for kind: directory or archive, not for {self.kind}; remove it or change kind")
        if not hub and not self.path:
            raise ValueError(f"kind: {self.kind} needs path; add the {self.kind} to read from")
        if not hub and self.endpoint:
            raise ValueError(f"endpoint is for kind: modelscope or huggingface, not for {self.kind}; remove it")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError("endpoint must start with http:// or https://")
        return self


class Cache(_Section):
    """Where snapshots live on this host: a directory on a local SSD."""

    dir: Path = Field(Path("~/.cache/zops"), description="root of the cache, mounted read-only into instances")
    kernels: Path | None = Field(
        None,
        description="where a process keeps compiled kernels and gate verdicts; its state directory when empty",
    )

    @field_validator("dir", "kernels")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value and value.expanduser()


class Image(_Section):
    """The container image, and how to build it where it is missing."""

    name: str = Field(f"zops-inference:{__version__}", description="name[:tag] or name@sha256:digest")
    build: bool = Field(default=True, description="build the image when the engine does not have it (else: pull)")
    base: str = Field("debian:bookworm-slim", description="base image of the build")
    torch_index: str | None = Field(None, description="package index for torch, for example one of CPU builds")
    wheels: Path | None = Field(None, description="directory of wheels that the build prefers to the index")
    ca: Path | None = Field(None, description="CA bundle handed to the build as a secret (company proxies)")


class Serve(_Section):
    """How an instance serves."""

    host: str = Field("127.0.0.1", description="address on which the port is published")
    port: int = Field(8000, ge=1, le=65535)
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    preset: Literal["auto", "eager", "bf16", "fp8"] = Field(
        "auto", description="auto: bf16 where it fits into the GPU, else fp8; eager on a CPU"
    )
    fp8_text: Literal["auto"] | bool = Field(
        "auto", description="the text encoder in fp8 too (preset fp8 only); auto: where it does not fit otherwise"
    )
    force_preset: bool = Field(default=False, description="serve a preset that the quality gate refuses")
    verify_on_load: bool = Field(
        default=False, description="compare all weights with their recorded digests while they are loaded"
    )
    forwards: int | None = Field(None, ge=1, le=200, description="forwards an image; the catalog's number when empty")
    guidance_scale: float | None = Field(
        None, ge=0, le=20, description="the catalog's number when empty; > 0 costs double"
    )
    max_pixels: int = Field(2048 * 2048, ge=256, description="width x height of the largest image that is accepted")
    max_images: int = Field(4, ge=1, le=10, description="largest n of one request")
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto", description="auto: one a visible GPU (or gpus_per_worker of them), or one on the CPU"
    )
    parallel: Literal["replicas", "split", "context"] = Field(
        "replicas",
        description="several GPUs: replicas, a whole model on each; split, its components on several; "
        "context, several work on each image",
    )
    gpus_per_worker: int = Field(2, ge=2, le=8, description="GPUs of one worker with parallel: split or context")
    max_batch: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = Field(
        "auto", description="most images made together; auto: what was measured to pay on this GPU and size, else 1"
    )
    max_queue: int = Field(16, ge=1, le=4096, description="requests that may wait before new ones get 429")
    warmup_size: int = Field(512, ge=16, le=4096, multiple_of=16, description="edge of the warm-up and canary image")
    request_timeout_s: float = Field(120, gt=0, le=3600, description="longest that one request may take")
    startup_timeout_s: float = Field(900, gt=0, le=7200, description="longest wait for an instance to become ready")
    long_prompts: Literal["refuse", "truncate"] = Field(
        "refuse", description="truncate: a prompt of more than 512 tokens is cut, and its receipt says so"
    )
    log_prompts: bool = Field(default=False, description="write prompts into the access log")
    mark_images: bool = Field(
        default=True, description="write into each image, for machines to read, that it was made by a model"
    )
    max_upload: ByteSize = Field(ByteSize(20 << 20), ge=1024, description="largest image that may be sent for an edit")
    results_bytes: ByteSize = Field(ByteSize(256 << 20), description="memory for images that are answered as a URL")
    results_keep_s: float = Field(3600, gt=0, le=86400, description="how long an image can be fetched from its URL")
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="what URLs of images begin with; the request's host when empty",
    )
    api_keys: Path | None = Field(
        None, description="file of API keys, in a directory of its own (see zops key); open to everybody when empty"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if isinstance(value, str) and value in {"float16", "fp16", "half"}:
            raise ValueError("float16 overflows in this model and gives black images; use bfloat16 or auto")
        return {"bf16": "bfloat16", "fp32": "float32"}.get(value, value) if isinstance(value, str) else value


class Resources(_Section):
    """What the engine grants an instance."""

    memory: ByteSize | None = Field(None, description="memory limit, for example 48GiB; none when empty")
    shm: ByteSize = Field(ByteSize(GIB), description="size of /dev/shm")
    log_bytes: ByteSize = Field(ByteSize(20_000_000), description="size at which a log file is rotated")
    log_files: int = Field(5, ge=1, le=100, description="rotated log files that are kept")


_KEEP = re.compile(r"(last|daily|weekly|monthly|yearly)=([0-9]{1,5})")


class Backup(_Section):
    """Where `zops cache backup` puts archives and `zops provision` looks for one."""

    to: str | None = Field(
        None, description="a directory, or s3://bucket/prefix[?endpoint=URL&region=NAME&style=path|virtual]"
    )
    compression: Literal["zstd", "gzip", "none"] = Field(
        "zstd", description="none: a plain tar, larger and faster; gzip: for hosts without zstd"
    )
    incremental: bool = Field(default=False, description="store only what the newest archive does not have")
    encrypt_to: tuple[str, ...] = Field(
        (), description="who may read archives: age1... and ssh-... keys, or files of them"
    )
    passphrase_file: Path | None = Field(
        None, description="file whose first line encrypts and decrypts archives, instead of keys"
    )
    identities: tuple[Path, ...] = Field((), description="files with the keys that decrypt archives")
    keep: str | None = Field(
        None, description="what stays after a backup, as last=7,daily=7,weekly=4,monthly=6; everything when empty"
    )
    max_age_days: float = Field(8, gt=0, le=3660, description="the doctor warns when the newest archive is older")

    @field_validator("encrypt_to", "identities", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("passphrase_file")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value else None

    @field_validator("keep")
    @classmethod
    def _keeps_something(cls, value: str | None) -> str | None:
        if value is None:
            return None
        counts = [_KEEP.fullmatch(part.strip()) for part in value.split(",")]
        if not all(counts) or not any(int(count[2]) for count in counts if count):
            raise ValueError("must be as last=7,daily=7,weekly=4,monthly=6,yearly=1, at least one of them above 0")
        return value

    @model_validator(mode="after")
    def _one_way_to_encrypt(self) -> "Backup":
        if self.encrypt_to and self.passphrase_file:
            raise ValueError("encrypt_to and passphrase_file exclude each other; remove one")
        return self


class Watch(_Section):
    """How `zops watch` looks at the instances of this host and mends them."""

    interval_s: float = Field(10, ge=0.2, le=3600, description="time between two probes of an instance")
    jitter: float = Field(0.1, ge=0, le=0.5, description="share of the interval by which a probe may come earlier")
    canary_every_s: float = Field(900, ge=0, description="time between two canary images of an instance; 0: never")
    failures: int = Field(2, ge=1, le=20, description="bad answers among the last `of` that make a verdict")
    of: int = Field(3, ge=1, le=20, description="answers that a verdict looks at")
    heal: bool = Field(default=True, description="restart and recreate what is unhealthy (else: only report)")
    first_pause_s: float = Field(30, gt=0, le=3600, description="pause before the second heal; doubled for each more")
    longest_pause_s: float = Field(900, gt=0, le=86400, description="longest pause between two heals")
    quiet_s: float = Field(600, gt=0, le=86400, description="after so long in good health the pauses start anew")
    budget: int = Field(6, ge=1, le=1000, description="heals of one instance within an hour before it is given up")
    listen: str = Field(
        "127.0.0.1:9465",
        pattern=r"^(|\[[0-9A-Fa-f:]+\]:[0-9]{1,5}|[^\s:/]+:[0-9]{1,5})$",
        description="address of /metrics and /livez; none when empty",
    )
    webhook_file: Path | None = Field(
        None, description="file whose first line is the URL that gets every event (or set ZOPS_WATCH_WEBHOOK)"
    )

    @field_validator("webhook_file")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value else None

    @model_validator(mode="after")
    def _possible(self) -> "Watch":
        if self.failures > self.of:
            raise ValueError(f"failures: {self.failures} of {self.of} can never be; lower failures or raise of")
        if self.first_pause_s > self.longest_pause_s:
            raise ValueError("first_pause_s is longer than longest_pause_s; swap them")
        return self


_ENGINE = re.compile(r"^(local|context:[\w.-]+|(unix|ssh|tcp)://.+)$")
_ENGINE_FORMS = "must be local, context:NAME, unix:///path, tcp://host:port or ssh://user@host"


def _engine_form(value: str) -> str:
    if not _ENGINE.match(value):
        raise ValueError(_ENGINE_FORMS)
    return value


Engine = Annotated[str, AfterValidator(_engine_form)]


class Host(_Section):
    """Another host whose instances `zops health --all` judges too."""

    name: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$", description="name in the output")
    engine: Engine = Field("local", description="as engine: local, context:NAME, tcp://host:port or ssh://user@host")
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+$",
        description="where its published ports are reached, as http://gpu-2; asked through the engine when empty",
    )


_GPU_NAME = re.compile(r"^(GPU|MIG)-[0-9A-Za-z-]+$")
Gpus = Literal["all", "none"] | tuple[Annotated[int | str, Field(union_mode="left_to_right")], ...]


class Spec(_Section):
    """A deployment as the operator wants it."""

    name: str = Field("zops", pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$", description="name of the deployment")
    model: str = Field("Tongyi-MAI/Z-Image-Turbo", pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name")
    source: Source = Source()
    cache: Cache = Cache()
    runtime: Literal["docker", "process", "kubernetes"] = "docker"
    engine: Engine = Field("local", description="local, context:NAME, unix:///path, tcp://host:port or ssh://user@host")
    image: Image = Image()
    gpus: Gpus = Field("all", description="all, none, or a list of indices or GPU-... names")
    serve: Serve = Serve()
    resources: Resources = Resources()
    backup: Backup = Backup()
    watch: Watch = Watch()
    hosts: tuple[Host, ...] = Field((), description="hosts that zops health --all judges: name, engine, url of each")

    @field_validator("hosts")
    @classmethod
    def _names_differ(cls, value: tuple[Host, ...]) -> tuple[Host, ...]:
        names = [host.name for host in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two hosts are named {twice}; give each a name of its own")
        return value

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpu_list(cls, value: object) -> object:
        if value in ("all", "none"):
            return value
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not items:
            raise ValueError("an empty list; write none for a CPU-only instance")
        for item in items:
            fits = (isinstance(item, int) and not isinstance(item, bool) and item >= 0) or (
                isinstance(item, str) and _GPU_NAME.match(item)
            )
            if not fits:
                raise ValueError(f"{item!r} is no GPU; write all, none, or a list such as [0, 1] or [GPU-8f6e...]")
        if len(set(items)) != len(items):
            raise ValueError("names a GPU twice")
        return tuple(items)

    @model_validator(mode="after")
    def _possible(self) -> "Spec":
        if self.runtime != "docker" and self.engine != "local":
            raise ValueError(f"engine: {self.engine} is for runtime: docker, not for {self.runtime}; remove it")
        if self.serve.warmup_size**2 > self.serve.max_pixels:
            raise ValueError("serve.warmup_size squared is more than serve.max_pixels; lower it or raise the limit")
        return self


def fields(section: type[BaseModel] = Spec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the pydantic field of every value that can be set."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def variable(path: str) -> str:
    """Return the environment variable that sets the value at a dotted path."""
    return ENV_PREFIX + path.upper().replace(".", "_")


def value_at(spec: Spec, path: str) -> Any:
    """Return the value at a dotted path."""
    value: Any = spec
    for part in path.split("."):
        value = getattr(value, part)
    return value


def type_name(annotation: object) -> str:
    """Describe a field's type in the words of the configuration reference."""
    if annotation is Gpus:
        return "all | none | list"
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    names: dict[object, str] = {str: "text", int: "whole number", float: "number", bool: "true | false", Path: "path"}
    names |= {tuple[str, ...]: "list of text", tuple[Path, ...]: "list of paths", tuple[Host, ...]: "list of hosts"}
    return names.get(annotation, "size" if annotation is ByteSize else str(annotation))

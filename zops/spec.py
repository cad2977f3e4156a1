"""zops.yaml as typed, frozen, validated objects: the one input of everything.

Every value comes from exactly one of four places, the first that has it wins: a flag, a `ZOPS_*` variable, the file,
the default. `load` remembers which, so that `zops config show --origin` can tell. Nothing here looks at the host.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from zops import __version__
from zops.errors import SpecError

FILE_NAMES = ("zops.yaml", "zops.yml")
SYSTEM_FILE = Path("/etc/zops/zops.yaml")
ENV_PREFIX = "ZOPS_"
# Variables that steer the program itself and are no part of the specification.
RESERVED_VARIABLES = frozenset({"ZOPS_FILE", "ZOPS_DEBUG", "ZOPS_OUTPUT", "ZOPS_STATE_DIR", "ZOPS_SNAPSHOT"})

GIB = 1 << 30


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


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

    @field_validator("dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - resolve() would follow the operator's links


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
    forwards: int | None = Field(None, ge=1, le=200, description="forwards an image; the catalog's number when empty")
    guidance_scale: float | None = Field(
        None, ge=0, le=20, description="the catalog's number when empty; > 0 costs double"
    )
    max_pixels: int = Field(2048 * 2048, ge=256, description="width x height of the largest image that is accepted")
    max_images: int = Field(4, ge=1, le=10, description="largest n of one request")
    max_queue: int = Field(16, ge=1, le=4096, description="requests that may wait before new ones get 429")
    warmup_size: int = Field(512, ge=16, le=4096, multiple_of=16, description="edge of the warm-up and canary image")
    request_timeout_s: float = Field(120, gt=0, le=3600, description="longest that one request may take")
    startup_timeout_s: float = Field(900, gt=0, le=7200, description="longest wait for an instance to become ready")

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value in {"float16", "fp16", "half"}:
            raise ValueError("float16 overflows in this model and gives black images; use bfloat16 or auto")
        return {"bf16": "bfloat16", "fp32": "float32"}.get(value, value) if isinstance(value, str) else value


class Resources(_Section):
    """What the engine grants an instance."""

    memory: ByteSize | None = Field(None, description="memory limit, for example 48GiB; none when empty")
    shm: ByteSize = Field(ByteSize(GIB), description="size of /dev/shm")
    log_bytes: ByteSize = Field(ByteSize(20_000_000), description="size at which a log file is rotated")
    log_files: int = Field(5, ge=1, le=100, description="rotated log files that are kept")


class Backup(_Section):
    """Where `zops cache backup` puts archives and `zops provision` looks for one."""

    to: str | None = Field(None, description="a directory, or s3://bucket/prefix")
    compression: Literal["zstd", "none"] = "zstd"

    @field_validator("to")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is None or "://" in value:
            return value
        return os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111 - a string, it may be a URL


_GPU_NAME = re.compile(r"^(GPU|MIG)-[0-9A-Za-z-]+$")
Gpus = Literal["all", "none"] | tuple[Annotated[int | str, Field(union_mode="left_to_right")], ...]


class Spec(_Section):
    """A deployment as the operator wants it."""

    name: str = Field("zops", pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$", description="name of the deployment")
    model: str = Field("Tongyi-MAI/Z-Image-Turbo", pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name")
    source: Source = Source()
    cache: Cache = Cache()
    runtime: Literal["docker", "process", "kubernetes"] = "docker"
    engine: str = Field("local", description="local, context:NAME, unix:///path, tcp://host:port or ssh://user@host")
    image: Image = Image()
    gpus: Gpus = Field("all", description="all, none, or a list of indices or GPU-... names")
    serve: Serve = Serve()
    resources: Resources = Resources()
    backup: Backup = Backup()

    @field_validator("engine")
    @classmethod
    def _engine_form(cls, value: str) -> str:
        if value != "local" and not re.match(r"^(context:[\w.-]+|(unix|ssh|tcp)://.+)$", value):
            raise ValueError("must be local, context:NAME, unix:///path, tcp://host:port or ssh://user@host")
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


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value came from: `kind` is flag, environment, file or default; `where` names the very place."""

    kind: Literal["flag", "environment", "file", "default"]
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".strip()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A specification with the origin of each of its values (by dotted path) and the file it was read from."""

    spec: Spec
    origins: Mapping[str, Origin]
    file: Path | None
    warnings: tuple[str, ...] = ()


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


def find_file(explicit: Path | None, environ: Mapping[str, str], directory: Path) -> Path | None:
    """Return the file to read: the one asked for, else `ZOPS_FILE`, else zops.yaml here, else the host's; None without."""
    named = explicit or (Path(environ["ZOPS_FILE"]) if environ.get("ZOPS_FILE") else None)
    if named is not None:
        if not named.is_file():
            raise SpecError(
                f"{named} does not exist or is no file", code="spec-not-found", hint="write one with: zops init"
            )
        return named
    candidates = [directory / name for name in FILE_NAMES] + [SYSTEM_FILE]
    return next((path for path in candidates if path.is_file()), None)


def load(
    file: Path | None = None,
    *,
    flags: Mapping[str, tuple[str, object]] | None = None,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Loaded:
    """Read, merge and validate the specification.

    Args:
        file: the file that the operator named, if any.
        flags: dotted path -> (flag as typed, value); values win over everything else.
        environ: the environment, `os.environ` by default.
        directory: where to look for zops.yaml, the working directory by default.

    Raises:
        SpecError: naming file (or variable or flag), path, value and the fix.
    """
    environ = os.environ if environ is None else environ
    found = find_file(file, environ, directory or Path.cwd())
    merged: dict[str, Any] = {}
    origins = {path: Origin("default") for path, _ in fields()}
    if found:
        tree, lines = _read_yaml(found)
        _merge_file(tree, lines, found, merged, origins)
    warnings = _merge_environment(environ, merged, origins)
    for path, (flag, value) in (flags or {}).items():
        if path not in origins:
            raise SpecError(f"{flag}: there is no {path}{_suggest(path, origins)}", code="spec-unknown-key")
        _put(merged, path, value)
        origins[path] = Origin("flag", flag)
    try:
        spec = Spec.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, origins, found) from None
    return Loaded(_anchored(spec, origins, found), origins, found, warnings)


def _anchored(spec: Spec, origins: Mapping[str, Origin], file: Path | None) -> Spec:
    """Make a relative source.path or backup.to of a file relative to that file, as its reader expects."""
    path = spec.source.path
    if path and "://" not in path:
        base = file.parent if file and origins["source.path"].kind == "file" else Path.cwd()
        source = spec.source.model_copy(update={"path": os.path.abspath(base / Path(path).expanduser())})  # noqa: PTH100
        spec = spec.model_copy(update={"source": source})
    return spec


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Parse a YAML file and the line of each key; refuse anything but a mapping, and duplicate keys."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _collect_lines(node, "", lines, path)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(
            f"{path}{line}: not valid YAML: {error.problem}", code="spec-not-yaml", file=str(path)
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SpecError(f"{path}: cannot be read: {error}", code="spec-not-yaml", file=str(path)) from None
    if tree is None:
        return {}, lines
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: must be a mapping of keys to values, not {type(tree).__name__}", code="spec-not-yaml")
    return tree, lines


def _collect_lines(node: yaml.Node, prefix: str, lines: dict[str, int], file: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if path in lines:
            raise SpecError(
                f"{file}:{line}: {path} is set twice (first in line {lines[path]})", code="spec-duplicate-key"
            )
        lines[path] = line
        _collect_lines(value, f"{path}.", lines, file)


def _merge_file(
    tree: dict[str, Any], lines: Mapping[str, int], file: Path, merged: dict[str, Any], origins: dict[str, Origin]
) -> None:
    sections = {path.split(".")[0] for path in origins if "." in path}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            where = f"{file}:{lines.get(path, 0)}"
            if path in sections:
                if value is not None and not isinstance(value, dict):
                    raise SpecError(
                        f"{where}: {path} is {value!r}, it must be a section of keys", code="spec-invalid", path=path
                    )
                walk(value or {}, f"{path}.")
            elif path in origins:
                _put(merged, path, value)
                origins[path] = Origin("file", where)
            else:
                raise SpecError(
                    f"{where}: there is no {path}{_suggest(path, [*origins, *sections])}",
                    code="spec-unknown-key",
                    hint="see every key with: zops config show",
                    file=str(file),
                    path=path,
                )

    walk(tree, "")


def _merge_environment(
    environ: Mapping[str, str], merged: dict[str, Any], origins: dict[str, Origin]
) -> tuple[str, ...]:
    known = {variable(path): path for path in origins}
    for name, path in known.items():
        if name in environ:
            _put(merged, path, parse_scalar(environ[name]))
            origins[path] = Origin("environment", name)
    # Other programs own names with our prefix too (Kubernetes makes ZOPS_PORT for a service zops), so no refusal.
    strangers = [
        name for name in environ if name.startswith(ENV_PREFIX) and name not in known.keys() | RESERVED_VARIABLES
    ]
    close = [(name, difflib.get_close_matches(name, known, n=1, cutoff=0.85)) for name in sorted(strangers)]
    return tuple(f"{name} is set but means nothing; did you mean {match[0]}?" for name, match in close if match)


def parse_scalar(text: str) -> object:
    """Read a flag's or a variable's text as YAML would, so that `[0, 1]`, `true` and `8000` have their types."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def _suggest(path: str, known: "typing.Iterable[str]") -> str:
    match = difflib.get_close_matches(path, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def _explain(error: ValidationError, origins: Mapping[str, Origin], file: Path | None) -> SpecError:
    """Turn pydantic's first finding into one line: where, path, value, what it must be."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    path = ".".join(parts)
    while path and path not in origins:
        path = path.rpartition(".")[0]
    path = path or ".".join(part for part in parts if part in Spec.model_fields)
    origin = origins.get(path)
    where = origin.where if origin and origin.where else str(file or "the specification")
    reason = first["msg"].removeprefix("Value error, ")
    # A finding of a whole section or of the whole file has no single value worth repeating.
    subject = f"{path} is {first['input']!r}: " if path in origins else (f"{path}: " if path else "")
    return SpecError(f"{where}: {subject}{_sentence(reason)}", file=str(file) if file else None, path=path)


def _sentence(reason: str) -> str:
    reason = reason.replace("Input should be", "must be")
    return reason[:1].lower() + reason[1:]


def type_name(annotation: object) -> str:
    """Describe a field's type in the words of the configuration reference."""
    if annotation is Gpus:
        return "all | none | list"
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    names: dict[object, str] = {str: "text", int: "whole number", float: "number", bool: "true | false", Path: "path"}
    return names.get(annotation, "size" if annotation is ByteSize else str(annotation))

"""Where the values of a specification come from: flags, `ZOPS_*` variables, the file, the defaults.

The first that has a value wins, and which one it was is remembered, so that `zops config show --origin` can tell.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from zops.errors import SpecError
from zops.spec.model import ENV_PREFIX, Spec, fields, variable

if TYPE_CHECKING:
    import yaml

FILE_NAMES = ("zops.yaml", "zops.yml")
SYSTEM_FILE = Path("/etc/zops/zops.yaml")
# Variables that steer the program itself and are no part of the specification.
RESERVED_VARIABLES = frozenset({
    "ZOPS_FILE", "ZOPS_DEBUG", "ZOPS_OUTPUT", "ZOPS_STATE_DIR", "ZOPS_SNAPSHOT", "ZOPS_API_KEY", "ZOPS_PUBLISHED",
    "ZOPS_PASSPHRASE", "ZOPS_IDENTITY_PASSPHRASE", "ZOPS_WATCH_WEBHOOK", "ZOPS_LOCK_DIR",
})  # fmt: skip
# Keys that hold a path of this host (or, the second and third, perhaps a URL).
PATHS = ("cache.dir", "source.path", "backup.to", "image.wheels", "image.ca", "serve.api_keys")


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


def find_file(explicit: Path | None, environ: Mapping[str, str], directory: Path) -> Path | None:
    """Return the file to read: the one asked for, else `ZOPS_FILE`, else zops.yaml here, else the host's, if any."""
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
        tree, lines = read_yaml(found)
        _merge_file(tree, lines, found, merged, origins)
    warnings = _merge_environment(environ, merged, origins)
    for path, (flag, value) in (flags or {}).items():
        if path not in origins:
            raise SpecError(f"{flag}: there is no {path}{_suggest(path, origins)}", code="spec-unknown-key")
        _put(merged, path, value)
        origins[path] = Origin("flag", flag)
    _anchor(merged, origins, found)
    try:
        spec = Spec.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, origins, found) from None
    return Loaded(spec, origins, found, warnings)


def _anchor(merged: dict[str, Any], origins: Mapping[str, Origin], file: Path | None) -> None:
    """Make relative paths absolute: those of a file relative to that file, all others to the working directory."""
    for path in PATHS:
        section, _, key = path.partition(".")
        text = (merged.get(section) or {}).get(key)
        if isinstance(text, str) and text and "://" not in text:
            base = file.parent if file and origins[path].kind == "file" else Path.cwd()
            try:
                expanded = Path(text).expanduser()
            except RuntimeError:
                where = origins[path].where or path
                raise SpecError(f"{where}: {path} is {text!r}: there is no such home directory", path=path) from None
            # Not resolve(): it would follow the operator's links, and a link may be the point of a path.
            merged[section][key] = os.path.abspath(base / expanded)  # noqa: PTH100


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Parse a YAML file and the line of each key; refuse anything but a mapping, and duplicate keys.

    Raises:
        SpecError: naming file and line.
    """
    import yaml  # noqa: PLC0415 - without a file a command begins sooner

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


def _collect_lines(node: "yaml.Node", prefix: str, lines: dict[str, int], file: Path) -> None:
    import yaml  # noqa: PLC0415 - as above

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
    import yaml  # noqa: PLC0415 - as above

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def _suggest(path: str, known: Iterable[str]) -> str:
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

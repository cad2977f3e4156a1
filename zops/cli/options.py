"""Options that several commands share, and what they turn into: an `Output` and a loaded specification."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from zops.cli.output import MODES, Output
from zops.errors import SpecError, UsageError
from zops.spec import Loaded, load, parse_scalar

Command = TypeVar("Command", bound=Callable[..., Any])

# flag -> (dotted path it sets, metavar, help). `--set` reaches everything else.
SPEC_FLAGS: dict[str, tuple[str, str, str]] = {
    "--name": ("name", "NAME", "Deployment."),
    "--model": ("model", "OWNER/NAME", "Model."),
    "--cache-dir": ("cache.dir", "DIR", "Root of the cache."),
    "--runtime": ("runtime", "KIND", "docker, process or kubernetes."),
    "--engine": ("engine", "WHERE", "local, context:NAME, or ssh://user@host."),
    "--gpus": ("gpus", "LIST", "all, none, or a list such as 0,1."),
    "--port": ("serve.port", "PORT", "Port on which the instance is published."),
}


def with_output(command: Command) -> Command:
    """Give a command `--output` and pass it an `Output` as `out`."""

    @click.option("--output", "output_mode", type=click.Choice(MODES), help="How to print (default: by terminal).")
    @functools.wraps(command)
    def wrapped(*args: Any, output_mode: str | None, **kwargs: Any) -> Any:
        return command(*args, out=Output.resolve(output_mode, os.environ), **kwargs)

    return wrapped  # type: ignore[return-value] # functools.wraps keeps the signature that matters to click


def with_spec(command: Command) -> Command:
    """Give a command the options of the specification (and `--output`) and pass it `loaded` and `out`."""

    @functools.wraps(command)
    def wrapped(*args: Any, out: Output, spec_file: Path | None, settings: tuple[str, ...], **kwargs: Any) -> Any:
        flags: dict[str, tuple[str, object]] = {}
        for flag, (path, _, _) in SPEC_FLAGS.items():
            value = kwargs.pop("spec_" + path.replace(".", "_"))
            if value is not None:
                flags[path] = (flag, _flag_value(path, value))
        for setting in settings:
            path, separator, text = setting.partition("=")
            if not separator:
                raise UsageError(f"--set {setting}: must be KEY=VALUE", hint="for example --set serve.max_queue=32")
            flags[path] = (f"--set {path}", parse_scalar(text))
        loaded = load(spec_file, flags=flags)
        for warning in loaded.warnings:
            out.warn(warning)
        return command(*args, out=out, loaded=loaded, **kwargs)

    options = [
        click.option(flag, "spec_" + path.replace(".", "_"), metavar=metavar, help=text)
        for flag, (path, metavar, text) in SPEC_FLAGS.items()
    ]
    options += [
        click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Any key of zops.yaml; repeatable."),
        click.option("-f", "--file", "spec_file", type=click.Path(path_type=Path), help="Instead of ./zops.yaml."),
    ]
    for option in options:
        wrapped = option(wrapped)
    return with_output(wrapped)  # type: ignore[return-value] # as above


def _flag_value(path: str, text: str) -> object:
    if path == "gpus" and text not in {"all", "none"}:
        return [parse_scalar(part) for part in text.split(",") if part.strip()]
    return parse_scalar(text) if path == "serve.port" else text


def confirm(out: Output, question: str, *, yes: bool) -> None:
    """Ask before something is destroyed; where nobody can be asked, `--yes` must have been given.

    Raises:
        UsageError: when nobody can be asked and `--yes` was not given.
    """
    if yes:
        return
    if not out.interactive:
        raise UsageError(f"{question} Nobody can be asked here", code="needs-yes", hint="add --yes")
    click.confirm(question, abort=True, err=True)


__all__ = ["Loaded", "SpecError", "confirm", "with_output", "with_spec"]

"""`zops init` and `zops config`: write the specification, show it, say where each value came from."""

from pathlib import Path
from typing import Any

import click
import yaml

from zops.cache.redact import redacted
from zops.cli.options import Loaded, with_output, with_spec
from zops.cli.output import Output
from zops.errors import UsageError
from zops.spec import fields, type_name, value_at, variable


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default="zops.yaml")
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@with_output
def init(path: Path, *, force: bool, out: Output) -> None:
    """Write a commented zops.yaml fitted to this host.

    GPUs that are found are used, the fastest local disk with room holds the cache.

    \b
    Examples:
      zops init
      zops init /etc/zops/zops.yaml
    """
    from zops.provision.starter import starter  # noqa: PLC0415 - looks at GPUs and disks; `config` need not

    if path.exists() and not force:
        raise UsageError(f"{path} exists already", code="file-exists", hint="overwrite it with: zops init --force")
    made = starter()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(made.text, encoding="utf-8")
    part.replace(path)
    out.data(
        {"path": str(path), "cache_dir": str(made.cache_dir), "gpus": made.gpus, "notes": list(made.notes)},
        f"wrote {path}",
    )
    for note in made.notes:
        out.note(note)
    out.note("next: zops doctor, then zops provision --dry-run")


@click.group()
def config() -> None:
    """Show the configuration and where each value came from."""


@config.command()
@click.option("--origin", is_flag=True, help="Say where each value came from.")
@with_spec
def show(*, origin: bool, loaded: Loaded, out: Output) -> None:
    """Print every key with its value, as YAML (or with --origin as a table).

    \b
    Examples:
      zops config show
      zops config show --origin
      ZOPS_SERVE_PORT=9000 zops config show --origin --output json
    """
    dumped = loaded.spec.model_dump(mode="json")
    if dumped["source"]["endpoint"]:
        dumped["source"]["endpoint"] = redacted(dumped["source"]["endpoint"])
    if not origin:
        out.data(dumped, yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True))
        return
    rows, body = [], {}
    for path, field in fields():
        value, where = _plain(value_at(loaded.spec, path)), loaded.origins[path]
        rows.append((path, _shown(value), str(where)))
        body[path] = {
            "value": value,
            "origin": where.kind,
            "where": where.where,
            "variable": variable(path),
            "type": type_name(field.annotation),
        }
    out.table(("KEY", "VALUE", "ORIGIN"), rows, body)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str):
        # A mirror's user and password are nobody's business who only looks at the configuration.
        return redacted(value)
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

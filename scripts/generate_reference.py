"""Write the reference pages that are made from the code; `--check` only says whether they are current."""

import sys
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

import click

from zops.cli.main import cli
from zops.spec import Spec, fields, type_name, variable

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Made by scripts/generate_reference.py; run `make docs` after a change. -->\n"


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and all below it, each with its context."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from commands(child, click.Context(child, info_name=name, parent=context))


def cli_page() -> str:
    """Return the command line reference: every command with its help, as typed."""
    parts = [NOTICE, "# Command line", ""]
    root = click.Context(cli, info_name="zops", **cli.context_settings)
    for command, context in commands(cli, root):
        context.terminal_width = 100
        parts += [f"## {context.command_path}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(parts)


def configuration_page() -> str:
    """Return the reference of zops.yaml: every key with its type, default, variable and meaning."""
    parts = [
        NOTICE,
        "# zops.yaml",
        "",
        "A flag beats a `ZOPS_*` variable, which beats the file, which beats the default. The file is the one named by",
        "`-f`, else by `ZOPS_FILE`, else `./zops.yaml`, else `/etc/zops/zops.yaml`. Relative paths in the file are",
        "relative to the file. `--set KEY=VALUE` sets any key from the command line. Unknown keys are refused.",
        "",
        "| key | type | default | variable | meaning |",
        "|---|---|---|---|---|",
    ]
    for path, field in fields(Spec):
        default = "" if field.default is None else str(field.default)
        kind = type_name(field.annotation).replace("|", "\\|")
        meaning = (field.description or "").replace("|", "\\|")
        parts.append(f"| `{path}` | {kind} | {default and f'`{default}`'} | `{variable(path)}` | {meaning} |")
    return "\n".join([*parts, ""])


PAGES = {"docs/reference/cli.md": cli_page, "docs/reference/configuration.md": configuration_page}


def main(argv: list[str]) -> int:
    """Write the pages, or with --check return 1 when one is stale."""
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_text(text, encoding="utf-8")
            elif path.exists():
                sys.stderr.writelines(
                    unified_diff(path.read_text(encoding="utf-8").splitlines(True), text.splitlines(True))
                )
    for name in stale:
        sys.stderr.write(f"{name} {'is stale: run make docs' if '--check' in argv else 'written'}\n")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The documentation must know everything that the code promises, and promise nothing that is gone."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from zops import errors
from zops.cli.doctor import WARNED
from zops.cli.main import COMMANDS, INTERRUPTED, cli
from zops.errors import ZopsError
from zops.health.verdict import CODES, LAYERS

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("generate_reference")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def classes() -> Iterator[type[ZopsError]]:
    for thing in vars(errors).values():
        if isinstance(thing, type) and issubclass(thing, ZopsError):
            yield thing


def codes() -> set[str]:
    """Every error code in the source: the classes' own, and each `code="..."` that is passed anywhere."""
    found = {cls.default_code for cls in classes()}
    for path in (ROOT / "zops").rglob("*.py"):
        if "serving" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
    return found


def test_every_reference_page_that_is_made_from_the_code_must_be_current(generator) -> None:
    assert generator.main(["--check"]) == 0, "run: make docs"


def test_every_command_must_have_help_an_example_and_helped_options(generator) -> None:
    root = click.Context(cli, info_name="zops", **cli.context_settings)
    for command, context in generator.commands(cli, root):
        assert command.help, context.command_path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{context.command_path} {parameter.name}"


def test_the_short_helps_in_the_table_must_be_the_commands_own() -> None:
    for name, (module, attribute, text) in COMMANDS.items():
        command = getattr(importlib.import_module(module), attribute)
        assert command.help.splitlines()[0].strip() == text, name
        assert command.name == name


def test_every_exit_status_must_be_documented() -> None:
    page = (REFERENCE / "exit-codes.md").read_text(encoding="utf-8")
    documented = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert documented == {cls.exit_status for cls in classes()} | {0, INTERRUPTED, WARNED}


def test_every_error_code_must_be_documented_and_no_other() -> None:
    page = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE))
    assert codes() - documented == set()
    assert documented - codes() == set()


def test_every_code_of_a_probe_must_be_documented_with_its_layer_and_no_other() -> None:
    page = (ROOT / "docs" / "how-to" / "check-health.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z, ]+) \| .+ \| .+ \|$", page, re.MULTILINE)
    assert {code for code, _ in rows} == set(CODES)
    assert {layer for _, layers in rows for layer in layers.split(", ")} == set(LAYERS)


def test_every_code_of_a_probe_must_be_given_somewhere_and_no_unknown_one() -> None:
    sources = [path for path in (ROOT / "zops" / "health").glob("*.py") if path.name != "verdict.py"]
    texts = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert {code for code in CODES if f'"{code}"' not in texts} == set()
    called = set(re.findall(r'(?:failed|degraded|judge)\(\s*"[a-z]+",\s*"([a-z-]+)"', texts))
    assert len(called) > 12
    assert called <= set(CODES)


def test_every_metric_of_health_must_be_documented() -> None:
    page = (ROOT / "docs" / "how-to" / "check-health.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z_]+)`", page))
    source = (ROOT / "zops" / "health" / "formats.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'Metric\("([a-z_]+)"', source)) | set(
        re.findall(r'^        "([a-z_]+)": \(', source, re.MULTILINE)
    )
    assert len(metrics) > 15
    assert metrics - documented == set()


def test_every_error_class_must_stand_in_the_tree_at_the_top_of_its_module() -> None:
    tree = dict(re.findall(r"(\w+) {2,}(\d)\b", errors.__doc__ or ""))
    assert tree == {cls.__name__: str(cls.exit_status) for cls in classes()}


def test_no_page_must_link_to_a_file_that_is_not_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 8
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_both_readmes_must_have_the_same_sections_and_the_same_code() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    block = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    assert block.findall(english) == block.findall(chinese)
    assert len(re.findall(r"^#+ ", english, re.MULTILINE)) == len(re.findall(r"^#+ ", chinese, re.MULTILINE))

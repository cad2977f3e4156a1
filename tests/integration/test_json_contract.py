"""Every field that a command prints as JSON must be documented, and no field that none prints."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import ROOT, Host

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "reference" / "json.md"
# What is below these differs from case to case and is described elsewhere.
OPEN = {"evidence", "receipt", "dtypes", "machine", "model", "case"}
# Run in this order on one host; the heading in the page, then what is typed.
CALLS = [
    ("init", "init other.yaml"),
    ("doctor", "doctor"),
    ("model list", "model list"),
    ("model synthesize", "model synthesize other --size tiny"),
    ("provision", "provision --dry-run"),
    ("cache pull", "cache pull"),
    ("cache verify", "cache verify --deep"),
    ("cache scrub", "cache scrub"),
    ("cache pin", "cache pin"),
    ("cache warm", "cache warm"),
    ("cache slim", "cache slim"),
    ("cache prune", "cache prune"),
    ("cache status", "cache status"),
    ("up", "up"),
    ("ps", "ps"),
    ("bench load", "bench load --quick --only load/zops/full/warm --json one.json"),
    ("bench report", "bench report one.json --html one.html"),
    ("bench compare", "bench compare one.json one.json"),
    ("health", "health --deep"),
    ("generate", "generate kite --size 64x64 -o kite.png"),
    ("key new", "key new web --file keys.yaml"),
    ("key list", "key list --file keys.yaml"),
    ("key remove", "key remove web --file keys.yaml"),
    ("cache backup", "cache backup"),
    ("cache drill", "cache drill"),
    ("archive prune", "archive prune --keep last=1 --dry-run"),
    ("archive list", "archive list"),
    ("archive show", "archive show"),
    ("archive verify", "archive verify"),
    ("archive diff", "archive diff"),
    ("cache restore", "cache restore"),
    ("cache restore --only", "cache restore --only model_index.json --to picked"),
    ("down", "down"),
]
# Needs an engine, a GPU, leftovers, or has the specification's own keys; held by tests of their own.
ELSEWHERE = {"image build", "config show", "doctor --capacity", "archive clean", "watch"}


def fields(body: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every field of a document, in the page's notation."""
    if isinstance(body, list):
        for item in body:
            yield from fields(item, f"{path}[]")
    elif isinstance(body, dict):
        for key, value in body.items():
            yield f"{path}.{key}".removeprefix(".")
            if key not in OPEN and not re.search(r"(^|\.)counts$", f"{path}.{key}"):
                yield from fields(value, f"{path}.{key}".removeprefix("."))


def documented() -> dict[str, set[str]]:
    """Return the fields in the page, by command."""
    sections = re.split(r"^### zops ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0].strip(): set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
        for section in sections
    }


def test_the_json_page_must_know_exactly_the_fields_that_the_commands_print(tmp_path: Path, tiny_model: Path) -> None:
    host = Host(tmp_path / "host", tiny_model, name="json", runtime="process")
    page = documented()
    assert set(page) == {heading for heading, _ in CALLS} | ELSEWHERE
    page["ps"] |= {f"[].{field}" for field in page["up"]}
    seen = {}
    try:
        for heading, typed in CALLS:
            seen[heading] = set(fields(host.json(*typed.split())))
    finally:
        host.run("down")
    assert {heading: found - page[heading] for heading, found in seen.items() if found - page[heading]} == {}
    assert {heading: page[heading] - found for heading, found in seen.items() if page[heading] - found} == {}


def test_config_show_must_document_what_origin_prints(tmp_path: Path, tiny_model: Path) -> None:
    host = Host(tmp_path / "host", tiny_model, name="json", runtime="process")
    shown = host.json("config", "show", "--origin")
    assert set(shown["serve.port"]) == documented()["config show"]

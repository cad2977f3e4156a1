"""The page on the HTTP API must tell everything that the server can answer."""

import re
from pathlib import Path

import pytest

from tests.support.studio import ScriptedScheduler
from zops.serving.app import PATHS, READY_PHASES, Identity, create_app
from zops.serving.errors import ERROR_CODES
from zops.serving.fields import EditBody, GenerationBody
from zops.serving.messages import PHASES
from zops.serving.metrics import METRICS, Metrics
from zops.serving.request import Limits
from zops.spec import Spec

PAGE = (Path(__file__).parents[2] / "docs/reference/http-api.md").read_text(encoding="utf-8")
SOURCES = Path(__file__).parents[2] / "zops/serving"


def _rows(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


@pytest.fixture
def app():
    metrics = Metrics(model="m/m", revision="r", manifest_digest="d")
    limits = Limits.of(Spec())
    return create_app(ScriptedScheduler(), limits, Identity("m/m", "r", "d", Path("/")), metrics)


def test_every_error_code_must_be_described_with_its_status_and_type():
    rows = [f"| `{code}` | {kind.status} | `{kind.type}` | {kind.text} |" for code, kind in ERROR_CODES.items()]
    assert _rows("Errors") == rows


def test_every_error_code_must_be_sent_by_something():
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.py") if path.name != "errors.py")
    assert [code for code in ERROR_CODES if f'"{code}"' not in text] == []


def test_every_metric_must_be_described_and_exist():
    documented = [re.match(r"\| `(\w+)` \| (\w+) \| (.*) \| (.+) \|$", row).groups() for row in _rows("Metrics")]
    wanted = [
        (name, kind.type, ", ".join(f"`{label}`" for label in kind.labels), kind.text) for name, kind in METRICS.items()
    ]
    assert documented == wanted
    exposition = Metrics(model="m", revision="r", manifest_digest="d").render()[0].decode()
    exposed = set(re.findall(r"^# TYPE (\w+)", exposition, re.MULTILINE))
    assert exposed == set(METRICS)
    assert all(name.startswith("zops_") for name in exposed)


def test_every_path_must_be_described(app):
    assert [
        f"| `{path}` | {text.replace('/readyz', '`/readyz`').replace('/livez', '`/livez`')} |"
        for path, text in PATHS.items()
    ] == _rows("Paths")
    served = {
        f"{method} {route.path.replace(':path', '')}"
        for route in app.routes
        for method in (getattr(route, "methods", None) or {"GET"}) - {"HEAD"}
    }
    # Mounted, so without a parameter of its own.
    assert served == set(PATHS) - {"GET /assets/{path}"} | {"GET /assets"}


def test_every_phase_must_be_described():
    assert [re.match(r"\| `(\w+)`", row)[1] for row in _rows("Readiness")] == list(READY_PHASES)
    assert set(PHASES) < set(READY_PHASES)


def test_every_field_of_a_request_must_be_described():
    section = "".join(_rows("Make images"))
    assert [name for name in GenerationBody.model_fields if f"`{name}`" not in section] == []
    section += "".join(_rows("Edit images"))
    assert [name for name in EditBody.model_fields if f"`{name}`" not in section] == []


def test_openapi_must_describe_the_request_and_every_error_status(app):
    operation = app.openapi()["paths"]["/v1/images/generations"]["post"]
    assert "prompt" in operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {str(kind.status) for kind in ERROR_CODES.values()} <= set(operation["responses"])

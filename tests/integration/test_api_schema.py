"""What /openapi.json says must be what a running server does: schemathesis, let loose on it, must find nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import clean_environment, start_server, stop_hard
from zops.serving.app import PATHS
from zops.serving.probes import READY_PATHS

# Paths that are not part of the API's description: the description itself, and the page.
UNDESCRIBED = {"GET /openapi.json", "GET /", "GET /assets/{path}"}
SETTINGS = """
seed = 7
warnings = false
# The id of a model has a slash, which the generator of path parameters does not like, and there is no other id.
suppress-health-check = ["filter_too_much"]

[generation]
max-examples = 12
database = "none"

# A schema cannot tell how many pixels, tokens and bytes of memory there are: these are answered with 400. A wrong type
# would be answered with 422, which stays a finding. A key for idempotency that comes again is a conflict.
[[operations]]
include-path-regex = "^/v1/images/(generations|edits)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "409"]

# In a form everything is text, so that a number where a text belongs is no violation.
[[operations]]
include-path = "/v1/images/edits"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "409"]
checks.negative_data_rejection.enabled = false
"""


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    """A server whose images are so small that hundreds of requests take seconds."""
    settings = {"ZOPS_SERVE_MAX_PIXELS": "4096", "ZOPS_SERVE_MAX_IMAGES": "2"}
    server = start_server(tiny_model, tmp_path_factory.mktemp("small"), **settings)
    try:
        yield server.wait_ready()
    finally:
        stop_hard(server)


def test_schemathesis_must_find_nothing(small, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *("--no-color", "--config-file", tmp_path / "schemathesis.toml"),
            *("run", f"{small.url}/openapi.json", "--checks", "all", "--report-json-path", report),
        ],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert f"Tested: {len(PATHS) - len(UNDESCRIBED)}" in done.stdout
    assert "traceback" not in small.log.read_text()


def test_every_path_must_be_described_with_all_it_answers(small):
    document = small.call("GET", "/openapi.json").json
    described = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert described == set(PATHS) - UNDESCRIBED
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                assert answer.get("content"), f"{method} {path} does not tell what comes with {status}"
                if int(status) >= 400 and path not in READY_PATHS:
                    content = answer["content"]["application/json"]["schema"]
                    assert content == {"$ref": "#/components/schemas/ErrorAnswer"}, f"{method} {path} {status}"


def test_the_description_must_have_the_limits_of_this_server(small):
    document = json.loads(small.call("GET", "/openapi.json").body)
    body = document["paths"]["/v1/images/generations"]["post"]["requestBody"]
    fields = body["content"]["application/json"]["schema"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == 2
    assert fields["model"]["anyOf"][0] == {"const": "zops/synthetic-tiny"}
    assert fields["num_inference_steps"]["anyOf"][0]["maximum"] == 200
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["image"]["format"] == "binary"
    assert set(form["required"]) == {"image", "prompt"}

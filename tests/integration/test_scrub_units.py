"""What is shipped to run scrubs must be valid, hold no privileges, and call the command as it is."""

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import click
import kubernetes_validate
import pytest
import yaml

from tests.support.kubernetes_api import find_kubectl
from zops.cli.cache import cache
from zops.cli.main import cli

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "systemd" / "zops-scrub.service"
TIMER = ROOT / "systemd" / "zops-scrub.timer"


def unit(path):
    parser = configparser.RawConfigParser(strict=True, delimiters=("=",), interpolation=None)
    parser.optionxform = str
    parser.read_string(path.read_text())
    return parser


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    overlay = tmp_path_factory.mktemp("overlay")
    body = {
        "resources": [os.path.relpath(ROOT / "k8s" / "base", overlay)],
        "components": [os.path.relpath(ROOT / "k8s" / "components" / "scrub", overlay)],
        "images": [{"name": "zops-inference", "newName": "registry.example.com/zops", "newTag": "1"}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(body))
    done = subprocess.run([find_kubectl(), "kustomize", overlay], capture_output=True, check=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def job(objects):
    return next(each for each in objects if each["kind"] == "CronJob")["spec"]["jobTemplate"]["spec"]


def parse(words):
    """Parse the words behind `zops cache`, as click does; raises when one is unknown."""
    # A command remembers the help option of its first context, so that must be as it is when zops runs.
    context = click.Context(cache, parent=click.Context(cli, **cli.context_settings))
    name, command, rest = cache.resolve_command(context, list(words))
    return name, command.make_context(name, rest, parent=context).params


def test_the_unit_must_call_the_command_as_it_is() -> None:
    words = unit(SERVICE)["Service"]["ExecStart"].split()
    assert words[1] == "cache"
    name, parameters = parse(words[2:])
    assert (name, parameters["rate"], parameters["limit"]) == ("scrub", 2e8, 3600)
    assert str(parameters["metrics"]).startswith(unit(SERVICE)["Service"]["ReadWritePaths"])


def test_the_unit_must_hold_no_privileges_and_stand_back() -> None:
    service = unit(SERVICE)["Service"]
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict"
    assert (service["IOSchedulingClass"], service["Nice"]) == ("idle", "19")
    for key in ("NoNewPrivileges", "PrivateNetwork", "PrivateDevices", "PrivateTmp", "ProtectHome", "RestrictSUIDSGID"):
        assert service[key] == "yes", key


def test_systemd_must_find_nothing_to_say_of_the_units(tmp_path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    text = SERVICE.read_text().replace("/usr/local/bin/zops", "/bin/true")
    (tmp_path / SERVICE.name).write_text(text)
    shutil.copy(TIMER, tmp_path)
    units = [tmp_path / SERVICE.name, tmp_path / TIMER.name]
    done = subprocess.run([tool, "verify", "--man=no", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    judged = subprocess.run(
        [tool, "security", "--offline=yes", "--threshold=25", tmp_path / SERVICE.name], capture_output=True, text=True
    )
    assert judged.returncode == 0, judged.stdout[-400:] + judged.stderr


@pytest.mark.parametrize("version", ["1.33", "1.35", "1.37"])
def test_the_component_must_fit_the_published_schema(objects, version) -> None:
    for each in objects:
        assert kubernetes_validate.validate(each, version, strict=True) == version


def test_the_job_must_call_the_command_as_it_is(job) -> None:
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "zops"
    assert container["args"][0] == "cache"
    assert parse(container["args"][1:])[0] == "scrub"
    assert container["image"] == "registry.example.com/zops:1"


def test_the_job_must_be_as_restricted_as_the_server(objects, job) -> None:
    server = next(each for each in objects if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    pod = job["template"]["spec"]
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert pod[key] == server[key]
    assert pod["containers"][0]["securityContext"] == server["containers"][0]["securityContext"]
    mounts = {mount["name"]: mount.get("readOnly") for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["cache"] is True


def test_no_selector_of_the_server_must_match_the_job(objects, job) -> None:
    labels = job["template"]["metadata"]["labels"]
    found = 0
    for each in objects:
        selector = each.get("spec", {}).get("selector") or each.get("spec", {}).get("podSelector") or {}
        wanted = selector.get("matchLabels", selector)
        if wanted and each["kind"] in {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}:
            found += 1
            assert not wanted.items() <= labels.items(), each["kind"]
    assert found >= 3


def test_a_failed_scrub_must_fail_the_job_at_once(job) -> None:
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"

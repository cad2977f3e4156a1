"""What is shipped to run backups and drills must be valid, hold no privileges, and call the commands as they are."""

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
from zops.spec import load

ROOT = Path(__file__).parents[2]
UNITS = ("backup", "drill")


def unit(name):
    parser = configparser.RawConfigParser(strict=True, delimiters=("=",), interpolation=None)
    parser.optionxform = str
    parser.read_string((ROOT / "systemd" / f"zops-{name}").read_text())
    return parser


def parse(words):
    """Parse the words behind `zops cache`, as click does; raises when one is unknown."""
    # A command remembers the help option of its first context, so that must be as it is when zops runs.
    context = click.Context(cache, **cli.context_settings)
    name, command, rest = cache.resolve_command(context, list(words))
    return name, command.make_context(name, rest, parent=context).params


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    overlay = tmp_path_factory.mktemp("overlay")
    body = {
        "resources": [os.path.relpath(ROOT / "k8s" / "base", overlay)],
        "components": [os.path.relpath(ROOT / "k8s" / "components" / "backup", overlay)],
        "images": [{"name": "zops-inference", "newName": "registry.example.com/zops", "newTag": "1"}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(body))
    done = subprocess.run([find_kubectl(), "kustomize", overlay], capture_output=True, check=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


def named(objects, kind, name="zops-backup"):
    return next(each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))


@pytest.fixture(scope="module")
def job(objects):
    return named(objects, "CronJob")["spec"]["jobTemplate"]["spec"]


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_must_call_the_command_as_it_is(name) -> None:
    service = unit(f"{name}.service")["Service"]
    words = service["ExecStart"].split()
    assert words[1] == "cache"
    found, parameters = parse(words[2:])
    assert found == name
    for path in filter(None, (parameters["metrics"], parameters.get("scratch"))):
        assert str(path).startswith(service["ReadWritePaths"].split()[0])


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_must_hold_no_privileges_and_no_secrets(name) -> None:
    service = unit(f"{name}.service")["Service"]
    assert service["CapabilityBoundingSet"] == ""
    assert (service["ProtectSystem"], service["IOSchedulingClass"], service["Nice"]) == ("strict", "idle", "19")
    for key in ("NoNewPrivileges", "PrivateDevices", "PrivateTmp", "ProtectHome", "RestrictSUIDSGID"):
        assert service[key] == "yes", key
    assert "KEY" not in service["Environment"]
    assert service["EnvironmentFile"].startswith("-/etc/")


@pytest.mark.parametrize("name", UNITS)
def test_systemd_must_find_nothing_to_say_of_the_units(name, tmp_path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    units = [tmp_path / f"zops-{name}.{kind}" for kind in ("service", "timer")]
    for path in units:
        path.write_text((ROOT / "systemd" / path.name).read_text().replace("/usr/local/bin/zops", "/bin/true"))
    done = subprocess.run([tool, "verify", "--man=no", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    judged = subprocess.run(
        [tool, "security", "--offline=yes", "--threshold=30", units[0]], capture_output=True, text=True
    )
    assert judged.returncode == 0, judged.stdout[-400:] + judged.stderr


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_the_component_must_fit_the_published_schema(objects, version) -> None:
    for each in objects:
        assert kubernetes_validate.validate(each, version, strict=True) == version


def test_the_job_must_call_the_command_as_it_is_with_settings_that_zops_reads(objects, job, tmp_path) -> None:
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "zops"
    assert container["args"][0] == "cache"
    assert parse(container["args"][1:])[0] == "backup"
    assert container["image"] == "registry.example.com/zops:1"
    settings = named(objects, "ConfigMap")["data"]
    loaded = load(None, flags={}, environ=settings, directory=tmp_path)
    assert loaded.spec.backup.to == settings["ZOPS_BACKUP_TO"]
    assert loaded.spec.backup.keep == settings["ZOPS_BACKUP_KEEP"]
    assert not loaded.warnings


def test_the_job_must_be_as_restricted_as_the_server_and_read_its_secrets_from_a_secret(objects, job) -> None:
    server = named(objects, "Deployment", "zops")["spec"]["template"]["spec"]
    pod = job["template"]["spec"]
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert pod[key] == server[key]
    container = pod["containers"][0]
    assert container["securityContext"] == server["containers"][0]["securityContext"]
    mounts = {mount["name"]: mount.get("readOnly") for mount in container["volumeMounts"]}
    assert mounts["cache"] is True
    assert [source for source in container["envFrom"] if "secretRef" in source]
    assert not [each for each in container["env"] if "KEY" in each["name"] or "PASS" in each["name"]]


def test_the_job_alone_must_be_let_out_of_the_namespace(objects, job) -> None:
    policy = named(objects, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= job["template"]["metadata"]["labels"].items()
    server = named(objects, "Deployment", "zops")["spec"]["template"]["metadata"]["labels"]
    assert not policy["podSelector"]["matchLabels"].items() <= server.items()
    for kind, name in (("Deployment", "zops"), ("Service", "zops"), ("PodDisruptionBudget", "zops")):
        selector = named(objects, kind, name)["spec"]["selector"]
        assert not selector.get("matchLabels", selector).items() <= job["template"]["metadata"]["labels"].items()


def test_the_compose_file_must_call_the_command_as_it_is_and_hold_no_privileges() -> None:
    service = yaml.safe_load((ROOT / "compose" / "compose.backup.yaml").read_text())["services"]["backup"]
    assert service["entrypoint"][-1] == "zops"
    assert parse(service["command"][1:])[0] == "backup"
    server = yaml.safe_load((ROOT / "compose" / "compose.yaml").read_text())["services"]["zops"]
    for key in ("image", "user", "cap_drop", "security_opt", "read_only"):
        assert service[key] == server[key], key
    assert next(v for v in service["volumes"] if v["target"] == "/cache")["read_only"] is True
    assert not [name for name in service["environment"] if "KEY" in name or "PASS" in name]

"""What is shipped to run the watch must be valid, hold as little as it can, and call the command as it is."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from zops.cli.main import cli
from zops.host.fences import UNIT_STATE_DIR
from zops.spec import RESERVED_VARIABLES, fields, variable

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "systemd" / "zops-watch.service"
COMPOSE = ROOT / "compose" / "compose.watch.yaml"


@pytest.fixture
def service():
    # Some keys stand twice: systemd adds them up.
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), interpolation=None)
    parser.optionxform = str
    parser.read_string(SERVICE.read_text())
    return parser["Service"]


@pytest.fixture
def container():
    return yaml.safe_load(COMPOSE.read_text())["services"]["watch"]


def parse(words):
    """Parse the words behind `zops`, as click does; raises when one is unknown."""
    # A command remembers the help option of its first context, so that must be as it is when zops runs.
    context = click.Context(cli, **cli.context_settings)
    name, command, rest = cli.resolve_command(context, list(words))
    return name, command.make_context(name, rest, parent=context).params


def test_unit_and_container_must_call_the_command_as_it_is(service, container) -> None:
    for words in (service["ExecStart"].split()[1:], container["command"]):
        name, parameters = parse(words)
        assert (name, parameters["output_mode"], parameters["dry_run"]) == ("watch", "json", False)


def test_the_unit_must_run_as_a_user_with_no_right_but_to_read_the_log_and_talk_to_the_engine(service) -> None:
    assert service["User"] == "zops"
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == "CAP_SYSLOG"
    assert service["ProtectSystem"] == "strict"
    assert service["DevicePolicy"] == "closed"
    assert "AF_NETLINK" not in service["RestrictAddressFamilies"]
    for key in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictSUIDSGID", "RestrictNamespaces"):
        assert service[key] == "yes", key


def test_the_unit_must_come_back_whatever_ended_it_and_own_nothing_of_others(service) -> None:
    assert service["Restart"] == "always"
    assert service["StateDirectory"] == UNIT_STATE_DIR.name
    assert f"ZOPS_STATE_DIR={UNIT_STATE_DIR}" in service["Environment"].split()


def test_no_secret_must_stand_in_the_unit_or_on_a_command_line(service, container) -> None:
    assert "WEBHOOK" not in service["ExecStart"] + " ".join(container["command"])
    assert service["EnvironmentFile"] == "-/etc/zops/watch.env"
    assert container["environment"]["ZOPS_WATCH_WEBHOOK"] == "${ZOPS_WATCH_WEBHOOK:-}"


def test_systemd_must_find_nothing_to_say_of_the_unit(tmp_path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text().replace("/usr/local/bin/zops", "/bin/true"))
    done = subprocess.run([tool, "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    judged = subprocess.run([tool, "security", "--offline=yes", "--threshold=25", unit], capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout[-400:] + judged.stderr


def test_the_container_must_hold_nothing_but_the_socket_and_what_it_reads(container) -> None:
    assert container["cap_drop"] == ["ALL"]
    assert container["read_only"] is True
    assert container["user"] == "10001:10001"
    assert "privileged" not in container
    writable = [one["target"] for one in container["volumes"] if not one.get("read_only")]
    assert writable == ["/var/run/docker.sock", "/run/lock/zops", str(UNIT_STATE_DIR)]
    assert container["environment"]["ZOPS_STATE_DIR"] == str(UNIT_STATE_DIR)


def test_every_variable_of_the_container_must_be_one_that_zops_knows(container) -> None:
    named = {name for name in container["environment"] if name.startswith("ZOPS_")}
    named |= set(re.findall(r"\$\{(ZOPS_\w+)", COMPOSE.read_text()))
    known = {variable(path) for path, _ in fields()} | RESERVED_VARIABLES
    assert named - known == {"ZOPS_DOCKER_GID"}


def test_the_page_must_say_that_the_socket_is_root() -> None:
    page = (ROOT / "docs" / "how-to" / "watch.md").read_text()
    assert "root on the host" in page
    assert "rootless" in page

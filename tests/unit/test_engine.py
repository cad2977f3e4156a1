"""Reaching an engine, reading what it says of itself, and asking it for GPUs."""

from pathlib import Path

import pytest

from tests.support.instances import recorded
from zops.errors import HostShort, RuntimeUnreachable
from zops.host.engine import Endpoint, connect, gpu_request, resolve, unreachable
from zops.host.tunnel import ssh_argv

UUID = "GPU-8f6e2a51-0c2b-4a55-9d1c-0a5f4f0d7c11"


def test_what_an_engine_says_must_be_read_into_facts() -> None:
    facts = recorded("docker-29-cdi", "1.52")
    assert (facts.name, facts.version, facts.api_version) == ("gpu-29", "29.1.3", "1.52")
    assert (facts.cgroup_version, facts.cgroup_driver, facts.storage_driver) == ("2", "systemd", "overlayfs")
    assert (facts.default_runtime, facts.runtimes) == ("runc", ("io.containerd.runc.v2", "nvidia", "runc"))
    assert facts.cdi_spec_dirs == ("/etc/cdi", "/var/run/cdi")
    assert facts.gpu_devices == tuple(
        f"nvidia.com/gpu={gpu}" for gpu in ("0", "1", UUID, "GPU-a1b2c3d4-1111-2222-3333-444455556666", "all")
    )
    assert not facts.remaps_users


def test_an_engine_that_is_too_old_to_tell_of_devices_must_read_as_not_knowing() -> None:
    facts = recorded("docker-20.10")
    assert facts.cdi_devices is None
    assert facts.cdi_spec_dirs == ()
    assert not facts.nvidia_driver
    assert not facts.offers_cdi


@pytest.mark.parametrize("option", ["name=rootless", "name=userns"])
def test_an_engine_with_other_user_ids_outside_must_say_so(option: str) -> None:
    assert recorded("docker-20.10", SecurityOptions=["name=seccomp,profile=default", option]).remaps_users


@pytest.mark.parametrize(
    ("gpus", "ids"),
    [
        ("all", ["nvidia.com/gpu=all"]),
        ((0,), ["nvidia.com/gpu=0"]),
        ((1, UUID), ["nvidia.com/gpu=1", f"nvidia.com/gpu={UUID}"]),
    ],
)
def test_an_engine_with_cdi_devices_must_be_asked_by_their_names(gpus, ids: list[str]) -> None:
    assert gpu_request(recorded("docker-29-cdi"), gpus) == {"Driver": "cdi", "DeviceIDs": ids}


@pytest.mark.parametrize(
    ("gpus", "request_body"),
    [
        ("all", {"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}),
        ((0, 3), {"Driver": "nvidia", "DeviceIDs": ["0", "3"], "Capabilities": [["gpu"]]}),
        ((UUID,), {"Driver": "nvidia", "DeviceIDs": [UUID], "Capabilities": [["gpu"]]}),
    ],
)
def test_an_engine_with_the_nvidia_runtime_must_be_asked_through_its_driver(gpus, request_body) -> None:
    assert gpu_request(recorded("docker-27-nvidia"), gpus) == request_body


def test_an_engine_with_cdi_on_but_no_nvidia_device_must_be_asked_through_the_driver() -> None:
    facts = recorded("docker-29-cdi", DiscoveredDevices=[{"Source": "cdi", "ID": "vendor.com/nic=0"}])
    request = gpu_request(facts, "all")
    assert request
    assert request["Driver"] == "nvidia"


def test_an_engine_with_cdi_switched_on_that_cannot_list_devices_must_be_asked_through_cdi() -> None:
    facts = recorded("docker-20.10", CDISpecDirs=["/etc/cdi"])
    assert gpu_request(facts, "all") == {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}


@pytest.mark.parametrize("engine", ["docker-20.10", "docker-27-nvidia", "docker-29-cdi"])
def test_no_engine_must_be_asked_for_a_gpu_that_is_not_wanted(engine: str) -> None:
    assert gpu_request(recorded(engine), "none") is None


@pytest.mark.parametrize("changes", [{}, {"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": []}])
def test_an_engine_that_offers_no_gpu_must_be_refused_with_the_remedy(changes) -> None:
    with pytest.raises(HostShort) as raised:
        gpu_request(recorded("docker-20.10", **changes), "all")
    assert raised.value.code == "gpu-not-offered"
    assert "nvidia-container-toolkit" in raised.value.hint
    assert "--gpus none" in raised.value.hint


def test_a_gpu_that_the_engine_does_not_list_must_be_named() -> None:
    with pytest.raises(HostShort, match=r"has no nvidia\.com/gpu=7") as raised:
        gpu_request(recorded("docker-29-cdi"), (0, 7))
    assert raised.value.code == "gpu-missing"


@pytest.mark.parametrize(
    ("engine", "environ", "url"),
    [
        ("local", {}, "unix:///var/run/docker.sock"),
        ("local", {"DOCKER_HOST": "unix:///run/user/1000/docker.sock"}, "unix:///run/user/1000/docker.sock"),
        ("unix:///srv/docker.sock", {"DOCKER_HOST": "unix:///elsewhere"}, "unix:///srv/docker.sock"),
        ("ssh://ops@gpu-1", {}, "ssh://ops@gpu-1"),
        ("tcp://gpu-1:2375", {}, "tcp://gpu-1:2375"),
        ("context:default", {"DOCKER_HOST": "unix:///elsewhere"}, "unix:///var/run/docker.sock"),
    ],
)
def test_an_engine_must_be_found_where_it_was_named(engine: str, environ, url: str) -> None:
    assert resolve(engine, environ) == Endpoint(url)


def test_a_context_must_be_read_from_the_docker_commands_own_files(tmp_path: Path, monkeypatch) -> None:
    from docker.context import ContextAPI

    directory = tmp_path / "docker"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(directory))
    ContextAPI.create_context("far", host="ssh://ops@gpu-2")
    assert resolve("context:far").url == "ssh://ops@gpu-2:22"


@pytest.mark.parametrize(
    ("url", "forward", "destination"),
    [
        ("ssh://gpu-1", "/s:/var/run/docker.sock", ["--", "gpu-1"]),
        ("ssh://ops@gpu-1:2222", "/s:/var/run/docker.sock", ["-l", "ops", "-p", "2222", "--", "gpu-1"]),
        ("ssh://gpu-1/run/user/1000/docker.sock", "/s:/run/user/1000/docker.sock", ["--", "gpu-1"]),
        ("ssh://-oProxyCommand=evil", "/s:/var/run/docker.sock", ["--", "-oproxycommand=evil"]),
    ],
)
def test_ssh_must_forward_the_engines_socket_and_take_no_host_for_an_option(url, forward, destination) -> None:
    argv = ssh_argv(url, Path("/s"))
    assert argv[argv.index("-L") + 1] == forward
    assert argv[argv.index("-L") + 2 :] == destination
    assert "BatchMode=yes" in argv


def test_a_context_that_is_not_there_must_be_named() -> None:
    with pytest.raises(RuntimeUnreachable, match="no docker context nowhere") as raised:
        connect("context:nowhere")
    assert raised.value.code == "engine-no-context"


def test_certificates_that_are_not_there_must_be_named(tmp_path: Path) -> None:
    environ = {"DOCKER_HOST": "tcp://gpu-1:2376", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)}
    with pytest.raises(RuntimeUnreachable) as raised:
        resolve("local", environ)
    assert raised.value.code == "engine-no-certificates"


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (PermissionError(13, "Permission denied"), "engine-no-permission"),
        (FileNotFoundError(2, "No such file or directory"), "engine-not-running"),
        (ConnectionRefusedError(111, "Connection refused"), "engine-not-running"),
        (TimeoutError("timed out"), "runtime-unreachable"),
    ],
)
def test_the_reason_must_be_found_in_whatever_wrapped_it(cause: Exception, code: str) -> None:
    wrapped = ConnectionError(("Connection aborted.", RuntimeError(cause)))
    wrapped.__cause__ = OSError("a wrapper", cause)
    error = unreachable("unix:///var/run/docker.sock", wrapped)
    assert error.code == code
    assert error.hint
    assert error.details["tried"] == "unix:///var/run/docker.sock"

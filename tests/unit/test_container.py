"""What a deployment is as a container, field by field, and what is read back."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.instances import deployment, recorded
from zops.errors import HostShort, SnapshotMissing
from zops.runtime.base import LABEL, drift, labels
from zops.runtime.container import container_options, instance_of, require_readable

SECOND = 1_000_000_000
PLAIN = recorded("docker-20.10")


def environment(options) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in options["Env"])


def inspected(wanted, **changes):
    """What the engine would say of a container that was made from the deployment."""
    state = {"Status": "running", "StartedAt": "2026-11-23T13:37:07.331415852Z", "ExitCode": 0, "OOMKilled": False}
    return {
        "Id": "c0ffee",
        "Image": "sha256:1111",
        "Config": {"Image": wanted.spec.image.name, "Labels": labels(wanted)},
        "State": state,
        "RestartCount": 2,
    } | changes


def test_a_container_must_have_every_restriction_that_it_can_bear(tmp_path: Path) -> None:
    options = container_options(deployment(tmp_path), PLAIN)
    host = options["HostConfig"]
    assert options["User"] == "10001:10001"
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["Tmpfs"] == {"/tmp": "rw,noexec,nosuid,nodev,mode=1777,size=1g"}
    assert host["PidsLimit"] == 8192
    assert not {"CapAdd", "Devices", "PidMode", "IpcMode", "NetworkMode", "Binds", "UsernsMode"} & host.keys()
    assert "Cmd" not in options
    assert "Entrypoint" not in options


def test_a_container_must_be_kept_running_and_stopped_with_patience(tmp_path: Path) -> None:
    wanted = deployment(tmp_path, serve={"request_timeout_s": 300, "startup_timeout_s": 600})
    options = container_options(wanted, PLAIN)
    assert options["HostConfig"]["RestartPolicy"] == {"Name": "unless-stopped"}
    assert (options["StopSignal"], options["StopTimeout"]) == ("SIGTERM", 315)
    check = {"Interval": 10 * SECOND, "Timeout": 6 * SECOND, "Retries": 3, "StartPeriod": 600 * SECOND}
    assert options["Healthcheck"] == check
    newer = container_options(wanted, recorded("docker-29-cdi", "1.52"))
    assert newer["Healthcheck"] == check | {"StartInterval": 5 * SECOND}


def test_a_container_must_get_its_memory_its_shm_and_a_log_that_ends(tmp_path: Path) -> None:
    wanted = deployment(tmp_path, resources={"memory": "8GiB", "shm": "2GiB", "log_bytes": "5MB", "log_files": 3})
    host = container_options(wanted, PLAIN)["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (8 << 30, 8 << 30, 2 << 30)
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "5000000", "max-file": "3"}}
    assert "Memory" not in container_options(deployment(tmp_path), PLAIN)["HostConfig"]


def test_more_memory_than_the_host_has_must_be_refused(tmp_path: Path) -> None:
    with pytest.raises(HostShort) as raised:
        container_options(deployment(tmp_path, resources={"memory": "999GiB"}), PLAIN)
    assert raised.value.code == "memory-short"


def test_the_cache_must_be_mounted_read_only_and_never_made(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    options = container_options(wanted, PLAIN)
    assert options["HostConfig"]["Mounts"] == [
        {"Type": "bind", "Source": str(tmp_path / "cache"), "Target": "/cache", "ReadOnly": True},
        {
            "Type": "volume",
            "Source": "zops-demo-compile",
            "Target": "/compile-cache",
            "VolumeOptions": {"Labels": {"io.zops.deployment": "demo"}},
        },
    ]
    inside = environment(options)
    assert inside["ZOPS_SNAPSHOT"] == "/cache/models/zops--synthetic-tiny/snapshots/seed-0"
    assert inside["ZOPS_CACHE_DIR"] == inside["MODELSCOPE_CACHE"] == inside["HF_HOME"] == "/cache"
    assert inside["HF_HUB_OFFLINE"] == "1"
    assert inside["TORCHINDUCTOR_CACHE_DIR"] == "/compile-cache/inductor"
    assert inside["TRITON_CACHE_DIR"] == "/compile-cache/triton"
    assert inside["HOME"] == "/tmp"
    assert str(tmp_path) not in json.dumps(options["Env"])


def test_a_snapshot_outside_the_cache_must_be_mounted_read_only_too(tmp_path: Path) -> None:
    elsewhere = tmp_path / "weights"
    elsewhere.mkdir()
    made = deployment(tmp_path)
    outside = type(made)(made.spec, elsewhere, made.revision, made.manifest_digest)
    options = container_options(outside, PLAIN)
    mount = {"Type": "bind", "Source": str(elsewhere), "Target": "/snapshot", "ReadOnly": True}
    assert mount in options["HostConfig"]["Mounts"]
    assert environment(options)["ZOPS_SNAPSHOT"] == "/snapshot"


def test_a_cache_behind_a_link_must_be_mounted_as_what_it_is(tmp_path: Path) -> None:
    made = deployment(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    spec = made.spec.model_copy(update={"cache": made.spec.cache.model_copy(update={"dir": tmp_path / "link"})})
    linked = type(made)(spec, tmp_path / "link" / made.snapshot.relative_to(tmp_path / "cache"), "r", "d")
    options = container_options(linked, PLAIN)
    assert options["HostConfig"]["Mounts"][0]["Source"] == str(tmp_path / "cache")
    assert environment(options)["ZOPS_SNAPSHOT"] == "/cache/models/zops--synthetic-tiny/snapshots/seed-0"


@pytest.mark.parametrize(
    ("host", "published"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")]
)
def test_the_port_must_be_published_on_the_address_that_was_asked_for(tmp_path: Path, host, published) -> None:
    options = container_options(deployment(tmp_path, serve={"host": host, "port": 8123}), PLAIN)
    assert options["ExposedPorts"] == {"8000/tcp": {}}
    assert options["HostConfig"]["PortBindings"] == {"8000/tcp": [{"HostIp": published, "HostPort": "8123"}]}
    inside = environment(options)
    assert (inside["ZOPS_SERVE_HOST"], inside["ZOPS_SERVE_PORT"]) == ("0.0.0.0", "8000")


def test_gpus_must_be_requested_as_the_engine_understands_it(tmp_path: Path) -> None:
    wanted = deployment(tmp_path, gpus=[0, 1])
    by_driver = container_options(wanted, recorded("docker-27-nvidia"))
    assert by_driver["HostConfig"]["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": ["0", "1"], "Capabilities": [["gpu"]]}
    ]
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(by_driver)
    by_cdi = container_options(wanted, recorded("docker-29-cdi"))
    assert by_cdi["HostConfig"]["DeviceRequests"] == [
        {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]}
    ]
    assert environment(by_cdi)["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_no_gpu_must_reach_a_container_that_asked_for_none(tmp_path: Path) -> None:
    options = container_options(deployment(tmp_path), recorded("docker-27-nvidia"))
    assert "DeviceRequests" not in options["HostConfig"]
    assert environment(options)["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_no_option_must_hold_what_the_specification_says_of_sources_and_backups(tmp_path: Path) -> None:
    secretive = deployment(
        tmp_path, source={"kind": "directory", "path": "/srv/private-src"}, backup={"to": "/srv/private-to"}
    )
    assert "private" not in json.dumps(container_options(secretive, PLAIN))


# --- labels and what is read back


def test_labels_must_bring_back_the_same_deployment(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    found = instance_of(inspected(wanted), image_id="sha256:1111")
    assert drift(wanted, found) == []
    assert (found.name, found.id, found.runtime, found.state) == ("demo", "c0ffee", "docker", "running")
    assert (found.model, found.snapshot) == (wanted.spec.model, str(wanted.snapshot))
    assert (found.manifest_digest, found.spec_digest, found.url) == ("ab" * 32, wanted.spec_digest, wanted.url)
    assert (found.started_at, found.restarts, found.exit_code) == ("2026-11-23T13:37:07Z", 2, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serve": {"port": 9999}}, "serve.port: 8000 -> 9999"),
        ({"gpus": "all"}, "gpus: none -> all"),
        ({"image": {"name": "other:1"}}, "-> other:1"),
        ({"resources": {"memory": "1GiB"}}, "resources.memory: None -> 1073741824"),
    ],
)
def test_a_changed_specification_must_show_as_drift(tmp_path: Path, changes, words: str) -> None:
    found = instance_of(inspected(deployment(tmp_path)))
    differences = drift(deployment(tmp_path, **changes), found)
    assert len(differences) == 1
    assert words in differences[0]


@pytest.mark.parametrize(
    "changes", [{"serve": {"startup_timeout_s": 5}}, {"backup": {"to": "/b"}}, {"source": {"kind": "huggingface"}}]
)
def test_what_is_no_part_of_the_instance_must_not_drift(tmp_path: Path, changes) -> None:
    assert drift(deployment(tmp_path, **changes), instance_of(inspected(deployment(tmp_path)))) == []


def test_a_rebuilt_image_must_show_as_drift(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    assert drift(wanted, instance_of(inspected(wanted), image_id="")) == []
    (difference,) = drift(wanted, instance_of(inspected(wanted), image_id="sha256:2222"))
    assert difference.startswith("image: ")
    assert "older" in difference


@given(st.dictionaries(st.sampled_from([f"{LABEL}.{n}" for n in ("traits", "url", "model", "spec")]), st.text()))
def test_broken_labels_must_read_as_an_instance_that_differs(tmp_path_factory, broken: dict[str, str]) -> None:
    wanted = deployment(tmp_path_factory.getbasetemp() / "shared")
    attributes = inspected(wanted)
    attributes["Config"]["Labels"] = {f"{LABEL}.deployment": "demo"} | broken
    found = instance_of(attributes)
    assert found.name == "demo"
    assert drift(wanted, found)


@pytest.mark.parametrize(("status", "state"), [("removing", "dead"), ("paused", "paused"), ("", "dead")])
def test_every_word_of_an_engine_must_become_a_state(tmp_path: Path, status: str, state: str) -> None:
    attributes = inspected(deployment(tmp_path))
    attributes["State"] = {"Status": status, "StartedAt": "0001-01-01T00:00:00Z", "Health": {"Status": "none"}}
    found = instance_of(attributes)
    assert (found.state, found.started_at, found.health, found.exit_code) == (state, "", "", None)


def test_how_a_container_ended_must_be_told(tmp_path: Path) -> None:
    attributes = inspected(deployment(tmp_path))
    attributes["State"] = {"Status": "exited", "ExitCode": 137, "OOMKilled": True}
    found = instance_of(attributes)
    assert (found.exit_code, found.oom_killed, found.running) == (137, True, False)


# --- who may read


def test_a_readable_snapshot_must_pass(tmp_path: Path) -> None:
    require_readable(deployment(tmp_path), PLAIN)


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("vae/config.json", 0o640),
        ("model_index.json", 0o600),
        ("vae", 0o744),
        (".", 0o750),
        ("..", 0o700),
        ("../../../..", 0o700),
    ],
)
def test_a_file_that_the_containers_user_cannot_read_must_be_named(tmp_path: Path, place: str, mode: int) -> None:
    wanted = deployment(tmp_path)
    path = Path(os.path.normpath(wanted.snapshot / place))
    path.chmod(mode)
    with pytest.raises(HostShort) as raised:
        require_readable(wanted, PLAIN)
    assert raised.value.code == "cache-unreadable"
    assert raised.value.details["path"] == str(path)
    assert raised.value.hint == f"sudo chmod -R a+rX '{tmp_path / 'cache'}'"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_the_containers_user_or_its_group_owns_must_pass(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    os.chown(wanted.snapshot / "model_index.json", 10001, 0)
    (wanted.snapshot / "model_index.json").chmod(0o400)
    os.chown(wanted.snapshot / "vae", 0, 10001)
    (wanted.snapshot / "vae").chmod(0o750)
    require_readable(wanted, PLAIN)
    # Where ids are other ones outside, owning as 10001 here means nothing.
    with pytest.raises(HostShort):
        require_readable(wanted, recorded("docker-20.10", SecurityOptions=["name=rootless"]))


def test_a_link_that_leads_out_of_the_cache_must_be_named(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    (tmp_path / "blob").write_text("{}")
    (wanted.snapshot / "linked.json").symlink_to(tmp_path / "blob")
    with pytest.raises(HostShort) as raised:
        require_readable(wanted, PLAIN)
    assert raised.value.code == "cache-links-outside"


def test_a_link_within_the_cache_must_pass(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    blob = tmp_path / "cache" / "blob"
    blob.write_text("{}")
    blob.chmod(0o644)
    (wanted.snapshot / "linked.json").symlink_to(blob)
    require_readable(wanted, PLAIN)


def test_a_link_to_nothing_must_be_a_missing_snapshot(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    (wanted.snapshot / "linked.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(SnapshotMissing):
        require_readable(wanted, PLAIN)

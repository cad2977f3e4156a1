"""How the file of API keys reaches an instance, in every runtime, and what is refused before one is made."""

import base64
import os
from pathlib import Path

import pytest
import yaml

from tests.support.deployments import cpu_deployment
from tests.support.instances import deployment, recorded
from zops.errors import HostShort, SpecError
from zops.events import Warned
from zops.runtime.base import Deployment, drift, serve_environment
from zops.runtime.container import container_options, instance_of, require_readable
from zops.runtime.deployment import bring_up
from zops.runtime.kubernetes_render import find_kind, render
from zops.spec import Spec
from zops.spec.keys import add_key
from zops.spec.load import load

PLAIN = recorded("docker-20.10")
COMPOSE = Path(__file__).parents[2] / "compose"


@pytest.fixture
def keys(tmp_path) -> Path:
    directory = tmp_path / "keys"
    directory.mkdir()
    add_key(directory / "web.yaml", "web")
    directory.chmod(0o755)
    (directory / "web.yaml").chmod(0o644)
    return directory / "web.yaml"


def keyed(tmp_path, keys) -> Deployment:
    return deployment(tmp_path, serve={"api_keys": str(keys)})


def test_a_container_must_see_the_directory_of_the_keys_read_only(tmp_path, keys):
    options = container_options(keyed(tmp_path, keys), PLAIN)
    mount = {"Type": "bind", "Source": str(keys.parent), "Target": "/keys", "ReadOnly": True}
    assert mount in options["HostConfig"]["Mounts"]
    assert "ZOPS_SERVE_API_KEYS=/keys/web.yaml" in options["Env"]
    require_readable(keyed(tmp_path, keys), PLAIN)


def test_no_key_and_no_hash_must_be_in_what_the_engine_shows(tmp_path, keys):
    shown = str(container_options(keyed(tmp_path, keys), PLAIN))
    assert yaml.safe_load(keys.read_text())["keys"]["web"]["sha256"] not in shown


def test_a_container_without_keys_must_have_no_mount_for_them(tmp_path):
    options = container_options(deployment(tmp_path), PLAIN)
    assert [mount["Target"] for mount in options["HostConfig"]["Mounts"]] == ["/cache", "/compile-cache"]
    assert not any("API_KEYS" in entry for entry in options["Env"])


def test_a_container_must_know_where_it_is_published(tmp_path):
    assert "ZOPS_PUBLISHED=127.0.0.1" in container_options(deployment(tmp_path), PLAIN)["Env"]
    public = deployment(tmp_path, serve={"host": "0.0.0.0"})
    assert "ZOPS_PUBLISHED=0.0.0.0" in container_options(public, PLAIN)["Env"]


def test_a_directory_that_holds_more_than_the_keys_must_be_refused(tmp_path, keys):
    (keys.parent / ".lock").touch()
    require_readable(keyed(tmp_path, keys), PLAIN)
    (keys.parent / "zops.yaml").touch()
    with pytest.raises(SpecError) as raised:
        require_readable(keyed(tmp_path, keys), PLAIN)
    assert raised.value.code == "keys-not-alone"
    assert "mv " in raised.value.hint


@pytest.mark.parametrize(("of_directory", "of_file"), [(0o755, 0o600), (0o700, 0o644)])
def test_keys_that_the_container_cannot_read_must_be_refused(tmp_path, keys, of_directory, of_file):
    keys.parent.chmod(of_directory)
    keys.chmod(of_file)
    with pytest.raises(HostShort) as raised:
        require_readable(keyed(tmp_path, keys), PLAIN)
    assert raised.value.code == "keys-unreadable"
    assert "chgrp 10001" in raised.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_keys_of_the_containers_group_must_be_enough_and_stay_so(tmp_path, keys):
    for path, mode in ((keys.parent, 0o750), (keys, 0o640)):
        os.chown(path, -1, 10001)
        path.chmod(mode)
    add_key(keys, "shop")
    require_readable(keyed(tmp_path, keys), PLAIN)


def test_broken_keys_must_be_refused_before_a_container_is_made(tmp_path, keys):
    keys.write_text("keys: {")
    with pytest.raises(SpecError):
        require_readable(keyed(tmp_path, keys), PLAIN)


def test_a_process_must_read_the_hosts_own_file(tmp_path, keys):
    made = serve_environment(keyed(tmp_path, keys), snapshot="/s", cache_dir="/c", host="127.0.0.1", port=8000)
    assert made["ZOPS_SERVE_API_KEYS"] == str(keys)


def test_another_file_of_keys_must_be_a_difference_and_another_key_none(tmp_path, keys):
    plain, wanted = deployment(tmp_path), keyed(tmp_path, keys)
    assert plain.spec_digest != wanted.spec_digest
    before = wanted.spec_digest
    add_key(keys, "shop")
    assert keyed(tmp_path, keys).spec_digest == before
    present = instance_of({"Id": "1", "Config": {}, "State": {}})
    assert any("api_keys" in line for line in drift(wanted, present))


def test_a_pod_must_get_the_keys_as_a_secret_of_hashes(keys):
    plain = cpu_deployment()
    spec = plain.spec.model_copy(update={"serve": plain.spec.serve.model_copy(update={"api_keys": keys})})
    objects = render(Deployment(spec, plain.snapshot, plain.revision, plain.manifest_digest))
    secret = find_kind(objects, "Secret")
    name = secret["metadata"]["name"]
    assert base64.b64decode(secret["data"]["web.yaml"]) == keys.read_bytes()
    assert secret["metadata"]["labels"]["io.zops.deployment"] == spec.name
    pod = find_kind(objects, "Deployment")["spec"]["template"]["spec"]
    assert {"name": "keys", "secret": {"secretName": name, "defaultMode": 0o444}} in pod["volumes"]
    container = pod["containers"][0]
    assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in container["volumeMounts"]
    assert {"name": "ZOPS_SERVE_API_KEYS", "value": "/keys/web.yaml"} in container["env"]
    kinds = [manifest["kind"] for manifest in objects]
    assert kinds.index("Secret") < kinds.index("Deployment")


def test_a_pod_without_keys_must_need_no_secret():
    assert "Secret" not in [manifest["kind"] for manifest in render(cpu_deployment())]


def test_the_compose_file_for_keys_must_mount_what_the_docker_runtime_mounts():
    service = yaml.safe_load((COMPOSE / "compose.keys.yaml").read_text())["services"]["zops"]
    (mount,) = service["volumes"]
    assert (mount["type"], mount["target"], mount["read_only"]) == ("bind", "/keys", True)
    assert service["environment"] == {"ZOPS_SERVE_API_KEYS": "/keys/keys.yaml"}


@pytest.mark.parametrize(
    ("serve", "warned"),
    [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_keys": "/keys/k.yaml"}, False)],
)
def test_a_server_that_is_open_to_others_must_be_warned_of(tmp_path, serve, warned):
    class Runtime:
        """As much of a runtime as bringing up needs."""

        def has_image(self, _spec):
            return True

        def up(self, wanted, _report):
            return wanted

    said = []
    bring_up(Runtime(), deployment(tmp_path, serve=serve), said.append)
    assert [type(event) for event in said] == [Warned] * warned


def test_the_path_of_the_keys_must_be_relative_to_the_file_that_names_it(tmp_path):
    (tmp_path / "zops.yaml").write_text("serve: {api_keys: keys/keys.yaml}\n")
    assert load(tmp_path / "zops.yaml", environ={}).spec.serve.api_keys == tmp_path / "keys" / "keys.yaml"


def test_a_home_that_is_none_must_be_refused_by_name():
    with pytest.raises(SpecError, match="no such home"):
        load(environ={"ZOPS_SERVE_API_KEYS": "~nobody-of-this-name/k.yaml"}, directory=Path("/"))


def test_keys_must_be_none_by_default():
    assert Spec().serve.api_keys is None

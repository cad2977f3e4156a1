"""The real image on a real engine: what it is, what it refuses to be, and that it runs under every restriction."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import docker
import pytest

import zops
from tests.support.build_inputs import ca_bundle, find_links
from zops.cli.output import size
from zops.errors import SourceFailed
from zops.health.needs import needs
from zops.host.engine import read_labels
from zops.runtime.image import BuiltImage, build_image, image_size
from zops.spec import Image, Spec

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# As zops.runtime.container and compose run it.
HARDENED = {
    "read_only": True,
    "tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,mode=1777,size=1g"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "network_mode": "none",
}
# CPU builds of torch; a CUDA build brings about 5 GB more.
CPU_LIMIT_BYTES = 1_600_000_000


@pytest.fixture
def config(docker_client: docker.DockerClient, inference_image: str) -> dict:
    return docker_client.images.get(inference_image).attrs["Config"]


@pytest.fixture
def execute(docker_client: docker.DockerClient, inference_image: str):
    """Run a program in a container of its own and return what it wrote."""

    def run(*argv: str, **options) -> str:
        return docker_client.containers.run(
            inference_image, list(argv[1:]), entrypoint=[argv[0]], remove=True, **(HARDENED | options)
        ).decode()

    return run


def test_what_was_built_must_be_what_the_engine_has(built_image: BuiltImage, docker_client, capsys):
    found = docker_client.images.get(built_image.name)
    assert (built_image.id, built_image.size_bytes) == (found.id, found.attrs["Size"])
    assert image_size("local", built_image.name) == built_image.size_bytes
    with capsys.disabled():
        print(f"\n{built_image.name}: {size(built_image.size_bytes)}, built in {built_image.seconds:.1f} s")
    if find_links():
        assert built_image.size_bytes < CPU_LIMIT_BYTES


def test_the_same_inputs_must_give_the_same_image(built_image: BuiltImage, tmp_path):
    again = build_image("local", Image(wheels=find_links(), ca=ca_bundle()), lambda _event: None, tag=built_image.name)
    assert again.id == built_image.id


def test_the_image_must_not_run_as_root(config, execute):
    assert config["User"] == "10001:10001"
    assert execute("id").startswith("uid=10001(zops) gid=10001(zops)")


def test_no_file_may_lend_its_owners_rights(execute):
    assert execute("find", "/", "-xdev", "-perm", "/6000", "-type", "f", user="0", cap_drop=[]) == ""


def test_signals_must_go_through_an_init(config):
    assert config["Entrypoint"] == ["tini", "--", "zops", "serve"]
    assert not config["Cmd"]


def test_the_labels_must_say_what_the_image_is(config):
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == "zops-inference"
    assert labels["version"] == zops.__version__
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == "debian:bookworm-slim"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", labels["revision"])


def test_the_labels_must_say_which_torch_is_inside(config, execute):
    said = execute("python", "-c", "import torch; print(torch.__version__, torch.version.cuda or 'cpu')")
    assert f"{config['Labels']['io.zops.torch']} {config['Labels']['io.zops.torch.cuda']}" == said.strip()


def test_the_doctor_must_read_which_cuda_the_image_was_built_for(inference_image, config, tmp_path):
    spec = Spec.model_validate({"cache": {"dir": tmp_path}, "image": {"name": inference_image, "build": False}})
    assert needs(spec, {}).torch_cuda == config["Labels"]["io.zops.torch.cuda"]
    assert read_labels("local", "zops-test-nowhere:1") is None


def test_the_health_check_must_ask_the_server_and_leave_time_to_load(config, docker_client, inference_image):
    check = config["Healthcheck"]
    assert check["Test"] == ["CMD", "python", "-m", "zops.serving.healthcheck"]
    assert check["StartPeriod"] >= 600 * 10**9
    # Nobody serves in this container: the check must run to its end and say no.
    container = docker_client.containers.create(inference_image, check["Test"][1:], entrypoint=[], **HARDENED)
    try:
        container.start()
        assert container.wait(timeout=60)["StatusCode"] == 1
        assert container.logs() == b""
    finally:
        container.remove(force=True)


def test_zops_must_run_under_every_restriction(execute):
    assert execute("zops", "--version") == f"zops {zops.__version__}\n"


def test_what_serving_needs_must_load_without_a_network_or_a_volume(execute):
    program = "import zops.serving.server, torch; from diffusers import ZImagePipeline; print(torch.ones(2).sum())"
    assert execute("python", "-c", program) == "tensor(2.)\n"


def test_the_image_must_serve_nothing_rather_than_what_is_not_there(docker_client, inference_image):
    container = docker_client.containers.create(inference_image, **HARDENED)
    try:
        container.start()
        assert container.wait(timeout=120)["StatusCode"] == 3, container.logs()
    finally:
        container.remove(force=True)


def test_nothing_that_builds_may_be_in_the_image(execute):
    program = (
        "import importlib.util, json, shutil\n"
        "print(json.dumps([n for n in ('pip', 'ensurepip', 'hatchling') if importlib.util.find_spec(n)]\n"
        "    + [n for n in ('pip', 'pip3', 'gcc', 'git', 'curl') if shutil.which(n)]))"
    )
    assert json.loads(execute("python", "-c", program)) == []


def test_the_bytecode_must_be_in_the_image_because_none_can_be_written(execute):
    program = (
        "import os, struct, torch, zops.cli.main as z\n"
        "for module in (torch, z):\n"
        "    header = open(module.__cached__, 'rb').read(16)\n"
        "    print(struct.unpack('<I', header[8:12])[0] == int(os.stat(module.__file__).st_mtime))"
    )
    assert execute("python", "-c", program).split() == ["True", "True"]


def test_the_ca_and_other_secrets_of_the_build_must_not_be_in_the_image(execute, docker_client, inference_image):
    bundle = ca_bundle()
    history = json.dumps(docker_client.api.history(inference_image))
    assert execute("find", "/run", "-type", "f", user="0", cap_drop=[]) == ""
    if bundle is None:
        return
    assert str(bundle) not in history
    content = bundle.read_bytes()
    # The image's own bundle, which Debian made from the same certificates, may well be equal.
    own = r"-not -path '/etc/ssl/certs/*' -not -path '/usr/share/ca-certificates/*' -not -path '/proc/*'"
    found = execute("sh", "-c", f"find / -xdev -type f -size {len(content)}c {own} -exec sha256sum {{}} +", user="0")
    assert hashlib.sha256(content).hexdigest() not in found


def test_a_base_image_that_nobody_has_must_be_an_error_that_says_what_to_do(built_image: BuiltImage, tmp_path):
    with pytest.raises(SourceFailed) as caught:
        build_image("local", Image(base="localhost:9/none:1"), lambda _event: None, tag="zops-inference:never")
    assert caught.value.code == "image-base-missing"
    assert "docker pull localhost:9/none:1" in caught.value.hint
    assert "localhost:9/none:1" in Path(str(caught.value.details["log"])).read_text()
    assert image_size("local", "zops-inference:never") is None


def test_the_command_must_print_data_on_stdout_and_all_else_on_stderr(built_image: BuiltImage, docker_client, tmp_path):
    wheels, ca = find_links(), ca_bundle()
    settings = [f"--set=image.{key}={value}" for key, value in (("wheels", wheels), ("ca", ca)) if value]
    argv = [sys.executable, "-m", "zops", "image", "build", "--tag", built_image.name, "--output", "json", *settings]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    body = json.loads(done.stdout)
    found = docker_client.images.get(built_image.name)
    assert (body["name"], body["id"], body["size_bytes"]) == (built_image.name, found.id, found.attrs["Size"])
    assert all(json.loads(line) for line in done.stderr.splitlines())

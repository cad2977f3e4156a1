"""A real engine with the real image on it, built once for all tests that need it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.support.build_inputs import ca_bundle, find_links
from zops.runtime.image import BuiltImage, build_image
from zops.spec import Image

ROOT = Path(__file__).parents[2]
IMAGE = "zops-inference:e2e"


def base_image() -> None:
    done = subprocess.run([str(ROOT / "scripts" / "ensure-base-image")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def built_image(tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The inference image as `zops image build` makes it; layers are cached between runs."""
    base_image()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOPS_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        return build_image("local", Image(wheels=find_links(), ca=ca_bundle()), lambda _event: None, tag=IMAGE)


@pytest.fixture(scope="session")
def inference_image(built_image: BuiltImage) -> str:
    """The name of the inference image, which the engine has."""
    return built_image.name


@pytest.fixture
def docker_client() -> Iterator[docker.DockerClient]:
    """The engine as the tests see it, past all our code."""
    client = docker.DockerClient.from_env(use_context=False)
    yield client
    client.close()

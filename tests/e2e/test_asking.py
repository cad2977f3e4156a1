"""Questions that go to a server through its engine, because its port cannot be reached."""

import functools
import json
import uuid
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.host import free_port
from tests.support.waiting import eventually
from zops.cache.manifest import read_manifest
from zops.cache.synthetic import synthesize_snapshot
from zops.errors import RuntimeUnreachable
from zops.events import silent
from zops.health.client import Client
from zops.runtime.base import Deployment
from zops.runtime.docker import DockerRuntime
from zops.spec import Spec

pytestmark = [pytest.mark.engine, pytest.mark.slow]
KEY = "zk-" + "a" * 40


@pytest.fixture(scope="module")
def asked(inference_image: str, tmp_path_factory):
    """An instance of the tiny model on a port that this test never asks, and its runtime."""
    cache = tmp_path_factory.mktemp("asked") / "cache"
    snapshot = cache / "models" / "zops--synthetic-tiny" / "snapshots" / "seed-0"
    snapshot.parent.mkdir(parents=True)
    synthesize_snapshot(snapshot, "tiny")
    for directory in (cache, *cache.parents[:3]):
        directory.chmod(0o755)
    settings = {
        "name": f"t-{uuid.uuid4().hex[:12]}",
        "model": "zops/synthetic-tiny",
        "cache": {"dir": cache},
        "gpus": "none",
        "image": {"name": inference_image},
        "serve": {"port": free_port(), "warmup_size": 64},
    }
    spec = Spec.model_validate(settings)
    deployment = Deployment(spec, snapshot, "seed-0", read_manifest(snapshot).digest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOPS_LOCK_DIR", str(cache.parent / "locks"))
        runtime = DockerRuntime(spec)
        runtime.up(deployment, silent)
        client = Client("http://192.0.2.1:9", 20, ask=functools.partial(runtime.ask, spec.name))
        try:
            eventually(lambda: _is_ready(client), "readiness", timeout_s=90)
            yield runtime, spec.name, client
        finally:
            runtime.down(spec.name, silent, volumes=True)


def _is_ready(client: Client) -> bool:
    try:
        return client.ready().ready
    except RuntimeUnreachable:
        return False


def _looked(client: Client) -> Mapping[str, Any] | None:
    facts = client.ready().facts
    return facts if facts["snapshot"] else None


def test_a_client_must_get_the_same_answers_through_the_engine(asked) -> None:
    _, _, client = asked
    assert client.live()
    assert client.info()["model"] == "zops/synthetic-tiny"
    [image] = client.generate("a lighthouse", size="64x64", seed=3).images
    assert image.data.startswith(b"\x89PNG")
    assert image.receipt["seed"] == 3


def test_a_container_without_a_gpu_must_say_that_none_is_used_and_that_its_cache_is_read_only(asked) -> None:
    _, _, client = asked
    facts = eventually(lambda: _looked(client), "a look at the disk")
    assert facts["gpus"] is None
    assert facts["snapshot"] == {"manifest_digest": facts["manifest_digest"], "writable": False, "error": ""}


def test_an_error_of_the_server_must_come_through_with_its_status(asked) -> None:
    runtime, name, _ = asked
    status, body = runtime.ask(name, "POST", "/v1/images/generations", b'{"prompt": ""}', timeout_s=20)
    assert status == 400
    assert json.loads(body)["error"]["code"] == "prompt_empty"


def test_neither_key_nor_body_may_be_in_what_the_engine_tells_of_a_question(asked) -> None:
    runtime, name, _ = asked
    seen: list[dict] = []
    api = runtime._client.api
    made = api.exec_create

    def create(*arguments, **options):
        seen.append({"arguments": arguments, "environment": options["environment"]})
        return made(*arguments, **options)

    api.exec_create = create
    try:
        runtime.ask(name, "GET", "/livez", b'{"prompt": "secret words"}', timeout_s=20, key=KEY)
    finally:
        api.exec_create = made
    [question] = seen
    assert question["environment"]["ZOPS_API_KEY"] == KEY
    assert KEY not in str(question["arguments"])
    assert "secret words" not in str(question["arguments"])


def test_a_server_that_does_not_answer_must_be_given_up_in_time(asked) -> None:
    runtime, name, _ = asked
    body = json.dumps({"prompt": "long", "size": "512x512", "num_inference_steps": 200}).encode()
    with pytest.raises(RuntimeUnreachable) as raised:
        runtime.ask(name, "POST", "/v1/images/generations", body, timeout_s=1)
    assert raised.value.code == "instance-timeout"

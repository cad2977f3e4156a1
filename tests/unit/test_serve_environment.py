"""What an operator sets under `serve` must reach the server inside an instance."""

import pytest

from tests.support.deployments import kubernetes_deployment
from zops.runtime.base import serve_environment
from zops.spec import Serve, load, variable

OF_THE_HOST = {"host", "port", "startup_timeout_s", "api_keys"}
OTHERWISE = {
    "dtype": "float32", "preset": "eager", "fp8_text": False, "force_preset": True, "verify_on_load": True,
    "forwards": 5, "guidance_scale": 1.5, "max_pixels": 1 << 20, "max_images": 2, "workers": 2, "max_batch": 4,
    "max_queue": 7, "warmup_size": 64, "request_timeout_s": 33.0, "long_prompts": "truncate", "log_prompts": True,
    "mark_images": False, "max_upload": 1 << 20, "results_bytes": 1 << 21, "results_keep_s": 60.0,
    "public_url": "https://images.example", "parallel": "split", "gpus_per_worker": 3,
}  # fmt: skip


def test_every_key_must_be_tried_here():
    assert OTHERWISE.keys() | OF_THE_HOST == set(Serve.model_fields)


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_key_that_was_set_must_have_the_same_value_inside(name):
    deployment = kubernetes_deployment(serve={name: OTHERWISE[name]})
    given = serve_environment(deployment, snapshot="/snapshot", cache_dir="/cache", host="0.0.0.0", port=8000)
    inside = load(environ={variable(f"serve.{name}"): given[variable(f"serve.{name}")]}).spec
    assert getattr(inside.serve, name) == OTHERWISE[name] == getattr(deployment.spec.serve, name)

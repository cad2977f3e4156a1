"""A real `zops serve` with two workers that are killed and stopped: every request is answered, and answered right."""

import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageChops

from tests.support.serving import LONG, start_server, stop_hard
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    """A server with two workers on the CPU; tests leave it with both ready."""
    server = start_server(tiny_model, tmp_path_factory.mktemp("pair"), ZOPS_SERVE_WORKERS="2")
    yield both_ready(server.wait_ready())
    stop_hard(server)


def both_ready(server):
    eventually(lambda: all(w["phase"] == "ready" for w in server.state["workers"]), "both workers", timeout_s=60)
    return server


def opened(picture):
    return Image.open(io.BytesIO(picture)).convert("RGB")


def make_long(server, seed):
    return server.call("POST", "/v1/images/generations", LONG | {"seed": seed})


def test_requests_at_once_must_be_spread_over_both_workers(pair):
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(make_long, pair, seed) for seed in range(2)]
        eventually(lambda: [w["running"] for w in pair.state["workers"]] == [1, 1], "both workers to run")
        assert all(answer.result().status == 200 for answer in answers)


def test_the_pictures_of_one_request_must_be_those_that_each_seed_gives_alone(pair):
    together = pair.generate(seed=40, n=4).images
    assert together == [image for seed in range(40, 44) for image in pair.generate(seed=seed).images]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_struck_worker_must_cost_no_request_while_the_other_one_serves(pair, blow):
    alone = [make_long(pair, seed).images for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(make_long, pair, seed) for seed in range(2)]
        eventually(lambda: [w["running"] for w in pair.state["workers"]] == [1, 1], "both workers to run")
        victim = pair.state["workers"][0]["pid"]
        os.kill(victim, blow)
        replaced = lambda: pair.state["workers"][0]["pid"] not in {victim, None}  # noqa: E731 - a condition to wait for
        eventually(replaced, "the successor to start", timeout_s=15)
        assert pair.call("GET", "/readyz").status == 200, "the other worker serves"
        assert [answer.result(timeout=60).images for answer in running] == alone
    both_ready(pair)


def test_a_batch_must_give_the_same_pictures_as_each_of_its_seeds_alone(tiny_model, tmp_path):
    server = start_server(tiny_model, tmp_path / "batches", ZOPS_SERVE_MAX_BATCH="4")
    try:
        server.wait_ready()
        alone = [server.generate(seed=seed).images for seed in range(60, 64)]
        for picture, [same] in zip(server.generate(seed=60, n=4).images, alone, strict=True):
            # Sums are taken in another order in a batch: a value may be rounded to its neighbour.
            difference = ImageChops.difference(opened(picture), opened(same))
            assert max(most for _, most in difference.getextrema()) <= 1
        page = server.call("GET", "/metrics").body.decode()
        assert 'zops_batch_size_bucket{le="3.0"} 4.0' in page
        assert "zops_batch_size_count 5.0" in page
    finally:
        stop_hard(server)

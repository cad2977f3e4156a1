"""The client of an instance: right answers become values, everything else one clear error in bounded time."""

import socket
import time

import pytest

from tests.support.instance import picture, running
from zops.errors import NotReady, RuntimeUnreachable, UsageError, ZopsError
from zops.health.client import Client


@pytest.fixture
def instance():
    with running() as (url, behaviour):
        yield Client(url, timeout_s=5), behaviour


def refused(status, message, kind="invalid_request_error", **more):
    return status, {"error": {"message": message, "type": kind, "param": None, "code": "a_code"}, **more}


def test_what_is_asked_for_must_reach_the_server_and_nothing_else(instance):
    client, behaviour = instance
    made = client.generate("a fox", size="32x16", seed=7, n=2, forwards=4, output_format="png")
    assert [image.receipt["seed"] for image in made.images] == [7, 8]
    assert made.images[0].data == picture(32, 16)
    assert behaviour.requests[-1][1] == {
        "prompt": "a fox",
        "size": "32x16",
        "seed": 7,
        "n": 2,
        "num_inference_steps": 4,
        "output_format": "png",
        "response_format": "b64_json",
    }


def test_what_is_left_open_must_be_left_to_the_server(instance):
    client, behaviour = instance
    client.generate("a fox")
    assert set(behaviour.requests[-1][1]) == {"prompt", "n", "output_format", "response_format"}


def test_a_refused_request_must_be_a_usage_error_with_the_servers_words(instance):
    client, behaviour = instance
    behaviour.refusal = refused(400, "size is 30x30, edges must be multiples of 16.")
    with pytest.raises(UsageError, match=r"multiples of 16$") as caught:
        client.generate("a fox", size="30x30")
    assert caught.value.exit_status == 2
    assert caught.value.details["server_code"] == "a_code"


def test_an_instance_that_is_not_ready_must_be_named_with_its_phase(instance):
    client, behaviour = instance
    behaviour.refusal = refused(503, "no working worker yet", "server_error", phase="load")
    with pytest.raises(NotReady, match="no working worker yet") as caught:
        client.generate("a fox")
    assert caught.value.details["phase"] == "load"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (refused(429, "the queue is full", "rate_limit_error"), "instance-busy"),
        (refused(500, "out of memory", "server_error"), "instance-failed"),
        ((502, "bad gateway"), "instance-failed"),
        ((200, {"data": [{"b64_json": "***"}]}), "instance-stranger"),
        ((200, {"data": [None]}), "instance-stranger"),
        ((200, {"data": []}), "instance-stranger"),
        ((200, ["not", "an", "object"]), "instance-stranger"),
    ],
)
def test_every_other_answer_must_have_its_code(instance, answer, code):
    client, behaviour = instance
    behaviour.refusal = answer
    with pytest.raises(ZopsError) as caught:
        client.generate("a fox")
    assert caught.value.code == code
    assert caught.value.hint


def test_no_server_must_be_unreachable_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RuntimeUnreachable, match="connection refused") as caught:
        Client(f"http://127.0.0.1:{port}", timeout_s=1).ready()
    assert caught.value.code == "instance-unreachable"
    assert "zops up" in caught.value.hint


@pytest.mark.parametrize("way", ["hang", "drip"])
def test_a_server_that_hangs_or_drips_must_be_given_up_in_time(way):
    with running() as (url, behaviour):
        getattr(behaviour, way).add("/readyz")
        began = time.monotonic()
        with pytest.raises(RuntimeUnreachable) as caught:
            Client(url, timeout_s=0.3).ready()
        assert time.monotonic() - began < 1.5
        assert caught.value.code == "instance-timeout"


def test_a_stranger_on_the_port_must_be_called_one(instance):
    client, behaviour = instance
    behaviour.raw["/readyz"] = b"<html>welcome</html>"
    with pytest.raises(ZopsError, match="is not zops"):
        client.ready()


def test_a_connection_that_is_cut_must_be_unreachable():
    with running() as (url, behaviour):
        behaviour.hang.add("/livez")
        behaviour.over.set()
        with pytest.raises(RuntimeUnreachable, match="the connection broke"):
            Client(url, timeout_s=2).live()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_an_address_that_is_none_must_be_refused_at_once(url):
    with pytest.raises(UsageError, match="no address"):
        Client(url)

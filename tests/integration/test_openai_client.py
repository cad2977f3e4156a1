"""The openai client as it comes from the registry must work with a running `zops serve`."""

import base64
import contextlib
import io
import json
import socket
import time
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from tests.support.serving import ENDLESS, start_server, stop_hard
from tests.support.waiting import eventually
from zops.spec.keys import add_key

ASK = {"prompt": "a cat", "size": "64x64"}


def client_for(server, **options):
    settings = {"api_key": "any", "max_retries": 0, "timeout": 60} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **settings)


@pytest.fixture
def client(served):
    with client_for(served) as client:
        yield client


def opened(b64_json):
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def png(width=64, height=64):
    target = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(target, "PNG")
    return target.getvalue()


def seeded(seed, **more):
    return {"extra_body": {"seed": seed, **more}}


def test_images_must_be_made(client):
    answer = client.images.generate(**ASK, n=2, **seeded(5))
    assert [opened(item.b64_json).size for item in answer.data] == [(64, 64)] * 2
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert answer.usage.output_tokens == 2 * 4 * 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert [item.receipt["seed"] for item in answer.data] == [5, 6]


def test_every_option_of_openais_that_means_nothing_here_must_be_taken(client):
    answer = client.images.generate(
        **ASK,
        model="zops/synthetic-tiny",
        user="u",
        quality="high",
        style="vivid",
        moderation="low",
        background="opaque",
        output_format="webp",
        output_compression=50,
        response_format="b64_json",
    )
    assert opened(answer.data[0].b64_json).format == "WEBP"


def test_a_url_must_give_the_image(served, client):
    inline = client.images.generate(**ASK, **seeded(5)).data[0].b64_json
    url = client.images.generate(**ASK, response_format="url", **seeded(5)).data[0].url
    assert url.startswith(f"{served.url}/v1/images/")
    assert httpx2.get(url).content == base64.b64decode(inline)


def test_a_stream_must_show_previews_and_end_with_the_image(client):
    whole = client.images.generate(**ASK, **seeded(5)).data[0].b64_json
    events = list(client.images.generate(**ASK, stream=True, partial_images=3, **seeded(5)))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    previews = [opened(event.b64_json) for event in events[:3]]
    assert len({preview.tobytes() for preview in previews}) == 3
    assert previews[0].width * 64 == previews[0].height * 64
    assert events[3].b64_json == whole
    assert events[3].usage.output_tokens == 16


def test_a_stream_without_previews_must_be_one_event(client):
    [event] = client.images.generate(**ASK, stream=True)
    assert event.type == "image_generation.completed"


def test_an_image_must_be_edited(client):
    made = [client.images.edit(image=png(), prompt="a cat", **seeded(5, strength=s)).data[0] for s in (0.3, 0.3, 0.9)]
    assert made[0].b64_json == made[1].b64_json != made[2].b64_json
    assert opened(made[0].b64_json).size == (64, 64)
    assert made[0].receipt["mode"] == "edit"
    assert made[0].receipt["strength"] == 0.3
    assert made[0].receipt["forwards"] < made[2].receipt["forwards"]


@pytest.mark.parametrize("way", ["bytes", "tuple", "path", "file", "list"])
def test_each_way_to_name_a_file_must_work(client, tmp_path, way):
    path = tmp_path / "in.png"
    path.write_bytes(png(100, 70))
    image = {
        "bytes": path.read_bytes,
        "tuple": lambda: ("in.png", path.read_bytes(), "image/png"),
        "path": lambda: Path(path),
        "file": lambda: path.open("rb"),
        "list": lambda: [path.read_bytes()],
    }[way]()
    try:
        answer = client.images.edit(image=image, prompt="a cat", n=1, output_format="jpeg")
    finally:
        if way == "file":
            image.close()
    assert opened(answer.data[0].b64_json).size == (96, 64)


def test_an_edit_must_be_streamed(client):
    events = list(client.images.edit(image=png(), prompt="a cat", stream=True, partial_images=1, size="32x32"))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert opened(events[1].b64_json).size == (32, 32)


def test_an_edit_must_be_fetched_by_url(client):
    url = client.images.edit(image=png(), prompt="a cat", response_format="url").data[0].url
    assert Image.open(io.BytesIO(httpx2.get(url).content)).size == (64, 64)


def test_a_mask_must_be_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=png(), mask=png(), prompt="a cat")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "mask")


def test_models_must_be_listed_and_named(client):
    assert [model.id for model in client.models.list()] == ["zops/synthetic-tiny"]
    assert client.models.retrieve("zops/synthetic-tiny").object == "model"


@pytest.mark.parametrize(
    ("fields", "kind", "status", "code"),
    [
        ({"size": "65x64"}, openai.BadRequestError, 400, "invalid_size"),
        ({"prompt": " "}, openai.BadRequestError, 400, "prompt_empty"),
        ({"extra_body": {"negative_prompt": "fog"}}, openai.BadRequestError, 400, "parameters_conflict"),
        ({"background": "transparent"}, openai.BadRequestError, 400, "unsupported_parameter"),
        ({"model": "dall-e-3"}, openai.NotFoundError, 404, "model_not_found"),
        ({"n": "two"}, openai.UnprocessableEntityError, 422, "invalid_type"),
        ({"stream": True, "partial_images": 9}, openai.BadRequestError, 400, "partial_images_out_of_range"),
    ],
)
def test_each_refusal_must_be_the_clients_own_error(client, fields, kind, status, code):
    with pytest.raises(kind) as caught:
        client.images.generate(**(ASK | fields))
    error = caught.value
    assert (error.status_code, error.code, error.type) == (status, code, "invalid_request_error")
    assert error.body["request_id"] == error.request_id
    assert error.body["message"]


@contextlib.contextmanager
def waiting_request(server):
    """Have one more request wait."""
    body = json.dumps(ENDLESS).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head + body)
        eventually(lambda: server.state["queue"]["waiting"] == 1, "the request to wait")
        yield


@pytest.fixture
def narrow(tiny_model, tmp_path):
    """A server with a queue of one and 3 s for a request; whoever uses it spoils it."""
    server = start_server(tiny_model, tmp_path / "narrow", ZOPS_SERVE_MAX_QUEUE="1", ZOPS_SERVE_REQUEST_TIMEOUT_S="3")
    try:
        yield server
    finally:
        stop_hard(server)


def test_errors_of_a_server_in_trouble_must_be_the_clients_own(narrow):
    eventually(narrow.is_up, "the socket", timeout_s=60)
    with client_for(narrow) as client:
        with pytest.raises(openai.InternalServerError) as early:
            client.images.generate(**ASK)
        assert (early.value.status_code, early.value.code) == (503, "not_ready")
        assert int(early.value.response.headers["retry-after"]) > 0
        narrow.wait_ready()

        with narrow.endless_request(), waiting_request(narrow):
            with pytest.raises(openai.RateLimitError) as full:
                client.images.generate(**ASK)
            assert (full.value.status_code, full.value.code, full.value.type) == (429, "queue_full", "rate_limit_error")
            assert int(full.value.response.headers["retry-after"]) > 0

        steps = {"num_inference_steps": ENDLESS["num_inference_steps"]}
        asked = {"prompt": "a cat", "n": ENDLESS["n"], "size": ENDLESS["size"], "extra_body": steps}
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as late:
            client.images.generate(**asked)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        assert time.monotonic() - began > 2

        with pytest.raises(openai.APIError) as midway:
            list(client.images.generate(**asked, stream=True))
        assert midway.value.code == "deadline_exceeded"


def test_a_key_that_was_used_for_something_else_must_be_a_conflict(client):
    headers = {"Idempotency-Key": f"k{time.monotonic_ns()}"}
    first = client.images.generate(**ASK, extra_headers=headers)
    assert client.images.generate(**ASK, extra_headers=headers).data == first.data
    with pytest.raises(openai.ConflictError) as caught:
        client.images.generate(**(ASK | {"prompt": "a dog"}), extra_headers=headers)
    assert (caught.value.status_code, caught.value.code) == (409, "idempotency_conflict")


def test_a_guarded_server_must_know_its_clients(tiny_model, tmp_path):
    keys = tmp_path / "keys" / "keys.yaml"
    keys.parent.mkdir()
    secrets = {name: add_key(keys, name) for name in ("alice", "bob")}
    server = start_server(tiny_model, tmp_path / "guarded", ZOPS_SERVE_API_KEYS=str(keys))
    try:
        server.wait_ready()
        with client_for(server, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.images.generate(**ASK)
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
        with client_for(server, api_key=secrets["alice"]) as alice:
            url = alice.images.generate(**ASK, response_format="url").data[0].url
        assert httpx2.get(url).status_code == 401
        got = {name: httpx2.get(url, headers={"Authorization": f"Bearer {key}"}) for name, key in secrets.items()}
        assert (got["alice"].status_code, got["bob"].status_code) == (200, 404)
        assert Image.open(io.BytesIO(got["alice"].content)).size == (64, 64)
    finally:
        stop_hard(server)

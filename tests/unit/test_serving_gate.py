"""Who is let in, as what, and how often; over the application as `zops serve` puts it together."""

import asyncio
import io
import json

import pytest

from tests.support.front import Front, loggers, put_back, until
from tests.support.studio import client_of
from zops.serving.app import PATHS
from zops.serving.errors import ApiError
from zops.serving.gate import is_guarded
from zops.serving.keys import KeyRing
from zops.spec.keys import add_key, remove_key

IMAGE = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 1, "seed": 3}
GENERATIONS = "/v1/images/generations"


@pytest.fixture(autouse=True)
def _own_log():
    before = loggers()
    yield
    put_back(before)


class Keyed(Front):
    """A front with a file of keys."""

    def __init__(self, directory, **limits):
        (directory / "keys").mkdir()
        self.file = directory / "keys" / "keys.yaml"
        self.now = 0.0
        self.key = add_key(self.file, "web", **limits)
        self.log = io.StringIO()
        super().__init__(directory / "snapshot", KeyRing(self.file, clock=lambda: self.now), self.log)

    def bearer(self, key=None):
        return {"Authorization": f"Bearer {key or self.key}"}


def drive(front, act):
    """Run a client's coroutine against a front."""

    async def run():
        async with client_of(front.app) as client:
            return await asyncio.wait_for(act(client), 10)

    return asyncio.run(run())


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_a_good_key_must_get_images_and_its_name_be_in_log_and_metrics(tmp_path):
    front = Keyed(tmp_path)
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE, headers=front.bearer()))
    assert answer.status_code == 200
    assert front.scheduler.submitted[0].client == "web"
    line = json.loads(front.log.getvalue().splitlines()[-1])
    assert (line["client"], line["status"]) == ("web", 200)
    assert front.key not in front.log.getvalue()
    assert front.count("zops_client_requests_total", client="web", status="200") == 1
    assert front.count("zops_api_keys") == 1
    assert front.key[5:] not in front.metrics.render()[0].decode()


@pytest.mark.parametrize(
    ("headers", "code", "challenge"),
    [
        ({}, "missing_api_key", 'Bearer realm="zops"'),
        ({"Authorization": "Bearer nonsense"}, "invalid_api_key", 'Bearer realm="zops", error="invalid_token"'),
    ],
)
def test_nobody_else_must_get_in_and_the_answer_must_say_how(tmp_path, headers, code, challenge):
    front = Keyed(tmp_path)
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE, headers=headers))
    assert error_of(answer) == (401, code)
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["www-authenticate"] == challenge
    assert front.scheduler.submitted == []
    assert front.count("zops_refused_total", code=code) == 1
    assert front.count("zops_requests_total", status="401") == 1


def test_who_is_refused_by_the_head_alone_must_be_heard_out(tmp_path):
    """A connection that is closed while a client still sends would cost it the answer."""
    sent = []

    async def pieces():
        for number in range(3):
            sent.append(number)
            yield b" "

    answer = drive(Keyed(tmp_path), lambda client: client.post(GENERATIONS, content=pieces()))
    assert error_of(answer) == (401, "missing_api_key")
    assert sent == [0, 1, 2]


def test_every_path_must_be_guarded_but_those_that_everybody_may_see(tmp_path):
    front = Keyed(tmp_path)
    open_paths = {path.partition(" ")[2] for path in PATHS if not is_guarded(path.partition(" ")[2])}
    assert open_paths == {
        "/livez", "/readyz", "/healthz", "/health", "/v1/health/live", "/v1/health/ready", "/v1/zops/info",
        "/metrics", "/openapi.json", "/", "/assets/{path}",
    }  # fmt: skip

    async def act(client):
        for entry in PATHS:
            method, _, path = entry.partition(" ")
            answer = await client.request(method, path.replace("{", "").replace("}", ""))
            assert (answer.status_code == 401) is (path not in open_paths), entry

    drive(front, act)


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/none", "/v1/images/generations/", "/v1/%69mages/generations"])
def test_no_spelling_of_a_path_must_lead_around_the_gate(tmp_path, path):
    front = Keyed(tmp_path)
    assert drive(front, lambda client: client.post(path, json=IMAGE)).status_code == 401


def test_without_a_file_of_keys_everybody_must_get_in(tmp_path):
    front = Front(tmp_path)
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE, headers={"Authorization": "Bearer x"}))
    assert answer.status_code == 200
    assert front.scheduler.submitted[0].client == ""


def test_a_key_must_be_told_what_it_has_left_and_when_it_has_nothing(tmp_path):
    front = Keyed(tmp_path, requests_per_minute=2)

    async def act(client):
        answers = [await client.post(GENERATIONS, json=IMAGE, headers=front.bearer()) for _ in range(3)]
        return [*answers, await client.get("/v1/models", headers=front.bearer())]

    first, second, third, models = drive(front, act)
    assert [first.status_code, second.status_code, models.status_code] == [200, 200, 200]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in (first, second, third)] == ["1", "0", "0"]
    assert error_of(third) == (429, "rate_limit_exceeded")
    assert third.headers["x-ratelimit-limit-requests"] == "2"
    assert float(third.headers["x-ratelimit-reset-requests"].removesuffix("s")) == pytest.approx(60, abs=5)
    assert 20 <= int(third.headers["retry-after"]) <= 30
    assert front.count("zops_client_requests_total", client="web", status="429") == 1


def test_images_must_be_limited_by_their_number(tmp_path):
    front = Keyed(tmp_path, images_per_minute=3)

    async def act(client):
        return [await client.post(GENERATIONS, json=IMAGE | {"n": 2}, headers=front.bearer()) for _ in range(2)]

    first, second = drive(front, act)
    assert (first.status_code, first.headers["x-ratelimit-remaining-images"]) == (200, "1")
    assert error_of(second) == (429, "rate_limit_exceeded")
    assert len(front.scheduler.submitted) == 1


def test_a_key_must_not_have_more_open_than_it_may(tmp_path):
    front = Keyed(tmp_path, max_waiting=1)
    front.scheduler.hold = True

    async def act(client):
        first = asyncio.ensure_future(client.post(GENERATIONS, json=IMAGE, headers=front.bearer()))
        await until(lambda: front.scheduler.submitted)
        second = await client.post(GENERATIONS, json=IMAGE, headers=front.bearer())
        front.scheduler.finish(front.scheduler.submitted[0])
        front.scheduler.hold = False
        return [(await first).status_code, second, await client.post(GENERATIONS, json=IMAGE, headers=front.bearer())]

    first, second, third = drive(front, act)
    assert (first, error_of(second), third.status_code) == (200, (429, "queue_full"), 200)


def test_a_key_that_is_removed_must_be_refused_and_leave_the_metrics(tmp_path):
    front = Keyed(tmp_path)
    other = add_key(front.file, "shop")

    async def act(client):
        before = await client.post(GENERATIONS, json=IMAGE, headers=front.bearer())
        remove_key(front.file, "web")
        front.now += 1
        after = await client.post(GENERATIONS, json=IMAGE, headers=front.bearer())
        await client.get("/v1/models", headers=front.bearer(other))
        return [before.status_code, after.status_code]

    assert drive(front, act) == [200, 401]
    assert 'client="web"' not in front.metrics.render()[0].decode()
    assert front.count("zops_api_keys") == 1


def test_a_file_that_breaks_must_show_in_the_metrics_and_the_log(tmp_path):
    front = Keyed(tmp_path)
    front.file.write_text("keys: {")
    front.now += 1
    answer = drive(front, lambda client: client.get("/v1/models", headers=front.bearer()))
    assert answer.status_code == 200
    assert front.count("zops_api_keys_stale") == 1
    assert "broken" in front.log.getvalue()


@pytest.mark.parametrize(
    "headers",
    [{f"x-{n}": "" for n in range(101)}, {"x-long": "a" * (17 << 10)}],
    ids=["too many", "too long"],
)
def test_headers_beyond_all_bounds_must_be_refused(tmp_path, headers):
    answer = drive(Front(tmp_path), lambda client: client.get("/livez", headers=headers))
    assert error_of(answer) == (431, "headers_too_large")


def test_a_path_beyond_all_bounds_must_be_refused(tmp_path):
    answer = drive(Front(tmp_path), lambda client: client.get("/" + "a" * (17 << 10)))
    assert error_of(answer) == (431, "headers_too_large")


def test_a_refusal_behind_the_gate_must_be_counted_once(tmp_path):
    front = Keyed(tmp_path)
    front.scheduler.refusal = ApiError("draining", "the server is stopping", retry_after_s=5)
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE, headers=front.bearer()))
    assert error_of(answer) == (503, "draining")
    assert front.count("zops_requests_total", status="503") == 1
    assert front.count("zops_client_requests_total", client="web", status="503") == 1


def test_openapi_must_tell_where_a_key_is_wanted(tmp_path):
    front = Keyed(tmp_path)
    schema = drive(front, lambda client: client.get("/openapi.json")).json()
    assert schema["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is is_guarded(path), path
    post = schema["paths"][GENERATIONS]["post"]
    assert {"Prefer", "Idempotency-Key"} <= {parameter["name"] for parameter in post["parameters"]}
    assert {"202", "401", "409", "429", "431"} <= set(post["responses"])


def test_openapi_must_ask_for_no_key_where_none_is_wanted(tmp_path):
    schema = drive(Front(tmp_path), lambda client: client.get("/openapi.json")).json()
    assert not any("security" in operation for path in schema["paths"].values() for operation in path.values())

"""The HTTP API around a scripted scheduler: what clients see, and what becomes of requests that nobody waits for."""

import asyncio
import io
import json
import logging

import pytest
from PIL import Image

from tests.support.studio import ScriptedScheduler, build_app, client_of, write_tokenizer
from zops.serving import stream as stream_module
from zops.serving.answers import error_answer
from zops.serving.errors import ApiError
from zops.serving.messages import Ready
from zops.serving.metrics import Metrics
from zops.serving.rates import Allowance
from zops.serving.request import Limits
from zops.spec import Spec

ASK = {"prompt": "a cat", "size": "64x64", "seed": 3}
MAKE = "/v1/images/generations"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    directory = tmp_path_factory.mktemp("snapshot")
    write_tokenizer(directory)
    return directory


class Served:
    """An application, its scheduler, its metrics and its log; `run` drives a client through it."""

    def __init__(self, snapshot, **serve):
        self.log = io.StringIO()
        self.scheduler = ScriptedScheduler()
        self.metrics = Metrics(model="m/m", revision="r", manifest_digest="d")
        limits = Limits.of(Spec.model_validate({"serve": serve}))
        self.app = build_app(snapshot, self.scheduler, log=self.log, limits=limits, metrics=self.metrics)

    def run(self, talk):
        async def drive():
            async with client_of(self.app) as client:
                return await talk(client)

        return asyncio.run(drive())

    def post(self, body=None, path=MAKE, **options):
        options |= {"json": body} if body is not None else {}
        return self.run(lambda client: client.post(path, **options))

    def get(self, path):
        return self.run(lambda client: client.get(path))

    def counted(self, line):
        exposition = self.metrics.render()[0].decode().splitlines()
        return next((float(row.split()[-1]) for row in exposition if row.startswith(line + " ")), 0.0)

    @property
    def logged(self):
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@pytest.fixture
def serve(snapshot):
    """Build applications; loggers are the process's own, so they are put back."""
    loggers = [logging.getLogger(name) for name in ("zops.serving", "uvicorn")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield lambda **settings: Served(snapshot, **settings)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def events(text):
    """Read server-sent events as (name, data)."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert [line.split(": ")[0] for line in lines] == ["event", "data"]
            found.append((lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))))
    return found


def png():
    target = io.BytesIO()
    Image.new("RGB", (100, 70), "red").save(target, "PNG")
    return target.getvalue()


# --- whole answers


def test_an_answer_must_have_images_receipts_and_tokens(serve):
    body = serve().post(ASK | {"n": 2}).json()
    assert [item["receipt"]["seed"] for item in body["data"]] == [3, 4]
    assert body["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 9},
        "output_tokens": 32,
        "total_tokens": 41,
    }
    assert body["data"][0]["receipt"]["seconds"].keys() == {"queue", "text", "denoise", "decode", "encode"}


def test_a_request_must_be_counted_and_logged_with_its_phases(serve):
    served = serve()
    served.post(ASK)
    assert served.counted('zops_requests_total{status="200"}') == 1
    assert served.counted('zops_images_total{format="png"}') == 1
    [line] = served.logged
    assert line["phases"].keys() == {"queue", "text", "denoise", "decode", "encode"}
    assert "prompt" not in line


def test_a_prompt_must_be_logged_only_where_the_operator_wants_it(serve):
    served = serve(log_prompts=True)
    served.post(ASK)
    assert served.logged[0]["prompt"] == "a cat"


def test_an_edit_must_hand_its_pixels_to_the_worker(serve):
    served = serve()
    answer = served.post(path="/v1/images/edits", data={"prompt": "a dog"}, files={"image": ("a.png", png())})
    assert answer.status_code == 200
    [making] = served.scheduler.submitted
    assert (making.shape.mode, making.shape.width, making.shape.height, making.shape.strength) == ("edit", 96, 64, 0.6)
    assert making.parts[0].picture.source == b"\xff\0\0" * (96 * 64)
    assert answer.json()["size"] == "96x64"


@pytest.mark.parametrize(
    ("files", "status", "code"),
    [
        ([], 422, "invalid_type"),
        ([("image", ("a.png", b"GIF89a"))], 400, "invalid_image"),
        ([("image[]", ("a.png", b"1")), ("image[]", ("b.png", b"2"))], 400, "unsupported_parameter"),
        ([("image", ("a.png", b"1")), ("mask", ("b.png", b"2"))], 400, "unsupported_parameter"),
        ([("image", ("a.png", b"1" * 3000))], 413, "body_too_large"),
        ([("image", ("a.png", b"1" * (2 << 20)))], 413, "body_too_large"),
    ],
)
def test_files_that_are_not_one_image_must_be_refused(serve, files, status, code):
    served = serve(max_upload=2048)
    more = {"files": files} if files else {"files": {"prompt": (None, "a dog")}}
    answer = served.post(path="/v1/images/edits", data={"prompt": "a dog"} if files else None, **more)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert not served.scheduler.submitted


def test_an_edit_that_is_no_form_must_be_refused(serve):
    answer = serve().post({"prompt": "a"}, path="/v1/images/edits")
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_every_error_must_name_its_request(serve):
    served = serve()
    served.scheduler.error = ApiError("worker_lost", "lost", retry_after_s=5)
    answer = served.post(ASK, headers={"x-request-id": "mine.7"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == "mine.7"
    assert served.counted('zops_refused_total{code="worker_lost"}') == 1


def test_what_does_not_fit_into_memory_must_be_refused_with_the_limit(serve):
    served = serve()
    served.scheduler.facts = Ready("gpu", "bfloat16", {}, pixel_bytes=1000.0)
    served.scheduler.left = 64 * 64 * 1000
    assert served.post(ASK).status_code == 200
    answer = served.post(ASK | {"size": "80x64"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_large_for_memory")
    assert "memory for 4096 pixels" in answer.json()["error"]["message"]
    assert len(served.scheduler.submitted) == 1


def test_a_server_without_a_worker_must_say_so_and_not_guess_at_tokens(serve):
    served = serve()
    served.scheduler.facts = None
    served.scheduler.refusal = ApiError("not_ready", "not yet", retry_after_s=5)
    assert served.post(ASK).json()["error"]["code"] == "not_ready"


def test_a_client_that_goes_away_must_have_its_making_cancelled(serve):
    served = serve()
    served.scheduler.hold = True

    async def leave(client):
        asking = asyncio.ensure_future(client.post(MAKE, json=ASK))
        while not served.scheduler.submitted:  # noqa: ASYNC110 - the condition is a list of the test's own
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    served.run(leave)
    assert served.scheduler.submitted[0].state == "cancelled"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/readyz", "GET"),
        ("OPTIONS", "/v1/jobs/x", "DELETE, GET"),
        ("GET", MAKE, "POST"),
        ("POST", "/", "GET"),
    ],
)
def test_a_method_that_is_not_allowed_must_name_those_that_are(serve, method, path, allowed):
    answer = serve().run(lambda client: client.request(method, path))
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


# --- results by URL


def test_an_image_must_be_fetched_from_its_url(serve):
    served = serve()
    inline = served.post(ASK).json()["data"][0]["b64_json"]
    item = served.post(ASK | {"response_format": "url", "output_format": "webp"}).json()["data"][0]
    assert "b64_json" not in item
    assert item["url"].startswith("http://zops.test/v1/images/img_")
    answer = served.get(item["url"])
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    assert inline
    name = item["url"].split("/")[-2]
    assert name not in served.log.getvalue()


def test_urls_must_begin_as_the_operator_says(serve):
    item = serve(public_url="https://images.example/zops/").post(ASK | {"response_format": "url"}).json()["data"][0]
    assert item["url"].startswith("https://images.example/zops/v1/images/img_")


def test_a_url_must_work_only_for_the_client_that_had_the_image_made(serve):
    served = serve()
    clients = iter(["alice", "bob", "alice"])
    inner = served.app

    async def gate(scope, receive, send):
        scope.setdefault("state", {})["allowance"] = Allowance(next(clients))
        await inner(scope, receive, send)

    served.app = gate
    url = served.post(ASK | {"response_format": "url"}).json()["data"][0]["url"]
    assert (served.get(url).status_code, served.get(url).status_code) == (404, 200)
    assert served.scheduler.submitted[0].client == "alice"


# --- streams


def test_a_stream_must_send_previews_and_then_the_image(serve):
    served = serve()
    answer = served.post(ASK | {"stream": True, "partial_images": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert all(name == data["type"] for name, data in found)
    assert [data["partial_image_index"] for _, data in found[:2]] == [0, 1]
    whole = serve().post(ASK).json()["data"][0]["b64_json"]
    assert found[2][1]["b64_json"] == whole
    assert found[2][1]["usage"]["total_tokens"] == 25
    assert served.counted('zops_requests_total{status="200"}') == 1
    assert "denoise" in served.logged[0]["phases"]


def test_a_stream_of_several_images_must_tell_which_is_which(serve):
    found = events(serve().post(ASK | {"stream": True, "n": 3}).text)
    assert [(data["image_index"], data["receipt"]["seed"]) for _, data in found] == [(0, 3), (1, 4), (2, 5)]


def test_an_edit_must_be_streamed_by_its_own_names(serve):
    data = {"prompt": "a dog", "stream": "true", "partial_images": "1"}
    answer = serve().post(path="/v1/images/edits", data=data, files={"image": ("a.png", png())})
    assert [name for name, _ in events(answer.text)] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_failure_in_the_midst_must_end_the_stream_with_an_error(serve):
    served = serve()
    served.scheduler.error = ApiError("worker_lost", "lost")
    answer = served.post(ASK | {"stream": True, "partial_images": 1}, headers={"x-request-id": "mine"})
    name, data = events(answer.text)[-1]
    assert (answer.status_code, name, data["error"]["code"], data["error"]["request_id"]) == (
        200,
        "error",
        "worker_lost",
        "mine",
    )
    assert served.counted('zops_requests_total{status="503"}') == 1
    assert served.counted('zops_refused_total{code="worker_lost"}') == 1


def test_a_bug_in_the_midst_must_end_the_stream_with_an_error_and_be_logged(serve, monkeypatch):
    served = serve()
    monkeypatch.setattr(stream_module, "usage", lambda _made: {}["sesame"])
    name, data = events(served.post(ASK | {"stream": True}).text)[-1]
    assert (name, data["error"]["code"]) == ("error", "internal_error")
    assert "sesame" not in json.dumps(data)
    assert any("sesame" in line.get("traceback", "") for line in served.logged)


def test_a_stream_that_cannot_begin_must_have_the_status_of_its_error(serve):
    served = serve()
    served.scheduler.refusal = ApiError("queue_full", "full", retry_after_s=2)
    answer = served.post(ASK | {"stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_a_silent_stream_must_be_kept_alive(serve, monkeypatch):
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_S", 0.01)
    served = serve()
    served.scheduler.hold = True

    async def talk(client):
        asking = asyncio.ensure_future(client.post(MAKE, json=ASK | {"stream": True}))
        while not served.scheduler.submitted:  # noqa: ASYNC110 - the condition is a list of the test's own
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # silence is what is tested
        served.scheduler.finish(served.scheduler.submitted[0])
        return await asking

    text = served.run(talk).text
    assert text.startswith(": keep-alive\n\n")
    assert events(text)[0][0] == "image_generation.completed"


def test_leaving_a_stream_must_cancel_its_making_and_be_counted(serve):
    served = serve()
    served.scheduler.hold = True
    body = json.dumps(ASK | {"stream": True}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if inbox:
            return inbox.pop()
        while not served.scheduler.submitted:  # noqa: ASYNC110 - the condition is a list of the test's own
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(_message):
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": MAKE, "headers": [], "query_string": b"", "server": ("a", 1)}
    scope |= {"scheme": "http", "root_path": "", "client": ("b", 2), "http_version": "1.1"}
    asyncio.run(served.app(scope, receive, send))
    assert served.scheduler.submitted[0].state == "cancelled"
    assert served.counted('zops_requests_total{status="499"}') == 1


# --- the page


def test_the_page_must_come_with_a_policy_that_allows_nothing_else(serve):
    answer = serve().get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/assets/../web.py", "/assets/%2e%2e/index.html", "/assets/", "/assets/none.js"])
def test_nothing_but_the_pages_own_files_must_be_served(serve, path):
    assert serve().get(path).status_code in {404, 405}


def test_an_error_outside_a_request_with_an_id_must_still_be_an_envelope():
    class Bare:
        state = object()

    body = json.loads(error_answer(Bare(), ApiError("not_found", "gone")).body)
    assert (body["error"]["code"], body["error"]["request_id"]) == ("not_found", None)

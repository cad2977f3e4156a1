"""Idempotency-Key: one making however often a request is sent."""

import asyncio
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.front import Front, loggers, put_back, until
from tests.support.studio import client_of
from zops.serving import idempotency
from zops.serving.errors import ApiError
from zops.serving.idempotency import Answer, Answers, fingerprint_of
from zops.serving.keys import KeyRing
from zops.spec.keys import add_key

IMAGE = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 1}
GENERATIONS = "/v1/images/generations"
KEY = {"Idempotency-Key": "order-17"}


@pytest.fixture(autouse=True)
def _own_log():
    before = loggers()
    yield
    put_back(before)


@pytest.fixture
def front(tmp_path):
    return Front(tmp_path, log=io.StringIO())


def drive(front, act):
    async def run():
        async with client_of(front.app) as client:
            return await asyncio.wait_for(act(client), 10)

    return asyncio.run(run())


def post(client, body=IMAGE, headers=KEY):
    return client.post(GENERATIONS, json=body, headers=headers)


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_the_same_request_again_must_get_the_same_answer_without_a_second_making(front):
    async def act(client):
        return await post(client), await post(client)

    first, second = drive(front, act)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.content == second.content
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert len(front.scheduler.submitted) == 1
    assert front.count("zops_replays_total") == 1


def test_the_same_request_meanwhile_must_wait_for_the_same_answer(front):
    front.scheduler.hold = True

    async def act(client):
        both = [asyncio.ensure_future(post(client)) for _ in range(2)]
        await until(lambda: front.scheduler.submitted)
        await asyncio.sleep(0)
        front.scheduler.finish(front.scheduler.submitted[0])
        return await asyncio.gather(*both)

    first, second = drive(front, act)
    assert first.content == second.content
    assert [("idempotent-replayed" in answer.headers) for answer in (first, second)] == [False, True]
    assert len(front.scheduler.submitted) == 1


def test_who_waited_for_an_error_that_may_pass_must_try_for_himself(front):
    front.scheduler.error = ApiError("queue_full", "full", retry_after_s=1)

    async def act(client):
        return await asyncio.gather(post(client), post(client), post(client))

    answers = drive(front, act)
    assert {error_of(answer) for answer in answers} == {(429, "queue_full")}
    assert [answer.json()["error"]["request_id"] for answer in answers] == [a.headers["x-request-id"] for a in answers]
    assert len(front.scheduler.submitted) == 3


@pytest.mark.parametrize("held", [True, False], ids=["while it runs", "afterwards"])
def test_another_request_with_the_same_key_must_be_refused(front, held):
    front.scheduler.hold = held

    async def act(client):
        first = asyncio.ensure_future(post(client))
        await until(lambda: front.scheduler.submitted)
        if not held:
            await first
        second = await post(client, IMAGE | {"prompt": "a dog"})
        first.cancel()
        return second

    assert error_of(drive(front, act)) == (409, "idempotency_conflict")


def test_keys_of_two_clients_must_not_meet(tmp_path):
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "keys.yaml"
    mine, other = ({"Authorization": f"Bearer {add_key(file, name)}"} for name in ("mine", "other"))
    front = Front(tmp_path, KeyRing(file), io.StringIO())

    async def act(client):
        return await post(client, headers=KEY | mine), await post(client, IMAGE | {"n": 2}, headers=KEY | other)

    first, second = drive(front, act)
    assert (first.status_code, second.status_code) == (200, 200)
    assert "idempotent-replayed" not in second.headers


@pytest.mark.parametrize(
    ("error", "made"),
    [
        (ApiError("draining", "stopping", retry_after_s=1), 2),
        (ApiError("queue_full", "full", retry_after_s=1), 2),
        (ApiError("generation_failed", "broken"), 2),
        (ApiError("prompt_too_long", "long"), 1),
    ],
)
def test_only_an_error_that_stays_must_be_repeated(front, error, made):
    front.scheduler.error = error

    async def act(client):
        return await post(client), await post(client)

    first, second = drive(front, act)
    assert error_of(first) == error_of(second) == (error.status, error.code)
    assert len(front.scheduler.submitted) == made
    assert ("idempotent-replayed" in second.headers) is (made == 1)


def test_a_job_must_be_made_once_too(front):
    async def act(client):
        headers = KEY | {"Prefer": "respond-async"}
        return await post(client, headers=headers), await post(client, headers=headers)

    first, second = drive(front, act)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.headers["location"] == second.headers["location"]
    assert len(front.scheduler.submitted) == 1


def test_a_stream_must_be_made_again(front):
    async def act(client):
        return await post(client, IMAGE | {"stream": True}), await post(client, IMAGE | {"stream": True})

    first, second = drive(front, act)
    assert "image_generation.completed" in first.text
    assert "image_generation.completed" in second.text
    assert len(front.scheduler.submitted) == 2


def test_a_form_must_be_the_same_whatever_its_boundary(front):
    picture = front_picture()

    async def act(client):
        answers = []
        for boundary in ("one", "another"):
            body = form(boundary, picture)
            kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
            answers.append(await client.post("/v1/images/edits", content=body, headers=KEY | kind))
        return answers

    first, second = drive(front, act)
    assert first.status_code == 200, first.text
    assert first.content == second.content
    assert second.headers["idempotent-replayed"] == "true"


def front_picture() -> bytes:
    from tests.support.instance import picture

    return picture(16, 16)


def form(boundary: str, picture: bytes) -> bytes:
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n'.encode(),
        f'--{boundary}\r\nContent-Disposition: form-data; name="size"\r\n\r\n16x16\r\n'.encode(),
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode(),
        picture,
        f"\r\n--{boundary}--\r\n".encode(),
    ]
    return b"".join(lines)


@pytest.mark.parametrize("key", ["", " ", "a" * 256, "a\x7f", "caf\xe9", " a"])
def test_a_key_that_is_none_must_be_refused(front, key):
    answer = drive(front, lambda client: post(client, headers=[(b"idempotency-key", key.encode("latin-1"))]))
    assert error_of(answer) == (400, "invalid_idempotency_key")


def test_two_keys_must_be_refused(front):
    answer = drive(front, lambda client: post(client, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")]))
    assert error_of(answer) == (400, "invalid_idempotency_key")


def test_a_body_that_is_too_large_must_be_refused_as_ever(front):
    answer = drive(front, lambda client: client.post(GENERATIONS, content=b"x" * (1 << 20) + b"x", headers=KEY))
    assert error_of(answer) == (413, "body_too_large")


def test_a_request_whose_client_has_left_must_be_there_for_its_second_try(front):
    """What the key is for: the connection breaks, the images are made all the same."""
    front.scheduler.hold = True

    async def act(client):
        left = {"type": "http.disconnect"}
        inbox = [
            {"type": "http.request", "body": b'{"prompt": "a cat", "size": "16x16"}', "more_body": False},
            left,
            left,
        ]
        sent = []
        scope = {
            "type": "http", "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(),
            "query_string": b"", "headers": [(b"idempotency-key", b"k"), (b"content-type", b"application/json"),
            (b"host", b"zops.test")], "http_version": "1.1", "scheme": "http", "root_path": "",
            "server": ("zops.test", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip

        async def receive():
            return inbox.pop(0)

        async def send(message):
            sent.append(message)

        first = asyncio.ensure_future(front.app(scope, receive, send))
        await until(lambda: front.scheduler.submitted)
        for _ in range(10):
            await asyncio.sleep(0)
        assert front.scheduler.submitted[0].state == "queued"
        front.scheduler.finish(front.scheduler.submitted[0])
        await first
        kind = {"Idempotency-Key": "k", "Content-Type": "application/json"}
        return await client.post(GENERATIONS, content=b'{"prompt": "a cat", "size": "16x16"}', headers=kind)

    answer = drive(front, act)
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
    assert len(front.scheduler.submitted) == 1


# --- bounds


def answer(size: int, status: int = 200) -> Answer:
    return Answer(status, (), b"x" * size)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), st.sampled_from([200, 400, 429, 503])), max_size=40))
def test_what_is_kept_must_stay_within_its_bounds_and_be_counted_right(uses):
    async def act():
        answers = Answers(lambda: 0.0)
        for name, size, status in uses:
            owner = ("", b"%d" % name)
            if answers.find(owner, b"") is None:
                entry = answers.open(owner, b"")
                answers.close(owner, entry, answer(size, status))
            kept = [entry.answer.result() for entry in answers._entries.values()]
            assert answers.size_bytes == sum(len(one.body) for one in kept) <= 100
            assert len(answers) <= 3
            assert all(one.final for one in kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idempotency, "MAX_BYTES", 100)
        patch.setattr(idempotency, "MAX_ENTRIES", 3)
        asyncio.run(act())


def test_an_answer_must_be_forgotten_when_its_time_is_over():
    async def act():
        now = [0.0]
        answers = Answers(lambda: now[0])
        answers.close(("", b"k"), answers.open(("", b"k"), b"f"), answer(9))
        now[0] = idempotency.KEEP_S
        assert answers.find(("", b"k"), b"f") is not None
        now[0] += 1
        assert answers.find(("", b"k"), b"other") is None
        assert (len(answers), answers.size_bytes) == (0, 0)

    asyncio.run(act())


def test_open_keys_must_be_bounded_too(monkeypatch):
    monkeypatch.setattr(idempotency, "MAX_ENTRIES", 2)

    async def act():
        answers = Answers()
        for name in (b"a", b"b"):
            answers.open(("", name), b"")
        with pytest.raises(ApiError) as raised:
            answers.open(("", b"c"), b"")
        assert raised.value.code == "queue_full"

    asyncio.run(act())


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_two_bodies_must_have_one_fingerprint_only_if_they_are_one(first, second):
    scope = {"path": "/a", "headers": [(b"content-type", b"application/json")]}
    assert (fingerprint_of(scope, first) == fingerprint_of(scope, second)) is (first == second)


def test_the_path_and_the_kind_must_count():
    scopes = [
        {"path": path, "headers": [(b"content-type", kind)]}
        for path in ("/a", "/b")
        for kind in (b"application/json", b"text/plain")
    ]
    assert len({fingerprint_of(scope, b"x") for scope in scopes}) == 4

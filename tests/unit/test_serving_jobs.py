"""Jobs: asked for, looked at, waited for, cancelled, forgotten; and never seen by anybody else."""

import asyncio
import io

import pytest

from tests.support.front import Front, loggers, put_back, until
from tests.support.studio import client_of
from zops.serving.errors import ApiError
from zops.serving.jobs import Job, Jobs
from zops.serving.keys import KeyRing
from zops.serving.metrics import Metrics
from zops.spec.keys import add_key

IMAGE = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 1, "seed": 3}
GENERATIONS = "/v1/images/generations"
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(autouse=True)
def _own_log():
    before = loggers()
    yield
    put_back(before)


@pytest.fixture
def front(tmp_path):
    made = Front(tmp_path, log=io.StringIO())
    made.scheduler.hold = True
    return made


def drive(front, act):
    async def run():
        async with client_of(front.app) as client:
            return await asyncio.wait_for(act(client), 10)

    return asyncio.run(run())


async def settled(client, location):
    """Wait for a job's end by polling as clients do."""
    return (await client.get(f"{location}?wait=5")).json()


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_a_job_must_be_told_at_once_and_have_the_images_later(front):
    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        location = asked.headers["location"]
        queued = (await client.get(location)).json()
        making = front.scheduler.submitted[0]
        making.begin(0.0)
        making.parts[0].forwards = making.shape.forwards
        running = (await client.get(location)).json()
        front.scheduler.finish(making)
        return asked, queued, running, await settled(client, location)

    asked, queued, running, done = drive(front, act)
    assert asked.status_code == 202
    assert asked.headers["preference-applied"] == "respond-async"
    assert asked.json() == queued
    assert asked.headers["location"] == f"/v1/jobs/{queued['id']}"
    assert (queued["object"], queued["status"], queued["progress"], queued["result"]) == ("job", "queued", 0.0, None)
    assert queued["request_id"] == asked.headers["x-request-id"]
    assert (running["status"], running["progress"], running["expires_at"]) == ("running", 1.0, None)
    assert (done["status"], done["progress"], done["error"]) == ("succeeded", 1.0, None)
    assert done["result"]["data"][0]["receipt"]["seed"] == 3
    assert 590 <= done["expires_at"] - done["created_at"] <= 610
    assert front.count("zops_jobs_ended_total", status="succeeded") == 1
    assert front.count("zops_jobs") == 0
    assert front.count("zops_job_bytes") > 100


def test_what_is_refused_at_once_must_be_no_job(front):
    async def act(client):
        bad = await client.post(GENERATIONS, json=IMAGE | {"size": "17x17"}, headers=ASYNC)
        front.scheduler.refusal = ApiError("queue_full", "full", retry_after_s=7)
        return bad, await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)

    bad, full = drive(front, act)
    assert error_of(bad) == (400, "invalid_size")
    assert error_of(full) == (429, "queue_full")
    assert full.headers["retry-after"] == "7"


def test_a_job_that_fails_must_say_why(front):
    front.scheduler.hold, front.scheduler.error = False, ApiError("image_invalid", "not a number")

    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        return await settled(client, asked.headers["location"])

    job = drive(front, act)
    assert (job["status"], job["result"], job["error"]["code"]) == ("failed", None, "image_invalid")
    assert job["error"]["request_id"] == job["request_id"]
    assert front.count("zops_refused_total", code="image_invalid") == 1


def test_a_job_must_be_cancelled_and_an_ended_one_stay(front):
    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        location = asked.headers["location"]
        first = await client.post(f"{location}/cancel")
        return first, await client.post(f"{location}/cancel"), await client.get(location)

    first, second, shown = drive(front, act)
    assert [a.status_code for a in (first, second, shown)] == [200, 200, 200]
    assert first.json() == second.json() == shown.json()
    assert (first.json()["status"], first.json()["error"]) == ("cancelled", None)
    assert front.scheduler.submitted[0].state == "cancelled"


def test_a_job_that_succeeded_must_not_be_cancelled_afterwards(front):
    front.scheduler.hold = False

    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        await settled(client, asked.headers["location"])
        return (await client.post(f"{asked.headers['location']}/cancel")).json()["status"]

    assert drive(front, act) == "succeeded"


def test_a_job_that_is_deleted_must_be_stopped_and_gone(front):
    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        location = asked.headers["location"]
        deleted = await client.delete(location)
        return asked, deleted, await client.get(location), await client.delete(location)

    asked, deleted, *gone = drive(front, act)
    assert deleted.json() == {"id": asked.json()["id"], "object": "job", "deleted": True}
    assert [error_of(answer) for answer in gone] == [(404, "job_not_found")] * 2
    assert front.scheduler.submitted[0].state == "cancelled"


def test_a_long_poll_must_end_with_the_job_or_with_its_time(front):
    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        location = asked.headers["location"]
        short = await client.get(f"{location}?wait=0.05")
        long = asyncio.ensure_future(client.get(f"{location}?wait=60"))
        await asyncio.sleep(0)
        front.scheduler.finish(front.scheduler.submitted[0])
        return short.json()["status"], (await long).json()["status"]

    assert drive(front, act) == ("queued", "succeeded")


@pytest.mark.parametrize("wait", ["61", "-1", "nan", "inf", "x", ""])
def test_a_wait_that_is_none_must_be_refused(front, wait):
    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        return await client.get(f"{asked.headers['location']}?wait={wait}")

    answer = drive(front, act)
    assert error_of(answer) == (422, "invalid_type")
    assert answer.json()["error"]["param"] == "wait"


@pytest.mark.parametrize(
    ("prefer", "status"),
    [("respond-async, wait=5", 202), ("wait=5,Respond-Async", 202), ("respond-asynchronously", 200), ("", 200)],
)
def test_only_the_preference_itself_must_make_a_job(front, prefer, status):
    front.scheduler.hold = False
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE, headers={"Prefer": prefer}))
    assert answer.status_code == status


def test_a_stream_must_stay_a_stream_whatever_is_preferred(front):
    front.scheduler.hold = False
    answer = drive(front, lambda client: client.post(GENERATIONS, json=IMAGE | {"stream": True}, headers=ASYNC))
    assert answer.status_code == 200
    assert "image_generation.completed" in answer.text
    assert "preference-applied" not in answer.headers


def test_the_jobs_of_others_must_not_exist(tmp_path):
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "keys.yaml"
    mine, other = ({"Authorization": f"Bearer {add_key(file, name)}"} for name in ("mine", "other"))
    front = Front(tmp_path, KeyRing(file), io.StringIO())
    front.scheduler.hold = True

    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC | mine)
        location = asked.headers["location"]
        stolen = [
            await client.request(method, path, headers=other)
            for method, path in (("GET", location), ("POST", f"{location}/cancel"), ("DELETE", location))
        ]
        return stolen, (await client.get(location, headers=mine)).json()["status"]

    stolen, status = drive(front, act)
    assert [error_of(answer) for answer in stolen] == [(404, "job_not_found")] * 3
    assert status == "queued"


def test_a_job_must_keep_its_place_until_it_ends(tmp_path):
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "keys.yaml"
    headers = {"Authorization": f"Bearer {add_key(file, 'web', max_waiting=1)}"}
    front = Front(tmp_path, KeyRing(file), io.StringIO())
    front.scheduler.hold = True

    async def act(client):
        first = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC | headers)
        second = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC | headers)
        await client.post(f"{first.headers['location']}/cancel", headers=headers)
        third = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC | headers)
        return first.status_code, error_of(second), third.status_code

    assert drive(front, act) == (202, (429, "queue_full"), 202)


def test_a_job_that_breaks_must_be_logged_and_end(front, monkeypatch):
    async def broken(*_arguments):
        raise KeyError("sesame")

    monkeypatch.setattr("zops.serving.studio.Studio.answer", broken)

    async def act(client):
        asked = await client.post(GENERATIONS, json=IMAGE, headers=ASYNC)
        return await settled(client, asked.headers["location"])

    job = drive(front, act)
    assert (job["status"], job["error"]["code"]) == ("failed", "internal_error")
    assert "sesame" not in str(job)
    assert "sesame" in front.log.getvalue()


# --- bounds


class Request:
    """As much of a request as a job needs."""

    class state:  # noqa: N801 - as starlette's
        request_id = "req_1"


class Making:
    """As much of a making as a job needs; never ends by itself."""

    state, progress = "running", 0.5
    cancelled = False

    def cancel(self):
        self.cancelled = True


def ids(jobs: Jobs) -> list[str]:
    return list(jobs._jobs)


async def ended(jobs: Jobs, size: int) -> str:
    """Run one job whose answer has so many bytes."""

    async def answer():
        return b"x" * size, None

    jobs.accept(Request(), Making(), answer, "")
    job: Job = next(reversed(jobs._jobs.values()))
    await job.ended.wait()
    return job.id


async def endless() -> tuple[bytes, None]:
    await asyncio.Event().wait()
    raise AssertionError


def metrics() -> Metrics:
    return Metrics(model="m", revision="r", manifest_digest="d")


def test_results_beyond_the_bytes_must_make_the_oldest_go():
    async def act():
        jobs = Jobs(metrics(), max_bytes=100)
        _first, second, third = [await ended(jobs, 40) for _ in range(3)]
        assert ids(jobs) == [second, third]
        assert jobs.size_bytes == 80
        large = await ended(jobs, 101)
        assert jobs.find(large, "").error["code"] == "result_expired"
        assert jobs.size_bytes == 80

    asyncio.run(act())


def test_jobs_beyond_the_number_must_make_ended_ones_go_and_open_ones_stay():
    async def act():
        jobs = Jobs(metrics(), max_jobs=2)
        jobs.accept(Request(), Making(), endless, "")
        (open_one,) = ids(jobs)
        await ended(jobs, 1)
        jobs.accept(Request(), Making(), endless, "")
        assert len(jobs) == 2
        assert open_one in ids(jobs)
        refused = Making()
        with pytest.raises(ApiError) as raised:
            jobs.accept(Request(), refused, endless, "")
        assert raised.value.code == "queue_full"
        assert refused.cancelled
        for task in list(jobs._tasks):
            task.cancel()
        await asyncio.gather(*jobs._tasks, return_exceptions=True)

    asyncio.run(act())


def test_a_job_must_be_forgotten_when_its_time_is_over():
    async def act():
        jobs = Jobs(metrics(), keep_s=0.01)
        name = await ended(jobs, 40)
        await until(lambda: not jobs.size_bytes)
        with pytest.raises(ApiError):
            jobs.find(name, "")

    asyncio.run(act())

"""The queue and the care for the worker, against a scripted worker at the other end of a real pipe."""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import threading

import pytest

from zops.serving.errors import ApiError
from zops.serving.link import WorkerLink
from zops.serving.messages import (
    Cancel,
    Cancelled,
    Done,
    Entered,
    Failed,
    Job,
    Passed,
    RawImage,
    Ready,
    StartFailed,
)
from zops.serving.metrics import Metrics
from zops.serving.request import Limits
from zops.serving.scheduler import MAX_FAILED_STARTS, Scheduler
from zops.spec import Spec

READY = Ready("cpu", "float32", {"zops": "0", "torch": "0", "diffusers": "0"})


class ScriptedWorker:
    """The worker's end of the pipe: says what the test tells it to, and remembers what it was told."""

    pid = 4711

    def __init__(self):
        self.ours, self.theirs = multiprocessing.Pipe(duplex=True)
        self.alive = True
        self.heard = []
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def link(self):
        return WorkerLink(self, self.ours)

    def say(self, *messages):
        for message in messages:
            self.theirs.send(message)

    def die(self):
        self.alive = False
        # What the kernel does to a dead process's end; closing would leave the listener's read pending.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.theirs.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    kill = die

    def join(self, timeout=None):
        pass

    def is_alive(self):
        return False

    def _listen(self):
        try:
            while True:
                message = self.theirs.recv()
                with self._news:
                    self.heard.append(message)
                    self._news.notify_all()
        except (EOFError, OSError):
            self.alive = False

    async def hear(self, kind, count=1):
        def wait():
            with self._news:
                assert self._news.wait_for(lambda: len(self._of(kind)) >= count, 5), f"never heard {count} {kind}"
                return self._of(kind)[count - 1]

        return await asyncio.to_thread(wait)

    def _of(self, kind):
        return [message for message in self.heard if isinstance(message, kind)]


class Bench:
    """A scheduler whose workers are all scripted."""

    def __init__(self, **serve):
        self.workers = []
        self.events = []
        self.limits = Limits.of(Spec.model_validate({"serve": serve}))
        self.metrics = Metrics(model="m", revision="r", manifest_digest="d")
        self.scheduler = Scheduler(
            self._start, self.limits, self.metrics, report=self.events.append, cancel_grace_s=0.2
        )

    def _start(self):
        self.workers.append(ScriptedWorker())
        return self.workers[-1].link()

    @property
    def worker(self):
        return self.workers[-1]

    async def started(self, count):
        await until(lambda: len(self.workers) == count)

    async def ready(self):
        self.worker.say(READY)
        await until(lambda: self.scheduler.ready)

    def ask(self, name):
        return asyncio.ensure_future(self.scheduler.generate(job(name)))


def job(name):
    return Job(name, "a cat", 64, 64, (1,), 8, 0.0)


def done(name):
    return Done(name, (RawImage(64, 64, 1, b""),), 5, 0.1)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the conditions are of many kinds, and none has an event
            await asyncio.sleep(0.002)


async def refused(call):
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value


def run(scenario, **serve):
    async def whole():
        bench = Bench(**serve)
        bench.scheduler.begin()
        try:
            async with asyncio.timeout(20):
                await scenario(bench)
        finally:
            bench.scheduler.close()

    asyncio.run(whole())


def test_a_request_before_the_warm_up_must_be_refused_with_the_phase():
    async def scenario(bench):
        bench.worker.say(Entered("imports"), Passed("imports", 1.5), Entered("load"))
        await until(lambda: bench.scheduler.status.phase == "load")
        error = await refused(bench.ask("a"))
        assert (error.code, error.status) == ("not_ready", 503)
        assert "load" in error.message
        assert int(error.headers()["Retry-After"]) >= 1
        assert bench.scheduler.snapshot()["phases"]["imports"] == 1.5

    run(scenario)


def test_one_job_at_a_time_must_be_with_the_worker_in_order_of_arrival():
    async def scenario(bench):
        await bench.ready()
        asked = [bench.ask(name) for name in "abc"]
        await bench.worker.hear(Job)
        assert (bench.scheduler.running, bench.scheduler.waiting) == (1, 2)
        for count, name in enumerate("abc", start=1):
            assert (await bench.worker.hear(Job, count)).id == name
            assert len([m for m in bench.worker.heard if isinstance(m, Job)]) == count
            bench.worker.say(done(name))
            assert (await asked[count - 1]).done.id == name

    run(scenario)


def test_one_more_than_may_wait_must_get_429_with_the_time_to_come_back():
    async def scenario(bench):
        await bench.ready()
        asked = [bench.ask(str(number)) for number in range(3)]
        await bench.worker.hear(Job)
        error = await refused(bench.ask("too-many"))
        assert (error.code, error.status) == ("queue_full", 429)
        assert "2" in error.message
        assert 1 <= int(error.headers()["Retry-After"]) <= 10
        for count, call in enumerate(asked, start=1):
            await bench.worker.hear(Job, count)
            bench.worker.say(done(str(count - 1)))
            await call

    run(scenario, max_queue=2)


def test_a_waiting_request_past_its_deadline_must_get_504_and_never_reach_the_worker():
    async def scenario(bench):
        await bench.ready()
        bench.ask("first").add_done_callback(lambda call: call.exception())
        error = await refused(bench.ask("second"))
        assert (error.code, error.status) == ("deadline_exceeded", 504)
        bench.worker.say(Cancelled("first"))
        await until(lambda: bench.scheduler.running == 0)
        assert [m.id for m in bench.worker.heard if isinstance(m, Job)] == ["first"]

    run(scenario, request_timeout_s=0.1)


def test_a_running_request_past_its_deadline_must_be_cancelled_between_forwards():
    async def scenario(bench):
        await bench.ready()
        error = await refused(bench.ask("slow"))
        assert error.code == "deadline_exceeded"
        assert (await bench.worker.hear(Cancel)).id == "slow"
        bench.worker.say(Cancelled("slow"))
        await until(lambda: bench.scheduler.running == 0)
        assert len(bench.workers) == 1

    run(scenario, request_timeout_s=0.1)


def test_a_worker_that_ignores_the_cancellation_must_be_killed_and_replaced():
    async def scenario(bench):
        await bench.ready()
        hung = bench.worker
        await refused(bench.ask("hung"))
        await until(lambda: len(bench.workers) == 2)
        assert not hung.alive
        assert bench.scheduler.status.restarts == 1
        assert not bench.scheduler.ready
        assert 'zops_worker_restarts_total{reason="hung"} 1.0' in bench.metrics.render()[0].decode()
        await bench.ready()
        asked = bench.ask("next")
        await bench.worker.hear(Job)
        bench.worker.say(done("next"))
        await asked

    run(scenario, request_timeout_s=0.5)


def test_a_client_that_goes_away_must_free_the_worker():
    async def scenario(bench):
        await bench.ready()
        gone, kept = bench.ask("gone"), bench.ask("kept")
        await bench.worker.hear(Job)
        gone.cancel()
        assert (await bench.worker.hear(Cancel)).id == "gone"
        bench.worker.say(Cancelled("gone"))
        assert (await bench.worker.hear(Job, 2)).id == "kept"
        bench.worker.say(done("kept"))
        await kept

    run(scenario)


def test_a_dead_worker_must_cost_the_running_request_503_and_the_waiting_one_nothing():
    async def scenario(bench):
        await bench.ready()
        running, waiting = bench.ask("running"), bench.ask("waiting")
        await bench.worker.hear(Job)
        bench.worker.die()
        error = await refused(running)
        assert (error.code, error.status) == ("worker_lost", 503)
        assert not bench.scheduler.ready
        assert bench.scheduler.snapshot()["phase"] == "restarting"
        await until(lambda: len(bench.workers) == 2)
        await bench.ready()
        assert (await bench.worker.hear(Job)).id == "waiting"
        bench.worker.say(done("waiting"))
        await waiting

    run(scenario)


def test_a_failed_job_must_answer_with_the_workers_code_and_keep_the_worker():
    async def scenario(bench):
        await bench.ready()
        asked = bench.ask("a")
        await bench.worker.hear(Job)
        bench.worker.say(Failed("a", "prompt_too_long", "the prompt has 600 tokens", "prompt"))
        error = await refused(asked)
        assert (error.status, error.param) == (400, "prompt")
        assert bench.scheduler.ready

    run(scenario)


def test_an_answer_to_a_forgotten_job_must_not_answer_another_one():
    async def scenario(bench):
        await bench.ready()
        asked = bench.ask("b")
        await bench.worker.hear(Job)
        bench.worker.say(done("a"), Failed("a", "generation_failed", ""), Cancelled("a"), done("b"))
        assert (await asked).done.id == "b"

    run(scenario)


def test_draining_must_finish_the_running_request_and_refuse_all_others():
    async def scenario(bench):
        await bench.ready()
        running, waiting = bench.ask("running"), bench.ask("waiting")
        await bench.worker.hear(Job)
        bench.scheduler.drain()
        assert not bench.scheduler.ready
        for call in (waiting, bench.ask("late")):
            error = await refused(call)
            assert (error.code, error.status) == ("draining", 503)
            assert "Retry-After" in error.headers()
        drained = asyncio.ensure_future(bench.scheduler.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        bench.worker.say(done("running"))
        await running
        await drained

    run(scenario)


def test_draining_with_a_dead_worker_must_end():
    async def scenario(bench):
        await bench.ready()
        running = bench.ask("running")
        await bench.worker.hear(Job)
        bench.scheduler.drain()
        bench.worker.die()
        assert (await refused(running)).code == "worker_lost"
        await bench.scheduler.drained()
        assert len(bench.workers) == 1

    run(scenario)


def test_a_worker_that_is_never_ready_must_be_killed_after_the_start_timeout():
    async def scenario(bench):
        first = bench.worker
        first.say(Entered("load"))
        await until(lambda: not first.alive)
        await until(lambda: bench.scheduler.status.phase == "failed")
        assert "load" in bench.scheduler.status.reason

    run(scenario, startup_timeout_s=0.2)


def test_starts_that_always_fail_must_make_the_server_give_up_with_the_reason(monkeypatch):
    monkeypatch.setattr("zops.serving.scheduler.BACKOFF_FIRST_S", 0.01)

    async def scenario(bench):
        for attempt in range(1, MAX_FAILED_STARTS + 1):
            await bench.started(attempt)
            bench.worker.say(StartFailed("the warm-up image is black"))
            bench.worker.die()
        error = await bench.scheduler.gave_up
        assert (error.code, error.exit_status) == ("worker-start-failed", 1)
        assert "black" in error.message
        assert len(bench.workers) == MAX_FAILED_STARTS

    run(scenario)


def test_a_good_start_must_forgive_the_failed_ones(monkeypatch):
    monkeypatch.setattr("zops.serving.scheduler.BACKOFF_FIRST_S", 0.01)

    async def scenario(bench):
        for attempt in range(1, 2 * MAX_FAILED_STARTS):
            await bench.started(attempt)
            if attempt % 2 == 0:
                await bench.ready()
            bench.worker.die()
        await until(lambda: len(bench.workers) == 2 * MAX_FAILED_STARTS)
        assert not bench.scheduler.gave_up.done()

    run(scenario)


def test_the_gauges_must_follow_the_queue():
    async def scenario(bench):
        def gauges():
            lines = bench.metrics.render()[0].decode().splitlines()
            return [
                next(float(x.split()[1]) for x in lines if x.startswith(f"zops_{n} "))
                for n in ("ready", "running", "waiting")
            ]

        assert gauges() == [0, 0, 0]
        await bench.ready()
        first, second = bench.ask("a"), bench.ask("b")
        await bench.worker.hear(Job)
        assert gauges() == [1, 1, 1]
        bench.worker.say(done("a"), done("b"))
        await first
        await bench.worker.hear(Job, 2)
        bench.worker.say(done("b"))
        await second
        assert gauges() == [1, 0, 0]

    run(scenario)

"""What /readyz tells of the queue: how long the oldest waits, and since when nothing was done; in virtual time."""

import asyncio

from tests.support.scheduling import made, run, settle
from zops.serving.messages import Beat


def test_an_empty_queue_must_neither_wait_nor_be_idle():
    async def scenario(bench):
        await bench.ready()
        await asyncio.sleep(1000)
        queue = bench.scheduler.queue_facts()
        assert (queue["oldest_s"], queue["idle_s"], queue["made"]) == (None, None, 0)

    run(scenario)


def test_the_oldest_waiting_request_must_tell_its_age():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a")
        await asyncio.sleep(2)
        bench.ask("b")
        await asyncio.sleep(3)
        bench.ask("c")
        await asyncio.sleep(4)
        queue = bench.scheduler.queue_facts()
        assert (queue["waiting"], queue["running"], queue["oldest_s"]) == (2, 1, 7)

    run(scenario)


def test_time_without_work_must_not_count_as_standing_still():
    async def scenario(bench):
        await bench.ready()
        await asyncio.sleep(1000)
        bench.ask("a")
        await asyncio.sleep(2)
        assert bench.scheduler.queue_facts()["idle_s"] == 2

    run(scenario)


def test_forwards_and_pictures_must_count_as_progress_and_signs_of_life_must_not():
    async def scenario(bench):
        def idle_s():
            return bench.scheduler.queue_facts()["idle_s"]

        await bench.ready()
        bench.ask("ab")
        batch = bench.worker.batch.id
        await asyncio.sleep(3)
        bench.worker.say(Beat(batch, 0))
        await settle()
        assert idle_s() == 3
        bench.worker.say(Beat(batch, 1))
        await settle()
        assert idle_s() == 0
        await asyncio.sleep(3)
        bench.worker.say(Beat(batch, 1))
        await settle()
        assert idle_s() == 3
        bench.worker.say(made("a"))
        await settle()
        assert idle_s() == 0
        assert bench.scheduler.queue_facts()["made"] == 1

    run(scenario, max_batch=2)


def test_the_metrics_must_tell_the_same():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a")
        bench.ask("b")
        await asyncio.sleep(5)
        bench.metrics.tell_queue(bench.scheduler.queue_facts())
        assert bench.metric("zops_oldest_waiting_seconds") == 5
        assert bench.metric("zops_idle_seconds") == 5

    run(scenario)

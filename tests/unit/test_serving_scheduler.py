"""The queue in front of the workers, against scripted ones in virtual time."""

import asyncio
from dataclasses import replace

import pytest

from tests.support.scheduling import CPU, GPU, made, run, settle
from zops.events import Warned
from zops.serving.errors import ApiError
from zops.serving.messages import Beat, Cancelled, Entered, Failed, Free, Passed, Preview


async def refused(making):
    with pytest.raises(ApiError) as caught:
        await making.outcome()
    return caught.value


def refused_at_once(call):
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value


def test_a_request_before_the_warm_up_must_be_refused_with_the_phase():
    async def scenario(bench):
        bench.worker.say(Entered("imports"), Passed("imports", 1.5), Entered("read"))
        await settle()
        error = refused_at_once(lambda: bench.ask("a"))
        assert (error.code, error.status) == ("not_ready", 503)
        assert "read" in error.message
        assert int(error.headers()["Retry-After"]) >= 1
        state = bench.scheduler.snapshot()
        assert (state["phase"], state["phases"]["imports"]) == ("read", 1.5)

    run(scenario)


def test_requests_must_be_made_in_order_of_arrival():
    async def scenario(bench):
        await bench.ready()
        asked = [bench.ask(name) for name in "abc"]
        assert [each.state for each in asked] == ["running", "queued", "queued"]
        assert (bench.scheduler.running, bench.scheduler.waiting) == (1, 2)
        for count, making in enumerate(asked, start=1):
            assert bench.worker.batches == list("abc")[:count]
            bench.worker.finish()
            assert [each.picture for each in (await making.outcome()).made] == ["abc"[count - 1]]
            assert making.state == "succeeded"
            await settle()

    run(scenario)


def test_the_time_in_the_queue_must_be_told():
    async def scenario(bench):
        await bench.ready()
        first, second = bench.ask("a"), bench.ask("b")
        await asyncio.sleep(3)
        bench.worker.finish()
        assert (await first.outcome()).queue_s == 0
        await settle()
        bench.worker.finish()
        assert (await second.outcome()).queue_s == pytest.approx(3, abs=0.01)
        assert bench.metric("zops_phase_seconds_count", phase="queue") == 2
        assert bench.metric("zops_phase_seconds_sum", phase="denoise") == pytest.approx(1.4)

    run(scenario)


def test_one_more_than_may_wait_must_get_429_with_the_time_to_come_back():
    async def scenario(bench):
        await bench.ready()
        for _ in range(30):  # until the measured time is that of these pictures, not the guess of the start
            bench.ask("x")
            await asyncio.sleep(10)
            bench.worker.finish()
            await settle()
        for number in range(3):
            bench.ask(str(number))
        error = refused_at_once(lambda: bench.ask("n"))
        assert (error.code, error.status) == ("queue_full", 429)
        assert "2" in error.message
        assert int(error.headers()["Retry-After"]) == pytest.approx(30, abs=1)

    run(scenario, max_queue=2)


def test_two_workers_must_halve_the_time_to_come_back():
    async def scenario(bench):
        await bench.ready()
        for number in range(4):
            bench.ask(str(number))
        error = refused_at_once(lambda: bench.ask("n"))
        assert error.retry_after_s == pytest.approx(1.5)

    run(scenario, max_queue=2, workers=2)


def test_a_waiting_request_past_its_deadline_must_get_504_and_never_reach_a_worker():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a")
        await asyncio.sleep(1)
        waiting = bench.ask("b")
        error = await refused(waiting)
        assert (error.code, error.status, waiting.state) == ("deadline_exceeded", 504, "failed")
        assert bench.now == pytest.approx(11)
        bench.worker.obey()
        await settle()
        assert bench.worker.batches == ["a"]
        assert (bench.scheduler.running, bench.scheduler.waiting) == (0, 0)

    run(scenario, request_timeout_s=10)


def test_a_running_request_past_its_deadline_must_be_cancelled_between_forwards():
    async def scenario(bench):
        await bench.ready()
        error = await refused(bench.ask("a"))
        assert error.code == "deadline_exceeded"
        assert bench.worker.cancelled == ["a"]
        bench.worker.obey()
        await asyncio.sleep(60)
        assert bench.scheduler.ready
        assert len(bench.links) == 1

    run(scenario, request_timeout_s=10)


def test_the_pictures_of_a_request_must_be_spread_over_the_idle_workers():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("abc")
        assert [link.batches for link in bench.links] == [["a"], ["b"]]
        bench.links[1].finish()
        await settle()
        assert [link.batches for link in bench.links] == [["a"], ["b", "c"]]
        bench.links[1].finish()
        bench.links[0].finish()
        outcome = await making.outcome()
        assert [each.picture for each in outcome.made] == list("abc")
        assert outcome.workers == (0, 1, 1)

    run(scenario, workers=2)


def test_an_idle_worker_must_get_the_picture_before_one_that_was_busy_just_now():
    async def scenario(bench):
        await bench.ready()
        for name, index in (("a", 0), ("b", 1), ("c", 2), ("d", 0)):
            bench.ask(name)
            assert bench.links[index].batches[-1] == name
            await asyncio.sleep(1)
            bench.links[index].finish()
            await settle()

    run(scenario, workers=3)


def test_a_cancelled_request_must_free_the_worker_for_the_next_one():
    async def scenario(bench):
        await bench.ready()
        gone, kept = bench.ask("a"), bench.ask("b")
        gone.cancel()
        assert (gone.state, bench.worker.cancelled) == ("cancelled", ["a"])
        assert (await refused(gone)).code == "cancelled"
        bench.worker.obey()
        await settle()
        assert bench.worker.batches == ["a", "b"]
        bench.worker.finish()
        await kept.outcome()
        kept.cancel()
        assert kept.state == "succeeded"

    run(scenario)


def test_who_stops_waiting_must_not_stop_the_making():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        waiting = asyncio.ensure_future(making.outcome())
        await settle()
        waiting.cancel()
        await settle()
        assert bench.worker.cancelled == []
        bench.worker.finish()
        assert len((await making.outcome()).made) == 1

    run(scenario)


def test_progress_must_follow_the_forwards():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("ab")
        assert making.progress == 0
        bench.worker.say(Beat(bench.worker.batch.id, 4))
        await settle()
        assert making.progress == pytest.approx(0.25)
        assert bench.scheduler.snapshot()["workers"][0]["forwards"] == 4
        bench.worker.finish()
        await settle()
        assert making.progress == pytest.approx(0.5)
        bench.worker.finish()
        await settle()
        assert making.progress == 1

    run(scenario)


def test_the_progress_of_an_edit_must_count_the_forwards_that_it_runs():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a", mode="edit", strength=0.5)
        bench.worker.say(Beat(bench.worker.batch.id, 2))
        await settle()
        assert making.progress == pytest.approx(0.5)

    run(scenario)


def test_events_must_come_in_order_to_everybody_who_asks_also_late():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        early = asyncio.ensure_future(collect(making))
        await settle()
        previews = [Preview("a", index, 8, 8, b"") for index in range(2)]
        bench.worker.say(*previews, made("a"), Free(1))
        assert await early == [*previews, made("a")]
        assert await collect(making) == [*previews, made("a")]

    async def collect(making):
        return [event async for event in making.events()]

    run(scenario)


def test_events_must_end_with_the_error_of_the_making():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        preview = Preview("a", 0, 8, 8, b"")
        bench.worker.say(preview, Failed("a", "out_of_memory", "too much"), Free(1))
        events = making.events()
        assert await anext(events) == preview
        with pytest.raises(ApiError) as caught:
            await anext(events)
        assert caught.value.code == "out_of_memory"

    run(scenario)


def test_a_failed_picture_must_fail_its_request_with_the_workers_code_and_keep_the_worker():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("ab")
        bench.worker.say(Failed("a", "prompt_too_long", "the prompt has 600 tokens", "prompt"), Free(1))
        error = await refused(making)
        assert (error.status, error.param) == (400, "prompt")
        await settle()
        assert bench.worker.batches == ["a"], "the other picture is for nobody"
        assert bench.scheduler.ready

    run(scenario)


def test_an_answer_to_a_forgotten_picture_must_not_answer_another_one():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("b")
        bench.worker.say(made("a"), Failed("a", "generation_failed", ""), Cancelled("a"), Free(99))
        await settle()
        assert making.state == "running"
        bench.worker.finish()
        assert (await making.outcome()).made[0].picture == "b"

    run(scenario)


def test_a_picture_that_its_worker_forgot_must_be_made_again():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        bench.worker.say(Free(1))
        await settle()
        assert bench.worker.batches == ["a", "a"]
        bench.worker.finish()
        assert (await making.outcome()).retries == 1

    run(scenario)


def test_draining_must_finish_what_has_begun_and_refuse_all_others():
    async def scenario(bench):
        await bench.ready()
        begun, waiting = bench.ask("ab"), bench.ask("c")
        bench.scheduler.drain()
        assert not bench.scheduler.ready
        assert bench.scheduler.snapshot()["phase"] == "draining"
        for error in (await refused(waiting), refused_at_once(lambda: bench.ask("d"))):
            assert (error.code, error.status) == ("draining", 503)
            assert "Retry-After" in error.headers()
        drained = asyncio.ensure_future(bench.scheduler.drained())
        bench.worker.finish()
        await settle()
        assert bench.worker.batches == ["a", "b"]
        assert not drained.done()
        bench.worker.finish()
        await begun.outcome()
        await drained

    run(scenario)


def test_draining_must_end_when_the_last_worker_dies():
    async def scenario(bench):
        await bench.ready()
        begun = bench.ask("ab")
        bench.scheduler.drain()
        bench.worker.die()
        assert (await refused(begun)).code == "worker_lost"
        await bench.scheduler.drained()
        await asyncio.sleep(60)
        assert len(bench.links) == 1

    run(scenario)


def test_draining_must_let_another_worker_finish_what_a_lost_one_had():
    async def scenario(bench):
        await bench.ready()
        begun = bench.ask("a")
        bench.scheduler.drain()
        bench.links[0].die()
        await settle()
        bench.links[1].finish()
        assert (await begun.outcome()).workers == (1,)
        await bench.scheduler.drained()

    run(scenario, workers=2)


def test_the_gauges_must_follow_the_queue():
    async def scenario(bench):
        def gauges():
            return [bench.metric(f"zops_{name}") for name in ("ready", "workers_ready", "running", "waiting")]

        await settle()
        assert gauges() == [0, 0, 0, 0]
        await bench.ready()
        bench.ask("a"), bench.ask("b")
        assert gauges() == [1, 1, 1, 1]
        bench.worker.finish()
        await settle()
        assert gauges() == [1, 1, 1, 0]
        bench.worker.finish()
        await settle()
        assert gauges() == [1, 1, 0, 0]
        assert bench.metric("zops_gpu_memory_used_bytes", worker="0", card="0") == 10
        bench.worker.say(Beat(None, 0, ((10, 100), (20, 200))))
        await settle()
        assert bench.metric("zops_gpu_memory_used_bytes", worker="0", card="1") == 20
        [worker] = bench.scheduler.snapshot()["workers"]
        assert (worker["memory_used"], worker["memory_total"]) == (30, 300)
        assert worker["cards"][1] == {"memory_used": 20, "memory_total": 200}
        bench.worker.die()
        await settle()
        assert gauges() == [0, 0, 0, 0]

    run(scenario)


def test_the_facts_must_be_those_of_a_ready_worker_and_the_memory_the_least():
    async def scenario(bench):
        assert (bench.scheduler.facts, bench.scheduler.memory_left()) == (None, None)
        bench.links[1].become_ready(replace(GPU, memory_free=500))
        await settle()
        assert bench.scheduler.facts.device == "NVIDIA H200"
        bench.links[0].become_ready(replace(GPU, memory_free=300))
        await settle()
        assert bench.scheduler.memory_left() == 300
        bench.links[0].die()
        await settle()
        assert bench.scheduler.memory_left() == 500
        bench.links[1].die()
        await settle()
        assert (bench.scheduler.facts.device, bench.scheduler.memory_left()) == ("NVIDIA H200", None)

    run(scenario, workers=2)


def test_a_cpu_in_place_of_a_gpu_must_be_warned_of():
    async def scenario(bench):
        bench.scheduler._wants_gpu = True
        await bench.ready(CPU)
        assert any(isinstance(event, Warned) and "no GPU" in event.text for event in bench.events)

    run(scenario)

"""The care for workers: lost, hung, stopped, wedged or unable to start; against scripted ones in virtual time."""

import asyncio

import pytest

from tests.support.scheduling import CPU, GPU, made, run, settle
from zops.events import Warned
from zops.serving.errors import ApiError
from zops.serving.life import Patience
from zops.serving.messages import Beat, Entered, Free, Made, Preview, StartFailed


async def refused(making):
    with pytest.raises(ApiError) as caught:
        await making.outcome()
    return caught.value


def restarts(bench, reason):
    return bench.metric("zops_worker_restarts_total", reason=reason) or 0


def test_the_server_must_be_ready_with_its_first_worker_and_tell_of_the_others():
    async def scenario(bench):
        bench.links[0].say(Entered("imports"))
        bench.links[1].become_ready()
        await settle()
        state = bench.scheduler.snapshot()
        assert (bench.scheduler.ready, state["phase"]) == (True, "ready")
        assert [worker["phase"] for worker in state["workers"]] == ["imports", "ready"]
        assert [worker["pid"] for worker in state["workers"]] == [1000, 1001]
        making = bench.ask("a")
        assert bench.links[0].batches == []
        bench.links[1].finish()
        await making.outcome()

    run(scenario, workers=2)


def test_what_a_dead_worker_had_must_be_made_by_another_one():
    async def scenario(bench):
        await bench.ready()
        making, other = bench.ask("a"), bench.ask("b")
        bench.links[0].die()
        await settle()
        assert bench.scheduler.ready
        assert making.state == "running"
        bench.links[1].finish()
        await settle()
        assert bench.links[1].batches == ["b", "a"]
        bench.links[1].finish()
        outcome = await making.outcome()
        assert (outcome.retries, outcome.workers) == (1, (1,))
        assert (await other.outcome()).retries == 0
        assert restarts(bench, "died") == 1
        assert bench.metric("zops_retried_total") == 1
        assert bench.scheduler.snapshot()["workers"][0]["reason"] == "its process was ended by SIGSEGV in phase ready"

    run(scenario, workers=2)


def test_what_the_only_worker_had_must_be_made_by_its_successor_before_what_waits():
    async def scenario(bench):
        await bench.ready()
        lost, waiting = bench.ask("a"), bench.ask("b")
        bench.worker.die()
        await settle()
        assert (bench.scheduler.ready, bench.scheduler.snapshot()["phase"]) == (False, "restarting")
        await asyncio.sleep(0.6)
        assert len(bench.links) == 2
        await bench.ready()
        for making in (lost, waiting):
            bench.worker.finish()
            await making.outcome()
            await settle()
        assert bench.worker.batches == ["a", "b"]

    run(scenario)


def test_a_picture_must_be_lost_with_two_workers_at_most():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        bench.links[0].die()
        await settle()
        bench.links[1].die()
        error = await refused(making)
        assert (error.code, error.status) == ("worker_lost", 503)
        assert "Retry-After" in error.headers()
        assert bench.links[2].batches == []

    run(scenario, workers=3)


def test_a_picture_that_ends_workers_must_take_no_other_one_with_it_twice():
    async def scenario(bench):
        await bench.ready()
        bench.ask("0")
        poison, innocent = bench.ask("p"), bench.ask("i")
        await asyncio.sleep(1)
        bench.worker.finish()
        await settle()
        assert bench.worker.batches[-1] == "pi"
        bench.worker.die()
        await asyncio.sleep(1)
        await bench.ready()
        assert bench.worker.batches == ["p"]
        bench.worker.die()
        assert (await refused(poison)).code == "worker_lost"
        await asyncio.sleep(2)
        await bench.ready()
        assert bench.worker.batches == ["i"]
        bench.worker.finish()
        assert (await innocent.outcome()).retries == 1

    run(scenario, max_batch=4)


def test_pictures_that_were_finished_before_the_loss_must_be_kept():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("ab")
        bench.worker.say(made("a"))
        await settle()
        bench.worker.die()
        await asyncio.sleep(1)
        await bench.ready()
        assert bench.worker.batches == ["b"]
        bench.worker.finish()
        assert [each.picture for each in (await making.outcome()).made] == ["a", "b"]

    run(scenario, max_batch=4)


def test_previews_of_a_second_try_must_not_be_shown_twice():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        bench.worker.say(Preview("a", 0, 8, 8, b""))
        await settle()
        bench.worker.die()
        await asyncio.sleep(1)
        await bench.ready()
        bench.worker.say(Preview("a", 0, 8, 8, b""), Preview("a", 1, 8, 8, b""))
        bench.worker.finish()
        events = [event async for event in making.events()]
        assert [event.index for event in events if isinstance(event, Preview)] == [0, 1]
        assert isinstance(events[-1], Made)

    run(scenario)


def test_a_cancelled_picture_of_a_lost_worker_must_not_be_made_again():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        making.cancel()
        bench.links[0].die()
        await settle()
        assert bench.links[1].batches == []

    run(scenario, workers=2)


def test_a_worker_that_gives_no_sign_of_life_must_be_replaced_after_five_seconds():
    async def scenario(bench):
        await bench.ready()
        await asyncio.sleep(3.3)
        making = bench.ask("a")
        bench.links[0].stop()
        await asyncio.sleep(4.4)
        assert bench.links[0].alive
        await asyncio.sleep(0.7)
        assert not bench.links[0].alive
        bench.links[1].finish()
        assert (await making.outcome()).retries == 1
        assert restarts(bench, "silent") == 1
        assert "no sign of life for 5 s" in bench.scheduler.snapshot()["workers"][0]["reason"]

    run(scenario, workers=2)


def test_an_idle_worker_that_is_stopped_must_be_replaced_as_well():
    async def scenario(bench):
        await bench.ready()
        bench.worker.stop()
        await asyncio.sleep(6)
        assert restarts(bench, "silent") == 1

    run(scenario)


def test_a_server_that_was_itself_held_up_must_not_blame_its_workers():
    async def scenario(bench):
        await bench.ready()
        asyncio.get_running_loop().hold_up(20)
        await asyncio.sleep(10)
        assert len(bench.links) == 1

    run(scenario)


def test_a_slow_start_without_signs_of_life_must_be_given_a_minute():
    async def scenario(bench):
        bench.worker.say(Beat(None, 0))
        await asyncio.sleep(59)
        assert bench.worker.alive
        await asyncio.sleep(2)
        assert not bench.links[0].alive
        assert restarts(bench, "silent") == 1

    run(scenario)


def test_a_gpu_that_makes_no_forward_must_be_given_up_though_its_process_lives():
    async def scenario(bench):
        await bench.ready(GPU)
        making = bench.ask("a")
        for forwards in range(3):
            bench.links[0].say(Beat(1, forwards))
            await asyncio.sleep(50)
        assert bench.links[0].alive, "each forward starts the time anew"
        await asyncio.sleep(11)
        assert not bench.links[0].alive
        assert restarts(bench, "stalled") == 1
        bench.links[1].finish()
        await making.outcome()

    run(scenario, workers=2, request_timeout_s=600)


def test_a_cpu_may_take_its_time_for_a_forward():
    async def scenario(bench):
        await bench.ready(CPU)
        bench.ask("a")
        await asyncio.sleep(500)
        assert len(bench.links) == 1

    run(scenario, request_timeout_s=600)


def test_a_worker_that_ignores_the_cancellation_must_be_killed_and_replaced():
    async def scenario(bench):
        await bench.ready()
        assert (await refused(bench.ask("a"))).code == "deadline_exceeded"
        await asyncio.sleep(4.9)
        assert bench.worker.alive
        await asyncio.sleep(0.2)
        assert not bench.worker.alive
        assert restarts(bench, "hung") == 1
        await asyncio.sleep(1)
        await bench.ready()
        making = bench.ask("b")
        bench.worker.finish()
        await making.outcome()

    run(scenario, request_timeout_s=10)


def test_a_worker_that_answered_in_time_must_not_be_killed_for_what_it_had():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a")
        bench.worker.finish()
        await asyncio.sleep(60)
        assert len(bench.links) == 1

    run(scenario, request_timeout_s=10)


def test_a_worker_that_is_never_ready_must_be_killed_after_the_start_timeout():
    async def scenario(bench):
        bench.worker.say(Entered("read"))
        await asyncio.sleep(101)
        assert not bench.links[0].alive
        assert bench.scheduler.snapshot()["phase"] in {"failed", "starting"}
        assert restarts(bench, "start-timeout") == 1
        assert any(isinstance(event, Warned) and "phase read" in event.text for event in bench.events)

    run(scenario, startup_timeout_s=100)


def test_a_second_death_in_a_row_must_double_the_pause_and_a_picture_must_forgive():
    async def scenario(bench):
        pauses = []
        for loss in range(4):
            await bench.ready()
            if loss == 3:
                bench.ask("a")
                bench.worker.finish()
                await settle()
            bench.worker.die()
            died = bench.now
            await asyncio.sleep(10)
            pauses.append(bench.worker.began - died)
        assert pauses == pytest.approx([0.5, 1, 2, 0.5])

    run(scenario)


def test_starts_that_always_fail_must_make_the_server_give_up_with_the_reason():
    async def scenario(bench):
        for _ in range(3):
            bench.worker.say(StartFailed("the warm-up image is black"))
            await settle()
            bench.worker.die()
            await asyncio.sleep(10)
        error = await bench.scheduler.gave_up
        assert (error.code, error.exit_status) == ("worker-start-failed", 1)
        assert "black" in error.message
        assert bench.scheduler.snapshot()["phase"] == "failed"
        assert len(bench.links) == 3

    run(scenario)


def test_a_pause_before_a_start_must_not_outlive_the_drain():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        bench.worker.die()
        await settle()
        bench.scheduler.drain()
        assert (await refused(making)).code == "worker_lost"
        await bench.scheduler.drained()
        await asyncio.sleep(60)
        assert len(bench.links) == 1

    run(scenario)


def test_one_worker_that_starts_must_keep_the_server_from_giving_up():
    async def scenario(bench):
        bench.links[0].become_ready()
        for _ in range(6):
            bench.worker.say(StartFailed("the GPU is lost"))
            await settle()
            bench.worker.die()
            await asyncio.sleep(60)
        assert not bench.scheduler.gave_up.done()
        assert bench.scheduler.ready
        workers = bench.scheduler.snapshot()["workers"]
        assert [worker["restarts"] for worker in workers] == [0, 6]

    run(scenario, workers=2)


def test_a_good_start_must_forgive_the_failed_ones():
    async def scenario(bench):
        for attempt in range(6):
            if attempt % 3 == 2:
                await bench.ready()
            bench.worker.die()
            await asyncio.sleep(60)
        assert not bench.scheduler.gave_up.done()

    run(scenario)


def test_what_waits_when_the_server_gives_up_must_be_answered():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("ab")
        bench.worker.die()
        for _ in range(3):
            await asyncio.sleep(5)
            bench.worker.die()
        await bench.scheduler.gave_up
        bench.scheduler.drain()
        await bench.scheduler.drained()
        assert (await refused(making)).code == "worker_lost"

    run(scenario, patience=Patience(pause_s=0.1))


def test_an_answer_after_the_loss_must_mean_nothing():
    async def scenario(bench):
        await bench.ready()
        making = bench.ask("a")
        late = bench.worker
        late.die()
        await settle()
        late.say(made("a"), Free(1))
        await settle()
        assert making.state == "running"

    run(scenario)

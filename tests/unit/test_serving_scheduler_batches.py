"""What is made together and in which turn, by scripted workers in virtual time."""

import asyncio
from dataclasses import replace

from tests.support.scheduling import GPU, run, settle
from zops.serving.messages import Made


def test_a_lone_picture_must_wait_for_no_other_one():
    async def scenario(bench):
        await bench.ready(GPU)
        for name in "abc":
            making = bench.ask(name)
            assert bench.worker.batches[-1] == name, "it was not given at once"
            bench.worker.finish()
            await making.outcome()
            await settle()

    run(scenario)


def test_what_waits_with_the_same_shape_must_be_made_together_up_to_the_limit():
    async def scenario(bench):
        await bench.ready()
        first, others = bench.ask("a"), [bench.ask(name) for name in "bcd"]
        other_shape = bench.ask("x", width=128)
        last = bench.ask("ef")
        await asyncio.sleep(1)
        bench.worker.finish()
        await settle()
        assert bench.worker.batches == ["a", "bcde"]
        bench.worker.finish()
        await settle()
        assert bench.worker.batches == ["a", "bcde", "x"]
        bench.worker.finish()
        await settle()
        bench.worker.finish()
        for making in (first, *others, other_shape, last):
            assert all(isinstance(each, Made) for each in (await making.outcome()).made)
        assert bench.metric("zops_batch_size_sum") == 7
        assert bench.metric("zops_batch_size_count") == 4

    run(scenario, max_batch=4)


def test_a_batch_must_leave_no_other_worker_idle():
    async def scenario(bench):
        await bench.ready()
        bench.ask("abcd")
        assert [link.batches for link in bench.links] == [["ab"], ["cd"]]

    run(scenario, workers=2, max_batch=8)


def test_the_clients_of_a_batch_must_be_waited_for_a_few_milliseconds():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a"), bench.ask("b"), bench.ask("c")
        bench.worker.finish()
        await settle()
        assert bench.worker.batches == ["a", "bc"]
        bench.worker.finish()
        await settle()
        began = bench.now
        bench.ask("d")
        assert bench.worker.batches == ["a", "bc"], "one of two came back"
        await asyncio.sleep(0.001)
        bench.ask("e")
        assert bench.worker.batches == ["a", "bc", "de"], "both came back"
        bench.worker.finish()
        await settle()
        bench.ask("f")
        await asyncio.sleep(0.005)
        assert bench.worker.batches == ["a", "bc", "de", "f"]
        assert bench.now - began < 0.007

    run(scenario, max_batch=8)


def test_a_crowd_that_is_long_gone_must_delay_nobody():
    async def scenario(bench):
        await bench.ready()
        bench.ask("a"), bench.ask("b"), bench.ask("c")
        bench.worker.finish()
        await settle()
        bench.worker.finish()
        await asyncio.sleep(1)
        bench.ask("d")
        assert bench.worker.batches == ["a", "bc", "d"]

    run(scenario, max_batch=8)


def test_a_batch_that_did_not_fit_must_not_be_tried_again():
    async def scenario(bench):
        await bench.ready()
        bench.ask("abcd")
        bench.worker.finish(fits=2)
        await settle()
        bench.ask("efgh")
        assert bench.worker.batches == ["abcd", "ef"]
        for _ in range(2):
            await asyncio.sleep(1)
            bench.worker.finish()
            await settle()
        bench.ask("ijkl", width=128)
        assert bench.worker.batches[-1] == "ijkl", "another shape may fit"

    run(scenario, max_batch=4)


def test_clients_must_take_turns_however_many_pictures_each_has():
    async def scenario(bench):
        await bench.ready()
        bench.ask("0")
        bench.ask("abcd", client="greedy")
        bench.ask("efg", client="greedy")
        bench.ask("xy", client="modest")
        for _ in range(10):
            bench.worker.finish()
            await settle()
        assert "".join(bench.worker.batches) == "0axbycdefg"

    run(scenario)


def test_captions_of_different_lengths_must_be_made_together_only_where_that_costs_nothing():
    for packs, batches in ((True, ["a", "bc"]), (False, ["a", "b", "c"])):

        async def scenario(bench, packs=packs, batches=batches):
            await bench.ready(replace(GPU, packs=packs))
            bench.ask("a")
            bench.ask("b", bucket=32), bench.ask("c", bucket=64)
            await asyncio.sleep(1)
            for _ in batches:
                bench.worker.finish()
                await settle()
            assert bench.worker.batches == batches

        run(scenario, max_batch=4)

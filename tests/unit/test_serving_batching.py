"""How many pictures go together, who is next, and on which GPUs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduling import CPU, GPU, SHAPE, picture
from zops.errors import HostShort
from zops.host.gpu import Gpu, GpuFacts
from zops.serving.batching import LARGEST_BATCH, largest_batch
from zops.serving.devices import Seat, plan_workers
from zops.serving.fairness import FairQueue
from zops.serving.making import Making
from zops.spec import Spec


def sized(edge, **more):
    return replace(SHAPE, width=edge, height=edge, **more)


@pytest.mark.parametrize(
    ("device", "preset", "edge", "limit"),
    [
        ("NVIDIA H200", "fp8", 512, 8),
        ("NVIDIA H200", "fp8", 256, 8),
        ("NVIDIA H200", "fp8", 528, 1),
        ("NVIDIA H200", "fp8", 1024, 1),
        ("NVIDIA H200", "bf16", 512, 4),
        ("NVIDIA H200", "eager", 512, 1),
        ("NVIDIA T4", "bf16", 512, 1),
        ("cpu", "eager", 64, 1),
    ],
)
def test_only_what_was_measured_to_pay_must_be_batched(device, preset, edge, limit):
    assert largest_batch(sized(edge), replace(CPU, device=device, preset=preset)) == limit


def test_the_operators_limit_must_replace_the_measured_one():
    assert largest_batch(sized(1024), GPU, chosen=4) == 4
    assert largest_batch(sized(512), GPU, chosen=1) == 1
    assert largest_batch(sized(64), GPU, chosen=99) == LARGEST_BATCH


def test_a_batch_must_fit_into_nine_tenths_of_the_free_memory():
    facts = replace(GPU, memory_free=10 * 512 * 512, pixel_bytes=2.0)
    assert largest_batch(sized(512), facts) == 4
    assert largest_batch(sized(512, guidance_scale=1.5), facts) == 2
    assert largest_batch(sized(512), replace(facts, memory_free=10)) == 1, "one is tried in any case"


requests = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.sampled_from([64, 128])), max_size=12)


def queue_of(asked):
    queue = FairQueue()
    for number, (client, count, width) in enumerate(asked):
        pictures = tuple(picture(f"{number}.{index}") for index in range(count))
        shape = replace(SHAPE, width=width)
        making = Making(shape, pictures, client, arrived=0, deadline=1, on_end=lambda _making: None)
        for part in making.parts:
            queue.put(part)
    return queue


@given(asked=requests, limit=st.integers(1, 6))
def test_every_picture_must_be_taken_once_in_batches_of_one_shape_with_the_next_one_first(asked, limit):
    queue, taken = queue_of(asked), []
    while head := queue.head():
        size = len(queue)
        alike = queue.count(head.shape, 100)
        batch = queue.take(limit)
        assert batch[0] is head
        assert {part.shape for part in batch} == {head.shape}
        assert len(batch) == min(limit, alike)
        assert len(queue) == size - len(batch)
        taken += batch
    assert len(queue) == 0
    assert len(set(taken)) == len(taken) == sum(count for _, count, _ in asked)


@given(asked=requests)
def test_one_by_one_clients_must_take_turns_and_each_be_served_in_order(asked):
    queue, order = queue_of(asked), []
    while queue.head():
        order += queue.take(1)
    for client in "abc":
        mine = [part.picture.id for part in order if part.making.client == client]
        assert mine == sorted(mine, key=lambda name: tuple(int(number) for number in name.split(".")))
    left = {client: sum(1 for part in order if part.making.client == client) for client in "abc"}
    served = dict.fromkeys("abc", 0)
    for part in order:
        served[part.making.client] += 1
        waiting = [served[client] for client in "abc" if served[client] < left[client]]
        assert not waiting or served[part.making.client] - min(waiting) <= 1


@given(asked=requests, which=st.integers(0, 11))
def test_a_request_that_ended_must_leave_no_picture_behind(asked, which):
    queue = queue_of(asked)
    makings = {part.making for parts in queue._clients.values() for part in parts}
    gone = sorted(makings, key=id)[which : which + 1]
    for making in gone:
        queue.drop(making)
    order = []
    while queue.head():
        order += queue.take(2)
    assert len(order) == sum(len(making.parts) for making in makings if making not in gone)
    assert not any(part.making in gone for part in order)
    assert len(queue) == 0


def test_pictures_of_a_lost_worker_must_come_first_and_alone():
    queue = queue_of([("a", 3, 64)])
    first, second = queue.take(2)
    for part in (first, second):
        queue.put_back(part)
    assert queue.head() is first
    assert [[part.picture.id for part in queue.take(4)] for _ in range(3)] == [["0.0"], ["0.1"], ["0.2"]]


# --- where workers go


def gpus(count):
    return GpuFacts(tuple(Gpu(index, f"GPU-{index:04x}", "NVIDIA H200", 1, 0) for index in range(count)))


def plan(environ=None, count=0, **spec):
    return plan_workers(Spec.model_validate(spec), environ or {}, lambda: gpus(count))


def test_each_gpu_must_get_a_worker_by_its_uuid():
    assert plan(count=2) == (Seat("GPU-0000"), Seat("GPU-0001"))
    assert plan(count=4, gpus=[3, 1]) == (Seat("GPU-0003"), Seat("GPU-0001"))
    assert plan(count=4, gpus=["GPU-abcd", "MIG-1"]) == (Seat("GPU-abcd"), Seat("MIG-1"))


def test_a_lone_gpu_must_leave_the_environment_as_it_is():
    assert plan(count=1) == (Seat(None),)
    assert plan({"CUDA_VISIBLE_DEVICES": "3"}, count=8) == (Seat(None),)
    assert plan(count=8, gpus=[3]) == (Seat("GPU-0003"),)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,5", ["2", "5"]),
        ("GPU-a, MIG-b", ["GPU-a", "MIG-b"]),
        ("0,1,-1,3", ["0", "1"]),
        ("1,0,1,2", ["1", "0"]),
    ],
)
def test_what_the_runtime_made_visible_must_be_divided_and_nothing_else(visible, names):
    assert plan({"CUDA_VISIBLE_DEVICES": visible}, count=8) == tuple(Seat(name) for name in names)


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_no_visible_gpu_must_give_one_worker_on_the_cpu(visible):
    assert plan({"CUDA_VISIBLE_DEVICES": visible}, count=8) == (Seat(None),)
    assert plan(count=0) == (Seat(None),)


def test_no_gpu_wanted_must_not_even_ask_for_them():
    spec = Spec.model_validate({"gpus": "none"})
    assert plan_workers(spec, {"CUDA_VISIBLE_DEVICES": "0"}, lambda: pytest.fail("NVML was asked")) == (Seat(""),)


def test_workers_on_the_cpu_must_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    assert plan(gpus="none", serve={"workers": 3}) == (Seat("", 2),) * 3
    assert plan(gpus="none", serve={"workers": 16})[0].threads == 1


def test_fewer_workers_than_gpus_must_take_the_first_and_more_must_be_refused():
    assert plan(count=4, serve={"workers": 2}) == (Seat("GPU-0000"), Seat("GPU-0001"))
    with pytest.raises(HostShort) as caught:
        plan(count=2, serve={"workers": 3})
    assert (caught.value.code, caught.value.exit_status) == ("gpu-missing", 6)


SPLIT = {"parallel": "split"}


def test_a_worker_on_several_gpus_must_get_them_in_their_order():
    assert plan(count=4, serve=SPLIT) == (Seat("GPU-0000,GPU-0001", cards=2), Seat("GPU-0002,GPU-0003", cards=2))
    assert plan(count=4, serve={"parallel": "context", "gpus_per_worker": 3}) == (
        Seat("GPU-0000,GPU-0001,GPU-0002", cards=3),
    )
    assert plan({"CUDA_VISIBLE_DEVICES": "5,2,7"}, serve=SPLIT) == (Seat("5,2", cards=2),)
    assert plan(count=4, serve=SPLIT | {"workers": 1}) == (Seat("GPU-0000,GPU-0001", cards=2),)


def test_a_worker_that_takes_all_gpus_must_leave_the_environment_as_it_is():
    assert plan(count=2, serve=SPLIT) == (Seat(None, cards=2),)
    assert plan(count=2, gpus=[1, 0], serve=SPLIT) == (Seat("GPU-0001,GPU-0000", cards=2),)


@pytest.mark.parametrize(("count", "workers"), [(1, "auto"), (3, 2)])
def test_too_few_gpus_for_workers_on_several_must_be_refused(count, workers):
    with pytest.raises(HostShort, match="parallel: split") as caught:
        plan(count=count, serve=SPLIT | {"workers": workers})
    assert caught.value.code == "gpu-missing"


def test_processes_that_work_together_on_the_cpu_must_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    assert plan(gpus="none", serve={"parallel": "context"}) == (Seat("", 4, 2),)
    assert plan(gpus="none", serve={"parallel": "context", "workers": 2}) == (Seat("", 2, 2),) * 2
    assert plan(gpus="none", serve=SPLIT) == (Seat("", None, 2),)

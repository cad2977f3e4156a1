"""How many CUDA graphs are kept, by what they hold. The graphs and the GPU's memory are made up; the rule is not."""

from weakref import WeakKeyDictionary

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402 - torch may be missing
from hypothesis import strategies as st  # noqa: E402 - as above

from zops.serving.accelerate.graphs import Graphs, Recent  # noqa: E402 - as above


class Gpu:
    """Pools that are as large as the largest graph in them asks for, plus what each graph needs for itself."""

    OWN = 1

    def __init__(self, free=100, total=10_000):
        self.free_bytes, self.total, self.pools, self.captured = free, total, {}, []
        self.used, self.alive = set(), WeakKeyDictionary()

    def graphs(self, share=0.5):
        return Graphs(share, free=lambda: self.free_bytes, make=self.make, new_pool=self.new_pool, measure=self.measure)

    def new_pool(self):
        self.pools[len(self.pools)] = []
        return len(self.pools) - 1

    def make(self, work, pool):
        size = work()
        # torch asserts so: a pool ends with its last graph, or with a capture that failed in it.
        assert pool not in self.used or any(one == pool for _, one in self.alive.values())
        self.used.add(pool)
        self.captured.append((size, pool))
        if size + sum(taken for taken, _ in self.alive.values()) > self.total:
            raise torch.OutOfMemoryError
        self.pools[pool].append(size)

        def replay():
            return size

        self.alive[replay] = size, pool
        return replay

    def measure(self, pool):
        return max(self.pools[pool]) + self.OWN * len(self.pools[pool])


def work(size):
    return lambda: size


def test_a_graph_must_be_captured_once_and_replayed():
    gpu = Gpu()
    graphs = gpu.graphs()
    for _ in range(3):
        assert graphs.get("a", work(10))() == 10
    assert gpu.captured == [(10, 0)]


def test_what_each_graph_holds_must_be_what_the_pool_grew_by():
    gpu = Gpu()
    graphs = gpu.graphs()
    for key, size in (("a", 10), ("b", 30), ("c", 20)):
        graphs.get(key, work(size))
    graphs.get("a", work(10))
    assert list(graphs.held_bytes.items()) == [("b", 21), ("c", 1), ("a", 11)], (
        "a small one works where a large one does"
    )


def test_beyond_the_limit_the_others_must_go_and_come_again_when_they_are_used():
    gpu = Gpu()
    graphs = gpu.graphs()
    graphs.get("a", work(10))
    graphs.get("b", work(48))
    assert graphs.get("c", work(49))() == 49, "alone it fits"
    assert graphs.held_bytes == {"c": 50}
    assert [pool for _, pool in gpu.captured] == [0, 0, 0, 1], "a pool is never used again"
    assert graphs.get("a", work(10))() == 10
    assert graphs.held_bytes == {"a": 11}


def test_what_is_too_large_alone_must_run_without_a_graph_and_leave_the_others_room():
    gpu = Gpu()
    graphs = gpu.graphs()
    graphs.get("a", work(10))
    assert graphs.get("huge", work(80)) is None
    assert len(gpu.captured) == 3, "in the others' pool, and alone"
    graphs.get("a", work(10))
    assert graphs.get("huge", work(80)) is None
    assert graphs.held_bytes == {"a": 11}
    assert len(gpu.captured) == 4, "that was known"


def test_a_capture_that_memory_is_too_short_for_must_not_fail_the_call():
    gpu = Gpu(total=30)
    graphs = gpu.graphs()
    assert graphs.get("wide", work(40)) is None
    assert [size for size, _ in gpu.captured] == [40], "alone already"
    assert graphs.get("wide", work(40)) is None
    assert len(gpu.captured) == 1, "that was known"
    assert graphs.get("a", work(10))() == 10, "in a pool of its own: that of a failed capture is given up"


def test_a_capture_that_only_the_others_leave_no_room_for_must_have_theirs():
    gpu = Gpu(total=30)
    graphs = gpu.graphs()
    graphs.get("a", work(20))
    assert graphs.get("b", work(25))() == 25
    assert [pool for _, pool in gpu.captured] == [0, 0, 1]
    assert list(graphs.held_bytes) == ["b"]


def test_the_limit_must_be_a_share_of_what_is_free_at_the_first_capture():
    gpu = Gpu(free=20)
    graphs = gpu.graphs(share=0.5)
    gpu.free_bytes = 10
    assert graphs.get("a", work(5)) is None
    gpu = Gpu(free=20)
    graphs = gpu.graphs(share=0.5)
    graphs.get("a", work(1))
    gpu.free_bytes = 0
    assert graphs.get("b", work(5)) is not None


def test_a_shape_that_is_dropped_must_take_its_graph_along():
    gpu = Gpu()
    graphs = gpu.graphs()
    recent = Recent(2, graphs.forget)
    for key in ("a", "b", "c"):
        recent.get(key, lambda key=key: key)
        graphs.get(key, work(10))
    assert list(graphs.held_bytes) == ["b", "c"]
    graphs.forget("b"), graphs.forget("c")
    graphs.get("d", work(5))
    assert gpu.captured[-1] == (5, 1), "the last one took the pool along"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 70)), max_size=30))
def test_what_is_kept_must_never_exceed_the_limit(asked):
    gpu, sizes = Gpu(), {}
    graphs = gpu.graphs()
    for key, first in asked:
        size = sizes.setdefault(key, first)
        replay = graphs.get(key, work(size))
        assert (replay is None) == (size + Gpu.OWN > 50)
        assert replay is None or replay() == size
        assert sum(graphs.held_bytes.values()) <= 50

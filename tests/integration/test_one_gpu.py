"""What only a GPU can show: how torch's allocator takes what is done with pools and streams. Skipped elsewhere."""

import pytest

torch = pytest.importorskip("torch")

from zops.serving.accelerate import fused  # noqa: E402 - torch may be missing
from zops.serving.accelerate.graphs import Graphs  # noqa: E402 - as above
from zops.serving.accelerate.rows import operations  # noqa: E402 - as above
from zops.serving.memory import count_free  # noqa: E402 - as above

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

WIDE = 256 << 20


@pytest.fixture
def graphs():
    made = Graphs(0.5, free=lambda: count_free("cuda:0"))
    yield made
    made.drop()


def doubles(numbers, out):
    """Return work that needs `WIDE` bytes for a while, and leaves none of them."""

    def work():
        wide = torch.empty(WIDE, dtype=torch.uint8, device="cuda")
        wide.fill_(1)
        torch.mul(numbers, wide[: len(numbers)] + 1, out=out)

    return work


def test_a_pool_must_be_measured_and_be_given_back_with_its_last_graph(graphs):
    numbers = torch.arange(1000.0, device="cuda")
    first, second = torch.zeros_like(numbers), torch.zeros_like(numbers)
    graphs.get("first", doubles(numbers, first))()
    graphs.get("second", doubles(numbers, second))()
    assert torch.equal(first, 2 * numbers)
    assert torch.equal(second, 2 * numbers)
    held = graphs.held_bytes
    assert WIDE <= held["first"] < 2 * WIDE
    assert held["second"] < WIDE / 4, "it works where the first one does"
    graphs.forget("first")
    before, _ = torch.cuda.mem_get_info()
    graphs.forget("second")
    assert torch.cuda.mem_get_info()[0] - before >= WIDE
    graphs.get("first", doubles(numbers, first))()


@pytest.mark.parametrize("capturing", [False, True], ids=["before the capture", "in the midst of it"])
def test_memory_that_is_too_short_for_a_graph_must_fail_neither_the_call_nor_the_next_capture(graphs, capturing):
    numbers = torch.arange(1000.0, device="cuda")
    out = torch.zeros_like(numbers)

    def hungry():
        out.copy_(numbers)
        if torch.cuda.is_current_stream_capturing() == capturing:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    assert graphs.get("hungry", hungry) is None
    assert graphs.get("hungry", hungry) is None
    graphs.get("doubles", doubles(numbers, out))()
    assert torch.equal(out, 2 * numbers)
    assert graphs.get("hungry again", hungry) is None
    assert graphs.held_bytes == {}
    graphs.get("doubles", doubles(numbers, out))()


def test_weights_that_came_on_another_stream_must_not_be_held_twice_while_they_are_fused(monkeypatch):
    from diffusers import ZImageTransformer2DModel

    width, layers = 3072, 6
    with torch.cuda.stream(torch.cuda.Stream()):
        transformer = ZImageTransformer2DModel(
            dim=width, n_layers=layers, n_refiner_layers=1, n_heads=24, n_kv_heads=24, cap_feat_dim=64
        ).to("cuda", torch.bfloat16)
        transformer.requires_grad_(requires_grad=False)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    monkeypatch.setattr(fused, "MOST_KEPT", 1 << 24)
    fused.fuse_blocks(transformer, operations(torch.device("cuda")), fp8=False)
    assert torch.cuda.max_memory_reserved() - before < before / 2

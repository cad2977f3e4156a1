"""What a start holds of the weights: each of them once, and those that a preset replaces not at all.

A GPU's allocator can give back what nobody holds. So the storages of tensors are watched here, on the CPU, at the very
moments at which a GPU's memory would be given back, with the collector of cycles switched off.
"""

import gc
import os
from dataclasses import replace
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402 - torch may be missing

from tests.support.pipelines import settings_for  # noqa: E402 - as above
from zops.serving import loader  # noqa: E402 - as above
from zops.serving.accelerate import fp8, fused, gate, preset  # noqa: E402 - as above
from zops.serving.accelerate.rows import Quantised  # noqa: E402 - as above
from zops.serving.streaming import WeightStream  # noqa: E402 - as above


class Watched:
    """Storages of weights: as wide as they came from the disk, and as they were handed to the pipeline."""

    def __init__(self):
        self.wide, self.handed, self.alive_by_block, self.given_back = {}, {}, [], []

    def alive(self, which):
        return {name for name, (storage, _) in which.items() if not storage.expired()}

    def alive_bytes(self, which):
        return sum(size for storage, size in which.values() if not storage.expired())


def noted(tensor):
    storage = tensor.untyped_storage()
    assert storage.nbytes() == tensor.numel() * tensor.itemsize, "a view would keep all of what it is a view of"
    return StorageWeakRef(storage), storage.nbytes()


@pytest.fixture
def watched(monkeypatch):
    seen = Watched()
    plain_quantise, plain_result, plain_init = fp8.quantise_weight, WeightStream.result, fused.FusedBlock.__init__

    def quantise_weight(weight):
        made = plain_quantise(weight)
        seen.wide[len(seen.wide)] = noted(weight)
        return made

    def result(self):
        read = plain_result(self)
        for path, tensors in read.files.items():
            for name, tensor in tensors.items():
                values = tensor.values if isinstance(tensor, Quantised) else tensor
                seen.handed[f"{path}:{name}"] = noted(values)
        return read

    def init(self, *given, **named):
        plain_init(self, *given, **named)
        seen.alive_by_block.append(seen.alive_bytes(seen.handed))

    def give_back(_device):
        seen.given_back.append((seen.alive(seen.handed), seen.alive_bytes(seen.wide)))

    monkeypatch.setattr(fp8, "quantise_weight", quantise_weight)
    monkeypatch.setattr(WeightStream, "result", result)
    monkeypatch.setattr(fused.FusedBlock, "__init__", init)
    monkeypatch.setattr(preset, "give_back", give_back)
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(1.0, 0.0))
    before = dict(os.environ)
    enable = gc.enable
    gc.collect()
    gc.disable()
    monkeypatch.setattr(gc, "enable", lambda: None)  # the loader switches it on again
    yield seen
    enable()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["narrowed on arrival", "narrowed after eager's images"])
def loaded(request, watched, tiny_model, tmp_path, monkeypatch):
    if request.param == "narrowed on arrival":
        plain = loader.choose
        monkeypatch.setattr(loader, "choose", lambda *given: replace(plain(*given), eager_fits=False))
    settings = settings_for(
        tiny_model, preset="fp8", fp8_text=True, force_preset=True, kernels=str(tmp_path / "kernels"), dtype="bfloat16"
    )
    return loader.load(settings, lambda _message: None)


def held(pipeline):
    """Return the storages that the pipeline's models hold."""
    models = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in tensors}


def test_when_memory_is_given_back_nothing_must_hold_what_the_preset_replaced(loaded, watched):
    kept = held(loaded.pipelines.generate)
    [(alive, wide_bytes)] = watched.given_back
    assert watched.wide
    assert wide_bytes == 0, "a weight outlived its copy in fp8"
    strangers = {name for name in alive if watched.handed[name][0].cdata not in kept}
    assert strangers == set()
    replaced = watched.handed.keys() - alive
    for part in ("attention.to_q", "feed_forward.w1", "self_attn.q_proj"):
        assert any(part in name for name in replaced), f"{part} was not replaced: this test looks at nothing"


def test_each_block_must_be_freed_before_the_next_one_is_made(loaded, watched):
    """Else the weights are there twice at the peak: as they came, and as the preset keeps them."""
    by_block = watched.alive_by_block
    assert len(by_block) > 2
    assert all(later < earlier for earlier, later in pairwise(by_block[1:]))


def test_a_stream_that_was_read_must_hold_none_of_its_tensors(tiny_model):
    from zops.serving.assemble import weight_files

    paths = [path for group in weight_files(tiny_model).values() for path in group]
    stream = WeightStream(tiny_model, paths, "cpu", None, arrived=fp8.quantise_on_arrival(text=False))
    read = stream.result()
    gc.collect()
    gc.disable()
    try:
        tensors = {f"{part}.{name}": t for part in ("transformer", "vae") for name, t in read.take(part).items()}
        storages = [noted(t.values if isinstance(t, Quantised) else t)[0] for t in tensors.values()]
        assert read.take("vae") == {}, "they are given away once"
        tensors.clear()
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()
    assert stream.devices["vae"] == "cpu"

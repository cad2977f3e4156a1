"""Under `serve.preset: auto` a preset that the gate refuses gives way to the next; one that was asked for does not."""

import gc
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402 - torch may be missing

from tests.support.pipelines import Told, load_here, picture, settings_for  # noqa: E402 - as above
from zops.errors import ZopsError  # noqa: E402 - as above
from zops.serving import loader  # noqa: E402 - as above
from zops.serving.accelerate import gate, preset  # noqa: E402 - as above
from zops.serving.accelerate.choice import Device  # noqa: E402 - as above
from zops.serving.messages import Gate, Noticed  # noqa: E402 - as above


@pytest.fixture(autouse=True)
def _as_on_a_large_gpu(monkeypatch):
    """The rules see a GPU; what they choose is computed here, in float32."""
    gpu = Device("cuda", (9, 0), 1 << 40, triton=True)
    monkeypatch.setattr(loader, "describe_device", lambda _target: gpu)


@pytest.fixture
def strict(monkeypatch):
    """A gate that bf16 cannot pass: nothing but equal images would do."""
    monkeypatch.setitem(gate.THRESHOLDS, "bf16", gate.Threshold(1000.0, 1.0))


def start(snapshot, tmp_path, **changes):
    told = []
    loaded = loader.load(settings_for(snapshot, kernels=str(tmp_path / "kernels"), **changes), told.append)
    return loaded, [message.text for message in told if isinstance(message, Noticed)]


@pytest.mark.usefixtures("strict")
def test_auto_must_serve_eager_where_the_gate_refuses_bf16_and_say_why(tiny_model, tmp_path, renders):
    loaded, noticed = start(tiny_model, tmp_path)
    ready = loaded.ready
    assert (ready.preset, ready.gate, ready.packs) == ("eager", Gate("reference"), False)
    assert ready.fallback.startswith("the quality gate refused bf16: PSNR")
    assert ready.notes[0] == ready.fallback
    assert any("fails the quality gate" in text and "serving eager instead" in text for text in noticed)
    assert renders == ["eager", "bf16"]
    plain = load_here(tiny_model, preset="eager")
    ours, theirs = Told(loaded), Told(plain)
    ours.make(picture(1)), theirs.make(picture(1))
    assert ours.answers["p1"].rgb == theirs.answers["p1"].rgb, "nothing of the refused preset may be left"


@pytest.mark.usefixtures("strict")
def test_the_next_start_must_remember_the_refusal(tiny_model, tmp_path, renders):
    first, _ = start(tiny_model, tmp_path)
    renders.clear()
    second, noticed = start(tiny_model, tmp_path)
    assert renders == []
    assert noticed == []
    assert (second.ready.preset, second.ready.fallback) == (first.ready.preset, first.ready.fallback)


@pytest.mark.usefixtures("strict")
def test_a_preset_that_was_asked_for_must_be_refused_each_time(tiny_model, tmp_path, renders):
    for _ in range(2):
        with pytest.raises(ZopsError, match="fails the quality gate") as raised:
            start(tiny_model, tmp_path, preset="bf16")
        assert raised.value.code == "preset-refused"
    assert renders == ["eager", "bf16"] * 2, "a threshold may have been changed: it is judged again"


@pytest.mark.usefixtures("strict")
def test_force_must_serve_what_auto_would_refuse_even_after_it_did(tiny_model, tmp_path):
    start(tiny_model, tmp_path)
    loaded, _ = start(tiny_model, tmp_path, force_preset=True)
    assert (loaded.ready.preset, loaded.ready.gate.result, loaded.ready.fallback) == ("bf16", "forced", "")


@pytest.mark.parametrize("force", [False, True])
def test_a_preset_that_makes_no_pictures_must_give_way_even_by_force(tiny_model, tmp_path, monkeypatch, force):
    plain = preset.fused_decode

    def black(pipeline):
        decode = plain(pipeline)
        return lambda latents: decode(latents) * 0

    monkeypatch.setattr(preset, "fused_decode", black)
    loaded, _ = start(tiny_model, tmp_path, force_preset=force)
    assert loaded.ready.preset == "eager"
    assert "an image is black" in loaded.ready.fallback


@pytest.mark.usefixtures("strict")
def test_the_refused_pipeline_must_be_gone_before_the_next_one_is_read(tiny_model, tmp_path, monkeypatch):
    storages, alive = [], []
    plain_build, plain_stream = loader.build, loader._start_stream

    def build(*given):
        pipeline = plain_build(*given)
        models = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
        storages.extend(StorageWeakRef(t.untyped_storage()) for model in models for t in model.parameters())
        pipeline.transformer.itself = [pipeline.transformer]  # as a library's hooks may; only the collector frees it
        return pipeline

    def start_stream(*given):
        alive.append(sum(not storage.expired() for storage in storages))
        return plain_stream(*given)

    monkeypatch.setattr(loader, "build", build)
    monkeypatch.setattr(loader, "_start_stream", start_stream)
    gc.collect()
    start(tiny_model, tmp_path)
    assert storages
    assert alive == [0, 0], "two pipelines at once do not fit where one does"


def test_where_the_first_is_good_nothing_must_be_said_of_others(tiny_model, tmp_path):
    loaded, noticed = start(tiny_model, tmp_path)
    assert (loaded.ready.preset, loaded.ready.gate.result, loaded.ready.fallback) == ("bf16", "passed", "")
    assert noticed == []


@pytest.mark.usefixtures("strict")
def test_where_nothing_else_fits_a_refusal_must_end_the_start(tiny_model, tmp_path, monkeypatch):
    plain = loader.choose
    monkeypatch.setattr(loader, "choose", lambda *given: replace(plain(*given), fallbacks=()))
    with pytest.raises(ZopsError, match="fails the quality gate"):
        start(tiny_model, tmp_path)

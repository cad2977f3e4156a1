"""One pipeline over two cards. Here both are the CPU: shown is where things are asked to be, and the pictures."""

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402 - torch may be missing

from tests.support.pipelines import SHAPE, Told, load_here, picture, settings_for  # noqa: E402 - as above
from zops.errors import HostShort  # noqa: E402 - as above
from zops.serving import loader  # noqa: E402 - as above
from zops.serving.accelerate import gate, preset  # noqa: E402 - as above
from zops.serving.accelerate.homes import Homes  # noqa: E402 - as above

ONE, OTHER = torch.device("cpu:0"), torch.device("cpu:1")
SPLIT = {"parallel": "split", "cards": 2}


@pytest.fixture
def placed(monkeypatch):
    """Devices that components were asked to be on: by the stream, and by the model that got the weights."""
    streams, given = [], {}
    plain_stream, plain_give = loader.WeightStream, loader.give_weights

    def stream(*args, **named):
        made = plain_stream(*args, **named)
        streams.append(made.devices)
        return made

    def give(model, component, tensors, device):
        given[component] = device
        return plain_give(model, component, tensors, device)

    monkeypatch.setattr(loader, "WeightStream", stream)
    monkeypatch.setattr(loader, "give_weights", give)
    return streams, given


@pytest.mark.parametrize("asked", ["eager", "bf16", "fp8"])
def test_a_split_pipeline_must_make_the_pictures_of_a_whole_one(tiny_model, placed, monkeypatch, asked):
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(1.0, 0.0))
    changes = {"preset": asked, "force_preset": True}
    whole = Told(load_here(tiny_model, **changes))
    streams, given = placed
    streams.clear()
    loaded = load_here(tiny_model, **changes, **SPLIT)
    wanted = {"transformer": "cpu:0", "text_encoder": "cpu:1", "vae": "cpu:1"}
    assert streams == [wanted]
    assert given == wanted
    split = Told(loaded)
    for told in (whole, split):
        told.make(picture(1), picture(2, prompt="two dogs"))
        told.make(picture(3, source=bytes(SHAPE.width * SHAPE.height * 3)), shape=SHAPE)
    assert all(whole.answers[name].rgb == split.answers[name].rgb for name in ("p1", "p2", "p3"))


class Moves(TorchFunctionMode):
    """Notes to which devices tensors are asked to go."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            self.asked += [each for each in (*args[1:], *(kwargs or {}).values()) if isinstance(each, torch.device)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", ["eager", "bf16"])
def test_each_stage_must_hand_over_to_the_card_of_the_next(tiny_model, asked):
    pipeline = load_here(tiny_model, preset="eager").pipelines.generate
    applied = preset.apply(pipeline, asked, homes=Homes(text_encoder=OTHER, transformer=ONE, vae=OTHER))
    noise = torch.randn(1, pipeline.transformer.in_channels, 8, 8)
    with Moves() as moves:
        embeds = applied.encode(["a cat"])
    assert moves.asked[-1:] == [ONE], "embeds go to the transformer"
    if asked == "eager":
        assert OTHER in moves.asked, "the pipeline's own way is asked for the text encoder's card"
    with Moves() as moves:
        latents = applied.denoise(embeds, noise, forwards=2)
    assert OTHER not in moves.asked, "nothing leaves the transformer's card within a call"
    with Moves() as moves:
        applied.decode(latents)
    assert moves.asked[:1] == [OTHER], "latents go to the VAE"
    assert "text encoder on cpu:1, transformer on cpu:0, VAE on cpu:1" in applied.done


def test_stages_on_one_card_must_say_nothing_of_cards(tiny_model):
    applied = load_here(tiny_model, preset="eager").pipelines.applied
    assert not any("transformer on" in note for note in applied.done)


def test_components_that_fit_nowhere_must_be_refused_before_they_are_read(tiny_model, monkeypatch):
    monkeypatch.setattr(loader, "count_free", lambda _card: 1000)
    with pytest.raises(HostShort, match=r"do not fit on 2 cards with 0\.0 GB and 0\.0 GB free") as raised:
        loader.load(settings_for(tiny_model, **SPLIT), lambda _message: None)
    assert raised.value.code == "split-too-large"

"""Presets as a worker serves them: chosen, held to eager, kept, refused, forced; by reference numbers on the CPU."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.support.pipelines import SHAPE, Told, load_here, picture, settings_for  # noqa: E402 - torch may be missing
from zops.errors import ZopsError  # noqa: E402
from zops.serving.accelerate import gate  # noqa: E402
from zops.serving.accelerate.choice import Device  # noqa: E402
from zops.serving.accelerate.fp8 import Fp8Linear  # noqa: E402
from zops.serving.loader import load  # noqa: E402
from zops.serving.messages import Cancelled, Gate, Made, Noticed, WorkerSettings  # noqa: E402

EDIT = replace(SHAPE, mode="edit", strength=0.6)
SOURCE = random.Random(1).randbytes(SHAPE.width * SHAPE.height * 3)
SMALL_GPU = Device("cpu")


@pytest.fixture(scope="module")
def eager(tiny_model):
    return load_here(tiny_model)


@pytest.fixture(scope="module")
def fast(tiny_model):
    """bf16's stages in float32, as the CPU computes them when forced."""
    return load_here(tiny_model, preset="bf16", force_preset=True)


def far(one, other):
    return np.abs(np.frombuffer(one.rgb, np.uint8).astype(int) - np.frombuffer(other.rgb, np.uint8)).max()


def answers(loaded, *pictures, shape=SHAPE):
    told = Told(loaded)
    told.make(*pictures, shape=shape)
    return told


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, guidance_scale=2.0), EDIT], ids=["plain", "guided", "edit"])
def test_a_fast_preset_must_make_eagers_pictures_of_any_mix_of_captions(eager, fast, shape):
    wanted = [
        picture(1, previews=2, source=SOURCE, negative_prompt="blurry"),
        picture(2, prompt="far more words than that, " * 12, source=SOURCE[::-1]),
        picture(3, prompt="two dogs", source=SOURCE),
    ]
    slow, quick = answers(eager, *wanted, shape=shape), answers(fast, *wanted, shape=shape)
    assert all(far(slow.answers[one.id], quick.answers[one.id]) <= 1 for one in wanted)
    seen = [[preview.index for preview in told.previews("p1")] for told in (slow, quick)]
    assert seen[0] == seen[1]
    assert seen[0]


def test_a_fast_preset_must_stop_between_two_forwards(fast):
    told = Told(fast)

    class Messages(list):
        def append(self, message):
            super().append(message)
            told.cancelled.add("p1")  # with the first preview

    told.messages = Messages()
    told.make(picture(1, previews=2), shape=replace(SHAPE, forwards=8))
    assert told.answers == {"p1": Cancelled("p1")}
    assert len(told.previews("p1")) == 1


def test_ready_must_tell_the_preset_its_gate_and_that_captions_may_mix(eager, fast):
    assert (eager.ready.preset, eager.ready.gate, eager.ready.packs) == ("eager", Gate("reference"), False)
    ready = fast.ready
    assert (ready.preset, ready.gate.result, ready.packs) == ("bf16", "passed", True)
    assert ready.gate.psnr_db > 60
    assert any("row kernels: left out, no GPU" in note for note in ready.notes)


def test_a_repeated_prompt_must_not_be_encoded_again(fast):
    seen = []
    hook = fast.pipelines.generate.text_encoder.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
    try:
        first = answers(fast, picture(1, prompt="once only"))
        again = answers(fast, picture(1, prompt="once only"), picture(2, prompt="something else"))
    finally:
        hook.remove()
    assert len(seen) == 2
    assert far(first.answers["p1"], again.answers["p1"]) <= 1


@pytest.mark.parametrize("preset", ["bf16", "fp8"])
def test_the_cpu_must_refuse_a_preset_that_is_not_forced(tiny_model, preset):
    with pytest.raises(ZopsError, match="needs a GPU") as raised:
        load(settings_for(tiny_model, preset=preset), lambda _message: None)
    assert raised.value.code == "preset-unusable"


def start(snapshot, tmp_path, **changes):
    told = []
    given = {"preset": "fp8", "force_preset": True, "kernels": str(tmp_path / "kernels")} | changes
    return load(settings_for(snapshot, **given), told.append), told


def test_a_verdict_must_be_kept_for_the_next_start(tiny_model, tmp_path, renders, monkeypatch):
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(1.0, 0.0))
    first, _ = start(tiny_model, tmp_path)
    assert renders == ["eager", "fp8"]
    second, _ = start(tiny_model, tmp_path)
    assert renders == ["eager", "fp8"], "the second start must not judge again"
    assert first.ready.gate == second.ready.gate
    assert second.ready.gate.result == "passed"
    # One was put into fp8 from whole models, the other weight by weight on its way from the disk.
    for name in ("transformer", "text_encoder"):
        one, other = (getattr(it.pipelines.generate, name).state_dict() for it in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    start(tiny_model, tmp_path, warmup_size=80)
    assert renders == ["eager", "fp8"] * 2, "other images are another question"


def test_a_preset_that_fails_must_be_refused_unless_forced(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(98.0, 1.0))
    loaded, told = start(tiny_model, tmp_path)
    assert loaded.ready.gate.result == "forced"
    assert "PSNR" in loaded.ready.gate.trouble
    assert any(isinstance(message, Noticed) and "forced" in message.text for message in told)
    # What is not forced on the CPU is refused before its images are; so the rule is asked without the loader.
    from zops.serving.accelerate.choice import Choice
    from zops.serving.quality import Exam

    exam = Exam(Choice("fp8", fp8_text=False, eager_fits=True, reason=""), "ab", 64, 2, forced=False, volume=None)
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with pytest.raises(ZopsError, match="fails the quality gate") as raised:
        exam.judge(images[:1], lambda: images[1:])
    assert raised.value.code == "preset-refused"


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan")], ids=["black", "flat", "nan"])
def test_no_picture_at_all_must_be_refused_even_by_force(value):
    from zops.serving.accelerate.choice import Choice
    from zops.serving.quality import Exam

    exam = Exam(Choice("bf16", fp8_text=False, eager_fits=True, reason=""), "ab", 64, 2, forced=True, volume=None)
    with pytest.raises(ZopsError, match="an image is"):
        exam.judge([torch.rand(3, 64, 64)], lambda: [torch.full((3, 64, 64), value)])


def test_where_eager_does_not_fit_kept_images_must_judge_or_nobody(tiny_model, tmp_path, renders, monkeypatch):
    from zops.serving import loader

    plain = loader.choose
    monkeypatch.setattr(loader, "choose", lambda *given: replace(plain(*given), eager_fits=False))
    loaded, told = start(tiny_model, tmp_path)
    assert loaded.ready.gate.result == "not judged"
    assert not renders
    assert any(isinstance(message, Noticed) and "not judged" in message.text for message in told)
    assert isinstance(loaded.pipelines.generate.transformer.layers[0].qkv, Fp8Linear)
    monkeypatch.setattr(loader, "choose", plain)
    monkeypatch.setitem(gate.THRESHOLDS, "bf16", gate.Threshold(1.0, 0.0))
    start(tiny_model, tmp_path, preset="bf16")  # leaves eager's images
    monkeypatch.setattr(loader, "choose", lambda *given: replace(plain(*given), eager_fits=False))
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(1.0, 0.0))
    renders.clear()
    loaded, _ = start(tiny_model, tmp_path)
    assert loaded.ready.gate.result == "passed"
    assert renders == ["fp8"]


def test_verification_on_the_way_must_find_a_flipped_bit(tiny_model, tmp_path):
    import shutil

    snapshot = tmp_path / "tiny"
    shutil.copytree(tiny_model, snapshot)
    file = next(snapshot.glob("transformer/*.safetensors"))
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    _forgive_times(snapshot, file)
    load(settings_for(snapshot), lambda _message: None)  # the look at sizes and times cannot see it
    with pytest.raises(ZopsError, match="other bytes than were verified"):
        load(settings_for(snapshot, verify_on_load=True), lambda _message: None)


def _forgive_times(snapshot, _file):
    """Make the marker agree with the file's times: a disk that turns a bit changes none of them."""
    from zops.cache.manifest import read_manifest, stat_key, write_marker

    manifest = read_manifest(snapshot)
    write_marker(snapshot, manifest, {entry.path: stat_key(snapshot / entry.path) for entry in manifest.files})


def test_every_preset_must_answer_a_request(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(gate.THRESHOLDS, "fp8", gate.Threshold(1.0, 0.0))
    loaded, _ = start(tiny_model, tmp_path, fp8_text=True)
    assert isinstance(answers(loaded, picture(1)).answers["p1"], Made)


def test_the_warm_up_must_make_each_size_twice_and_captions_of_several_lengths(fast, monkeypatch):
    """On a GPU the second call of a shape captures its graph; here only the calls are counted."""
    from zops.serving import warmup
    from zops.serving.generate import Pipelines

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    plain, sizes, prompts = fast.pipelines.applied, [], []
    applied = replace(
        plain,
        encode=lambda asked: prompts.extend(asked) or plain.encode(asked),
        denoise=lambda embeds, latents, **how: (
            sizes.append(latents.shape[2] * 8) or plain.denoise(embeds, latents, **how)
        ),
        graphs=True,
    )
    settings = WorkerSettings("", "", "auto", "", 4, 0.0, warmup_size=64, sizes=(64, 96))
    chores = warmup.chores(Pipelines(fast.pipelines.generate, applied), settings)
    assert sizes == [], "nothing is done before the worker has time for it"
    next(chores)
    assert sizes == [96]
    assert len(list(chores)) == 1 + 2 * len(warmup.CAPTION_WORDS)
    assert sizes == [96, 96], "the warm-up has made its own size twice"
    lengths = [len(prompt) for prompt in prompts if prompt != warmup.PROMPT]
    assert len(set(lengths)) == len(lengths) / 2 == len(warmup.CAPTION_WORDS)

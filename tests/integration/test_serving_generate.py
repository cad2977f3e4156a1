"""Pictures made by the tiny model: alone, in batches, cancelled, edited, looked at early, and when memory is short."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pipelines import SHAPE, Told, load_here, picture
from zops.serving.generate import Captions, count_tokens, denoise, encode_prompts, forwards_run, template_of
from zops.serving.messages import Cancelled, Failed, Made, Picture
from zops.serving.preview import Projection, predict_clean

EDIT = replace(SHAPE, mode="edit", strength=0.6)
SOURCE = random.Random(1).randbytes(SHAPE.width * SHAPE.height * 3)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_here(tiny_model)


@pytest.fixture
def told(loaded):
    return Told(loaded)


@pytest.fixture(scope="module")
def alone(loaded):
    """Make a picture alone, once for each."""
    known = {}

    def make(wanted, shape):
        if (wanted, shape) not in known:
            told = Told(loaded)
            told.make(wanted, shape=shape)
            known[wanted, shape] = told.answers[wanted.id]
        return known[wanted, shape]

    return make


def editor(loaded):
    """Diffusers' own pipeline for edits, on the same weights."""
    from diffusers import ZImageImg2ImgPipeline

    pipeline = ZImageImg2ImgPipeline(**loaded.pipelines.generate.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pixels(made):
    return np.frombuffer(made.rgb, np.uint8).astype(int)


def _torch_seed(seed):
    import torch

    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_a_picture_must_be_to_the_bit_what_the_plain_pipeline_gives(loaded, told, guidance):
    shape = replace(SHAPE, guidance_scale=guidance)
    wanted = [picture(1, negative_prompt="blurry"), picture(2)]
    told.make(*wanted, shape=shape)
    plain = loaded.pipelines.generate(
        prompt=[one.prompt for one in wanted],
        negative_prompt=[one.negative_prompt for one in wanted],
        width=shape.width,
        height=shape.height,
        num_inference_steps=shape.forwards,
        guidance_scale=guidance,
        generator=[_torch_seed(one.seed) for one in wanted],
    ).images
    assert [told.answers[one.id].rgb for one in wanted] == [image.tobytes() for image in plain]


def test_an_edit_must_be_to_the_bit_what_the_plain_pipeline_gives(loaded, told):
    from PIL import Image

    wanted = [picture(1, source=SOURCE), picture(2, source=SOURCE[::-1])]
    told.make(*wanted, shape=EDIT)
    plain = editor(loaded)(
        prompt=[one.prompt for one in wanted],
        image=[Image.frombytes("RGB", (EDIT.width, EDIT.height), one.source) for one in wanted],
        strength=EDIT.strength,
        num_inference_steps=EDIT.forwards,
        guidance_scale=0.0,
        generator=[_torch_seed(one.seed) for one in wanted],
    ).images
    assert [told.answers[one.id].rgb for one in wanted] == [image.tobytes() for image in plain]


pictures = st.builds(
    lambda seed, words, negative: Picture(f"{seed}-{words}-{negative}", " ".join(["word"] * words), seed, negative),
    st.integers(0, 5),
    st.sampled_from([1, 2, 40]),
    st.sampled_from(["", "blurry"]),
)


@given(
    batch=st.lists(pictures, min_size=2, max_size=4, unique_by=lambda one: one.id),
    guidance=st.sampled_from([0.0, 2.0]),
    mode=st.sampled_from(["generate", "edit"]),
)
@settings(max_examples=15, deadline=None)
def test_the_same_seed_must_give_the_same_picture_alone_and_in_any_batch(loaded, alone, batch, guidance, mode):
    shape = replace(SHAPE, guidance_scale=guidance, mode=mode, strength=0.6)
    batch = [replace(one, source=SOURCE) for one in batch] if mode == "edit" else batch
    told = Told(loaded)
    assert told.make(*batch, shape=shape) is None
    for one in batch:
        made = told.answers[one.id]
        assert made.batch_size == len(batch)
        assert np.abs(_pixels(made) - _pixels(alone(one, shape))).max() <= 1


def test_pictures_of_different_seeds_or_prompts_must_differ(told):
    told.make(picture(1), picture(2), picture(1, "other", prompt="a cat"), picture(1, "same"))
    rgb = {name: made.rgb for name, made in told.answers.items()}
    assert len({rgb["p1"], rgb["p2"], rgb["other"]}) == 3
    assert np.abs(_pixels(told.answers["p1"]) - _pixels(told.answers["same"])).max() <= 1


def test_a_negative_prompt_must_count_only_with_guidance(told):
    told.make(picture(1, "a"), picture(1, "b", negative_prompt="blue"))
    told.make(picture(1, "c"), picture(1, "d", negative_prompt="blue"), shape=replace(SHAPE, guidance_scale=3.0))
    made = told.answers
    assert np.abs(_pixels(made["a"]) - _pixels(made["b"])).max() <= 1
    assert np.abs(_pixels(made["c"]) - _pixels(made["d"])).max() > 1


def test_equal_prompts_must_be_encoded_once(loaded, told):
    seen = []
    hook = loaded.pipelines.generate.text_encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        told.make(picture(1, prompt="a"), picture(2, prompt="b"), picture(3, prompt="a"))
    finally:
        hook.remove()
    assert seen == [2]


def test_an_answer_must_tell_what_was_really_done(told):
    told.make(picture(7), picture(8))
    made = told.answers["p7"]
    assert (made.seed, made.width, made.height, made.forwards, made.batch_size) == (7, 64, 48, 4, 2)
    assert len(made.rgb) == 64 * 48 * 3
    assert made.seconds.keys() == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in made.seconds.values())
    assert not made.truncated


def test_a_long_prompt_must_be_cut_and_that_be_told(loaded, told):
    long = "ab cd " * 400
    told.make(picture(1, prompt=long), picture(2, prompt=long + "and more"))
    made = told.answers["p1"]
    assert made.truncated
    assert made.prompt_tokens == count_tokens(loaded.pipelines.generate.tokenizer, long) > 512


def test_the_template_must_be_what_stands_around_a_prompt(loaded):
    tokenizer = loaded.pipelines.generate.tokenizer
    before, behind = template_of(tokenizer)
    assert loaded.ready.template == (before, behind)
    for prompt in ("a cat", "", "naïve\n<b> {{x}} 猫"):
        assert len(tokenizer(before + prompt + behind)["input_ids"]) == count_tokens(tokenizer, prompt)


def test_a_cancelled_picture_must_not_disturb_its_companions(told, alone):
    wanted = [picture(1, previews=2), picture(2), picture(3)]

    class Messages(list):
        def append(self, message):
            super().append(message)
            told.cancelled.add("p2")  # at the first preview, so in the midst of the forwards

    told.messages = Messages()
    assert told.make(*wanted) is None
    assert told.answers["p2"] == Cancelled("p2")
    for one in (wanted[0], wanted[2]):
        assert np.abs(_pixels(told.answers[one.id]) - _pixels(alone(one, SHAPE))).max() <= 1


def test_a_batch_that_nobody_waits_for_must_be_given_up_after_the_forward_that_runs(loaded, told):
    forwards = []

    def count(_module, _args, _kwargs):
        forwards.append(1)
        if len(forwards) == 2:
            told.cancelled.update({"p1", "p2"})

    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        told.make(picture(1), picture(2))
    finally:
        hook.remove()
    assert len(forwards) == 2
    assert told.answers == {"p1": Cancelled("p1"), "p2": Cancelled("p2")}


def test_a_picture_that_was_cancelled_before_must_cost_no_forward(loaded, told):
    told.cancelled.add("p1")
    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    try:
        told.make(picture(1))
    finally:
        hook.remove()
    assert told.answers == {"p1": Cancelled("p1")}


class Memory:
    """A device that holds so many pictures at a time; the fault is raised where a real one raises it."""

    def __init__(self, loaded, pictures):
        self.calls = []
        self._transformer = loaded.pipelines.generate.transformer
        self._pictures = pictures

    def __enter__(self):
        import torch

        def check(_module, args):
            self.calls.append(len(args[0]))
            if len(args[0]) > self._pictures:
                raise torch.OutOfMemoryError("CUDA out of memory")

        self._hook = self._transformer.register_forward_pre_hook(check)
        return self

    def __exit__(self, *_):
        self._hook.remove()


@given(size=st.integers(1, 6), holds=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_a_batch_that_does_not_fit_must_be_made_in_smaller_ones(loaded, size, holds):
    told = Told(loaded)
    wanted = [picture(seed) for seed in range(size)]
    with Memory(loaded, holds) as memory:
        fits = told.make(*wanted)
    assert all(isinstance(answer, Made) for answer in told.answers.values())
    assert len(told.answers) == size
    assert (fits is None) == (size <= holds)
    if fits:
        assert 1 <= fits <= holds
        # Halved until it fits, then never larger: of each size that did not fit there was one forward.
        tried = [calls for calls in dict.fromkeys(memory.calls) if calls > holds]
        assert [memory.calls.count(calls) for calls in tried] == [1] * len(tried)
        assert max(answer.batch_size for answer in told.answers.values()) == min(fits, size)


def test_previews_must_be_sent_once_when_a_batch_is_begun_again(loaded, told):
    import torch

    forwards = []

    def fail_late(_module, args):
        forwards.append(len(args[0]))
        if len(args[0]) == 2 and len(forwards) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(fail_late)
    try:
        assert told.make(picture(1, previews=2), picture(2, previews=1)) == 1
    finally:
        hook.remove()
    assert [preview.index for preview in told.previews("p1")] == [0, 1]
    assert [preview.index for preview in told.previews("p2")] == [0]
    assert all(isinstance(answer, Made) for answer in told.answers.values())


def test_a_single_picture_that_does_not_fit_must_fail_and_the_next_be_made(loaded, told):
    with Memory(loaded, 0):
        assert told.make(picture(1), picture(2)) == 1
    assert {answer.code for answer in told.answers.values()} == {"out_of_memory"}
    told.make(picture(3))
    assert isinstance(told.answers["p3"], Made)


def test_graphs_must_go_before_a_picture_is_refused_for_want_of_memory(loaded, told):
    import torch

    from zops.serving.accelerate.graphs import Graphs

    graphs = Graphs(1, free=lambda: 1, make=lambda work, _pool: work, new_pool=object, measure=lambda _pool: 1)
    graphs.get("a shape", lambda: None)
    calls = []

    def check(_module, _args):
        calls.append(bool(graphs.held_bytes))
        if graphs.held_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(check)
    try:
        told.make(picture(1))
    finally:
        hook.remove()
    assert calls[:2] == [True, False]
    assert isinstance(told.answers["p1"], Made)


def test_memory_that_is_short_for_ever_must_not_be_tried_for_ever(loaded, told):
    from zops.serving.accelerate.graphs import Graphs

    graphs = Graphs(1, free=lambda: 1, make=lambda work, _pool: work, new_pool=object, measure=lambda _pool: 1)
    with Memory(loaded, 0) as memory:
        keep = loaded.pipelines.generate.transformer.register_forward_pre_hook(
            lambda *_: graphs.get("a shape", lambda: None) and None, prepend=True
        )
        told.make(picture(1))
        keep.remove()
    assert told.answers["p1"].code == "out_of_memory"
    assert memory.calls == [1, 1]


def test_memory_that_the_host_has_not_must_be_told_from_other_errors(loaded, told):
    import torch

    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(
        lambda _module, args: torch.empty(1 << (50 if len(args[0]) > 1 else 1), dtype=torch.uint8)[:0].tolist() or None
    )
    try:
        assert told.make(picture(1), picture(2)) == 1
    finally:
        hook.remove()
    assert all(isinstance(answer, Made) for answer in told.answers.values())


def test_a_picture_that_cannot_be_made_must_not_fail_its_companions(told):
    told.make(picture(1, source=SOURCE), picture(2, source=SOURCE[:-1]), picture(3, source=None), shape=EDIT)
    assert isinstance(told.answers["p1"], Made)
    for name in ("p2", "p3"):
        assert isinstance(told.answers[name], Failed)
        assert "64x48" in told.answers[name].message


def test_a_picture_that_breaks_the_call_must_fail_alone(told, capfd):
    told.make(picture(1), replace(picture(2), seed=-(1 << 70)), picture(3))
    assert isinstance(told.answers["p2"], Failed)
    assert told.answers["p2"].code == "generation_failed"
    assert isinstance(told.answers["p1"], Made)
    assert isinstance(told.answers["p3"], Made)
    assert "Traceback" in capfd.readouterr().err


def test_a_shape_that_the_pipeline_refuses_must_be_answered_and_the_next_picture_be_made(told):
    told.make(picture(1), shape=replace(SHAPE, width=65))
    assert told.answers["p1"].code == "generation_failed"
    told.make(picture(2))
    assert isinstance(told.answers["p2"], Made)


def test_values_that_are_no_numbers_must_not_leave_as_a_picture(loaded, told):
    layer = loaded.pipelines.generate.vae.decoder.conv_out
    kept = layer.bias.data.clone()
    layer.bias.data[0] = float("nan")
    try:
        told.make(picture(1))
    finally:
        layer.bias.data.copy_(kept)
    assert told.answers["p1"].code == "image_invalid"


@pytest.mark.parametrize("strength", [0.05, 0.25, 0.3, 0.6, 1.0])
def test_an_edit_must_run_as_many_forwards_as_it_tells(loaded, told, strength):
    forwards = []
    hook = loaded.pipelines.generate.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        told.make(picture(1, source=SOURCE), shape=replace(EDIT, strength=strength))
    finally:
        hook.remove()
    assert told.answers["p1"].forwards == len(forwards) == forwards_run(replace(EDIT, strength=strength))


def test_an_edit_that_would_run_no_forward_must_fail_with_the_reason(told):
    told.make(picture(1, source=SOURCE), shape=replace(EDIT, strength=0.0))
    assert told.answers["p1"].code == "generation_failed"
    assert "strength" in told.answers["p1"].message


def test_a_weak_edit_must_stay_nearer_to_its_source_than_a_strong_one(loaded):
    def noise_of(strength):
        """How far the latents that an edit begins with are from those of another seed: the share of noise."""
        shape = replace(EDIT, strength=strength)
        one, two = (_watched(loaded, shape, picture(seed, prompt="a", source=SOURCE))[0] for seed in (1, 2))
        return float((one[0][0] - two[0][0]).abs().mean())

    assert noise_of(0.3) < noise_of(0.6) < noise_of(1.0)


def test_previews_must_be_small_views_at_even_distances(told):
    told.make(picture(1, previews=2), picture(2), shape=replace(SHAPE, forwards=6))
    seen = told.previews("p1")
    assert [preview.index for preview in seen] == [0, 1]
    assert {(preview.width, preview.height, len(preview.rgb)) for preview in seen} == {(8, 6, 8 * 6 * 3)}
    assert not told.previews("p2")
    assert told.messages.index(seen[-1]) < told.messages.index(told.answers["p1"])


def _watched(loaded, shape, wanted):
    """Return the steps of a call and its final latents."""
    steps = []
    captions = encode_prompts(loaded.pipelines, shape, [wanted])
    final = denoise(
        loaded.pipelines, shape, [wanted], captions, lambda step: steps.append((step.latents().clone(), step)) or True
    )
    return steps, final[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["generate", "edit"])
def test_previews_must_come_nearer_to_the_finished_picture(loaded, mode, seed):
    shape = replace(SHAPE, forwards=8, mode=mode)
    steps, final = _watched(loaded, shape, picture(seed, source=SOURCE))
    clean = [predict_clean(before[0], after[0], step) for (before, _), (after, step) in pairwise(steps)]
    # In the sixteen channels: random weights have no colours that a linear map could find. They also swerve a little
    # where they begin with a source of noise, so forwards are compared two apart.
    errors = [float((guess - final).abs().mean()) for guess in clean]
    assert all(later < earlier for earlier, later in zip(errors, errors[2:], strict=False))
    assert errors[-1] < 1e-5, "the last forward's prediction is the finished picture"
    assert errors[0] < float((steps[1][0][0] - final).abs().mean()) / 2, "the noise must be out of the preview"


def test_the_projection_must_find_a_map_that_is_there():
    import torch

    generator = _torch_seed(0)
    matrix, offset = torch.rand(16, 3, generator=generator) / 40, torch.tensor([0.4, 0.5, 0.6])
    latents = torch.randn(16, 32, 24, generator=generator)
    small = (latents.reshape(16, -1).T @ matrix + offset).T.reshape(3, 32, 24)
    pixels = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = Projection.fit(latents, pixels)
    other = torch.randn(16, 4, 4, generator=generator)
    wanted = (other.reshape(16, -1).T @ matrix + offset).T.reshape(3, 4, 4).clamp(0, 1)
    assert float((found.apply(other) - wanted).abs().max()) < 0.01


def test_captions_must_be_none_for_a_negative_prompt_that_does_not_count(loaded):
    captions = encode_prompts(loaded.pipelines, SHAPE, [picture(1, negative_prompt="x")])
    assert isinstance(captions, Captions)
    assert (len(captions.positive), captions.negative) == (1, [])

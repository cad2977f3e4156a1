"""Each transformation of a preset equals the plain pipeline: tiny model, float32, on the CPU."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

from zops.serving.accelerate import denoise, gate  # noqa: E402 - torch may be missing
from zops.serving.accelerate.attention import attend_natively, attend_packed, probe, runs  # noqa: E402
from zops.serving.accelerate.decoder import FusedDecoder  # noqa: E402
from zops.serving.accelerate.fp8 import Fp8Linear, stacked  # noqa: E402
from zops.serving.accelerate.fused import fuse_blocks  # noqa: E402
from zops.serving.accelerate.preset import apply, to_rgb  # noqa: E402
from zops.serving.accelerate.rows import PLAIN  # noqa: E402
from zops.serving.accelerate.schedule import make_schedule  # noqa: E402

SHORT = "a cat"
LONG = "a lighthouse on a cliff at sunrise, " * 4
PROMPTS = [SHORT, LONG, "two dogs"]


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    """The plain pipeline; nothing may change it."""
    import diffusers

    pipeline = diffusers.ZImagePipeline.from_pretrained(str(tiny_model), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
    return pipeline


@pytest.fixture
def twin(pipeline):
    """The same pipeline again, to transform."""
    return type(pipeline)(**{name: copy.deepcopy(part) for name, part in pipeline.components.items()})


def noise(count, height=64, width=96):
    return torch.cat([
        torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
        for seed in range(count)
    ])  # fmt: skip


def made_by(pipeline, prompts, latents, *, forwards=4, guidance=0.0, kind="latent"):
    return pipeline(
        prompt=list(prompts),
        latents=latents.clone(),
        height=latents.shape[2] * 8,
        width=latents.shape[3] * 8,
        num_inference_steps=forwards,
        guidance_scale=guidance,
        output_type=kind,
    ).images


def largest(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, SHORT], PROMPTS], ids=["one", "equal", "mixed"])
@pytest.mark.parametrize("size", [(64, 96), (48, 80)], ids=["whole", "padded"])
def test_the_fused_loop_must_equal_the_pipeline(pipeline, twin, prompts, size):
    latents = noise(len(prompts), *size)
    applied = apply(twin, "bf16")
    got = applied.denoise(applied.encode(prompts), latents, forwards=4)
    assert largest(got, made_by(pipeline, prompts, latents)) < 5e-6


def test_the_plain_loop_must_equal_the_pipeline(pipeline, twin):
    latents = noise(3)
    applied = apply(twin, "eager")
    got = applied.denoise(applied.encode(PROMPTS), latents, forwards=8)
    assert largest(got, made_by(pipeline, PROMPTS, latents, forwards=8)) == 0


def test_guidance_must_equal_the_pipelines(pipeline, twin):
    latents = noise(2)
    prompts = [SHORT, LONG]
    applied = apply(twin, "bf16")
    got = applied.denoise(
        applied.encode(prompts), latents, forwards=3, negative=applied.encode(["", ""]), guidance_scale=1.5
    )
    assert largest(got, made_by(pipeline, prompts, latents, forwards=3, guidance=1.5)) < 1e-5


def test_a_pipeline_with_fused_blocks_must_still_answer_its_own_call(pipeline, twin):
    latents = noise(3)
    expected = made_by(pipeline, PROMPTS, latents, kind="np")
    fuse_blocks(twin.transformer, PLAIN, fp8=False)
    assert abs(made_by(twin, PROMPTS, latents, kind="np") - expected).max() < 1e-5


def test_an_image_must_not_depend_on_its_batch(twin):
    latents = noise(3)
    applied = apply(twin, "bf16")
    together = applied.denoise(applied.encode(PROMPTS), latents, forwards=4)
    for i, prompt in enumerate(PROMPTS):
        alone = applied.denoise(applied.encode([prompt]), latents[i : i + 1], forwards=4)
        assert largest(together[i : i + 1], alone) < 5e-6


def test_a_second_call_must_give_the_same_and_another_schedule_its_own(pipeline, twin):
    latents = noise(1)
    applied = apply(twin, "bf16")
    for forwards in (4, 2, 4):
        got = applied.denoise(applied.encode([SHORT]), latents, forwards=forwards)
        assert largest(got, made_by(pipeline, [SHORT], latents, forwards=forwards)) < 5e-6


def test_a_call_that_skips_must_continue_one_that_stopped(twin):
    latents = noise(1)
    applied = apply(twin, "bf16")
    embeds = applied.encode([SHORT])
    whole = applied.denoise(embeds, latents, forwards=6)
    seen = []

    def stop_after_two(index, now):
        seen.append(now().clone())
        return index < 1

    with pytest.raises(denoise.Stopped):
        applied.denoise(embeds, latents, forwards=6, watch=stop_after_two)
    assert len(seen) == 2
    assert largest(applied.denoise(embeds, seen[1], forwards=6, skip=2), whole) < 1e-6


def test_embeds_must_equal_the_padded_ones(pipeline, twin):
    expected, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    for got, want in zip(apply(twin, "bf16").encode(PROMPTS), expected, strict=True):
        assert largest(got, want) < 5e-5 * float(want.abs().max())


def test_a_prompt_beyond_the_limit_must_be_cut_as_the_pipeline_cuts(pipeline, twin):
    prompt = "far too long " * 100
    (expected,), _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    (got,) = apply(twin, "bf16").encode([prompt])
    assert len(expected) == 512
    assert largest(got, expected) < 5e-5 * float(expected.abs().max())


def test_decoding_must_equal_the_vae(pipeline, twin):
    latents = noise(2)
    expected = pipeline.vae.decode(latents, return_dict=False)[0]
    with torch.inference_mode():
        assert largest(FusedDecoder(twin.vae)(latents), expected) < 1e-5


def test_decoding_must_split_attention_without_a_difference(pipeline, twin, monkeypatch):
    latents = noise(1)
    expected = pipeline.vae.decode(latents, return_dict=False)[0]
    monkeypatch.setattr("zops.serving.accelerate.decoder._SCORES", 700)
    with torch.inference_mode():
        assert largest(FusedDecoder(twin.vae)(latents), expected) < 1e-5


def test_pixels_must_equal_the_pipelines(pipeline, twin):
    latents = noise(2)
    expected = (made_by(pipeline, [SHORT, LONG], latents, kind="np") * 255).round().astype("uint8")
    applied = apply(twin, "bf16")
    got = to_rgb(applied.decode(applied.denoise(applied.encode([SHORT, LONG]), latents, forwards=4))).numpy()
    assert abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_fp8_must_stay_near_and_say_that_it_was_not_multiplied_directly(pipeline, twin):
    latents = noise(2)
    applied = apply(twin, "fp8", fp8_text=True)
    got = applied.denoise(applied.encode([SHORT, LONG]), latents, forwards=4)
    expected = made_by(pipeline, [SHORT, LONG], latents)
    distance = float((got - expected).norm() / expected.norm())
    assert 1e-5 < distance < 0.2
    assert "fp8 products" not in applied.done


def as_linear(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def test_an_fp8_product_must_be_within_its_format():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 64, generator=generator), torch.randn(48, 64, generator=generator)
    x[3] *= 1000  # a token of large values must not cost the others
    layer = stacked(as_linear(weight), fp8=True)
    assert isinstance(layer, Fp8Linear)
    got, expected = layer(PLAIN.quantise(x)), x @ weight.T
    assert float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 0.06
    assert not stacked(as_linear(weight[:, :40]), fp8=True).takes_fp8


def test_rows_of_zeros_must_quantise_to_zeros():
    quantised = PLAIN.quantise(torch.zeros(2, 16))
    assert (quantised.values.float() == 0).all()
    assert (quantised.scales > 0).all()


def test_packed_attention_must_keep_images_apart():
    qkv = torch.randn(2 * 5 + 7, 3 * 2 * 8, generator=torch.Generator().manual_seed(0))
    assert runs([5, 5, 7]) == ((5, 2), (7, 1))
    got = attend_packed(qkv, 8, runs([5, 5, 7]), attend_natively)
    for start, length in ((0, 5), (5, 5), (10, 7)):
        alone = attend_packed(qkv[start : start + length], 8, ((length, 1),), attend_natively)
        assert largest(got[start : start + length], alone) < 1e-6


def test_the_probe_must_put_what_works_first_and_say_what_is_wrong_with_the_rest():
    judged = probe(torch.device("cpu"), torch.float32, heads=2, head=16, tokens=64)
    assert judged[0].usable
    assert judged[0].seconds > 0
    assert {backend.name for backend in judged if not backend.usable} >= {"cudnn"}


@pytest.mark.parametrize("skip", [0, 3])
def test_the_schedule_must_be_the_schedulers(pipeline, skip):
    schedule = make_schedule(pipeline.scheduler, 8, tokens=4096, skip=skip)
    assert len(schedule) == 8 - skip
    assert math.isclose(sum(schedule.changes), -schedule.sigmas[0], rel_tol=1e-6)
    assert skip or schedule.sigmas[0] == 1.0


def test_the_gate_must_pass_eager_and_refuse_noise_black_and_nan(twin):
    device = torch.device("cpu")
    applied = apply(twin, "eager")
    references = gate.render(applied, size=64, forwards=2, device=device)
    assert gate.judge("eager", references, references).passed
    noisy = [image + 0.1 * torch.randn(image.shape) for image in references]
    assert "PSNR" in gate.judge("fp8", [image.clamp(0, 1) for image in noisy], references).trouble
    for wrong, said in ((0.0, "black"), (0.5, "flat"), (math.nan, "not a number")):
        broken = [*references[:-1], torch.full_like(references[0], wrong)]
        assert gate.judge("bf16", broken, references).trouble == f"an image is {said}"


def test_psnr_and_ssim_must_be_what_they_are_elsewhere():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert gate.psnr_db(image, image) == math.inf
    assert gate.ssim(image, image) == pytest.approx(1.0)
    assert gate.psnr_db(image * 0, image * 0 + 0.1) == pytest.approx(20.0)
    # Two flat images: only the term of the means is left.
    assert gate.ssim(image * 0, image * 0 + 0.1) == pytest.approx(1e-4 / (0.01 + 1e-4), rel=1e-4)


def test_a_loop_that_replays_must_compute_what_a_loop_that_does_not_does(tiny_model):
    """A graph reads from the tensors that it was captured with: here work that is kept, for want of a GPU."""
    from tests.support.pipelines import load_here
    from zops.serving.accelerate.denoise import Denoiser
    from zops.serving.accelerate.graphs import Graphs

    pipeline = load_here(tiny_model, preset="bf16", force_preset=True).pipelines.generate
    plain = Denoiser(pipeline.transformer, pipeline.scheduler)
    graphed = Denoiser(pipeline.transformer, pipeline.scheduler, graphs=True)
    replayed = []

    def keep(work, _pool):
        work()  # as a capture does
        return lambda: replayed.append(1) or work()

    graphed.graphs = Graphs(
        0.5, free=lambda: 100, make=keep, new_pool=object, measure=lambda _pool: 30 * len(graphed.graphs.held_bytes)
    )
    embeds = [torch.randn(20, pipeline.transformer.config.cap_feat_dim) for _ in range(2)]
    for edge in (8, 12, 16, 8, 12, 16, 8, 8):  # two fit into the pool
        noise = torch.randn(2, pipeline.transformer.in_channels, edge, 8)
        expected = plain(embeds, noise, forwards=3)
        torch.testing.assert_close(graphed(embeds, noise, forwards=3), expected, rtol=1e-6, atol=1e-6)
    assert len(replayed) == 5 * 3, "the first call with each size is computed plainly"

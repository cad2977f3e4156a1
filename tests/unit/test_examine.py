"""What a deployment will need, from the catalog and from what its cache has already."""

import pytest

from zops.cache.layout import place
from zops.cache.manifest import Manifest
from zops.catalog import Z_IMAGE_TURBO
from zops.health.needs import needs
from zops.spec import Spec


def spec(tmp_path, **settings) -> Spec:
    return Spec.model_validate({"cache": {"dir": tmp_path}} | settings)


def test_an_empty_cache_must_lack_the_whole_pinned_manifest(tmp_path):
    manifest = Manifest.from_json(Z_IMAGE_TURBO.pinned())
    need = needs(spec(tmp_path))
    assert (need.disk_bytes, need.files) == (manifest.size, len(manifest.files))


def test_what_is_there_in_its_right_size_must_not_be_missing(tmp_path):
    manifest = Manifest.from_json(Z_IMAGE_TURBO.pinned())
    directory = place(tmp_path, Z_IMAGE_TURBO.id, manifest.revision)
    small = [entry for entry in manifest.files if entry.size < 10_000]
    for entry in small:
        (directory / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (directory / entry.path).write_bytes(bytes(entry.size))
    (directory / small[0].path).write_bytes(b"cut")
    need = needs(spec(tmp_path))
    assert need.files == len(manifest.files) - len(small) + 1


def test_a_verified_snapshot_must_lack_nothing_and_a_lost_file_be_counted(tiny_model, tmp_path):
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(tiny_model, cache)
    tiny = spec(cache, model="zops/synthetic-tiny", gpus="none")
    assert needs(tiny).disk_bytes == 0
    largest = max(cache.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    largest.unlink()
    assert (needs(tiny).disk_bytes, needs(tiny).files) == (size, 1)


def test_a_model_whose_manifest_nobody_knows_must_have_an_unknown_need(tmp_path):
    need = needs(spec(tmp_path, model="someone/else"))
    assert (need.disk_bytes, need.gpu_weights_bytes, need.load_bytes) == (None, 0, 0)


@pytest.mark.parametrize(
    ("settings", "weights_gb", "load_gb"),
    [
        ({}, 20.5, 4.0),
        ({"serve": {"dtype": "float32"}}, 41.0, 4.0),
        ({"gpus": "none"}, 41.0, 45.0),
        ({"gpus": "none", "serve": {"dtype": "bfloat16"}}, 20.5, 24.5),
    ],
)
def test_weights_must_take_two_bytes_a_parameter_or_four(tmp_path, settings, weights_gb, load_gb):
    need = needs(spec(tmp_path, **settings))
    assert round(need.gpu_weights_bytes / 1e9, 1) == weights_gb
    assert round(need.load_bytes / 1e9, 1) == load_gb


def test_activations_must_grow_with_the_largest_allowed_image(tmp_path):
    small = needs(spec(tmp_path, serve={"max_pixels": 1024 * 1024}))
    assert small.gpu_activation_bytes == 2_700_000_000
    assert needs(spec(tmp_path)).gpu_activation_bytes == 4 * 2_700_000_000

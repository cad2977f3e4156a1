"""What a start does and tells: phases, facts, and a look at the first image before anybody gets one."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.pipelines import load_here, settings_for
from zops.cache.manifest import FileEntry, Manifest, read_manifest, stat_key, write_manifest, write_marker
from zops.errors import SnapshotDamaged
from zops.serving.loader import load
from zops.serving.messages import PHASES, Entered, Passed
from zops.serving.target import prepare_environment
from zops.serving.warmup import WarmupFailed


def _told_by_a_start(snapshot):
    told = []
    loaded = load(settings_for(snapshot), told.append)
    return loaded, told


def test_a_start_must_tell_each_phase_in_its_order_with_its_seconds(tiny_model):
    began = time.monotonic()
    _, told = _told_by_a_start(tiny_model)
    elapsed = time.monotonic() - began
    assert [message.phase for message in told if isinstance(message, Entered)] == list(PHASES)
    passed = [message for message in told if isinstance(message, Passed)]
    assert [message.phase for message in passed] == list(PHASES)
    assert all(message.seconds > 0 for message in passed)
    own = {message.phase: message.seconds for message in passed if message.phase != "read"}
    assert sum(own.values()) <= elapsed, "only the read goes on beside the others"


def test_a_start_must_tell_what_it_runs_on_and_what_it_read(tiny_model):
    ready = load_here(tiny_model).ready
    assert (ready.device, ready.dtype, ready.memory_free, ready.pixel_bytes) == ("cpu", "float32", None, None)
    assert ready.versions.keys() == {"zops", "torch", "diffusers", "transformers"}
    weights = [path.stat().st_size for path in tiny_model.rglob("*.safetensors")]
    assert ready.cache_bytes == sum(weights)
    assert 0 < ready.cache_seconds < 30


def test_the_weights_must_be_those_of_the_pipelines_own_loader(tiny_model):
    import torch
    from diffusers import ZImagePipeline

    ours = load_here(tiny_model).pipelines.generate
    theirs = ZImagePipeline.from_pretrained(str(tiny_model), dtype=torch.float32, local_files_only=True)
    assert ours.components.keys() == theirs.components.keys()
    for name in ("transformer", "text_encoder", "vae"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert not mine.training
        assert mine.dtype == other.dtype
        assert mine.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in mine.state_dict().items())
        assert all(torch.equal(tensor, dict(other.named_buffers())[key]) for key, tensor in mine.named_buffers())
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    assert ours.vae.use_slicing
    text = "naïve <|im_end|> 猫"
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]


def test_bfloat16_must_be_what_the_weights_are_cast_to(tiny_model):
    loaded = load(settings_for(tiny_model, dtype="bfloat16"), lambda _message: None)
    assert loaded.ready.dtype == "bfloat16"
    assert str(loaded.pipelines.generate.transformer.dtype) == "torch.bfloat16"


def _reseal(snapshot):
    """Make a changed copy a verified snapshot: the hashes were right, the weights are not."""
    import hashlib

    old = read_manifest(snapshot)
    entries = tuple(
        FileEntry(entry.path, len(data), hashlib.sha256(data).hexdigest())
        for entry in old.files
        for data in [(snapshot / entry.path).read_bytes()]
    )
    manifest = Manifest(old.model, old.revision, entries, origin=old.origin, source=old.source)
    write_manifest(snapshot, manifest)
    write_marker(snapshot, manifest, {entry.path: stat_key(snapshot / entry.path) for entry in entries})


@pytest.mark.parametrize(
    ("weight", "bias", "fault"), [(None, float("nan"), "not a number"), (0.0, -9.0, "black"), (0.0, 0.5, "flat")]
)
def test_a_first_image_that_is_no_picture_must_end_the_start(tiny_model, tmp_path, weight, bias, fault):
    from safetensors.torch import load_file, save_file

    snapshot = tmp_path / "tiny"
    shutil.copytree(tiny_model, snapshot)
    file = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if weight is not None:
        tensors["decoder.conv_out.weight"].fill_(weight)
    tensors["decoder.conv_out.bias"].fill_(bias)
    save_file(tensors, file, metadata={"format": "pt"})
    _reseal(snapshot)
    with pytest.raises(WarmupFailed, match=fault):
        load_here(snapshot)


def test_a_snapshot_that_changed_must_not_be_read(tiny_model, tmp_path):
    snapshot = tmp_path / "tiny"
    shutil.copytree(tiny_model, snapshot)
    (snapshot / "vae" / "config.json").write_text("{}")
    told = []
    with pytest.raises(SnapshotDamaged):
        load(settings_for(snapshot), told.append)
    assert told[-1] == Entered("verify")


def test_threads_and_gpus_must_reach_the_libraries_by_the_environment(tiny_model, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    prepare_environment(settings_for(tiny_model, threads=3, gpus="1"))
    assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("3", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert int(os.environ["GOMP_SPINCOUNT"]) <= 1000
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    prepare_environment(settings_for(tiny_model))
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_the_worker_must_be_imported_without_torch():
    code = "import sys, zops.serving.worker; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert not {"torch", "diffusers", "transformers", "numpy", "fastapi"} & set(done.stdout.split())

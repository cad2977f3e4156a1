"""Synthetic models on the disk: whole or absent, the same every time, and read by the real libraries."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zops.cache.manifest import read_manifest, require_verified
from zops.cache.synthetic import synthesize_snapshot
from zops.catalog.configs import CONFIGS, Size
from zops.catalog.shards import BYTES, WeightsFile, plan
from zops.catalog.synthetic import Synthetic, synthesize
from zops.catalog.tensors import text_encoder_tensors, transformer_tensors, vae_tensors
from zops.catalog.tokenizer import SPECIAL_IDS
from zops.cli.main import run
from zops.errors import HostShort, SnapshotDamaged, UsageError
from zops.events import Event, Finished, Progressed, Started

SIZES: list[Size] = ["tiny", "full"]


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory with size and time of its last change, hidden ones included."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


# --- on the disk


def test_a_synthesized_directory_must_be_a_verified_snapshot_at_once(tmp_path: Path) -> None:
    made = synthesize_snapshot(tmp_path / "new" / "tiny", "tiny")
    manifest = require_verified(made.path)
    assert (manifest.model, manifest.revision, manifest.origin) == ("zops/synthetic-tiny", "seed-0", "local")
    assert made.changed
    assert made.manifest == manifest
    for entry in manifest.files:
        body = (made.path / entry.path).read_bytes()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (entry.size, entry.sha256)
    assert set(tree(made.path)) - {e.path for e in manifest.files} == {".zops/manifest.json", ".zops/verified.json"}
    assert [p.name for p in made.path.parent.iterdir()] == ["tiny"]


def test_files_must_be_those_of_the_plan(tiny_model: Path) -> None:
    manifest = read_manifest(tiny_model)
    assert manifest is not None
    assert {e.path: e.size for e in manifest.files} == {f.path: f.size for f in plan("tiny").files}


def test_the_digest_must_depend_on_the_seed_and_not_on_the_number_of_threads(tiny_model: Path, tmp_path: Path) -> None:
    first = require_verified(tiny_model)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        again = synthesize_snapshot(tmp_path / "again", "tiny").manifest
    finally:
        os.sched_setaffinity(0, cores)
    assert again.digest == first.digest
    other = synthesize_snapshot(tmp_path / "other", "tiny", seed=1).manifest
    assert other.revision == "seed-1"
    same = {e.path for e in first.files} & {e.path for e in set(first.files) & set(other.files)}
    assert same == {f.path for f in plan("tiny").files if not isinstance(f, WeightsFile)}


def test_the_second_run_must_find_it_there_and_change_nothing(tmp_path: Path) -> None:
    synthesize_snapshot(tmp_path / "tiny", "tiny")
    before = tree(tmp_path)
    again = synthesize_snapshot(tmp_path / "tiny", "tiny")
    assert not again.changed
    assert tree(tmp_path) == before


def test_a_damaged_synthetic_snapshot_must_not_pass_for_being_there(tmp_path: Path) -> None:
    made = synthesize_snapshot(tmp_path / "tiny", "tiny")
    (made.path / "vae/config.json").write_text("{}")
    with pytest.raises(SnapshotDamaged, match=r"vae/config\.json"):
        synthesize_snapshot(made.path, "tiny")


@pytest.mark.parametrize("occupant", ["a stranger's file", "another seed", "a plain file"])
def test_a_place_that_is_taken_must_be_refused_and_left_as_it_was(occupant: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if occupant == "another seed":
        synthesize_snapshot(place, "tiny", seed=1)
    elif occupant == "a plain file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError) as refusal:
        synthesize_snapshot(place, "tiny")
    assert refusal.value.hint
    assert tree(tmp_path) == before


def test_an_empty_directory_must_be_filled_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    synthesize_snapshot(tmp_path / "link", "tiny")
    require_verified(tmp_path / "disk")
    assert (tmp_path / "link").is_symlink()


def test_too_small_a_disk_must_be_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    before = tree(tmp_path)
    with pytest.raises(HostShort) as refusal:
        synthesize_snapshot(tmp_path / "full", "full")
    assert refusal.value.code == "disk-full"
    assert refusal.value.details["needed_bytes"] == plan("full").size
    assert tree(tmp_path) == before
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), HostShort),
        (OSError(errno.EROFS, "Read-only file system"), HostShort),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "read-only", "broken", "interrupted"],
)
def test_a_run_that_fails_at_the_last_moment_must_leave_nothing(
    failure: BaseException, raised: type[BaseException], tmp_path: Path
) -> None:
    def fail(_hidden: Path, _made: Synthetic) -> None:
        raise failure

    place = tmp_path / "nest"
    place.mkdir()
    with pytest.raises(raised):
        synthesize(place / "tiny", "tiny", seal=fail)
    assert list(place.iterdir()) == []


def test_a_killed_run_must_leave_nothing_that_looks_whole_and_not_hinder_the_next(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from zops.catalog.synthetic import synthesize\n"
        "def wait(hidden, made): print('sealing', flush=True); time.sleep(600)\n"
        "synthesize(Path(sys.argv[1]), 'tiny', seal=wait)\n"
    )
    place = tmp_path / "nest" / "tiny"
    argv = [sys.executable, "-c", program, str(place)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sealing\n"
        process.send_signal(signal.SIGKILL)
    assert not place.exists()
    assert [p.name for p in place.parent.iterdir()] == [".tiny.part"]
    synthesize_snapshot(place, "tiny")
    require_verified(place)
    assert [p.name for p in place.parent.iterdir()] == ["tiny"]


def test_progress_must_count_every_byte_once(tmp_path: Path) -> None:
    events: list[Event] = []
    made = synthesize_snapshot(tmp_path / "tiny", "tiny", report=events.append)
    counts = [event.done for event in events if isinstance(event, Progressed)]
    assert isinstance(events[0], Started)
    assert events[0].total == made.manifest.size
    assert counts == sorted(counts)
    assert counts[-1] == made.manifest.size
    assert isinstance(events[-1], Finished)


# --- the command


def test_the_command_must_synthesize_and_say_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["model", "synthesize", str(tmp_path / "m"), "--size", "tiny", "--seed", "3", "--output", "json"]
    for changed in (True, False):
        assert run(argv) == 0
        body = json.loads(capsys.readouterr().out)
        manifest = require_verified(tmp_path / "m")
        assert body == {
            "path": str(tmp_path / "m"),
            "model": "zops/synthetic-tiny",
            "revision": "seed-3",
            "files": len(manifest.files),
            "size_bytes": manifest.size,
            "manifest_digest": manifest.digest,
            "changed": changed,
        }


def test_the_command_must_refuse_a_directory_in_use_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(["model", "synthesize", str(tmp_path), "--size", "tiny", "--output", "json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["code"] == "directory-not-empty"


def test_the_list_must_name_every_model_with_what_is_pinned_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "list", "--output", "json"]) == 0
    entries = {entry["model"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(entries) == {"Tongyi-MAI/Z-Image-Turbo", "zops/synthetic-tiny", "zops/synthetic-full"}
    # The sum of the nineteen runtime files of the model's repository.
    assert entries["Tongyi-MAI/Z-Image-Turbo"]["size_bytes"] == 32_848_305_533
    assert entries["zops/synthetic-tiny"]["size_bytes"] is None
    assert {entry["forwards"] for entry in entries.values()} == {8}


# --- read by the real libraries (torch, diffusers, transformers: imported inside, because it takes seconds)


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(tiny_model, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, prompt: str, seed: int) -> Any:
    import torch

    generator = [torch.Generator().manual_seed(seed)]
    options = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 0.0, "output_type": "np"}
    return pipe([prompt], generator=generator, **options).images[0]


@pytest.mark.parametrize("size", SIZES)
def test_tensors_must_be_those_of_the_real_classes_in_name_shape_and_order(size: Size) -> None:
    import torch
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    configs = CONFIGS[size]
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(dict(configs.transformer))
        vae = AutoencoderKL.from_config(dict(configs.vae))
        text_encoder = Qwen3Model(Qwen3Config(**configs.text_encoder))
    ours = {
        "transformer": [(t.name, t.shape) for t in transformer_tensors(configs.transformer)],
        "vae": [(t.name, t.shape) for t in vae_tensors(configs.vae)],
        "text_encoder": [(t.name, t.shape) for t in text_encoder_tensors(configs.text_encoder)],
    }
    theirs = {
        "transformer": [(name, tuple(t.shape)) for name, t in transformer.state_dict().items()],
        "vae": [(name, tuple(t.shape)) for name, t in vae.state_dict().items()],
        "text_encoder": [(f"model.{name}", tuple(t.shape)) for name, t in text_encoder.state_dict().items()],
    }
    assert ours == theirs


def test_the_safetensors_library_must_read_our_files_and_write_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    paths = sorted(tiny_model.rglob("*.safetensors"))
    assert len(paths) == 7
    for path in paths:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(path)
        save_file(tensors, tmp_path / "theirs", metadata)
        assert (tmp_path / "theirs").read_bytes() == path.read_bytes()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_every_tensor_must_have_the_type_of_the_real_checkpoint(tiny_model: Path) -> None:
    from safetensors import safe_open

    found = {}
    for path in tiny_model.rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found[path.parent.name] = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - not a dict
    assert found == {"transformer": {"F32"}, "text_encoder": {"BF16"}, "vae": {"BF16"}}


def test_a_part_of_the_full_model_must_be_written_as_planned(tmp_path: Path) -> None:
    from safetensors import safe_open

    from zops.catalog.shards import Plan
    from zops.catalog.synthetic import _write
    from zops.events import Task, silent

    # The smallest weights of the full size: 0.1 GB, and tensors of 95 blocks.
    name = "text_encoder/model-00003-of-00003.safetensors"
    (part,) = (file for file in plan("full").files if file.path == name)
    assert isinstance(part, WeightsFile)
    (written,) = _write(tmp_path, Plan((part,)), 0, Task(silent, "part", part.size))
    assert written.size == (tmp_path / name).stat().st_size == 99_630_640
    with safe_open(tmp_path / name, "pt") as opened:
        down = opened.get_tensor("model.layers.35.mlp.down_proj.weight").float()
    assert down.shape == (2560, 9728)
    assert abs(float(down.std()) - 0.6 / 9728**0.5) < 1e-5
    assert BYTES[part.dtype] == 2


def test_the_pipeline_must_make_an_image_that_is_neither_flat_nor_black(pipeline: Any) -> None:
    import numpy as np

    made = image(pipeline, "a lighthouse at dawn", 0)
    assert made.shape == (64, 64, 3)
    assert np.isfinite(made).all()
    assert 0.2 < made.mean() < 0.8
    assert made.std() > 0.05
    # Not saturated either: a picture of only black and white would hide differences.
    assert ((made > 0.01) & (made < 0.99)).mean() > 0.9


def test_the_image_must_depend_on_prompt_and_seed_and_on_nothing_else(pipeline: Any) -> None:
    import numpy as np

    first = image(pipeline, "a lighthouse at dawn", 0)
    assert np.array_equal(first, image(pipeline, "a lighthouse at dawn", 0))
    assert np.abs(first - image(pipeline, "a lighthouse at dawn", 1)).mean() > 0.02
    assert np.abs(first - image(pipeline, "two cats on a red sofa", 0)).mean() > 0.002


def test_the_tokenizer_must_be_qwens_with_a_chat_template_and_lose_nothing(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    for text in ("The king in the north, 1893", "灯塔 🚢 été\n\n  x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer(prompt).input_ids[0] == SPECIAL_IDS["<|im_start|>"]
    config = pipeline.text_encoder.config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert max(SPECIAL_IDS.values()) < config.vocab_size

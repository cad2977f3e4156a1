"""The streaming loader on a CPU: the same code with the copies to the GPU left out."""

import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from zops.cache.manifest import read_manifest, read_marker, write_marker
from zops.cache.verify import verify
from zops.errors import SnapshotDamaged
from zops.events import silent
from zops.serving import assemble, streaming
from zops.serving.streaming import WeightStream


@pytest.fixture
def snapshot(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "snapshot")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that tensors of the tiny model lie across several."""
    monkeypatch.setattr(streaming, "CHUNK", 64 << 10)


def paths_of(snapshot):
    return [path for group in assemble.weight_files(snapshot).values() for path in group]


def assembled(snapshot, dtype):
    files = assemble.weight_files(snapshot)
    streamed = WeightStream(snapshot, paths_of(snapshot), "cpu", dtype).result()
    models = {}
    for component, group in files.items():
        tensors = {name: tensor for path in group for name, tensor in streamed.files[path].items()}
        models[component] = assemble.give_weights(assemble.make_empty(snapshot, component), component, tensors, "cpu")
    from diffusers import ZImagePipeline

    return ZImagePipeline(**models, **assemble.load_rest(snapshot, list(files)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_assembled_pipeline_must_equal_the_one_that_diffusers_loads(snapshot, dtype):
    from diffusers import ZImagePipeline

    ours, theirs = assembled(snapshot, dtype), ZImagePipeline.from_pretrained(str(snapshot), dtype=dtype)
    for component in assemble.weight_files(snapshot):
        mine, other = getattr(ours, component), getattr(theirs, component)
        assert type(mine) is type(other)
        assert not mine.training
        for kind in ("state_dict", "named_buffers"):
            left, right = dict(getattr(mine, kind)()), dict(getattr(other, kind)())
            assert left.keys() == right.keys()
            assert all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)
    images = [
        pipeline(
            prompt=["a lighthouse"], height=64, width=64, num_inference_steps=4, guidance_scale=0.0, output_type="np",
            generator=[torch.Generator().manual_seed(3)],
        ).images
        for pipeline in (ours, theirs)
    ]  # fmt: skip
    # Equal weights in memory of another alignment: the last bits of a product may differ.
    assert abs(images[0] - images[1]).max() < (1e-5 if dtype == torch.float32 else 0.02)


def test_tensors_whose_elements_lie_across_borders_must_arrive_too(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}   '[:57]
    values = struct.pack("<3f", 1.0, 2.0, 3.0)
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
    streamed = WeightStream(tmp_path, ["odd.safetensors"], "cpu", torch.bfloat16).result()
    assert streamed.files["odd.safetensors"]["a"].tolist() == [1.0, 2.0, 3.0]


def test_whole_numbers_and_empty_tensors_must_keep_their_types(tmp_path):
    tensors = {
        "count": torch.arange(5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "weight": torch.ones(2, 2),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    found = WeightStream(tmp_path, ["file.safetensors"], "cpu", torch.bfloat16).result().files["file.safetensors"]
    assert found["count"].dtype == torch.int64
    assert found["weight"].dtype == torch.bfloat16
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "file.safetensors").items()
    }


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_a_flipped_byte_must_be_found_on_the_way_when_asked_to_verify(snapshot, algorithm):
    manifest = read_manifest(snapshot)
    if algorithm == "blake3":
        verify(snapshot, deep=True, report=silent)
    else:  # a marker as it is before the first deep verification
        write_marker(snapshot, manifest, read_marker(snapshot).stats)
    path = snapshot / paths_of(snapshot)[0]
    good = WeightStream(snapshot, paths_of(snapshot), "cpu", None, verify=manifest).result()
    assert good.verified_by == algorithm
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotDamaged, match=path.name):
        WeightStream(snapshot, paths_of(snapshot), "cpu", None, verify=manifest).result()


def test_a_file_that_is_cut_while_it_is_read_must_be_an_error_and_no_hang(snapshot, monkeypatch):
    path = snapshot / paths_of(snapshot)[-1]
    real = streaming.read_header

    def cut_after(location):
        header = real(location)
        if location == path:
            with location.open("r+b") as stream:
                stream.truncate(header.file_size // 2)
        return header

    monkeypatch.setattr(streaming, "read_header", cut_after)
    with pytest.raises(SnapshotDamaged, match="cut"):
        WeightStream(snapshot, paths_of(snapshot), "cpu", None, verify=read_manifest(snapshot)).result()


def test_weights_that_do_not_fit_their_configuration_must_be_named(snapshot):
    files = assemble.weight_files(snapshot)
    streamed = WeightStream(snapshot, paths_of(snapshot), "cpu", None).result()
    tensors = {name: tensor for path in files["vae"] for name, tensor in streamed.files[path].items()}
    tensors.pop(next(iter(tensors)))
    with pytest.raises(SnapshotDamaged, match="vae"):
        assemble.give_weights(assemble.make_empty(snapshot, "vae"), "vae", tensors, "cpu")


def test_what_arrives_must_be_replaced_tensor_by_tensor_and_few_be_there_at_once(tmp_path, monkeypatch):
    """The peak of whole tensors that were not narrowed yet must depend on what is on its way, not on the files."""
    import weakref

    monkeypatch.setattr(streaming, "CHUNK", 1 << 16)
    tensors = {f"layer.{i:03}.weight": torch.full((64, 512), float(i)) for i in range(120)}
    for file in range(2):
        save_file({f"{file}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / f"{file}.safetensors")
    alive, peak = weakref.WeakSet(), 0

    def arrived(path, name, wide):
        nonlocal peak
        assert path.startswith(name[0])
        alive.add(wide)
        peak = max(peak, len(alive))
        return wide.sum()

    stream = WeightStream(tmp_path, ["0.safetensors", "1.safetensors"], "cpu", None, arrived=arrived, readers=4)
    files = stream.result().files
    assert peak <= 2
    for i in range(120):
        assert float(files["1.safetensors"][f"1.layer.{i:03}.weight"]) == 64 * 512 * i


def test_an_error_in_what_takes_arrivals_must_end_the_stream(tmp_path):
    save_file({f"t{i}": torch.ones(64) for i in range(64)}, tmp_path / "a.safetensors")

    def arrived(_path, _name, _wide):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        WeightStream(tmp_path, ["a.safetensors"], "cpu", None, arrived=arrived).result()


@pytest.mark.parametrize("text", [True, False])
def test_every_large_weight_of_a_preset_in_fp8_must_be_narrowed_on_its_way_and_no_other(snapshot, text):
    from zops.serving.accelerate.fp8 import quantise_on_arrival
    from zops.serving.accelerate.rows import Quantised

    stream = WeightStream(snapshot, paths_of(snapshot), "cpu", torch.bfloat16, arrived=quantise_on_arrival(text=text))
    narrow, wide, fitting = set(), set(), set()
    for path, tensors in stream.result().files.items():
        for name, tensor in tensors.items():
            full_name = f"{path.partition('/')[0]}.{name}"
            (narrow if isinstance(tensor, Quantised) else wide).add(full_name)
            shape = tensor.values.shape if isinstance(tensor, Quantised) else tensor.shape
            if all(size % 16 == 0 for size in shape):  # the tiny model has layers that no matrix unit takes in fp8
                fitting.add(full_name)
    blocks = [name for name in narrow | wide if name.startswith(("transformer.layers.", "transformer.noise_refiner."))]
    large = {name for name in blocks if "attention.to_" in name or ".feed_forward.w" in name}
    encoder = {name for name in narrow | wide if name.startswith("text_encoder") and name.endswith("_proj.weight")}
    assert large & fitting
    assert encoder & fitting
    assert narrow == (large | (encoder if text else set())) & fitting

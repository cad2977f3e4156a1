"""What a host keeps of compilations and verdicts: found again by the same combination, and by no other."""

import pytest

from zops.host.gpu import Gpu, GpuFacts
from zops.serving.messages import Gate
from zops.serving.volume import open_volume

H200 = Gpu(0, "GPU-aaaa", "NVIDIA H200", 150_754_820_096, 0)
L4 = Gpu(1, "GPU-bbbb", "NVIDIA L4", 24_000_000_000, 0)
KEY = {"manifest": "ab", "preset": "fp8", "size": 512}
GATE = Gate("passed", 43.7, 0.9986)


def opened(root, gpus=None, driver="580.1", found=(H200, L4)):
    return open_volume(str(root), gpus, lambda: GpuFacts(found, driver))


def test_a_verdict_must_be_found_again(tmp_path):
    opened(tmp_path).keep_gate(GATE, **KEY)
    assert opened(tmp_path).find_gate(**KEY) == GATE
    assert opened(tmp_path).find_gate(**KEY | {"preset": "bf16"}) is None


@pytest.mark.parametrize(
    "other", [{"driver": "590.0"}, {"gpus": "GPU-bbbb"}, {"gpus": "1"}, {"found": ()}, {"gpus": ""}]
)
def test_another_gpu_or_driver_must_begin_anew(tmp_path, other):
    opened(tmp_path).keep_gate(GATE, **KEY)
    there = opened(tmp_path, **other)
    assert there.find_gate(**KEY) is None
    assert there.environment["TRITON_CACHE_DIR"] != opened(tmp_path).environment["TRITON_CACHE_DIR"]


def test_gpus_must_be_known_by_number_and_by_uuid(tmp_path):
    assert opened(tmp_path, "GPU-aaaa").path == opened(tmp_path, "0").path == opened(tmp_path).path


def test_a_verdict_that_cannot_be_read_must_be_no_verdict(tmp_path):
    volume = opened(tmp_path)
    volume.keep_gate(GATE, **KEY)
    (file,) = (volume.path / "gates").iterdir()
    for damage in ("", "{}", '{"gate": {"result": "passed", "unknown": 1}}'):
        file.write_text(damage)
        assert volume.find_gate(**KEY) is None


def test_without_a_place_nothing_must_be_kept_and_nothing_fail(tmp_path):
    assert open_volume(None, None) is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert opened(blocked) is None


def test_a_volume_must_hold_no_half_written_file(tmp_path):
    volume = opened(tmp_path)
    volume.keep_gate(GATE, **KEY)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "about.json" in names
    assert not any(name.startswith(".") for name in names)

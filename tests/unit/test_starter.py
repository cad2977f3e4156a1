"""`zops init` must write a file that loads, and that fits the host."""

from dataclasses import replace
from pathlib import Path

import pytest

from zops.host.disk import Disk, Mount
from zops.host.gpu import Gpu, GpuFacts
from zops.provision.starter import compose
from zops.spec import fields, load

SYSTEM = Disk(
    mount=Mount(Path("/"), "ext4", "/dev/sda1", "8:1", read_only=False),
    free_bytes=500_000_000_000,
    total_bytes=600_000_000_000,
    free_inodes=1_000_000,
    is_system=True,
    rotational=False,
)
NVME = replace(SYSTEM, mount=Mount(Path("/mnt/nvme"), "xfs", "/dev/nvme0n1", "259:0", read_only=False), is_system=False)
H200 = Gpu(index=0, uuid="GPU-1", name="NVIDIA H200", memory_total_bytes=150_000_000_000, memory_used_bytes=0)


def loaded(text: str, tmp_path: Path):
    path = tmp_path / "zops.yaml"
    path.write_text(text)
    return load(path, environ={})


def test_the_cache_must_go_to_the_best_disk_with_room(tmp_path: Path) -> None:
    made = compose(GpuFacts(gpus=(H200,)), [NVME, SYSTEM])
    spec = loaded(made.text, tmp_path).spec
    assert spec.cache.dir == Path("/mnt/nvme/zops/cache")
    assert spec.gpus == "all"
    assert "NVIDIA H200 150 GB" in made.text
    assert made.notes == ()


def test_a_disk_without_room_must_be_passed_over(tmp_path: Path) -> None:
    made = compose(GpuFacts(gpus=(H200,)), [replace(NVME, free_bytes=40_000_000_000), SYSTEM])
    spec = loaded(made.text, tmp_path).spec
    assert spec.cache.dir == Path("/var/lib/zops/cache") or spec.cache.dir.is_relative_to(Path.home())
    assert any("system disk" in note for note in made.notes)


@pytest.mark.parametrize("disks", [[], [replace(NVME, free_bytes=1)]])
def test_a_host_without_room_or_gpu_must_get_a_file_that_loads_and_be_told(disks: list[Disk], tmp_path: Path) -> None:
    made = compose(GpuFacts(reason="no NVIDIA driver here"), disks)
    spec = loaded(made.text, tmp_path).spec
    assert spec.gpus == "none"
    assert any("no NVIDIA driver" in note for note in made.notes)
    assert any("no local disk" in note for note in made.notes)


def test_every_value_that_the_file_repeats_must_be_the_default(tmp_path: Path) -> None:
    file = loaded(compose(GpuFacts(gpus=(H200,)), [NVME]).text, tmp_path)
    default = load(environ={}, directory=tmp_path / "none").spec
    fitted = {"cache.dir", "gpus", "backup.to"}
    for path, _ in fields():
        if file.origins[path].kind == "file" and path not in fitted:
            section, _, key = path.rpartition(".")
            of = lambda spec, s=section: getattr(spec, s) if s else spec  # noqa: E731
            assert getattr(of(file.spec), key) == getattr(of(default), key), path


@pytest.mark.parametrize(("memory", "edge"), [(150 * 10**9, 2048), (25_757_220_864, 1248), (10**10, 2048)])
def test_the_largest_image_must_be_one_that_the_smallest_gpu_has_room_for(
    memory: int, edge: int, tmp_path: Path
) -> None:
    made = compose(GpuFacts(gpus=(H200, replace(H200, memory_total_bytes=memory))), [NVME])
    assert loaded(made.text, tmp_path).spec.serve.max_pixels == edge * edge

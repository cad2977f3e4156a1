"""What a server sees of its GPUs and its snapshot, and that nobody waits for what hangs."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from zops.cache.manifest import read_manifest, sidecar, write_manifest
from zops.host.gpu import NO_DRIVER, Gpu, GpuFacts
from zops.serving.devices import wanted_gpus
from zops.serving.metrics import Metrics
from zops.serving.surroundings import GpuLook, Question, SnapshotLook, Surroundings
from zops.spec import Spec

A, B = (Gpu(index, f"GPU-{name}", "NVIDIA H200", 100, 40, temperature_c=50) for index, name in enumerate("ab"))
TAKEN_AWAY = "NVML says Unknown Error: access to the GPU was taken away"


def looks(names: tuple[str, ...] | None, *told: GpuFacts) -> list:
    answers = iter(told)
    look = GpuLook(names, lambda: next(answers))
    return [look() for _ in told]


def test_a_sound_gpu_must_be_told_with_what_it_has() -> None:
    [state] = looks(None, GpuFacts((A,)))
    assert state == {
        "error": "",
        "devices": [
            {
                "index": 0,
                "uuid": "GPU-a",
                "name": "NVIDIA H200",
                "memory_used": 40,
                "memory_total": 100,
                "temperature": 50,
                "ecc_uncorrected": None,
            }
        ],
    }


def test_a_place_without_a_driver_must_be_one_where_none_is_used() -> None:
    assert looks(None, GpuFacts(reason=NO_DRIVER)) == [None]


def test_a_driver_that_goes_must_be_an_error() -> None:
    _, state = looks(None, GpuFacts((A,)), GpuFacts(reason=NO_DRIVER))
    assert state == {"error": NO_DRIVER, "devices": []}


def test_a_gpu_that_was_never_reached_must_be_an_error() -> None:
    [state] = looks(None, GpuFacts(reason=TAKEN_AWAY))
    assert state == {"error": TAKEN_AWAY, "devices": []}


def test_a_gpu_that_is_missing_later_must_be_named() -> None:
    _, state, back = looks(None, GpuFacts((A, B)), GpuFacts((B,)), GpuFacts((A, B)))
    assert state["error"] == "GPU-a was there before and is missing now"
    assert [device["uuid"] for device in state["devices"]] == ["GPU-b"]
    assert back["error"] == ""


@pytest.mark.parametrize("names", [("0",), ("GPU-a",)])
def test_only_the_gpus_that_are_used_must_count(names: tuple[str, ...]) -> None:
    broken = GpuFacts((A,), reason="GPU 1 cannot be read: the GPU is lost: it fell off the bus")
    first, second = looks(names, GpuFacts((A, B)), broken)
    assert [device["uuid"] for device in first["devices"]] == ["GPU-a"]
    assert second["error"] == ""
    [state] = looks(("GPU-a", "GPU-b"), broken)
    assert "fell off the bus" in state["error"]


def test_parts_of_a_gpu_must_not_hide_it() -> None:
    [state] = looks(("MIG-1",), GpuFacts((A,)))
    assert len(state["devices"]) == 1


@pytest.mark.parametrize(
    ("gpus", "environ", "names"),
    [
        ("none", {}, ()),
        ("all", {}, None),
        ([1, "GPU-a"], {}, ("1", "GPU-a")),
        ("all", {"CUDA_VISIBLE_DEVICES": "1,GPU-b"}, ("1", "GPU-b")),
        ("all", {"CUDA_VISIBLE_DEVICES": ""}, ()),
        ("none", {"CUDA_VISIBLE_DEVICES": "1"}, ()),
    ],
)
def test_the_gpus_that_may_be_used_must_be_known_without_asking(gpus, environ, names) -> None:
    assert wanted_gpus(Spec(gpus=gpus), environ) == names


@pytest.fixture
def hanging():
    """An NVML that does not answer until the test is over."""
    gate = threading.Event()

    def read() -> GpuFacts:
        gate.wait(30)
        return GpuFacts((A,))

    yield read, gate
    gate.set()


def test_an_nvml_that_hangs_must_be_told_and_must_not_hold_up_anybody(tiny_model: Path, hanging) -> None:
    read, gate = hanging
    seen = Surroundings(tiny_model, None, read=read, every_s=0.01, limit_s=0.05)
    assert seen.gpus() is None
    seen.begin()
    state = eventually(seen.gpus, "the limit")
    assert state == {"error": "NVML did not answer within 0.05 s", "devices": []}
    assert eventually(seen.snapshot, "a look at the disk")["error"] == ""
    gate.set()
    eventually(lambda: seen.gpus()["error"] == "", "the answer")
    seen.end()


def test_the_end_must_not_wait_for_what_hangs(tiny_model: Path, hanging) -> None:
    read, _ = hanging
    seen = Surroundings(tiny_model, None, read=read, every_s=0.01, limit_s=0.05)
    seen.begin()
    eventually(seen.gpus, "the limit")
    seen.end()
    thread = next(thread for thread in threading.enumerate() if thread.name == "gpus")
    assert thread.daemon, "the interpreter would wait for it"


def test_a_question_that_ends_must_not_be_asked_again() -> None:
    asked: list[None] = []
    question = Question("test", lambda: asked.append(None), every_s=0.001, limit_s=1)
    question.begin()
    eventually(lambda: len(asked) > 2, "some questions")
    question.end()
    question._thread.join(10)
    assert not question._thread.is_alive()


def test_a_question_that_fails_must_be_asked_again_and_leave_a_traceback(capsys) -> None:
    answers = iter([1])
    question = Question("test", lambda: next(answers), every_s=0.001, limit_s=1)
    question.begin()
    eventually(lambda: question.failure, "the failure")
    question.end()
    question._thread.join(10)
    assert "StopIteration" in question.failure
    assert "Traceback" in capsys.readouterr().err


def test_where_no_gpu_is_used_nvml_must_not_be_asked(tiny_model: Path) -> None:
    def read() -> GpuFacts:
        raise AssertionError

    seen = Surroundings(tiny_model, (), read=read, every_s=0.01)
    seen.begin()
    eventually(seen.snapshot, "a look at the disk")
    seen.end()
    assert seen.gpus() is None


@pytest.fixture
def snapshot(tiny_model: Path, tmp_path: Path) -> Path:
    place = tmp_path / "tiny"
    shutil.copytree(tiny_model, place)
    shutil.copytree(sidecar(tiny_model), sidecar(place), dirs_exist_ok=True)
    return place


def test_a_sound_snapshot_must_be_told_by_its_digest(snapshot: Path) -> None:
    assert SnapshotLook(snapshot)() == {
        "manifest_digest": read_manifest(snapshot).digest,
        "writable": True,
        "error": "",
    }


def test_a_manifest_that_is_replaced_must_be_read_again(snapshot: Path) -> None:
    look = SnapshotLook(snapshot)
    before = look()["manifest_digest"]
    manifest = read_manifest(snapshot)
    write_manifest(snapshot, replace(manifest, files=manifest.files[1:]))
    assert look()["manifest_digest"] == read_manifest(snapshot).digest != before


def test_a_manifest_must_be_read_only_once_while_it_is_the_same(snapshot: Path, monkeypatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(
        "zops.serving.surroundings.read_manifest", lambda place: (read.append(place), read_manifest(place))[1]
    )
    look = SnapshotLook(snapshot)
    for _ in range(3):
        look()
    assert len(read) == 1


def weights(snapshot: Path) -> Path:
    return next(iter(sorted(snapshot.rglob("*.safetensors"))))


@pytest.mark.parametrize("damage", ["file", "size", "snapshot", "manifest", "broken"])
def test_what_is_wrong_on_the_disk_must_be_told(snapshot: Path, damage: str) -> None:
    look = SnapshotLook(snapshot)
    assert look()["error"] == ""
    file = sidecar(snapshot) / "manifest.json"
    match damage:
        case "file":
            weights(snapshot).unlink()
            expected = "No such file or directory"
        case "size":
            with weights(snapshot).open("ab") as stream:
                stream.write(b"x")
            expected = "its manifest says"
        case "snapshot":
            shutil.rmtree(snapshot)
            shutil.rmtree(sidecar(snapshot), ignore_errors=True)
            expected = "is gone"
        case "manifest":
            file.unlink()
            expected = "manifest.json is gone"
        case "broken":
            file.write_text("{")
            expected = ""
    state = look()
    assert state["error"]
    assert expected in state["error"]


def test_the_metrics_must_tell_what_is_wrong() -> None:
    metrics = Metrics(model="m", revision="r", manifest_digest="d")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    good, lost = looks(None, GpuFacts((A, B)), GpuFacts((A,)))
    metrics.tell_surroundings(good, {"manifest_digest": "d", "writable": False, "error": ""})
    assert (value("zops_gpus"), value("zops_gpu_error"), value("zops_snapshot_error")) == (2, 0, 0)
    assert value("zops_gpu_temperature_celsius", gpu="1") == 50
    assert value("zops_gpu_ecc_uncorrected", gpu="1") is None
    metrics.tell_surroundings(lost, {"manifest_digest": "", "writable": False, "error": "gone"})
    assert (value("zops_gpus"), value("zops_gpu_error"), value("zops_snapshot_error")) == (1, 1, 1)
    assert value("zops_gpu_temperature_celsius", gpu="1") is None
    metrics.tell_surroundings(None, None)
    assert (value("zops_gpus"), value("zops_gpu_error"), value("zops_snapshot_error")) == (0, 0, 0)

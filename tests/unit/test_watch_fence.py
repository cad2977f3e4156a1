"""GPUs that fail must be fenced once, stay fenced as long as they must, and be refused meanwhile."""

import json
from dataclasses import replace

import pytest

from zops.errors import UsageError
from zops.host.context import Context, Senses
from zops.host.doctor import diagnose, refusal
from zops.host.fences import Fence, as_json, fence_dirs, fence_path, read_boot_id, read_fences, standing_fences
from zops.host.gpu import Gpu, GpuFacts
from zops.host.gpu_condition import GPU_CONDITION_CHECKS
from zops.host.kernel_log import KernelLog, Xid
from zops.runtime.base import Instance
from zops.spec import Spec
from zops.watch.fence import LOST_ROUNDS, Suspicion, new_fences, outlived
from zops.watch.guard import Guard, lift
from zops.watch.station import Orders, Station

FIRST = Gpu(0, "GPU-aaaa", "NVIDIA L4", 24 * 10**9, 0, pci="0000:3b:00")
SECOND = Gpu(1, "GPU-bbbb", "NVIDIA L4", 24 * 10**9, 0, pci="0000:5e:00")
FALLEN = GpuFacts((FIRST,), "580.65", "13.0", reason="GPU 1 cannot be read: the GPU is lost", lost=(1,))
BOOT = read_boot_id()


def log(*numbers, pci=SECOND.pci, seconds=100.0, detail=""):
    return KernelLog(tuple(Xid(number, pci, seconds, detail) for number in numbers), "/dev/kmsg")


def gpus(*found, **more):
    return GpuFacts(found or (FIRST, SECOND), "580.65", "13.0", **more)


def decided(kernel_log=None, facts=None, fences=(), suspicion=None, boot_id=BOOT):
    suspicion = suspicion or Suspicion()
    return new_fences(
        kernel_log or log(), facts or gpus(), suspicion, fences, boot_id=boot_id, now=1000.0, since_boot_s=200.0
    )


@pytest.mark.parametrize(
    ("number", "action"), [(79, "reboot"), (48, "reset"), (95, "reset"), (64, "replace"), (31, ""), (43, ""), (999, "")]
)
def test_only_an_xid_that_a_restart_does_not_cure_must_fence_its_gpu(number, action) -> None:
    found = decided(log(number))
    assert [(one.uuid, one.index, one.action) for one in found] == ([("GPU-bbbb", 1, action)] if action else [])


def test_the_driver_s_own_advice_must_count() -> None:
    assert decided(log(154, detail="changed from 0x0 (None) to 0x2 (Node Reboot Required)"))[0].action == "reboot"


def test_an_xid_of_a_gpu_that_is_gone_must_fence_its_address() -> None:
    (fence,) = decided(log(79, pci="0000:99:00"))
    assert (fence.name, fence.hits("all"), fence.hits([0])) == ("0000:99:00", True, False)


def test_uncorrectable_memory_errors_must_fence_without_any_log() -> None:
    sick = replace(SECOND, ecc_uncorrected=3)
    (fence,) = decided(KernelLog(reason="not allowed"), gpus(FIRST, sick))
    assert (fence.uuid, fence.because, fence.ecc_uncorrected) == ("GPU-bbbb", "3 uncorrectable memory errors", 3)


def test_a_gpu_must_be_missed_twice_before_it_counts_as_lost() -> None:
    suspicion = Suspicion()
    assert decided(suspicion=suspicion) == []
    assert LOST_ROUNDS >= 2, "one answer may come from a driver that is just being reloaded"
    rounds = [decided(facts=FALLEN, suspicion=suspicion) for _ in range(LOST_ROUNDS)]
    assert [len(found) for found in rounds] == [0] * (LOST_ROUNDS - 1) + [1]
    assert (rounds[-1][0].uuid, rounds[-1][0].action) == ("GPU-bbbb", "reboot")


def test_a_driver_that_is_being_reloaded_must_fence_nobody() -> None:
    suspicion = Suspicion()
    decided(suspicion=suspicion)
    none = GpuFacts(reason="the NVIDIA kernel driver is not loaded")
    assert [decided(facts=none, suspicion=suspicion) for _ in range(5)] == [[]] * 5


def test_a_gpu_that_is_fenced_already_must_not_be_fenced_again() -> None:
    (fence,) = decided(log(79))
    assert decided(log(79, 48), fences=[fence]) == []


def test_what_was_before_a_person_lifted_it_must_be_dealt_with_and_what_comes_after_not() -> None:
    (fence,) = decided(log(48, seconds=100), gpus(FIRST, replace(SECOND, ecc_uncorrected=2)))
    lifted = replace(fence, lifted_at=1100.0, seconds=150.0, ecc_uncorrected=2)
    sick = gpus(FIRST, replace(SECOND, ecc_uncorrected=2))
    assert decided(log(48, seconds=149), sick, [lifted]) == []
    assert decided(log(48, seconds=151), sick, [lifted])[0].action == "reset"
    assert decided(log(), gpus(FIRST, replace(SECOND, ecc_uncorrected=5)), [lifted])[0].because.startswith("3 ")


@pytest.mark.parametrize(("action", "stays"), [("reset", False), ("reboot", False), ("replace", True)])
def test_a_reboot_must_lift_what_it_cures(action, stays) -> None:
    fence = Fence("GPU-aaaa", "", 0, "why", action, 0.0, "an earlier boot")
    assert fence.stands("this boot") is stays
    assert outlived([fence], "this boot") == ([] if stays else [fence])


@pytest.mark.parametrize(
    ("wanted", "hit"),
    [("all", True), ("none", False), ([1], True), (["GPU-bbbb"], True), ([0], False), ((0, 1), True), (None, False)],
)
def test_a_fence_must_hit_the_deployments_that_ask_for_its_gpu(wanted, hit) -> None:
    assert Fence("GPU-bbbb", SECOND.pci, 1, "", "reset", 0.0, BOOT).hits(wanted) is hit


class Scene:
    """A guard over scripted senses, and what it told."""

    def __init__(self, *, dry_run=False) -> None:
        self.log, self.gpus, self.told = log(), gpus(), []
        station = Station(Orders(dry_run=dry_run), self.told.append, now=lambda: 1000.0)
        self.guard = Guard(station, log=lambda: self.log, gpus=lambda: self.gpus, since_boot_s=lambda: 200.0)
        self.figures = station.figures

    def look(self):
        before = len(self.told)
        self.guard.look()
        return [one.kind for one in self.told[before:]]


def test_a_fence_must_be_told_once_kept_on_disk_and_found_by_the_next_watch() -> None:
    scene = Scene()
    assert scene.look() == []
    scene.log = log(79)
    assert scene.look() == ["gpu-fenced"]
    assert scene.look() == []
    assert [one.name for one in standing_fences()] == ["GPU-bbbb"]
    assert "zops_watch_fenced_gpus 1\n" in scene.figures.render()
    again = Scene()
    assert again.look() == ["gpu-fenced"], "each watch says what it knows"
    assert again.told[0].facts["because"] == "Xid 79: the GPU has fallen off the bus"


def test_a_person_must_be_able_to_lift_a_fence_by_any_of_its_names() -> None:
    for name in ("GPU-bbbb", SECOND.pci, "1"):
        scene = Scene()
        scene.log = log(95)
        scene.look()
        assert lift(name, facts=gpus()).lifted_at
        assert scene.look() == ["fence-lifted"]
        assert scene.look() == [], "the event that it was put up for lies in the past"
        fence_path(fence_dirs()[0], read_fences()[0]).unlink()
    with pytest.raises(UsageError, match="no fence of GPU GPU-bbbb stands"):
        lift("GPU-bbbb", facts=gpus())


def test_a_dry_run_must_fence_nothing() -> None:
    scene = Scene(dry_run=True)
    scene.log = log(79)
    assert scene.look() == ["gpu-fenced"]
    assert scene.look() == []
    assert read_fences() == ()


def test_a_log_that_cannot_be_read_must_be_said_once_where_there_are_gpus() -> None:
    scene = Scene()
    scene.log = KernelLog(reason="permission denied")
    assert scene.look() == ["warning"]
    assert scene.look() == []
    none = Scene()
    none.log, none.gpus = KernelLog(reason="permission denied"), GpuFacts(reason="no NVIDIA driver here")
    assert none.look() == []


def test_a_fence_that_cannot_be_written_must_stand_all_the_same() -> None:
    fence_dirs()[0].parent.mkdir(parents=True)
    fence_dirs()[0].write_text("a file where the directory should be")
    scene = Scene()
    scene.log = log(79)
    assert sorted(scene.look()) == ["gpu-fenced", "warning"]
    assert scene.look() == []
    assert scene.guard.standing()


def test_broken_files_among_the_fences_must_be_no_fences() -> None:
    directory = fence_dirs()[0]
    directory.mkdir(parents=True)
    for name, text in {"a": "", "b": "[]", "c": "{}", "d": '{"uuid": 1, "at": "x"}', "e": "\x00"}.items():
        (directory / f"{name}.json").write_text(text)
    assert read_fences() == ()
    assert Scene().look() == []


def test_a_hostile_name_must_not_leave_the_directory_of_fences(tmp_path) -> None:
    fence = Fence("../../etc/passwd", "", 0, "", "reset", 0.0, BOOT)
    assert fence_path(tmp_path, fence).parent == tmp_path


def instance(name, wanted, state="running"):
    return Instance(name, f"id-{name}", "process", state, "", "", "", "", "", traits={"gpus": wanted})


class Recorder:
    """Stands where an engine would; remembers what it was told to stop."""

    def __init__(self) -> None:
        self.stopped = []

    def stop(self, name, _report):
        self.stopped.append(name)


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_running_instances_on_a_fenced_gpu_must_be_stopped_and_no_others(dry_run) -> None:
    scene, engine = Scene(dry_run=dry_run), Recorder()
    scene.log = log(79)
    scene.look()
    known = [
        instance("everywhere", "all"),
        instance("there", [1]),
        instance("by-name", ["GPU-bbbb"]),
        instance("elsewhere", [0]),
        instance("without", "none"),
        instance("stopped", [1], "exited"),
    ]
    scene.guard.clear(engine, known)
    assert engine.stopped == ([] if dry_run else ["everywhere", "there", "by-name"])
    told = [one.facts["instance"] for one in scene.told if one.kind == "instance-fenced"]
    assert told == ["everywhere", "there", "by-name"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "fail"), ({"gpus": [1]}, "fail"), ({"gpus": [0]}, "ok"), ({"gpus": "none"}, "skipped")],
)
def test_the_doctor_must_refuse_a_fenced_gpu_with_its_own_code(tmp_path, settings, expected) -> None:
    fence = Fence("GPU-bbbb", SECOND.pci, 1, "Xid 79", "reset", 0.0, BOOT)
    spec = Spec.model_validate({"cache": {"dir": tmp_path}, "runtime": "process"} | settings)
    subject = Context(spec=spec, senses=Senses(gpus=gpus, fences=lambda: (fence,)))
    diagnosis = diagnose(subject, GPU_CONDITION_CHECKS, only=["gpu-fenced"])
    assert diagnosis.results[0].verdict == expected
    error = refusal(diagnosis)
    assert (error is not None) == (expected == "fail")
    if error:
        assert error.code == "gpu-fenced"
        assert "zops watch --unfence GPU-bbbb" in error.hint


def test_the_file_of_a_fence_must_hold_all_that_makes_it(tmp_path) -> None:
    fence = Fence("GPU-bbbb", SECOND.pci, 1, "Xid 79", "reboot", 12.5, BOOT, 3, 7.5, None)
    fence_path(tmp_path, fence).write_text(json.dumps(as_json(fence)))
    assert read_fences([tmp_path]) == (fence,)

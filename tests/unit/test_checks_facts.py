"""What the doctor reads besides NVML: the kernel's log, CDI specifications, device links, and what fits."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.health.needs import needs
from zops.host import kernel_log
from zops.host.capacity import (
    ACTIVATION_BYTES_A_PIXEL,
    EDGE_STEP,
    EDGES,
    RESERVE_BYTES,
    judge_capacity,
    largest_edge,
    speed_of,
)
from zops.host.cdi import read_cdi
from zops.host.devices import missing_char_links
from zops.host.gpu import Gpu
from zops.host.kernel_log import XIDS, KernelLog, Xid, read_xids
from zops.spec import Spec

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "doctor.md"
RECORDS = """\
6,1,2000000,-;Linux version 6.1
3,901,5000000,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=77, name=python, Ch 00000008, MMU Fault
 SUBSYSTEM=pci
4,902,7500000,c;NVRM: Xid (PCI:0000:AF:00.0): 79, GPU has fallen off the bus.
4,903,7600000,-;somebody says Xid 48 without NVRM
"""


@pytest.fixture
def no_journal(monkeypatch):
    monkeypatch.setattr(kernel_log, "_read_journal", lambda: None)


def test_xids_must_be_read_from_the_kernels_records_with_their_gpu_and_time(tmp_path):
    log = tmp_path / "kmsg"
    log.write_text(RECORDS)
    found = read_xids(log)
    assert found.source == str(log)
    assert [(xid.number, xid.pci, xid.seconds) for xid in found.xids] == [
        (31, "0000:3b:00", 5.0),
        (79, "0000:af:00", 7.5),
    ]
    assert found.xids[0].detail.startswith("pid=77, name=python")


@given(st.text())
def test_no_log_must_be_too_strange_to_read(tmp_path_factory, text):
    log = tmp_path_factory.mktemp("log") / "kmsg"
    log.write_text(text, encoding="utf-8")
    assert read_xids(log).source == str(log)


def test_a_log_that_may_not_be_read_must_be_said_not_taken_for_an_empty_one(tmp_path, no_journal):
    found = read_xids(tmp_path / "no" / "kmsg")
    assert (found.xids, found.source) == ((), "")
    assert "sudo" in found.reason


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((0, "[ 12.500000] host kernel: NVRM: Xid (PCI:0000:3b:00): 48, pid=1, DBE", ""), 48),
        ((1, "", ""), None),
        ((1, "", "Hint: You are currently not seeing messages from other users and the system."), "unseen"),
        ((2, "", ""), "unseen"),
    ],
)
def test_the_journal_must_be_asked_where_the_log_may_not_be_read(tmp_path, monkeypatch, done, expected):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], *done))
    found = read_xids(tmp_path / "none")
    if expected == "unseen":
        assert found.source == ""
    else:
        assert found == KernelLog(
            () if expected is None else (Xid(48, "0000:3b:00", 12.5, "pid=1, DBE"),), "journalctl -k"
        )


@pytest.mark.parametrize(
    ("detail", "action"),
    [
        ("GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", "reset"),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", "reboot"),
        ("GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)", "reset"),
        ("GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", "none"),
        ("something new", "look-up"),
    ],
)
def test_the_drivers_own_advice_must_be_taken_from_where_it_changed_to(detail, action):
    assert Xid(154, "0000:3b:00", 1.0, detail).meaning.action == action


def test_the_page_must_list_every_xid_with_its_meaning():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    listed = {int(number): text for number, text, _ in rows}
    assert listed.pop(154)
    assert listed == {number: meaning.text for number, meaning in XIDS.items()}


# --- CDI


def cdi_spec(*names: str, paths: tuple[str, ...] = (), kind: str = "nvidia.com/gpu") -> str:
    nodes = [{"name": name, "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}} for name in names]
    mounts = [{"hostPath": path, "containerPath": path} for path in paths]
    return json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": nodes, "containerEdits": {"mounts": mounts}})


def test_a_specification_must_give_its_devices_its_driver_and_what_is_gone(tmp_path):
    there = tmp_path / "libcuda.so.580.65.06"
    there.touch()
    gone = str(tmp_path / "libnvidia-ml.so.570.1")
    # JSON is YAML too.
    (tmp_path / "nvidia.yaml").write_text(cdi_spec("0", "all", paths=(str(there), gone)))
    (spec,) = read_cdi([str(tmp_path)]).specs
    assert (spec.devices, spec.drivers, spec.missing) == (("0", "all"), ("570.1", "580.65.06"), (gone,))


def test_a_later_directory_must_cover_an_earlier_one(tmp_path):
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "etc" / "nvidia.yaml").write_text(cdi_spec("0", "all", paths=("/old",)))
    (tmp_path / "run" / "nvidia.json").write_text(cdi_spec("0", "all"))
    found = read_cdi([str(tmp_path / "etc"), str(tmp_path / "run")])
    assert [str(spec.file) for spec in found.specs] == [str(tmp_path / "run" / "nvidia.json")]


@pytest.mark.parametrize("text", ["{", "[]", "a: [", "!!python/object/apply:os.getcwd []", "\x00", "- 1", "5"])
def test_a_hostile_specification_must_be_named_and_never_run(tmp_path, text):
    for name in ("x.yaml", "x.json"):
        (tmp_path / name).write_text(text)
    found = read_cdi([str(tmp_path)])
    assert found.specs == ()
    assert len(found.unreadable) == 2


def test_a_specification_must_never_run_anything(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:os.mkdir ['{victim}']")
    assert read_cdi([str(tmp_path)]).unreadable
    assert not victim.exists()


@pytest.mark.parametrize(
    "body", [{"devices": 5}, {"devices": [5]}, {"containerEdits": []}, {"devices": [{"name": None}]}]
)
def test_a_specification_of_the_wrong_shape_must_not_end_the_doctor(tmp_path, body):
    (tmp_path / "nvidia.yaml").write_text(json.dumps({"kind": "nvidia.com/gpu"} | body))
    read_cdi([str(tmp_path)])


def test_specifications_of_other_devices_must_be_left_out(tmp_path):
    (tmp_path / "other.yaml").write_text(cdi_spec("0", kind="vendor.com/net"))
    (tmp_path / "readme.txt").write_text("{")
    assert read_cdi([str(tmp_path), str(tmp_path / "nothing")]) == read_cdi([str(tmp_path / "nothing")])


# --- links of devices


def test_a_device_without_its_link_must_be_named(tmp_path):
    # /dev/null stands for a device of NVIDIA: a character device that is on every machine.
    (tmp_path / "char").mkdir()
    (tmp_path / "nvidia0").symlink_to("/dev/null")
    assert missing_char_links(tmp_path) == ("/dev/char/1:3",)
    # Whatever it leads to: systemd reads the link, and in a container its target may not be there.
    (tmp_path / "char" / "1:3").symlink_to("../gone")
    assert missing_char_links(tmp_path) == ()


def test_a_host_without_devices_must_be_told_from_one_whose_links_are_there(tmp_path):
    assert missing_char_links(tmp_path) is None


# --- capacity

WEIGHTS = 20_522_393_030


@given(st.integers(0, 200 * 10**9))
def test_the_largest_image_must_fit_and_the_next_larger_not(memory):
    edge = largest_edge(memory, WEIGHTS, ACTIVATION_BYTES_A_PIXEL)

    def need(size: int) -> float:
        return WEIGHTS + RESERVE_BYTES + size * size * ACTIVATION_BYTES_A_PIXEL

    assert edge == 0 or need(edge) <= memory
    assert need(edge + EDGE_STEP) > memory - 1


def test_24_gigabytes_must_hold_what_was_seen_to_fit_and_refuse_what_was_seen_not_to():
    card = Gpu(0, "GPU-a", "NVIDIA GeForce RTX 4090 D", 25_757_220_864, 0)
    found = judge_capacity("m", WEIGHTS, "bfloat16", 1024 * 1024, [card])
    fits = dict(zip([(d.dtype, d.edge) for d in found.demands], found.rooms[0].fits, strict=True))
    assert (fits["bfloat16", 1024], fits["bfloat16", 1280]) == (True, False)
    assert found.sound
    assert not judge_capacity("m", WEIGHTS, "bfloat16", 1280 * 1280, [card]).sound


def test_a_speed_must_only_be_told_for_a_gpu_on_which_it_was_measured():
    assert speed_of("NVIDIA GeForce RTX 4090 D")[1][1024] == 3.2
    assert speed_of("NVIDIA GeForce RTX 4090") == ("", {})
    assert speed_of("NVIDIA H200 NVL")[1][512] == 0.194


def test_a_speed_must_be_that_of_the_preset_which_is_served():
    assert speed_of("NVIDIA H200") == speed_of("NVIDIA H200", "bf16")
    assert speed_of("NVIDIA H200", "fp8")[1][1024] < speed_of("NVIDIA H200", "bf16")[1][1024]
    assert speed_of("NVIDIA H200", "eager")[1][512] == 0.417
    assert speed_of("NVIDIA GeForce RTX 4090 D", "fp8") == ("", {}), "what was not measured is not told"
    gpu = Gpu(0, "GPU-a", "NVIDIA H200", 150_754_820_096, 0)
    for preset, rate in (("auto", 1.28), ("fp8", 1.87), ("eager", 0.71)):
        [room] = judge_capacity("m", WEIGHTS, "bfloat16", 1024 * 1024, [gpu], preset=preset).rooms
        assert room.images_per_second[EDGES.index(1024)] == rate
        assert preset in room.measured or preset == "auto"


# --- what is needed


@pytest.mark.parametrize(
    ("image", "cuda"),
    [
        ({}, "13.0"),
        ({"torch_index": "https://wheels.example/whl/cu126"}, "12.6"),
        ({"torch_index": "https://wheels.example/whl/cpu/"}, "cpu"),
        ({"torch_index": "https://wheels.example/simple"}, ""),
        ({"build": False}, ""),
    ],
)
def test_the_cuda_of_the_image_must_be_told_only_where_it_is_known(tmp_path, image, cuda, monkeypatch):
    monkeypatch.setattr("zops.health.needs.read_labels", lambda *_: {})
    spec = Spec.model_validate({"cache": {"dir": tmp_path}, "image": image})
    assert needs(spec, {}).torch_cuda == cuda


@pytest.mark.parametrize("image", [{}, {"build": False}, {"torch_index": "https://wheels.example/whl/cpu/"}])
def test_what_an_image_says_of_itself_must_come_first(tmp_path, image, monkeypatch):
    labels = {"io.zops.torch": "2.12.0+cu126", "io.zops.torch.cuda": "12.6"}
    monkeypatch.setattr("zops.health.needs.read_labels", lambda *_: labels)
    need = needs(Spec.model_validate({"cache": {"dir": tmp_path}, "image": image}), {})
    assert (need.torch_cuda, need.torch_from) == ("12.6", f"torch 2.12.0+cu126 of {Spec().image.name}")


def test_an_engine_that_does_not_answer_must_leave_what_the_specification_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    assert needs(Spec.model_validate({"cache": {"dir": tmp_path}}), {}).torch_cuda == "13.0"


@pytest.mark.parametrize(
    ("source", "environ", "hub", "authorization"),
    [
        ({}, {"MODELSCOPE_API_TOKEN": "t"}, "https://modelscope.cn/api/v1/models/a/b/revisions", "Bearer t"),
        ({"endpoint": "http://u:p%40@mirror:80/x/"}, {},
         "http://mirror:80/x/api/v1/models/a/b/revisions", "Basic dTpwQA=="),
        ({"kind": "huggingface"}, {"HF_TOKEN": "t"}, "https://huggingface.co/api/models/a/b/revision/main", "Bearer t"),
        ({"kind": "huggingface", "revision": "v1"}, {"HF_HOME": "/nowhere"},
         "https://huggingface.co/api/models/a/b/revision/v1", ""),
        ({"kind": "directory", "path": "/x"}, {"HF_TOKEN": "t"}, "", ""),
    ],
)  # fmt: skip
def test_the_hub_must_be_asked_with_our_token_and_shown_without_it(tmp_path, source, environ, hub, authorization):
    need = needs(Spec.model_validate({"cache": {"dir": tmp_path}, "model": "a/b", "source": source}), environ)
    assert (need.hub, need.authorization) == (hub, authorization)
    assert not authorization or authorization not in repr(need)


@pytest.mark.skipif(shutil.which("dmesg") is None, reason="no dmesg here")
def test_this_very_machine_must_be_readable_or_say_why():
    found = read_xids()
    assert bool(found.source) != bool(found.reason)

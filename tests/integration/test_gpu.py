"""The GPU facts through pynvml itself, over a libnvidia-ml made for the test: the fake sits at the C interface."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_json_contract import documented, fields
from tests.support.host import ROOT, Host

TESTDATA = ROOT / "tests" / "testdata"
SOURCE, SCENARIOS = TESTDATA / "fake_nvml.c", TESTDATA / "nvml"
RECORDER = ROOT / "scripts" / "record-nvml"
READ = (
    "import dataclasses, json; from zops.host.gpu import read_gpus; print(json.dumps(dataclasses.asdict(read_gpus())))"
)


def compile_library(directory: Path, *flags: str) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler here: run scripts/ensure-test-tools")
    target = directory / "libnvidia-ml.so.1"
    subprocess.run(
        [compiler, *flags, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", target, SOURCE], check=True
    )
    return directory


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml-old"), "-DOLD_DRIVER")


def environment(library: Path, scenario: Path) -> dict[str, str]:
    return os.environ | {"FAKE_NVML": str(scenario), "LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT)}


def facts(library: Path, scenario: str | Path) -> dict:
    file = SCENARIOS / f"{scenario}.nvml" if isinstance(scenario, str) else scenario
    assert file.exists()
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment(library, file), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_fact_of_a_sound_gpu_must_be_read(library):
    found = facts(library, "h200")
    assert (found["driver"], found["cuda"], found["reason"]) == ("580.65.06", "13.0", "")
    assert found["gpus"] == [
        {
            "index": 0,
            "uuid": "GPU-h200-0",
            "name": "NVIDIA H200",
            "memory_total_bytes": 150754820096,
            "memory_used_bytes": 1073741824,
            "compute_capability": [9, 0],
            "temperature_c": 41,
            "ecc_uncorrected": 0,
            "ecc_uncorrected_ever": 0,
            "slowdown_c": 90,
            "slowdowns": [],
            "retired_pages": None,
            "repair_pending": False,
            "repair_failed": False,
            "remapped_rows": 0,
            "persistence": True,
            "at_full_speed": True,
            "link": {"generation": 5, "width": 16, "max_generation": 5, "max_width": 16},
            "pci": "0000:0a:00",
            "processes": [{"pid": 4000000, "name": "", "memory_bytes": 20500000000}],
        }
    ]


def test_what_a_gpu_does_not_count_must_be_none_not_zero(library):
    (gpu,) = facts(library, "ada-24gb")["gpus"]
    unknown = ("ecc_uncorrected", "ecc_uncorrected_ever", "retired_pages", "repair_pending", "repair_failed")
    assert {name: gpu[name] for name in unknown} == dict.fromkeys(unknown)
    assert (gpu["persistence"], gpu["at_full_speed"], gpu["slowdowns"], gpu["processes"]) == (False, False, [], [])


def test_everything_that_is_wrong_with_a_gpu_must_be_read(library):
    sick, sound = facts(library, "sick")["gpus"]
    assert (sick["ecc_uncorrected"], sick["ecc_uncorrected_ever"], sick["remapped_rows"]) == (3, 7, 8)
    assert (sick["repair_pending"], sick["repair_failed"]) == (True, True)
    assert sick["slowdowns"] == ["hardware", "heat, by the hardware"]
    assert sick["link"] == {"generation": 2, "width": 4, "max_generation": 5, "max_width": 16}
    assert (sound["repair_failed"], sound["slowdowns"]) == (False, [])


def test_retired_pages_of_an_older_gpu_must_be_counted(library):
    (gpu,) = facts(library, "v100-retired-pages")["gpus"]
    assert (gpu["retired_pages"], gpu["repair_pending"], gpu["remapped_rows"]) == (64, False, None)


def test_a_driver_that_lacks_functions_must_leave_the_rest_readable(old_library):
    (gpu,) = facts(old_library, "h200")["gpus"]
    assert (gpu["remapped_rows"], gpu["repair_failed"], gpu["processes"]) == (None, None, None)
    assert (gpu["name"], gpu["temperature_c"]) == ("NVIDIA H200", 41)


def test_two_gpus_must_be_told_apart(library):
    found = facts(library, "a100-80gb")
    assert [(gpu["index"], gpu["uuid"], gpu["pci"]) for gpu in found["gpus"]] == [
        (0, "GPU-a100-0", "0000:07:00"),
        (1, "GPU-a100-1", "0000:08:00"),
    ]
    assert found["cuda"] == "12.2"


def test_a_driver_without_a_gpu_must_say_so(library):
    found = facts(library, "no-devices")
    assert (found["gpus"], found["driver"]) == ([], "580.65.06")
    assert found["reason"] == "the driver is there but sees no GPU"


@pytest.mark.parametrize(
    ("scenario", "word"),
    [
        ("not-loaded", "not loaded"),
        ("mismatch", "reboot"),
        ("taken-away", "taken away"),
        ("no-permission", "permission"),
        ("odd", "NVML error"),
    ],
)
def test_a_failing_init_must_give_empty_facts_and_the_reason(library, scenario, word):
    found = facts(library, scenario)
    assert found["gpus"] == []
    assert word in found["reason"]


@pytest.mark.parametrize(("scenario", "left"), [("lost", "GPU-ada1"), ("vanishing", "GPU-h200-1")])
def test_a_lost_gpu_must_not_hide_its_neighbour_nor_be_taken_for_a_sound_one(library, scenario, left):
    found = facts(library, scenario)
    assert [gpu["uuid"] for gpu in found["gpus"]] == [left]
    assert found["reason"].startswith("GPU 0 cannot be read")
    assert "fell off the bus" in found["reason"]


@pytest.mark.parametrize("answers", range(1, 24))
def test_a_gpu_that_vanishes_at_any_moment_must_never_come_out_half_read(library, tmp_path, answers):
    scenario = tmp_path / "vanishing.nvml"
    lines = (SCENARIOS / "vanishing.nvml").read_text()
    scenario.write_text(re.sub(r"^0 lost \d+$", f"0 lost {answers}", lines, flags=re.MULTILINE))
    found = facts(library, scenario)
    read = [gpu["uuid"] for gpu in found["gpus"]]
    assert read == ["GPU-h200-1"] or (read == ["GPU-h200-0", "GPU-h200-1"] and answers > 19)
    assert bool(found["reason"]) == (len(read) == 1)


def test_a_host_without_a_driver_must_be_a_fact_not_an_error(tmp_path):
    # An empty file cannot be loaded, and hides a real driver from the test.
    (tmp_path / "libnvidia-ml.so.1").touch()
    found = facts(tmp_path, "h200")
    assert found["gpus"] == []
    assert "no NVIDIA driver" in found["reason"]


@pytest.mark.parametrize("scenario", ["h200", "ada-24gb", "sick", "v100-retired-pages", "h200-recorded"])
def test_what_is_recorded_from_a_host_must_give_the_same_facts_again(library, tmp_path, scenario):
    recorded = tmp_path / "recorded.nvml"
    subprocess.run(
        [sys.executable, RECORDER, recorded], env=environment(library, SCENARIOS / f"{scenario}.nvml"), check=True
    )
    again, first = facts(library, recorded), facts(library, scenario)
    for gpu in first["gpus"]:
        # A recording leaves out who the GPU and its users were.
        gpu["uuid"] = f"GPU-00000000-0000-0000-0000-{gpu['index']:012d}"
        for process in gpu["processes"]:
            process["pid"] = 4_000_001
    assert again == first


def doctor(host: Host, library: Path, scenario: str, *argv: str) -> tuple[int, dict[str, dict]]:
    done = subprocess.run(
        [sys.executable, "-m", "zops", "doctor", "--output", "json", *argv],
        cwd=host.root, env=environment(library, SCENARIOS / f"{scenario}.nvml") | {"ZOPS_STATE_DIR": str(host.root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, {check["id"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.fixture
def gpu_host(tmp_path: Path, tiny_model: Path) -> Host:
    return Host(tmp_path / "host", tiny_model, name="gpu", runtime="process", gpus="all")


GPU_IDS = (
    "gpu-driver", "gpu-count", "gpu-memory", "gpu-bfloat16", "gpu-processes", "gpu-condition", "gpu-slowdown",
    "gpu-persistence", "gpu-link",
)  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "settings", "bad"),
    [
        ("h100-80gb", {}, {}),
        ("a100-80gb", {}, {}),
        ("h200", {}, {"gpu-processes": "warn"}),
        ("ada-24gb", {}, {"gpu-memory": "fail", "gpu-persistence": "warn"}),
        ("ada-24gb", {"max_pixels": 1048576}, {"gpu-persistence": "warn"}),
        ("sick", {}, {"gpu-condition": "fail", "gpu-slowdown": "warn", "gpu-link": "warn"}),
        ("repair-pending", {}, {"gpu-condition": "warn"}),
        ("vanishing", {}, {"gpu-driver": "warn"}),
        ("v100-retired-pages", {}, {"gpu-bfloat16": "fail", "gpu-condition": "fail"}),
    ],
)
def test_the_doctor_must_judge_each_gpu_by_what_nvml_says(gpu_host, library, scenario, settings, bad):
    older = {"max_pixels": 1048576} if scenario.startswith("v100") else {}
    gpu_host.write(model="zops/synthetic-full", serve={"port": 1, "warmup_size": 64} | older | settings)
    status, checks = doctor(gpu_host, library, scenario, *(word for name in GPU_IDS for word in ("--only", name)))
    assert {name: check["verdict"] for name, check in checks.items() if check["verdict"] != "ok"} == bad
    assert status == (1 if "fail" in bad.values() else 0)
    assert all(checks[name]["remedy"] for name in bad)


def test_capacity_must_tell_what_fits_and_its_fields_must_be_documented(gpu_host, library):
    gpu_host.write(model="zops/synthetic-full")
    done = subprocess.run(
        [sys.executable, "-m", "zops", "doctor", "--capacity", "--output", "json"],
        cwd=gpu_host.root, env=environment(library, SCENARIOS / "ada-24gb.nvml"), capture_output=True, text=True,
    )  # fmt: skip
    body = json.loads(done.stdout)
    assert (done.returncode, body["sound"]) == (1, False)
    (gpu,) = body["gpus"]
    rows = {(row["dtype"], row["size"]): (row["fits"], row["images_per_second"]) for row in gpu["rows"]}
    assert rows["bfloat16", "1024x1024"] == (True, 0.31)
    assert rows["bfloat16", "1280x1280"] == (False, None)
    assert not any(fits for (dtype, _), (fits, _) in rows.items() if dtype == "float32")
    assert 1024 * 1024 <= gpu["largest_pixels"]["bfloat16"] < 1280 * 1280
    gpu_host.write(model="zops/synthetic-full", serve={"max_pixels": gpu["largest_pixels"]["bfloat16"]})
    assert doctor(gpu_host, library, "ada-24gb", "--only", "gpu-memory")[0] == 0
    assert set(fields(body)) == documented()["doctor --capacity"]


def test_what_was_recorded_on_a_real_h200_must_read_as_a_sound_gpu(library):
    (gpu,) = facts(library, "h200-recorded")["gpus"]
    assert (gpu["name"], gpu["compute_capability"], gpu["memory_total_bytes"]) == ("NVIDIA H200", [9, 0], 150754820096)

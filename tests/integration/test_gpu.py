"""The GPU facts through pynvml itself, over a libnvidia-ml made for the test: the fake sits at the C interface."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "testdata" / "fake_nvml.c"
READ = (
    "import dataclasses, json; from zops.host.gpu import read_gpus; print(json.dumps(dataclasses.asdict(read_gpus())))"
)
H200 = "NVIDIA H200|GPU-aaaa|150754820096|1073741824|9|0|41|0"
RTX4090 = "NVIDIA GeForce RTX 4090|GPU-bbbb|25757220864|0|8|9|35|"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler here: run scripts/ensure-test-tools")
    directory = tmp_path_factory.mktemp("nvml")
    target = directory / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    return directory


def facts(library: Path, gpus: str = "", init: int = 0) -> dict:
    environment = os.environ | {"FAKE_NVML_GPUS": gpus, "FAKE_NVML_INIT": str(init), "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_two_gpus_must_be_told_apart_with_all_their_facts(library):
    found = facts(library, f"{H200}\n{RTX4090}")
    assert (found["driver"], found["cuda"], found["reason"]) == ("580.65.06", "13.0", "")
    first, second = found["gpus"]
    assert first == {
        "index": 0,
        "uuid": "GPU-aaaa",
        "name": "NVIDIA H200",
        "memory_total_bytes": 150754820096,
        "memory_used_bytes": 1073741824,
        "compute_capability": [9, 0],
        "temperature_c": 41,
        "ecc_uncorrected": 0,
    }
    assert (second["index"], second["uuid"], second["compute_capability"]) == (1, "GPU-bbbb", [8, 9])


def test_what_a_gpu_does_not_count_must_be_none_not_zero(library):
    assert facts(library, RTX4090)["gpus"][0]["ecc_uncorrected"] is None


def test_a_driver_without_a_gpu_must_say_so(library):
    found = facts(library)
    assert found["gpus"] == []
    assert found["driver"] == "580.65.06"
    assert found["reason"] == "the driver is there but sees no GPU"


@pytest.mark.parametrize(
    ("code", "word"), [(9, "not loaded"), (18, "reboot"), (999, "taken away"), (4, "permission"), (57, "NVML error")]
)
def test_a_failing_init_must_give_empty_facts_and_the_reason(library, code, word):
    found = facts(library, H200, init=code)
    assert found["gpus"] == []
    assert word in found["reason"]


def test_a_lost_gpu_must_not_hide_its_neighbour(library):
    found = facts(library, f"lost\n{RTX4090}")
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-bbbb"]
    assert found["reason"].startswith("GPU 0 cannot be read")
    assert "fell off the bus" in found["reason"]


def test_a_host_without_a_driver_must_be_a_fact_not_an_error(tmp_path):
    # An empty file cannot be loaded, and hides a real driver from the test.
    (tmp_path / "libnvidia-ml.so.1").touch()
    found = facts(tmp_path)
    assert found["gpus"] == []
    assert "no NVIDIA driver" in found["reason"]

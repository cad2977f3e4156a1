"""A real server over a libnvidia-ml made for the test: what it tells of its GPU, and who waits when that hangs."""

import time
from pathlib import Path

import pytest

from tests.integration.test_gpu import SCENARIOS, compile_library
from tests.support.serving import Server, start_server, stop_hard
from tests.support.waiting import eventually


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path):
    scenario = tmp_path / "gpu.nvml"
    scenario.write_text((SCENARIOS / "h200.nvml").read_text())
    library = compile_library(tmp_path)
    running = start_server(
        tiny_model, tmp_path / "run", ZOPS_GPUS="all", LD_LIBRARY_PATH=str(library), FAKE_NVML=str(scenario)
    )
    try:
        yield running.wait_ready(), scenario
    finally:
        stop_hard(running)


def gpus(server: Server) -> dict:
    return server.call("GET", "/v1/zops/info", timeout_s=2).json["gpus"]


def test_a_gpu_that_is_lost_must_be_told_and_a_driver_that_hangs_must_not_hold_up_the_end(server) -> None:
    running, scenario = server
    sound = eventually(lambda: gpus(running), "the first look")
    assert sound["error"] == ""
    assert [(gpu["uuid"], gpu["memory_total"]) for gpu in sound["devices"]] == [("GPU-h200-0", 150754820096)]

    scenario.write_text((SCENARIOS / "taken-away.nvml").read_text())
    lost = eventually(lambda: (seen := gpus(running))["error"] and seen, "the loss", timeout_s=15)
    assert lost == {"error": "NVML says Unknown Error: access to the GPU was taken away", "devices": []}
    assert running.call("GET", "/readyz").status == 200, "readiness must not depend on it"
    assert "zops_gpu_error 1.0" in running.call("GET", "/metrics").body.decode()

    scenario.write_text("- nvmlInit !hang\n")
    eventually(lambda: "did not answer within" in gpus(running)["error"], "the limit", timeout_s=25)
    began = time.monotonic()
    assert running.call("GET", "/readyz").status == 200
    assert time.monotonic() - began < 1
    assert running.stop() == 0
    assert time.monotonic() - began < 12, "it waited for the driver"

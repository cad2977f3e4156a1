"""Each measurement shortly, with the tiny model on a CPU, as an operator runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.bench import figure, result, whole
from tests.support.host import ROOT
from tests.support.waiting import eventually
from zops.bench.child import run_inside
from zops.bench.pages import bring, share
from zops.bench.result import read_result, write_result
from zops.cache.synthetic import synthesize_snapshot
from zops.cli.main import run
from zops.errors import ZopsError

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A model of its own: what a server of other tests has mapped cannot be dropped from the page cache."""
    return synthesize_snapshot(tmp_path_factory.mktemp("bench") / "tiny", "tiny").path


@pytest.fixture
def zops(capsys, monkeypatch, tmp_path):
    """Run a command line; returns its status and its document."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*argv: object):
        status = run([*map(str, argv), "--output", "json"])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, json.loads(said.out) if said.out else said.err

    return call


def values(document):
    return {each["id"]: each for each in document["figures"]}


def test_loads_must_be_measured_warm_and_cold(zops, own_model, tmp_path):
    file, page = tmp_path / "load.json", tmp_path / "load.html"
    only = ("--only", "load/zops/full", "--only", "low_cpu_mem_usage=True/full/warm")
    status, document = zops("bench", "load", "--snapshot", own_model, "--quick", *only, "--json", file, "--html", page)
    found = values(document)
    assert (status, document["complete"], document["skipped"]) == (0, True, [])
    assert {name.rpartition("/")[0] for name in found} == {
        "load/zops/full/warm", "load/zops/full/cold", "load/low_cpu_mem_usage=True/full/warm",
    }  # fmt: skip
    for name in ("load/zops/full/warm", "load/low_cpu_mem_usage=True/full/warm"):
        assert 0 < found[f"{name}/time"]["value"] < 30
        assert 0.001 < found[f"{name}/host memory"]["value"] < 1, "4 MB of weights, in GB"
    parts = sum(found[f"load/zops/full/warm/{name}"]["value"] for name in ("tensors on the device", "assembly"))
    assert parts <= found["load/zops/full/warm/time"]["value"] * 1.01
    assert read_result(file).as_json() == document
    assert "Load time, cold page cache" in page.read_text()
    assert document["model"]["manifest_digest"]
    assert document["machine"]["versions"]["torch"]


def test_presets_must_be_measured_beside_their_likeness_and_their_floor(zops, own_model):
    only = ("--only", "precision/eager", "--only", "precision/bf16")
    status, document = zops("bench", "generate", "--snapshot", own_model, "--quick", *only)
    found = values(document)
    assert status == 0
    for preset in ("eager", "bf16"):
        case = f"precision/{preset}/8"
        stages = sum(found[f"{case}/{stage}"]["value"] for stage in ("encode", "denoise", "decode"))
        assert stages > 0.002, "a stage that answers from memory was not measured"
        assert found[f"{case}/time"]["n"] >= 2
    assert found["precision/bf16/8/PSNR"]["least"] > 60
    assert "precision/eager/8/PSNR" not in found
    assert "precision/eager/9/time" in found
    assert found["roofline/floor with float32 products/128 x 128, 8 forwards/floor"]["value"] > 0
    assert not any(name.startswith("sizes") for name in found)


def test_sizes_must_be_measured_with_forwards_and_guidance(zops, own_model):
    only = ("--only", "sizes/eager/64/8", "--only", "sizes/eager/128/9/0")
    status, document = zops("bench", "generate", "--snapshot", own_model, "--quick", *only)
    found = values(document)
    assert status == 0
    assert {name for name in found if name.endswith("/time")} == {
        "sizes/eager/64/8/0/time", "sizes/eager/64/8/1.5/time", "sizes/eager/128/9/0/time",
    }  # fmt: skip


def test_a_running_instance_must_be_measured_by_its_address_alone(zops, served):
    status, document = zops("bench", "serve", served.url, "--quick", "--only", "serve/64/4")
    found = values(document)
    assert status == 0
    rate, delay = found["serve/64/4/images/s"]["value"], found["serve/64/4/latency"]
    assert rate > 0
    # Little's law: who is served is never more than who asks.
    assert rate * sum(delay["samples"]) / delay["n"] <= 4 * 1.2
    assert found["serve/64/4/failed"]["value"] == 0
    assert document["model"]["model"] == "zops/synthetic-tiny"
    assert set(found["serve/64/4/batch size"]["samples"]) <= {1, 2, 3, 4}


def test_an_instance_of_its_own_must_be_started_and_gone_afterwards(zops, own_model):
    argv = ("--snapshot", own_model, "--gpus", "none", "--quick", "--only", "serve/64/1/", "--only", "gpus")
    status, document = zops("bench", "serve", *argv, "--only", "serve/64/16")
    found = values(document)
    assert status == 0
    assert found["serve/64/0/start"]["value"] > 0
    assert found["serve/64/16/images/s"]["value"] > 0
    assert document["skipped"][0]["reason"] == "fewer than two GPUs are visible"
    assert zops("ps", "--runtime", "process")[1] == []


def test_an_address_at_which_nothing_answers_must_be_an_error(zops):
    status, said = zops("bench", "serve", "http://127.0.0.1:9")
    assert status == 5
    assert "instance-unreachable" in said


def test_the_cache_must_be_measured_step_by_step(zops, own_model):
    only = [option for step in ("verify", "zops cache warm", "cache/page cache") for option in ("--only", step)]
    status, document = zops("bench", "cache", "--snapshot", own_model, "--quick", *only)
    found = values(document)
    assert (status, document["skipped"]) == (0, [])
    assert {name.split("/")[1] for name in found} == {
        "verify quick", "verify deep", "verify reread", "zops cache warm", "page cache",
    }  # fmt: skip
    rate, seconds = (found[f"cache/verify deep/full/warm/{name}"]["value"] for name in ("rate", "time"))
    assert rate * seconds == pytest.approx(document["model"]["weight_bytes"] / 1e9, rel=0.01)


def test_a_case_that_fails_must_be_listed_and_the_next_one_measured(zops, own_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(own_model, broken)
    (broken / "vae" / "config.json").write_text("{")
    only = ("--only", "load/zops/full/warm", "--only", "load/device_map/full/warm")
    status, document = zops("bench", "load", "--snapshot", broken, "--quick", *only)
    assert (status, document["figures"], document["complete"]) == (0, [], True)
    assert [each["id"] for each in document["skipped"]] == ["load/zops/full/warm", "load/device_map/full/warm"]
    assert "ended without a result" in document["skipped"][0]["reason"]


def test_what_cannot_be_measured_must_be_refused_with_what_to_do(zops, own_model, tmp_path):
    status, said = zops("bench", "load", "--snapshot", tmp_path)
    assert (status, "zops model synthesize" in said) == (3, True)
    status, said = zops("bench", "load", "--snapshot", own_model, "--slim", own_model)
    assert (status, "no slim snapshot" in said) == (2, True)
    status, said = zops("bench", "load", "--snapshot", own_model, "--only", "nothing is called so")
    assert (status, "no case is named" in said) == (2, True)


def test_a_measuring_process_that_takes_too_long_must_be_ended(own_model):
    task = {"snapshot": str(own_model), "way": "zops"}
    with pytest.raises(ZopsError, match="longer than 0 s") as refused:
        list(run_inside("load", task, timeout_s=0.2))
    assert refused.value.code == "bench-failed"


def session_lives(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_while_a_measuring_process_starts_must_end_it_and_its_clock(own_model, monkeypatch):
    started = []

    def start(clock):
        started.append(clock)
        threading.Thread.start(clock)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", start)
    with pytest.raises(KeyboardInterrupt):
        list(run_inside("load", {"snapshot": str(own_model), "way": "zops"}, timeout_s=600))
    (clock,) = started
    assert clock.daemon
    eventually(lambda: not clock.is_alive(), "the clock to stop")


def test_ctrl_c_must_keep_what_was_measured(own_model, tmp_path):
    file, page = tmp_path / "load.json", tmp_path / "load.html"
    argv = ["bench", "load", "--snapshot", str(own_model), "--json", str(file), "--html", str(page), "--quick"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "zops", *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            eventually(file.exists, "the first figures", timeout_s=60)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130, (tmp_path / "said").read_text()
        finally:
            process.kill()
    kept = read_result(file)
    assert kept.figures
    assert not kept.complete
    assert "ended early" in page.read_text()
    eventually(lambda: not session_lives(process.pid), "all of its session to end")


def test_the_page_cache_must_be_brought_into_a_state_and_proven(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(5_000_001))
    assert bring([file], "cold") == 0
    assert share([file]) == 0
    assert bring([file], "warm") == 1
    with file.open("rb") as stream:
        stream.read()
    with pytest.raises(FileNotFoundError):
        bring([tmp_path / "gone"], "warm")


def test_a_comparison_must_exit_with_1_on_a_regression_only(zops, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_result(old, result(figure(1.0), figure(1.0, way="b")))
    write_result(new, result(figure(1.2), figure(0.5, way="b"), machine={"gpus": []}))
    status, document = zops("bench", "compare", old, new)
    assert (status, document["regressions"]) == (1, 1)
    assert [each["verdict"] for each in document["figures"]] == ["worse", "better"]
    assert any("gpus" in text for text in document["machines_differ"])
    assert zops("bench", "compare", old, new, "--tolerance", "25%")[0] == 0
    assert zops("bench", "compare", old, old)[0] == 0
    assert zops("bench", "compare", old, new, "--tolerance", "lots")[0] == 2


def test_results_of_one_host_must_become_one_report(zops, tmp_path):
    one, two, page = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "page.html"
    write_result(one, result(figure(1.0, way="zops", weights="full", page_cache="warm")))
    write_result(two, whole())
    status, document = zops("bench", "report", one, two, "--html", page, "--against", one)
    assert (status, document["html"]) == (0, str(page))
    assert "Earlier runs" in page.read_text()


def test_two_cards_must_be_compared_in_three_ways(zops, tiny_model):
    """On the CPU a card is a process; that each way serves and is said to be better or worse is all that it shows."""
    only = [word for way in ("replicas", "split", "context") for word in ("--only", f"parallel/{way}/64")]
    status, document = zops("bench", "serve", "--snapshot", tiny_model, "--gpus", "none", "--quick", *only)
    found = values(document)
    assert (status, document["skipped"]) == (0, [])
    for way in ("replicas", "split", "context"):
        assert found[f"parallel/{way}/64/1/latency"]["value"] > 0
        assert found[f"parallel/{way}/64/8/images/s"]["value"] > 0
        gain = found.get(f"parallel/{way}/64/8/against replicas")
        assert (gain is None) == (way == "replicas")
    rates = [found[f"parallel/{way}/64/8/images/s"]["value"] for way in ("replicas", "split")]
    assert found["parallel/split/64/8/against replicas"]["value"] == pytest.approx(rates[1] / rates[0], rel=0.01)

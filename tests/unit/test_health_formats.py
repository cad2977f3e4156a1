"""What monitoring systems and people read of verdicts: forms that other programs parse, and lines that fit."""

import re

import pytest

from zops.cli.diagnosis import Colours
from zops.cli.verdicts import render_verdicts
from zops.errors import RuntimeUnreachable
from zops.health.formats import nagios, nagios_unknown, prometheus
from zops.health.survey import Survey
from zops.health.verdict import Health, Probe, degraded, failed, passed

# Of the Monitoring Plugins' guidelines: 'label'=value[UOM];[warn];[crit];[min];[max]
FIGURE = re.compile(r"'[^'=]+'=-?[0-9.]+(s|B|%)?(;[0-9.]*){0,4}")

GPU = {"index": 0, "uuid": "GPU-1", "memory_used": 21, "memory_total": 141, "temperature": 41, "ecc_uncorrected": 0}
WELL = (
    passed("running", "running since 2026", restarts=1),
    passed("gpu", "sees NVIDIA H200", devices=[GPU]),
    passed("queue", "2 waiting, 1 running", waiting=2, running=1, limit=16, oldest_s=None, idle_s=0.5),
    passed("canary", "an image", work_s=0.4, baseline_s=0.35, similarity_db=99.0),
)
LOST = failed("gpu", "gpu-lost", "NVML inside it: Unknown | Error", "recreate it: zops down && zops up; then look")
SLOW = degraded("canary", "canary-slow", "the image took long", "zops doctor")
ENGINE = failed("engine", "engine-unreachable", "no answer within 2 s", "")
KEY = degraded("canary", "key-refused", "wants a key", "zops key new")


def health(name: str = "web", *probes: Probe, host: str = "") -> Health:
    return Health(name, "docker", probes, host)


def survey(*healths: Health) -> Survey:
    return Survey("2026-11-23T19:00:00+00:00", healths)


@pytest.mark.parametrize(
    ("healths", "status", "begins"),
    [
        ([health("web", *WELL)], 0, "ZOPS OK - 1 instance ok"),
        ([health("web", *WELL), health("b", *WELL)], 0, "ZOPS OK - 2 instances ok"),
        ([health("web", SLOW)], 1, "ZOPS WARNING - web: canary canary-slow: the image took long"),
        ([health("web", LOST)], 2, "ZOPS CRITICAL - web: gpu gpu-lost: NVML inside it: Unknown / Error"),
        ([health("", ENGINE, host="far")], 3, "ZOPS UNKNOWN - far: engine engine-unreachable: no answer"),
        ([health("web", KEY)], 3, "ZOPS UNKNOWN - web: canary key-refused"),
        ([health("", ENGINE, host="far"), health("web", SLOW)], 3, "ZOPS UNKNOWN - far: "),
        ([health("web", *WELL), health("", ENGINE, host="far"), health("b", LOST)], 2, "ZOPS CRITICAL - b: gpu"),
        ([], 2, "ZOPS CRITICAL - there is no instance"),
    ],
)
def test_a_plugin_must_say_the_worst_first_in_one_line_with_its_status(healths, status, begins):
    found, line = nagios(survey(*healths))
    assert found == status
    assert line.startswith(begins)
    assert "\n" not in line
    assert line.count("|") <= 1


def test_performance_data_must_be_what_the_guidelines_say_for_any_name():
    _, line = nagios(survey(health("web", *WELL, host="gpu'1=x"), health("b", LOST)))
    figures = re.findall(r"'[^']*'\S*", line.partition(" | ")[2])
    assert len(figures) == 6
    for figure in figures:
        assert FIGURE.fullmatch(figure), figure
    assert "'gpu1x/web gpu0 memory'=21B;;;0;141" in figures
    assert "'gpu1x/web waiting'=2;;;0;16" in figures
    assert "'gpu1x/web canary'=0.4s;0.700;1.750;0" in figures


def test_an_error_must_be_unknown_in_one_line():
    assert nagios_unknown(RuntimeUnreachable("no engine\nruns | here")) == (3, "ZOPS UNKNOWN - no engine runs / here")


def test_metrics_must_be_read_by_prometheus_own_parser_and_say_what_was_judged():
    parser = pytest.importorskip("prometheus_client.parser")
    text = prometheus(survey(health("web", *WELL), health("web", LOST, host='g"1')))
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert all(name.startswith("zops_health_") for name, *_ in samples)
    assert samples[("zops_health_verdict_worst",)] == 2
    assert samples[("zops_health_judged_timestamp_seconds",)] == 1795460400
    here = (("deployment", "web"), ("host", ""))
    assert samples[("zops_health_verdict", *here, ("runtime", "docker"))] == 0
    assert samples[("zops_health_queue_waiting", *here, ("runtime", "docker"))] == 2
    assert samples[("zops_health_canary_seconds", *here, ("runtime", "docker"))] == 0.4
    assert not any(name == "zops_health_queue_oldest_seconds" for name, *_ in samples)
    gpu = (("deployment", "web"), ("gpu", "0"), ("host", ""), ("runtime", "docker"), ("uuid", "GPU-1"))
    assert samples[("zops_health_gpu_temperature_celsius", *gpu)] == 41
    problem = ("zops_health_problem", ("code", "gpu-lost"), ("deployment", "web"), ("host", 'g"1'))
    assert samples[(*problem, ("layer", "gpu"), ("runtime", "docker"))] == 1
    assert sum(name == "zops_health_problem" for name, *_ in samples) == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_must_fit_the_terminal_and_break_no_command(width):
    long = failed(
        "cache",
        "manifest-differs",
        "manifest aaaaaaaaaaaa lies on its disk now, bbbbbbbbbbbb is expected, which is what was deployed last week",
        "zops cache verify; then recreate it: zops down --name the-one-with-the-long-name && zops up --name the-one",
    )
    table = render_verdicts(
        [health("web", *WELL), health("a-deployment-of-a-long-name", long, host="gpu-host-17")], Colours(width=width)
    )
    lines = table.splitlines()
    assert all(len(line) <= width for line in lines if "fix:" not in line and "then" not in line)
    assert any(line.strip() == "fix: zops cache verify" for line in lines)
    command = "recreate it: zops down --name the-one-with-the-long-name && zops up --name the-one"
    assert any(line.strip() == f"then {command}" for line in lines)
    assert re.sub(r"\s+", " ", table).count(long.reason) == 1


def test_the_first_failed_layer_must_be_told_before_what_is_only_degraded():
    one = health("web", SLOW, LOST)
    assert (one.verdict, one.code) == ("failed", "gpu-lost")
    assert (health("web", *WELL, SLOW).code, health("web", *WELL).code) == ("canary-slow", "")


def test_colours_must_not_move_a_column():
    healths = [health("web", *WELL), health("b", LOST)]
    plain = render_verdicts(healths, Colours(width=120), verbose=True)
    coloured = render_verdicts(healths, Colours(on=True, width=120), verbose=True)
    assert coloured != plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain

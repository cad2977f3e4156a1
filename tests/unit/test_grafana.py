"""The Grafana dashboard must show metrics that exist, by labels that they have."""

import json
import re
from pathlib import Path

import pytest

from zops.serving.metrics import METRICS

DASHBOARD = json.loads((Path(__file__).parents[2] / "grafana/zops.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# The words of PromQL that the dashboard uses; whatever else looks like a name must be a metric or a label.
PROMQL = {"sum", "min", "by", "rate", "increase", "histogram_quantile", "topk", "or", "vector", "le"}
# Set by Prometheus when it scrapes.
SCRAPED = {"instance"}


def series():
    """Every name that /metrics can show, with its labels."""
    found = {}
    for name, kind in METRICS.items():
        if kind.type == "histogram":
            found[f"{name}_bucket"] = {*kind.labels, "le"}
            found[f"{name}_sum"] = found[f"{name}_count"] = set(kind.labels)
        else:
            found[name] = set(kind.labels)
    return found


def names_in(expression):
    """Return the words of an expression, without texts, durations and variables."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    return set(re.findall(r"[a-zA-Z_]\w*", bare))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_must_use_metrics_and_labels_that_exist(expression):
    known = series()
    used = {name for name in names_in(expression) if name.startswith("zops")}
    assert used, "it shows nothing of ours"
    assert used <= known.keys()
    labels = set.union(*(known[name] for name in used)) | SCRAPED
    assert names_in(expression) - used - PROMQL <= labels
    for text in re.findall(r"\{([^}]*)\}", expression):
        assert {matcher.split("=")[0] for matcher in text.split(",")} <= labels


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_counters_must_be_shown_as_rates_and_gauges_as_they_are(expression):
    for name in names_in(expression) & series().keys():
        kind = METRICS[re.sub(r"_(bucket|sum|count)$", "", name) if name not in METRICS else name].type
        counted = bool(re.search(rf"(rate|increase)\({name}\b", expression))
        assert counted == (kind != "gauge"), name


def test_the_legends_must_name_labels_that_the_expression_keeps():
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
                kept = re.search(r"by \(([^)]*)\)", target["expr"])
                assert not kept or label in kept[1], (panel["title"], label)


def test_an_operator_must_find_what_matters_at_night():
    shown = set.union(*(names_in(expression) for expression in EXPRESSIONS))
    needed = {
        "zops_ready",
        "zops_workers_ready",
        "zops_worker_restarts_total",
        "zops_waiting",
        "zops_running",
        "zops_refused_total",
        "zops_request_seconds_bucket",
        "zops_phase_seconds_bucket",
        "zops_batch_size_bucket",
        "zops_gpu_memory_used_bytes",
        "zops_cache_hit_bytes",
        "zops_build_info",
    }
    assert needed <= shown


def test_panels_must_have_ids_of_their_own_and_not_overlap():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_nothing_must_be_bound_to_one_grafana():
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"zops", "${datasource}"}

"""The watch's small parts: events, mailboxes, figures, memory and what the documentation says of them."""

import json
import re
import threading
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from zops.errors import SpecError
from zops.watch.events import COMMON, KINDS, LOUD, EventFile, Mailbox, Occurrence
from zops.watch.healing import TABLE, Heal
from zops.watch.memory import read_heals, write_heals
from zops.watch.metrics import FAMILIES, PREFIX, Figures
from zops.watch.webhook import VARIABLE, find_url

DOCS = Path(__file__).parents[2] / "docs"
WARNING = Occurrence("warning", 0.0, {"text": "a test"})


def test_every_event_and_field_must_be_documented_and_no_other() -> None:
    page = (DOCS / "reference" / "json.md").read_text(encoding="utf-8")
    section = page.partition("\n### zops watch\n")[2].partition("\n### ")[0]
    table = dict(re.findall(r"^- `([a-z-]+)`: (.*)$", section, re.MULTILINE))
    assert {kind: set(re.findall(r"`([a-z_]+)`", text)) for kind, text in table.items()} == {
        kind: set(names) for kind, names in KINDS.items()
    }
    fields = set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE))
    assert fields == set(COMMON) | {name for names in KINDS.values() for name in names}


def test_every_metric_must_be_documented_and_no_other() -> None:
    page = (DOCS / "how-to" / "watch.md").read_text(encoding="utf-8")
    documented = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert documented == {name: family.type for name, family in FAMILIES.items()}


def test_the_table_of_heals_in_the_documentation_must_be_the_code_s() -> None:
    page = (DOCS / "how-to" / "watch.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[a-z-]+`,? ?)+) \| (restart|recreate|report|give-up) \|", page, re.MULTILINE)
    assert {code: remedy for codes, remedy in rows for code in re.findall(r"`([a-z-]+)`", codes)} == TABLE


def test_loud_kinds_must_exist() -> None:
    assert KINDS.keys() >= LOUD


def test_an_event_with_other_fields_than_documented_must_be_a_bug() -> None:
    with pytest.raises(AssertionError, match="warning has other fields"):
        Occurrence("warning", 0.0, {"text": "x", "more": 1})


def test_an_event_must_carry_no_secret_and_no_line_of_a_log(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    evidence = {"log": ["a prompt"], "error": "https://user:pass@hub.example/x?token=abc", "deep": [{"log": ["x"]}]}
    facts = dict.fromkeys(KINDS["verdict"], "") | {"evidence": evidence, "reason": "hf_abcdefghijklmnopqrstuvwxyz"}
    line = Occurrence("verdict", 0.0, facts).as_line()
    for secret in ("a prompt", "user:pass", "token=abc", "hf_abcdef"):
        assert secret not in line
    assert json.loads(line)["at"] == "1970-01-01T00:00:00.000+00:00"


def test_a_sink_that_hangs_must_hold_nobody_up_and_lose_the_newest() -> None:
    go_on, seen = threading.Event(), []

    def sink(one):
        go_on.wait(30)
        seen.append(one)

    box = Mailbox(sink, "test", size=2)
    eventually(lambda: box(WARNING) or box.counts["dropped"], "a full queue")
    assert not box.drain(0.01)
    go_on.set()
    assert box.drain(10)
    assert len(seen) == box.counts["sent"]


def test_a_sink_that_fails_must_get_the_next_event_all_the_same(tmp_path) -> None:
    box = Mailbox(EventFile(tmp_path / "gone" / "events.jsonl"), "test")
    box(WARNING)
    assert box.drain(10)
    (tmp_path / "gone").mkdir()
    box(WARNING)
    assert box.drain(10)
    assert box.counts == {"sent": 1, "failed": 1, "dropped": 0}
    assert json.loads((tmp_path / "gone" / "events.jsonl").read_text())["text"] == "a test"


def test_figures_must_show_one_verdict_an_instance_and_forget_it_when_it_is_gone() -> None:
    figures = Figures()
    figures.judge("demo", "docker", "ok", "", "")
    figures.judge("demo", "docker", "failed", "live", "hung")
    figures.add("heals_total", "demo", "docker", "restart", "done")
    lines = [line for line in figures.render().splitlines() if 'instance="demo"' in line]
    verdict = 'zops_watch_instance_verdict{instance="demo",runtime="docker",layer="live",code="hung"} 2'
    counted = 'zops_watch_heals_total{instance="demo",runtime="docker",action="restart",result="done"} 1'
    assert lines == [verdict, counted]
    figures.forget("demo", "docker")
    assert [line for line in figures.render().splitlines() if 'instance="demo"' in line] == [counted]


def test_labels_must_be_escaped() -> None:
    figures = Figures()
    figures.replace("gpu_fenced", {('a"b\\c\nd', "", ""): 1})
    assert 'gpu="a\\"b\\\\c\\nd"' in figures.render()


def test_what_was_healed_must_be_known_again_after_a_new_start(tmp_path) -> None:
    heals = [Heal(1.0, "restart", "hung", 0.5, 2.0, None), Heal(5.0, "recreate", "hung", 4.5)]
    assert write_heals(tmp_path / "w" / "heals.json", {("docker", "demo"): ("id", heals)}) == ""
    assert read_heals(tmp_path / "w" / "heals.json") == ({("docker", "demo"): ("id", heals)}, "")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"instances": 3}', '{"instances": {"a/b": {"id": "", "heals": [1]}}}']
)
def test_a_broken_memory_must_be_no_memory(tmp_path, text) -> None:
    (tmp_path / "heals.json").write_text(text)
    assert read_heals(tmp_path / "heals.json") == ({}, "it makes no sense")


def test_a_missing_memory_must_be_nothing_to_speak_of(tmp_path) -> None:
    assert read_heals(tmp_path / "heals.json") == ({}, "")
    (tmp_path / "file").write_text("")
    assert write_heals(tmp_path / "file" / "heals.json", {}) != ""


def test_the_webhook_must_come_from_the_environment_or_a_file_and_never_be_repeated(tmp_path) -> None:
    file = tmp_path / "url"
    file.write_text("https://hooks.example/SECRET\nmore\n")
    assert find_url(file, {}) == "https://hooks.example/SECRET"
    assert find_url(file, {VARIABLE: " http://127.0.0.1:1/x "}) == "http://127.0.0.1:1/x"
    assert find_url(None, {}) == ""
    for wrong in ("SECRET", "ftp://host/SECRET", "http://", "http://[SECRET", "http://host/SEC RET"):
        with pytest.raises(SpecError) as caught:
            find_url(None, {VARIABLE: wrong})
        assert "SECRET" not in f"{caught.value.message} {caught.value.hint}"
        assert caught.value.code == "webhook-invalid"
    with pytest.raises(SpecError, match="cannot be read"):
        find_url(tmp_path / "missing", {})

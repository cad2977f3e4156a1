"""Data goes to stdout, all else to stderr, in the form that was asked for."""

import io
import json

import pytest

from zops.cli import bars
from zops.cli.output import Output, duration, format_table, size
from zops.errors import HostShort, UsageError
from zops.events import Finished, Progressed, Started, Warned, silent, task


def sink(mode: str) -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(mode, stdout=stdout, stderr=stderr), stdout, stderr  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "stdout", "stderr"),
    [
        ("plain", "hello\n", "a note\nwarning: careful\n"),
        ("json", '{\n "greeting": "hello"\n}\n', '{"note": "a note"}\n{"warning": "careful"}\n'),
    ],
)
def test_data_must_go_to_stdout_and_the_rest_to_stderr(mode: str, stdout: str, stderr: str) -> None:
    out, data, rest = sink(mode)
    out.data({"greeting": "hello"}, "hello")
    out.note("a note")
    out.warn("careful")
    assert (data.getvalue(), rest.getvalue()) == (stdout, stderr)


def test_an_error_must_be_one_line_what_and_one_line_what_to_do() -> None:
    out, data, rest = sink("plain")
    out.error(HostShort("port 8000 is taken", hint="free it"))
    assert (data.getvalue(), rest.getvalue()) == ("", "error: port 8000 is taken\n  fix: free it\n")


def test_an_error_in_json_must_carry_code_status_hint_and_details() -> None:
    out, data, rest = sink("json")
    out.error(HostShort("port 8000 is taken", code="port-taken", hint="free it", port=8000))
    assert data.getvalue() == ""
    assert json.loads(rest.getvalue()) == {
        "error": {
            "code": "port-taken",
            "message": "port 8000 is taken",
            "exit_status": 6,
            "hint": "free it",
            "details": {"port": 8000},
        }
    }


def test_an_empty_table_must_be_an_empty_list_in_json_and_a_note_for_people() -> None:
    out, data, rest = sink("json")
    out.table(("A",), [], [])
    assert json.loads(data.getvalue()) == []
    out, data, rest = sink("plain")
    out.table(("A",), [], [], empty="no instances")
    assert (data.getvalue(), rest.getvalue()) == ("", "no instances\n")


def test_a_table_must_align_its_columns_and_cut_nothing() -> None:
    text = format_table(("NAME", "STATE"), [("a-long-name", "ok"), ("b", "failed")])
    assert text == "NAME         STATE\na-long-name  ok\nb            failed"


def test_progress_in_plain_mode_must_be_a_line_at_the_end_of_each_task() -> None:
    out, data, rest = sink("plain")
    with out.progress() as report:
        report(Started("pull", "pulling", 100))
        report(Progressed("pull", 50, 100))
        report(Warned("slow"))
        report(Finished("pull", "pulled", 2.5))
    assert data.getvalue() == ""
    assert rest.getvalue() == "warning: slow\npulled (2.50 s)\n"


def test_progress_in_json_mode_must_be_one_object_a_line() -> None:
    out, _, rest = sink("json")
    with out.progress() as report, task(report, "pull", "pulling", total=10) as running:
        running.advance(10)
    lines = [json.loads(line) for line in rest.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["started", "progressed", "finished"]
    assert lines[1] == {"event": "progressed", "task": "pull", "done": 10, "total": 10}


def test_a_task_that_raises_must_not_be_reported_as_finished() -> None:
    seen: list[object] = []
    with pytest.raises(UsageError), task(seen.append, "pull", "pulling"):
        raise UsageError("no")
    assert [type(event) for event in seen] == [Started]
    silent(Warned("dropped"))


@pytest.mark.parametrize(
    ("asked", "environ", "mode"),
    [("json", {}, "json"), (None, {"ZOPS_OUTPUT": "json"}, "json"), ("plain", {"ZOPS_OUTPUT": "json"}, "plain")],
)
def test_the_mode_must_come_from_the_flag_then_the_environment(asked, environ, mode) -> None:
    assert Output.resolve(asked, environ).mode == mode


def test_a_wrong_mode_in_the_environment_must_be_refused() -> None:
    with pytest.raises(UsageError, match="ZOPS_OUTPUT is 'xml'"):
        Output.resolve(None, {"ZOPS_OUTPUT": "xml"})


def test_sizes_and_durations_must_read_well() -> None:
    assert [size(n) for n in (0, 999, 1500, 32_848_305_533)] == ["0 B", "999 B", "1.50 kB", "32.85 GB"]
    assert [duration(s) for s in (0.314, 12.34, 185)] == ["0.31 s", "12.3 s", "3 min 05 s"]


class Terminal(io.StringIO):
    """A terminal that remembers, for each line of text, whether bars were on it."""

    def __init__(self) -> None:
        super().__init__()
        self.out: Output | None = None
        self.covered: dict[str, bool] = {}

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.out is not None:
            bars = self.out._bars
            self.covered[text] = bars is not None and bars._bars.live.is_started
        return super().write(text)


def test_what_is_written_while_bars_are_shown_must_not_be_glued_to_them() -> None:
    terminal = Terminal()
    out = terminal.out = Output("human", stdout=terminal, stderr=terminal)
    with out.progress() as report, task(report, "pull", "pulling", total=10):
        out.data(None, "a result")
        out.note("a note")
        assert out._bars is not None
        assert out._bars._bars.live.is_started
    assert terminal.covered["a result\n"] is False
    assert terminal.covered["a note\n"] is False
    assert out._bars is None


def test_short_work_must_leave_no_line_and_long_work_one() -> None:
    for mode in ("human", "plain"):
        terminal = Terminal()
        out = Output(mode, stdout=io.StringIO(), stderr=terminal)  # type: ignore[arg-type]
        with out.progress() as report:
            report(Finished("look", "looked", 0.2))
            report(Finished("pull", "pulled", 2.5))
        assert "looked" not in terminal.getvalue()
        assert "pulled (2.50 s)" in terminal.getvalue()


def test_long_work_in_a_log_must_tell_how_far_it_is_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zops.cli.progress.LINE_INTERVAL_S", 0)
    out, _, rest = sink("plain")
    with out.progress() as report:
        report(Started("pull", "pulling", 2_000_000))
        report(Progressed("pull", 500_000, 2_000_000))
        report(Started("check", "checking", 4, "checks"))
        report(Progressed("check", 1, 4))
    assert rest.getvalue() == "pulling: 25 %, 500.00 kB of 2.00 MB\nchecking: 25 %, 1 of 4 checks\n"


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("vae/config.json", 20, "vae/config.json"), ("transformer/shard-1-of-3.safetensors", 20, "…-1-of-3.safetensors"),
     ("transformer/shard-1-of-3.safetensors", -5, "…f-3.safetensors")],
)  # fmt: skip
def test_a_long_text_must_be_cut_at_its_front(text: str, width: int, shown: str) -> None:
    assert bars.shortened(text, width) == shown


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0, 7, "0 / 7 B"), (230e6, 9.97e9, "0.23 / 9.97 GB"), (12e9, 320e9, "12 / 320 GB"), (5e5, 2e6, "0.50 / 2.00 MB")],
)
def test_both_numbers_of_a_bar_must_be_in_one_unit(done: float, total: float, shown: str) -> None:
    assert bars.share_of(done, total) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (67, "1:07"), (3723, "1:02:03")])
def test_the_time_left_must_be_a_clock(seconds: float, shown: str) -> None:
    assert bars.clock(seconds) == shown


def test_a_line_of_progress_must_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("zops.cli.progress.time.monotonic", lambda: now)
    out, _, rest = sink("plain")
    with out.progress() as report:
        report(Started("pull", "pulling", 1_000_000_000))
        # An earlier run had brought half of it: that took no time now.
        report(Progressed("pull", 500_000_000, 1_000_000_000))
        now += 20
        report(Progressed("pull", 700_000_000, 1_000_000_000))
    assert rest.getvalue() == "pulling: 70 %, 700.00 MB of 1.00 GB, 10.00 MB/s, 30.0 s left\n"

"""Several hosts judged at once: the dead and the hanging must hide nobody and keep nobody waiting."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.support.docker_engine import container, engine
from tests.support.instance import running
from zops.errors import SpecError, UsageError
from zops.health.fleet import survey_fleet
from zops.health.survey import Manner
from zops.spec import Spec, load

# Stands for ssh: connects to nobody, says nothing and does not end when it is told to.
HANGING_SSH = """#!{python}
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""


@pytest.fixture
def silent_engine():
    """An engine that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def hold() -> None:
            try:
                while True:
                    held.append(listener.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=hold)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for one in held:
            one.close()


@pytest.fixture
def dead_engine():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return f"tcp://127.0.0.1:{port}"


def fleet(**engines: str | dict[str, str]) -> Spec:
    hosts = [
        {"name": name, "engine": where} if isinstance(where, str) else {"name": name} | where
        for name, where in engines.items()
    ]
    return Spec.model_validate({"hosts": hosts})


def told(found) -> list[tuple[str, str, str]]:
    return [(one.host, one.name, one.code) for one in found.healths]


def test_a_dead_and_a_hanging_host_must_hide_no_other_and_keep_nobody_waiting(silent_engine, dead_engine):
    with running() as (url, _), engine(container("web", "http://127.0.0.1:9"), inside=url) as (well, _):
        began = time.monotonic()
        found = survey_fleet(fleet(a=silent_engine, b=well, c=dead_engine), host_timeout_s=2)
        assert time.monotonic() - began < 3.5
    assert told(found) == [("a", "", "engine-unreachable"), ("b", "web", ""), ("c", "", "engine-unreachable")]
    assert "no answer within 2 s" in found.healths[0].first_bad.reason
    assert "nobody listens" in found.healths[2].first_bad.reason
    assert found.verdict == "failed"


def test_an_instance_on_another_hosts_loopback_must_be_asked_from_inside_it(dead_engine):
    with running() as (url, behaviour), engine(container("web", "http://127.0.0.1:9"), inside=url) as (there, asked):
        found = survey_fleet(fleet(far=there), manner=Manner(deep=True))
        assert told(found) == [("far", "web", "")]
        assert any("/exec" in path for path in asked)
        assert [probe.layer for probe in found.healths[0].probes][-1] == "canary"
        assert behaviour.requests[-1][0] == "/v1/images/generations"


def test_an_instance_whose_hosts_address_is_known_must_be_asked_there(dead_engine):
    with running() as (url, _):
        address, _, port = url.rpartition(":")
        with engine(container("web", f"http://127.0.0.1:{port}")) as (there, asked):
            found = survey_fleet(fleet(far={"engine": there, "url": address}))
    assert told(found) == [("far", "web", "")]
    assert not any("/exec" in path for path in asked)


def test_a_host_without_the_instance_must_be_failed_and_say_so():
    with running() as (url, _), engine(container("web", url), inside=url) as (there, _), engine() as (empty, _):
        spec = fleet(there=there, empty=empty)
        assert told(survey_fleet(spec)) == [("there", "web", ""), ("empty", "", "instance-missing")]
        assert told(survey_fleet(spec, name="web")) == [("there", "web", ""), ("empty", "web", "instance-missing")]
        assert told(survey_fleet(spec, name="other"))[0] == ("there", "other", "instance-missing")


def test_goldens_of_two_hosts_must_be_kept_apart(tmp_path):
    with running() as (url, _), engine(container("web", url), inside=url) as (there, _):
        survey_fleet(fleet(a=there, b=there), manner=Manner(deep=True))
    names = {path.name for path in (tmp_path / "state" / "canaries").iterdir()}
    assert names == {"web@a.golden.json", "web@b.golden.json"}


def test_a_fleet_of_none_must_be_refused_with_what_to_write():
    with pytest.raises(UsageError) as caught:
        survey_fleet(Spec())
    assert caught.value.code == "hosts-missing"


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ("[{name: a, engine: 'http://x'}]", "must be local"),
        ("[{name: a}, {name: a}]", "two hosts are named a"),
        ("[{engine: local}]", "hosts"),
        ("[{name: a, url: 'ssh://x'}]", "hosts"),
        ("[{name: a/b}]", "hosts"),
    ],
)
def test_a_host_that_cannot_be_must_be_refused(tmp_path, hosts, words):
    (tmp_path / "zops.yaml").write_text(f"hosts: {hosts}\n")
    with pytest.raises(SpecError, match=words):
        load(tmp_path / "zops.yaml")


def test_the_command_must_end_in_time_whatever_an_ssh_does(tmp_path, silent_engine, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(HANGING_SSH.replace("{python}", sys.executable))
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with running() as (url, _), engine(container("web", url), inside=url) as (well, _):
        text = "hosts:\n" + "".join(
            f"  - {{name: {name}, engine: '{where}'}}\n"
            for name, where in {"far": "ssh://ops@far", "mute": silent_engine, "well": well}.items()
        )
        (tmp_path / "zops.yaml").write_text(text)
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "zops", "health", "--all", "--host-timeout", "2", "--output", "json"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - began
    body = json.loads(ran.stdout)
    assert ran.returncode == 1
    assert [(one["host"], one["verdict"]) for one in body["instances"]] == [
        ("far", "failed"), ("mute", "failed"), ("well", "ok"),
    ]  # fmt: skip
    assert seconds < 8

"""Finding a docker command that can build, and running it: with scripts in the place of docker."""

import io
import os
import sys
import time
from pathlib import Path

import pytest

from zops.errors import RuntimeUnreachable
from zops.events import Finished
from zops.runtime.buildkit import Builder, find_builder, run_build


def put_docker(directory: Path, *, version: str, buildx: bool = False) -> Path:
    """Put a `docker` into a directory that answers what a client of this version answers."""
    directory.mkdir(exist_ok=True)
    docker = directory / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "{version}" && exit 0\n'
        f'[ "$1" = buildx ] && {"echo github.com/docker/buildx v0.30 && exit 0" if buildx else "exit 1"}\n'
        "exit 1\n"
    )
    docker.chmod(0o755)
    return docker


OLD = "Docker version 20.10.24+dfsg1, build 297e128"
NEW = "Docker version 28.2.2, build e6534b4"


def find(tmp_path: Path, *directories: Path) -> Builder:
    environ = {"PATH": os.pathsep.join(map(str, directories))}
    return find_builder(environ, fallback=tmp_path / "usr" / "docker")


def test_a_client_with_buildx_must_be_used(tmp_path):
    docker = put_docker(tmp_path / "a", version=NEW, buildx=True)
    assert find(tmp_path, tmp_path / "a") == Builder(docker, buildx=True)


def test_an_old_client_must_be_used_with_its_own_buildkit(tmp_path):
    docker = put_docker(tmp_path / "a", version=OLD)
    assert find(tmp_path, tmp_path / "a") == Builder(docker, buildx=False)


def test_a_new_client_without_buildx_must_be_passed_over(tmp_path):
    put_docker(tmp_path / "a", version=NEW)
    docker = put_docker(tmp_path / "b", version=OLD)
    assert find(tmp_path, tmp_path / "a", tmp_path / "b") == Builder(docker, buildx=False)


def test_the_distributions_client_must_be_found_off_the_path(tmp_path):
    put_docker(tmp_path / "a", version=NEW)
    docker = put_docker(tmp_path / "usr", version=OLD)
    assert find(tmp_path, tmp_path / "a") == Builder(docker, buildx=False)


@pytest.mark.parametrize("version", [NEW, "Docker version 17.05.0-ce", "podman version 4.3.1", ""])
def test_without_a_builder_the_error_must_name_what_was_found_and_what_to_install(tmp_path, version):
    docker = put_docker(tmp_path / "a", version=version)
    with pytest.raises(RuntimeUnreachable) as caught:
        find(tmp_path, tmp_path / "a")
    assert caught.value.code == "no-builder"
    assert str(docker) in caught.value.message
    assert "docker-buildx-plugin" in caught.value.hint


def test_without_any_docker_the_error_must_say_so(tmp_path):
    with pytest.raises(RuntimeUnreachable, match="there is none on the PATH"):
        find(tmp_path, tmp_path)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_failed_build_must_give_its_status_its_last_lines_and_its_whole_log(tmp_path):
    program = "import sys\nfor i in range(50): print(f'#1 {i}', file=sys.stderr)\nsys.exit(3)"
    log = io.StringIO()
    status, tail = run_build(python(program), environment=os.environ, log=log, report=lambda _event: None)
    assert status == 3
    assert tail[-1] == "#1 49"
    assert len(tail) < 50
    assert len(log.getvalue().splitlines()) == 50


def test_steps_must_be_reported_while_the_build_runs(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = (
        "print('#1 [a 1/2] RUN x\\n#1 0.1 text\\n#1 DONE 2.0s', flush=True)\n"
        f"open({str(gate)!r}).read()\nprint('#2 [a 2/2] RUN y\\n#2 0.1 text\\n#2 DONE 1.0s')"
    )

    def let_go_on(event) -> None:
        # The program ends only because the end of its first step was heard while it ran.
        if event == Finished("build #1", "[a 1/2] RUN x", 2.0):
            gate.write_text("on")

    status, _ = run_build(python(program), environment=os.environ, log=io.StringIO(), report=let_go_on)
    assert status == 0


def test_an_interrupted_caller_must_take_the_build_with_it():
    def interrupted(_event) -> None:
        raise KeyboardInterrupt

    program = "import os, time\nprint(f'#1 [a 1/1] RUN x\\n#1 {os.getpid()}', flush=True)\ntime.sleep(60)"
    log = io.StringIO()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_build(python(program), environment=os.environ, log=log, report=interrupted)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.getvalue().split()[-1]), 0)

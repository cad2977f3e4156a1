"""A `docker` command that can build with BuildKit: finding one, running it, and reading its output as events.

The Engine API offers BuildKit only through a session that docker-py does not speak, so that builds go through the
command. Which one is not obvious: a client from version 23 on needs the buildx plugin, which may be missing; one
before has BuildKit built in.
"""

import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zops.errors import RuntimeUnreachable
from zops.events import Finished, Report, Started
from zops.host.engine import resolve

FALLBACK = Path("/usr/bin/docker")
"""Where distributions put theirs, also when another one is earlier on the PATH, or the PATH is short."""
FIRST_WITH_BUILDKIT, FIRST_WITHOUT = (18, 9), (23, 0)
PROBE_TIMEOUT_S = 20
TAIL_LINES = 12
STEP_TEXT_CHARS = 100
WORTH_SAYING_S = 0.1

_LINE = re.compile(r"^#(?P<id>\d+) (?P<text>.*)$")
_NAME = re.compile(r"^(\[(?!internal\]).+\] .+|exporting .*image.*)$")
_DONE = re.compile(r"^DONE (?P<seconds>[\d.]+)s$")
_ERROR = re.compile(r"^(?:#\d+ )?(?:[\d.]+ )?(?:ERROR|error|E): (?P<why>.+)$")
# What BuildKit says of any program that failed, with the whole program repeated.
_EMPTY_ERROR = re.compile(r"^(?:executor failed running|process \".*\" did not complete)")


@dataclass(frozen=True, slots=True)
class Builder:
    """A command that builds: the executable, and whether BuildKit comes as its buildx plugin."""

    docker: Path
    buildx: bool

    def argv(self, engine: str, arguments: Sequence[str]) -> list[str]:
        """Return the command line that builds on an engine (as in the specification) with these arguments."""
        context = ["--context", engine.removeprefix("context:")] if engine.startswith("context:") else []
        build = ["buildx", "build", "--load"] if self.buildx else ["build"]
        return [str(self.docker), *context, *build, "--progress", "plain", *arguments]

    def environment(self, engine: str, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment that makes the command talk to the very engine that zops talks to."""
        chosen = {name: value for name, value in environ.items() if name not in {"DOCKER_HOST", "DOCKER_CONTEXT"}}
        if not engine.startswith("context:"):
            chosen["DOCKER_HOST"] = resolve(engine, environ).url
        # Not whichever builder was chosen last: a builder in a container of its own does not see the engine's images.
        chosen["BUILDX_BUILDER"] = engine.removeprefix("context:") if engine.startswith("context:") else "default"
        return chosen | {"DOCKER_BUILDKIT": "1"}


def find_builder(environ: Mapping[str, str] | None = None, *, fallback: Path = FALLBACK) -> Builder:
    """Return the first `docker` on the PATH (then `fallback`) that can build with BuildKit.

    Raises:
        RuntimeUnreachable: when there is none, saying what was found and what to install.
    """
    environ = os.environ if environ is None else environ
    refused = []
    for docker in _candidates(environ, fallback):
        if _says(docker, "buildx", "version"):
            return Builder(docker, buildx=True)
        match = re.search(r"Docker version (\d+)\.(\d+)", _says(docker, "--version"))
        version = (int(match[1]), int(match[2])) if match else None
        if version and FIRST_WITH_BUILDKIT <= version < FIRST_WITHOUT:
            return Builder(docker, buildx=False)
        refused.append(f"{docker} ({'.'.join(map(str, version)) if version else 'no Docker'}) has no buildx plugin")
    raise RuntimeUnreachable(
        f"no docker command here can build with BuildKit: {'; '.join(refused) or 'there is none on the PATH'}",
        code="no-builder",
        hint="install docker-buildx-plugin (Docker's packages) or docker-buildx; or build elsewhere and docker load",
    )


def run_build(
    argv: Sequence[str], *, environment: Mapping[str, str], log: IO[str], report: Report
) -> tuple[int, list[str]]:
    """Run a build to its end; return its exit status and the last lines it wrote.

    The whole output goes to `log`, its steps go to `report`. When the caller is interrupted, so is the build.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        argv,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            read_steps(_teed(process.stdout, log.write, tail), report)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, list(tail)


def read_steps(lines: Iterable[str], report: Report) -> None:
    """Turn BuildKit's plain output into events: a start and an end for each step that really ran.

    Cached steps are not mentioned, and neither are the internal ones and those that took no time.
    """
    names: dict[str, str] = {}
    running: set[str] = set()
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        step, text = f"build #{match['id']}", match["text"]
        if step not in names:
            if _NAME.match(text):
                names[step] = _shorten(text)
        elif text == "CACHED":
            del names[step]
        elif done := _DONE.match(text):
            name, seconds = names.pop(step), float(done["seconds"])
            if step in running or seconds >= WORTH_SAYING_S:
                report(Finished(step, name, seconds))
            running.discard(step)
        elif step not in running and not text.startswith("sha256:"):
            running.add(step)
            report(Started(step, names[step], unit="steps"))


def reason(tail: Sequence[str]) -> str:
    """Return, of the last lines of a failed build, what says why in the fewest words."""
    errors = [match["why"] for match in map(_ERROR.match, tail) if match]
    telling = [why for why in errors if not _EMPTY_ERROR.match(why)]
    if telling:
        return _shorten(telling[-1])
    return errors[-1].rpartition("]: ")[2] if errors else next((line for line in reversed(tail) if line), "no word")


def _teed(lines: Iterable[str], write: Callable[[str], object], tail: deque[str]) -> Iterable[str]:
    for line in lines:
        write(line)
        stripped = line.rstrip()
        tail.append(stripped)
        yield stripped


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= STEP_TEXT_CHARS else text[: STEP_TEXT_CHARS - 3] + "..."


def _candidates(environ: Mapping[str, str], fallback: Path) -> list[Path]:
    """Return every docker command, first on the PATH first, each once however many names it has."""
    directories = [Path(part) for part in environ.get("PATH", "").split(os.pathsep) if part]
    found: dict[Path, Path] = {}
    for path in [*(directory / "docker" for directory in directories), fallback]:
        if path.is_file() and os.access(path, os.X_OK):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _says(docker: Path, *arguments: str) -> str:
    """Return what a docker command answers, empty when it fails."""
    try:
        done = subprocess.run(
            [str(docker), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

"""What goes into the build of the image, and how its output is read."""

import os
import re
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import zops
from zops.errors import HostShort, SourceFailed, SpecError, ZopsError
from zops.events import Finished, Started
from zops.runtime import image as building
from zops.runtime.buildkit import Builder, read_steps, reason
from zops.runtime.image import DOCKERFILE, WHEELS, _with_torch, assemble, assets, build_arguments, build_image
from zops.spec import Image

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "zops"

# BuildKit of Docker 20.10; the ids are real, the texts are shortened.
OUTPUT = """\
#1 [internal] load build definition from Dockerfile
#1 sha256:aaaa
#1 transferring dockerfile: 1.2kB done
#1 DONE 0.0s

#5 [base 1/2] FROM docker.io/library/debian:bookworm-slim
#5 sha256:bbbb
#5 CACHED

#6 [base 2/2] RUN apt-get update     && apt-get install python3
#6 sha256:cccc
#6 0.512 Get:1 something
#7 [wheels 1/1] COPY LICENSE wheels* /
#7 sha256:dddd
#7 DONE 0.0s

#6 1.204 Setting up python3
#6 DONE 9.4s

#24 exporting to image
#24 sha256:eeee
#24 exporting layers 4.6s done
#24 DONE 4.6s
"""


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by its path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    made = tmp_path / "context"
    made.mkdir()
    return made


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    made = tmp_path / "wheels"
    made.mkdir()
    (made / "torch-2.0-py3-none-any.whl").write_bytes(b"a wheel")
    (made / "notes.txt").write_text("no wheel")
    return made


# --- the context


def test_the_context_must_hold_what_the_dockerfile_copies(context):
    assemble(context, Image())
    text = (context / DOCKERFILE).read_text()
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("$")
    }
    assert copied == {"LICENSE", "pyproject.toml", "constraints.txt", "README.md", "zops"}
    assert {name for name in copied if not (context / name).exists()} == set()


def test_the_context_must_not_hold_anything_else(context):
    assemble(context, Image())
    assert {path.name for path in context.iterdir()} == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "images",
        "zops",
        WHEELS,
    }
    assert [name for name in tree(context) if "__pycache__" in name or name.endswith(".pyc")] == []


def test_a_build_by_hand_must_be_sent_the_same_files():
    allowed = (ROOT / f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    assert {line[1:] for line in allowed if line.startswith("!")} == assets().keys() | {WHEELS}


def test_an_installed_wheel_must_give_the_same_context_as_the_checkout(tmp_path, context):
    built = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "dist"), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site-packages")
    installed = tmp_path / "installed"
    installed.mkdir()
    assemble(installed, Image(), tmp_path / "site-packages" / "zops")
    assemble(context, Image(), PACKAGE)
    assert tree(installed) == tree(context)


def test_an_installation_without_the_assets_must_be_refused(tmp_path, context):
    (tmp_path / "zops").mkdir()
    with pytest.raises(ZopsError, match="is missing beside") as caught:
        assemble(context, Image(), tmp_path / "zops")
    assert caught.value.code == "image-assets-missing"


def test_a_file_that_is_missing_must_be_named(tmp_path, context):
    root = tmp_path / "checkout"
    (root / "zops").mkdir(parents=True)
    (root / "images" / "inference").mkdir(parents=True)
    (root / DOCKERFILE).touch()
    with pytest.raises(ZopsError, match=r"pyproject\.toml is missing"):
        assemble(context, Image(), root / "zops")


def test_wheels_must_be_linked_not_copied_and_only_they(context, wheels):
    assemble(context, Image(wheels=wheels))
    assert [path.name for path in (context / WHEELS).iterdir()] == ["torch-2.0-py3-none-any.whl"]
    assert (context / WHEELS / "torch-2.0-py3-none-any.whl").samefile(wheels / "torch-2.0-py3-none-any.whl")


def test_wheels_on_another_disk_must_be_copied(context, wheels, monkeypatch):
    def refuse(*_args) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assemble(context, Image(wheels=wheels))
    copy = context / WHEELS / "torch-2.0-py3-none-any.whl"
    assert copy.read_bytes() == b"a wheel"
    assert not copy.samefile(wheels / copy.name)
    assert copy.stat().st_mtime_ns == (wheels / copy.name).stat().st_mtime_ns, "the newest input dates the image"


# --- the arguments


def test_the_same_inputs_must_give_the_same_arguments(tmp_path):
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assemble(tmp_path / name, Image())
        made.append([a.replace(str(tmp_path / name), "") for a in build_arguments(tmp_path / name, Image(), {})])
    assert made[0] == made[1]


def test_the_moment_of_reproducible_builds_must_win(context):
    (context / "file").touch()
    arguments = build_arguments(context, Image(), {"SOURCE_DATE_EPOCH": "86400"})
    assert "--build-arg=CREATED=1970-01-02T00:00:00Z" in arguments


def test_a_proxy_with_a_password_must_not_be_in_the_arguments(context):
    (context / "file").touch()
    arguments = build_arguments(context, Image(), {"https_proxy": "http://me:secret@proxy:3128"})
    assert "--build-arg=https_proxy" in arguments
    assert "secret" not in " ".join(arguments)


def test_the_ca_must_be_a_secret_and_no_build_argument(context):
    (context / "file").touch()
    arguments = build_arguments(context, Image(ca=Path("/some/ca.crt")), {})
    assert [a for a in arguments if "ca.crt" in a] == ["--secret=id=ca,src=/some/ca.crt"]


def test_the_arguments_must_name_only_what_the_dockerfile_takes(context, tmp_path):
    (context / "file").touch()
    (tmp_path / "torch.txt").write_text("2.13.0+cu130 13.0\n")
    arguments = build_arguments(context, Image(), {}) + _with_torch(str(tmp_path))
    given = {a.split("=")[1] for a in arguments if a.startswith("--build-arg")}
    assert given == set(re.findall(r"^ARG (\w+)", (ROOT / DOCKERFILE).read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("settings", "tag", "said"),
    [
        ({"wheels": "/no/such/dir"}, None, r"image\.wheels is /no/such/dir"),
        ({"ca": "/no/such/file"}, None, r"image\.ca is /no/such/file"),
        ({"name": f"x@sha256:{'0' * 64}"}, None, "digest"),
        ({}, "x@sha256:00", "digest"),
        ({"torch_index": "https://me:secret@host/simple"}, None, "torch_index carries"),
    ],
)
def test_what_cannot_be_built_must_be_refused_before_anything_runs(settings, tag, said, monkeypatch):
    monkeypatch.setattr(building, "connect", lambda _engine: pytest.fail("the engine was asked"))
    with pytest.raises(SpecError, match=said) as caught:
        build_image("local", Image.model_validate(settings), lambda _event: None, tag=tag)
    assert "secret" not in caught.value.message


# --- the command


@pytest.mark.parametrize(
    ("engine", "context_flag", "host"),
    [
        ("local", [], "unix:///run/mine.sock"),
        ("ssh://ops@gpu", [], "ssh://ops@gpu"),
        ("context:far", ["--context", "far"], None),
    ],
)
def test_the_command_must_talk_to_the_engine_that_zops_talks_to(engine, context_flag, host):
    environ = {"DOCKER_HOST": "unix:///run/mine.sock", "DOCKER_CONTEXT": "other", "PATH": "/bin"}
    builder = Builder(Path("/bin/docker"), buildx=True)
    argv = builder.argv(engine, ["--tag=x", "."])
    assert argv == ["/bin/docker", *context_flag, "buildx", "build", "--load", "--progress", "plain", "--tag=x", "."]
    environment = builder.environment(engine, environ)
    assert environment.get("DOCKER_HOST") == host
    assert "DOCKER_CONTEXT" not in environment
    assert environment["BUILDX_BUILDER"] == ("far" if host is None else "default")


def test_a_client_with_buildkit_built_in_must_be_told_to_use_it():
    builder = Builder(Path("/bin/docker"), buildx=False)
    assert builder.argv("local", ["."]) == ["/bin/docker", "build", "--progress", "plain", "."]
    assert builder.environment("local", {})["DOCKER_BUILDKIT"] == "1"


# --- the output


def test_steps_that_ran_must_be_reported_and_cached_ones_must_not():
    events = []
    read_steps(OUTPUT.splitlines(), events.append)
    install = "[base 2/2] RUN apt-get update && apt-get install python3"
    assert events == [
        Started("build #6", install, unit="steps"),
        Finished("build #6", install, 9.4),
        Started("build #24", "exporting to image", unit="steps"),
        Finished("build #24", "exporting to image", 4.6),
    ]


@pytest.mark.parametrize(
    "output", ["", "#\n#x y\n", "#3 DONE 1.0s\n#3 CACHED\n", "#4 [a 1/1] X\n#4 CACHED\n#4 CACHED\n"]
)
def test_output_of_an_unknown_form_must_not_stop_a_build(output):
    read_steps(output.splitlines(), lambda _event: None)


@pytest.mark.parametrize(
    ("line", "kind", "code"),
    [
        ("#9 ERROR: pull access denied, repository does not exist", SourceFailed, "image-base-missing"),
        ("#9 3.2 ERROR: No matching distribution found for torch==9", SourceFailed, "image-package-missing"),
        ("#9 3.2 [SSL: CERTIFICATE_VERIFY_FAILED] self-signed", SourceFailed, "image-certificate"),
        ("#9 3.2 write /x: no space left on device", HostShort, "image-no-space"),
        ("#9 ERROR: process did not complete successfully: exit code: 2", ZopsError, "image-build-failed"),
    ],
)
def test_a_failed_build_must_say_what_to_do(line, kind, code):
    error = building._failure("i:1", Image(), [line, ""], Path("/state/builds/i.log"))
    assert type(error) is kind
    assert error.code == code
    assert "/state/builds/i.log" in error.hint


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (["#9 1.0 building", "#9 ERROR: executor failed running [false]: exit code: 2", "------"], "exit code: 2"),
        (
            ["#9 1.4 error: metadata-generation-failed", "#9 ERROR: executor failed running [x]: exit code: 1"],
            "metadata-",
        ),
        (["#9 0.3 E: Unable to locate package", '#9 ERROR: process "/bin/sh" did not complete: exit 100'], "Unable"),
        (["ERROR: failed to solve: no such base"], "failed to solve: no such base"),
        (["something else", ""], "something else"),
        ([], "no word"),
    ],
)
def test_the_reason_of_a_failure_must_be_the_line_that_says_most(tail, why):
    assert reason(tail).startswith(why)


def test_the_version_of_the_image_must_be_that_of_zops():
    assert Image().name == f"zops-inference:{zops.__version__}"

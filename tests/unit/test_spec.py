"""zops.yaml: who wins, what is refused, and how clearly."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops import spec as spec_module
from zops.errors import SpecError
from zops.spec import fields, load, parse_scalar, type_name, value_at, variable


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


def write(directory: Path, text: str) -> Path:
    path = directory / "zops.yaml"
    path.write_text(text)
    return path


def refusal(directory: Path, text: str, **environ: str) -> SpecError:
    path = write(directory, text)
    with pytest.raises(SpecError) as caught:
        load(path, environ=environ)
    return caught.value


def test_without_a_file_the_defaults_must_hold(here: Path) -> None:
    loaded = load(environ={}, directory=here)
    assert loaded.file is None
    assert loaded.spec.model == "Tongyi-MAI/Z-Image-Turbo"
    assert {origin.kind for origin in loaded.origins.values()} == {"default"}


def test_a_flag_must_beat_the_environment_which_must_beat_the_file(here: Path) -> None:
    path = write(here, "serve:\n  port: 1000\n  max_queue: 2\n  max_images: 3\n")
    environ = {"ZOPS_SERVE_PORT": "1001", "ZOPS_SERVE_MAX_QUEUE": "5"}
    loaded = load(path, environ=environ, flags={"serve.port": ("--port", 1002)})
    serve = loaded.spec.serve
    assert (serve.port, serve.max_queue, serve.max_images) == (1002, 5, 3)
    assert str(loaded.origins["serve.port"]) == "flag --port"
    assert str(loaded.origins["serve.max_queue"]) == "environment ZOPS_SERVE_MAX_QUEUE"
    assert str(loaded.origins["serve.max_images"]) == f"file {path}:4"
    assert str(loaded.origins["name"]) == "default"


@pytest.mark.parametrize("name", ["zops.yaml", "zops.yml"])
def test_the_file_in_the_working_directory_must_be_found(here: Path, name: str) -> None:
    (here / name).write_text("name: found\n")
    assert load(environ={}, directory=here).spec.name == "found"


def test_zops_file_must_name_the_file(here: Path) -> None:
    path = here / "other.yaml"
    path.write_text("name: other\n")
    assert load(environ={"ZOPS_FILE": str(path)}, directory=here).spec.name == "other"


def test_a_named_file_that_is_missing_must_be_refused(here: Path) -> None:
    with pytest.raises(SpecError, match="does not exist") as caught:
        load(here / "none.yaml", environ={})
    assert "zops init" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("portt: 8000\n", [":1: there is no portt"]),
        ("serve:\n  prot: 8000\n", [":2: there is no serve.prot", "did you mean serve.port?"]),
        ("serve:\n  port: eight\n", [":2: serve.port is 'eight'"]),
        ("serve:\n  port: 99999\n", [":2: serve.port is 99999", "65535"]),
        ("serve: 8000\n", [":1: serve is 8000", "section"]),
        ("runtime: podman\n", [":1: runtime is 'podman'", "docker"]),
        ("serve:\n  dtype: float16\n", [":2: serve.dtype is 'float16'", "black images", "bfloat16"]),
        ("gpus: [0, 0]\n", [":1: gpus is [0, 0]", "twice"]),
        ("gpus: [x]\n", [":1: gpus is ['x']", "'x' is no GPU"]),
        ("gpus: []\n", ["write none"]),
        ("engine: somewhere\n", [":1: engine is 'somewhere'", "ssh://user@host"]),
        ("name: Not A Name\n", [":1: name is 'Not A Name'"]),
        ("name: a\nname: b\n", [":2: name is set twice (first in line 1)"]),
        ("- a\n- b\n", ["must be a mapping"]),
        ("name: [\n", ["not valid YAML"]),
        ("source:\n  kind: directory\n", ["source", "needs path"]),
        ("source:\n  kind: modelscope\n  path: /x\n", ["path is for kind: directory or archive"]),
        ("source:\n  kind: archive\n  path: /x\n  endpoint: http://m\n", ["endpoint is for kind"]),
        ("source:\n  endpoint: mirror.local\n", ["http://"]),
        ("runtime: process\nengine: ssh://me@there\n", ["engine: ssh://me@there is for runtime: docker"]),
        ("serve:\n  warmup_size: 1024\n  max_pixels: 65536\n", ["serve.warmup_size squared"]),
        ("serve:\n  warmup_size: 100\n", ["serve.warmup_size is 100", "multiple of 16"]),
    ],
)
def test_a_wrong_file_must_be_refused_with_file_path_value_and_the_fix(here: Path, text: str, parts: list[str]) -> None:
    error = refusal(here, text)
    assert error.exit_status == 2
    assert error.message.startswith(str(here / "zops.yaml"))
    for part in parts:
        assert part in error.message
    assert "\n" not in error.message


def test_a_wrong_variable_must_be_named(here: Path) -> None:
    error = refusal(here, "", ZOPS_SERVE_PORT="many")
    assert error.message.startswith("ZOPS_SERVE_PORT: serve.port is 'many'")


def test_a_wrong_flag_must_be_named(here: Path) -> None:
    with pytest.raises(SpecError, match=r"^--set serve.prot: there is no serve.prot; did you mean serve.port\?"):
        load(environ={}, directory=here, flags={"serve.prot": ("--set serve.prot", 1)})


def test_a_variable_that_nearly_fits_must_be_warned_of_and_a_stranger_ignored(here: Path) -> None:
    loaded = load(environ={"ZOPS_SERVE_PROT": "1", "ZOPS_PORT_80_TCP": "tcp://1"}, directory=here)
    assert loaded.warnings == ("ZOPS_SERVE_PROT is set but means nothing; did you mean ZOPS_SERVE_PORT?",)


def test_a_relative_source_must_be_relative_to_its_file(here: Path, tmp_path: Path) -> None:
    path = write(here, "source: {kind: directory, path: ../model}\n")
    assert load(path, environ={}).spec.source.path == str(tmp_path / "model")


def test_relative_directories_of_a_file_must_be_relative_to_that_file(here: Path) -> None:
    loaded = load(write(here, "cache: {dir: ./cache}\nbackup: {to: backup}\n"), environ={})
    assert loaded.spec.cache.dir == here / "cache"
    assert loaded.spec.backup.to == str(here / "backup")


def test_a_store_url_must_stay_as_it_is(here: Path) -> None:
    assert load(write(here, "backup: {to: s3://bucket/prefix}\n"), environ={}).spec.backup.to == "s3://bucket/prefix"


def test_every_key_must_have_a_variable_of_its_own_a_description_and_a_type() -> None:
    names = {variable(path) for path, _ in fields()}
    assert len(names) == len(list(fields()))
    assert not names & spec_module.RESERVED_VARIABLES
    for path, field in fields():
        assert field.description or path in {"name", "model", "runtime", "source.kind", "serve.port", "gpus"}, path
        assert "typing" not in type_name(field.annotation), path


@given(st.sampled_from(sorted(path for path, _ in fields())), st.text(max_size=20))
def test_any_text_in_any_variable_must_be_taken_or_refused_by_name(path: str, text: str) -> None:
    try:
        value_at(load(environ={variable(path): text}, directory=Path("/nonexistent")).spec, path)
    except SpecError as error:
        assert path.partition(".")[0] in error.message
        assert "\n" not in error.message.replace(repr(parse_scalar(text)), "")


def test_a_spec_must_be_frozen(here: Path) -> None:
    loaded = load(environ={}, directory=here)
    with pytest.raises(ValueError, match="frozen"):
        loaded.spec.serve.port = 1  # type: ignore[misc]

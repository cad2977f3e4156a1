"""The command line as a process: help, laziness, statuses, one clear line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.archives import MODEL, make_snapshot

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "fastapi")


def zops(*argv: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zops", *argv],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_must_import_nothing_but_click_and_the_frame() -> None:
    loaded = modules_after("from zops.cli.main import run\nassert run(['--help']) == 0")
    ours = {name for name in loaded if name.startswith("zops")}
    assert ours == {"zops", "zops.cli", "zops.cli.main", "zops.cli.output", "zops.errors", "zops.events"}
    assert not {"rich", "pydantic", "yaml", "docker", "numpy", "modelscope", "huggingface_hub", "zstandard"} & loaded


def test_a_backup_must_import_only_what_it_needs_before_it_reads_the_first_byte(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "cache")
    argv = ["cache", "backup", MODEL, "--cache-dir", str(tmp_path / "cache"), "--to", str(tmp_path / "store")]
    loaded = modules_after(
        f"import os\nos.chdir({str(tmp_path)!r})\nfrom zops.cli.main import run\n"
        f"assert run({[*argv, '--compression', 'none', '--output', 'json']}) == 0"
    )
    assert list((tmp_path / "store").glob("*.tar"))
    assert not {"yaml", "rich", "docker", "numpy", "tenacity", "modelscope", "huggingface_hub", "obstore"} & loaded
    assert not {"cryptography", "zstandard", "zops.cache.hubs", "zops.archive.reader", "zops.archive.restore"} & loaded


def test_no_command_of_the_host_side_must_import_torch() -> None:
    code = (
        "import importlib\nfrom zops.cli.main import COMMANDS\n"
        "for module, attribute, _ in COMMANDS.values():\n    getattr(importlib.import_module(module), attribute)"
    )
    assert not set(HEAVY) & modules_after(code)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ((), 2, "Usage: zops"),
        (("fly",), 2, "No such command 'fly'"),
        (("ps", "--port", "x"), 2, "--port: serve.port is 'x'"),
        (("ps", "--set", "serve.port"), 2, "KEY=VALUE"),
        (("ps", "-f", "nowhere.yaml"), 2, "nowhere.yaml does not exist"),
        (("ps", "--runtime", "podman"), 2, "--runtime: runtime is 'podman'"),
    ],
)
def test_a_wrong_call_must_exit_with_two_and_say_why(tmp_path: Path, argv, status: int, words: str) -> None:
    done = zops(*argv, cwd=tmp_path)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_in_json_must_be_the_last_line_on_stderr(tmp_path: Path) -> None:
    done = zops("config", "show", "--set", "serve.port=0", "--output", "json", cwd=tmp_path)
    assert done.returncode == 2
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "spec-invalid"
    assert error["exit_status"] == 2


def test_config_show_must_tell_the_origin_of_every_value(tmp_path: Path) -> None:
    (tmp_path / "zops.yaml").write_text("serve:\n  port: 9000\n")
    done = zops("config", "show", "--origin", "--gpus", "0,1", "--output", "json", cwd=tmp_path, ZOPS_NAME="night")
    body = json.loads(done.stdout)
    assert (body["serve.port"]["value"], body["serve.port"]["where"]) == (9000, f"{tmp_path}/zops.yaml:2")
    assert (body["name"]["value"], body["name"]["origin"]) == ("night", "environment")
    assert (body["gpus"]["value"], body["gpus"]["where"]) == ([0, 1], "--gpus")
    assert body["model"]["origin"] == "default"


def test_what_config_show_prints_must_load_again(tmp_path: Path) -> None:
    shown = zops("config", "show", "--port", "9001", cwd=tmp_path)
    (tmp_path / "zops.yaml").write_text(shown.stdout)
    assert json.loads(zops("config", "show", "--output", "json", cwd=tmp_path).stdout)["serve"]["port"] == 9001


def test_a_mirrors_password_must_not_be_shown(tmp_path: Path) -> None:
    mirror = ("--set", "source.endpoint=http://me:s3cret@mirror:8080")
    for argv in (("config", "show"), ("config", "show", "--origin"), ("config", "show", "--output", "json")):
        shown = zops(*argv, *mirror, cwd=tmp_path).stdout
        assert "mirror:8080" in shown
        assert "s3cret" not in shown
    plan = zops("provision", "--dry-run", "--runtime", "process", "--gpus", "none", *mirror, cwd=tmp_path)
    assert "s3cret" not in plan.stdout + plan.stderr


def test_init_must_write_a_file_that_loads_and_refuse_to_overwrite_it(tmp_path: Path) -> None:
    assert zops("init", cwd=tmp_path).returncode == 0
    before = (tmp_path / "zops.yaml").read_bytes()
    assert zops("config", "show", cwd=tmp_path).returncode == 0
    again = zops("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert (tmp_path / "zops.yaml").read_bytes() == before
    assert zops("init", "--force", cwd=tmp_path).returncode == 0


def test_version_must_be_the_packages() -> None:
    from zops import __version__

    assert zops("--version").stdout == f"zops {__version__}\n"

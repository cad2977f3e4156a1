"""Every command that the README shows for a host must work as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import docker
import pytest

from tests.support.host import free_port
from zops.runtime.replacing import remove_volume

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def host_commands() -> list[list[str]]:
    """Return the commands of the README's section for a GPU host, as argument lists."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## On a GPU host")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.strip()]


def test_the_commands_for_a_host_must_run_one_after_another(
    tmp_path: Path, tiny_model: Path, inference_image: str, docker_client: docker.DockerClient
) -> None:
    host = tmp_path / "host"
    host.mkdir()
    for directory in (host, *host.parents[:2]):
        directory.chmod(0o755)
    name = f"readme-{os.getpid()}"
    # This host has no GPU and no hub: variables, which beat the file that `zops init` writes, say so.
    environ = os.environ | {
        "ZOPS_NAME": name,
        "ZOPS_MODEL": "zops/synthetic-tiny",
        "ZOPS_SOURCE_KIND": "directory",
        "ZOPS_SOURCE_PATH": str(tiny_model),
        "ZOPS_CACHE_DIR": str(host / "cache"),
        "ZOPS_BACKUP_TO": str(host / "backup"),
        "ZOPS_GPUS": "none",
        "ZOPS_IMAGE_NAME": inference_image,
        "ZOPS_SERVE_PORT": str(free_port()),
        "ZOPS_SERVE_WARMUP_SIZE": "64",
    }
    commands = host_commands()
    assert len(commands) > 8
    try:
        for command in commands:
            assert command[0] == "zops"
            argv = [sys.executable, "-m", "zops", *command[1:]]
            if command[1] == "health":
                # It judges every instance of the engine, and other tests make theirs ill meanwhile.
                argv += ["--name", name]
            done = subprocess.run(argv, cwd=host, env=environ, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert (host / "kite.png").read_bytes().startswith(b"\x89PNG")
        assert list((host / "backup").glob("*.tar.zst"))
    finally:
        for container in docker_client.containers.list(all=True, filters={"label": f"io.zops.deployment={name}"}):
            container.remove(force=True)
        for volume in docker_client.volumes.list(filters={"label": f"io.zops.deployment={name}"}):
            remove_volume(volume)

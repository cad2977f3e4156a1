"""A host of its own: a directory with zops.yaml, cache, state and backups, and `zops` as a person types it."""

import base64
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMMAND_TIMEOUT_S = 300


def free_port() -> int:
    """Return a port of the loopback that nobody listens on.

    Below those that the kernel gives to connections, and drawn at random, so that no other test has it by the time that
    it is used.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Host:
    """A host that deploys the tiny model without GPU; `settings` are added to its zops.yaml."""

    def __init__(self, root: Path, model: Path, *, name: str, **settings: Any) -> None:
        root.mkdir(exist_ok=True)
        # A container's user must be able to walk down to the cache.
        for directory in (root, *root.parents[:2]):
            directory.chmod(0o755)
        self.root = root
        self.name = name
        self.port = free_port()
        self.cache = root / "cache"
        self.backup = root / "backup"
        self._settings = {
            "name": name,
            "model": "zops/synthetic-tiny",
            "source": {"kind": "directory", "path": str(model)},
            "cache": {"dir": "./cache"},
            "gpus": "none",
            "serve": {"port": self.port, "warmup_size": 64, "startup_timeout_s": 120},
            "backup": {"to": "./backup"},
        } | settings
        self.write()

    def write(self, **changes: Any) -> None:
        """Write zops.yaml anew with some keys changed."""
        # JSON is YAML too.
        (self.root / "zops.yaml").write_text(json.dumps(self._settings | changes))

    def run(self, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `zops` here and hold it to an exit status."""
        done = subprocess.run(
            [sys.executable, "-m", "zops", *argv],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(ROOT), "ZOPS_STATE_DIR": str(self.root / "state")},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == status, f"zops {' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *argv: str, status: int = 0) -> Any:
        """Run `zops` and return the document that it printed."""
        return json.loads(self.run(*argv, "--output", "json", status=status).stdout)

    def error(self, *argv: str, status: int) -> str:
        """Run `zops`, hold it to an exit status, and return the code of its error."""
        done = self.run(*argv, "--output", "json", status=status)
        return json.loads(done.stderr.splitlines()[-1])["error"]["code"]

    def image(self, seed: int) -> bytes:
        """Fetch an image through the published port, as any client would."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            data=json.dumps({"prompt": "a red kite", "size": "64x64", "seed": seed}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return base64.b64decode(json.load(response)["data"][0]["b64_json"])

    def ready(self) -> bool:
        """Tell whether the instance answers that it is ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def tree(self, below: str = ".") -> dict[str, str]:
        """Return every file below a directory with its SHA-256, and every directory."""
        top = self.root / below
        return {
            str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
            for path in top.rglob("*")
        }

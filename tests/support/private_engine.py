"""A Docker engine of one's own beside the host's: what is broken on it is nobody else's, and it can be restarted.

It takes the inference image from the host's engine without copying it: its programs are mounted from the layers that
are there already. Needs root, and a host's engine that keeps its images with overlay2.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import docker

from tests.support.waiting import eventually

BEGIN_TIMEOUT_S = 30.0
HEAVY = ("usr", "opt")
"""Directories of the image that are mounted; all others are in the image that the private engine is given."""


class PrivateEngine:
    """An engine in a directory of its own, with a network bridge of its own and no rule in the host's firewall."""

    def __init__(self, root: Path, bridge: str, image_root: Path) -> None:
        self.root = root
        self.url = f"unix://{root}/sock"
        self.image = "zops-inference:faults"
        self._image_root = image_root
        # It must not touch the host's firewall, and its proxies publish ports without one.
        self._argv = [
            # A test run that is killed takes it along.
            *(
                "setpriv",
                "--pdeathsig",
                "TERM",
                "dockerd",
                "--host",
                self.url,
                "--bridge",
                bridge,
                "--pidfile",
                f"{root}/pid",
            ),
            *("--data-root", f"{root}/data", "--exec-root", f"{root}/exec"),
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.client = docker.DockerClient(self.url, version="1.41", timeout=60)

    def start(self) -> None:
        """Start it and return once it answers."""
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=log, start_new_session=True)
        eventually(self._answers, f"an engine of its own:\n{self.log}", timeout_s=BEGIN_TIMEOUT_S)

    def stop(self) -> None:
        """Stop it, and with it all its containers."""
        if self._process:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(BEGIN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self.root / "log").read_text(errors="replace")[-2000:]

    def borrow(self, options: dict[str, Any]) -> None:
        """Change the body of a container's creation so that the image's programs are mounted."""
        options["HostConfig"]["Mounts"] += [
            {"Type": "bind", "Source": str(self._image_root / name), "Target": f"/{name}", "ReadOnly": True}
            for name in HEAVY
        ]

    def take_image(self, config: dict[str, Any]) -> None:
        """Make an image of all that is not heavy, with the configuration of the genuine one."""
        light = self.root / "light.tar"
        with tarfile.open(light, "w") as tar:
            for path in sorted(self._image_root.iterdir()):
                tar.add(path, path.name, recursive=path.name not in HEAVY)
        changes = [f"ENV {name}={value}" for name, _, value in (entry.partition("=") for entry in config["Env"])]
        changes += [f"ENTRYPOINT {_words(config['Entrypoint'])}", f"USER {config['User']}"]
        changes += [f"WORKDIR {config['WorkingDir']}", f"HEALTHCHECK CMD {_words(config['Healthcheck']['Test'][1:])}"]
        repository, _, tag = self.image.partition(":")
        self.client.api.import_image(str(light), repository=repository, tag=tag, changes=changes)
        light.unlink()

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self.log
        # The client's own socket stays open where nobody listens yet.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(f"{self.root}/sock"):
                return False
        return bool(self.client.ping())


def _words(words: list[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"


def has_layers(image: str) -> bool:
    """Tell whether the host's engine keeps an image as directories that can be mounted from here."""
    with closing(docker.DockerClient.from_env(use_context=False)) as hosts:
        layers = hosts.images.get(image).attrs["GraphDriver"]["Data"] or {}
    return Path(layers.get("UpperDir", "/nowhere")).is_dir()


@contextmanager
def private_engine(image: str) -> Iterator[PrivateEngine]:
    """Give an engine that has the inference image, and leave nothing of it."""
    with ExitStack() as undo:
        # Sockets lie in it, whose paths may not be long.
        root = Path(tempfile.mkdtemp(prefix="zops-engine-"))
        undo.callback(shutil.rmtree, root, ignore_errors=True)
        with closing(docker.DockerClient.from_env(use_context=False)) as hosts:
            attributes = hosts.images.get(image).attrs
        image_root = root / "image"
        image_root.mkdir()
        layers = attributes["GraphDriver"]["Data"]
        lower = ":".join(filter(None, (layers["UpperDir"], layers.get("LowerDir"))))
        _run("mount", "-t", "overlay", "-o", f"ro,lowerdir={lower}", "overlay", str(image_root))
        undo.callback(_run, "umount", str(image_root))
        bridge = f"zopst{os.getpid()}"
        _run("ip", "link", "add", bridge, "type", "bridge")
        undo.callback(_run, "ip", "link", "delete", bridge)
        # Of the block for documentation's sibling that is for benchmarks of networks (RFC 2544): nobody routes it.
        dice = random.SystemRandom()
        _run("ip", "address", "add", f"198.18.{dice.randrange(256)}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        engine = PrivateEngine(root, bridge, image_root)
        undo.callback(engine.client.close)
        undo.callback(engine.stop)
        engine.start()
        engine.take_image(attributes["Config"])
        yield engine
        for container in engine.client.containers.list(all=True, ignore_removed=True):
            container.remove(force=True, v=True)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"

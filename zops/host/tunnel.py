"""A way to an engine on another host: its socket, forwarded through ssh to a socket of ours.

docker-py's own way needs another library even when it calls ssh, waits for passwords that nobody can type, and ignores
the port in ~/.ssh/config. One forwarded socket has none of that, and costs one login instead of one a connection.
"""

import shutil
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from zops.errors import RuntimeUnreachable

CONNECT_TIMEOUT_S = 5
# Resolving, connecting, authenticating; a smart card may need a touch.
OPEN_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 1.0
POLL_S = 0.02
REMOTE_SOCKET = "/var/run/docker.sock"


class Tunnel:
    """An ssh that forwards; it ends with `close`, or with whatever holds the tunnel.

    Args:
        url: ssh://[user@]host[:port], with the path of the remote socket after it where that is not the usual one.

    Raises:
        RuntimeUnreachable: with what ssh said, when it does not get through without asking.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._directory = Path(tempfile.mkdtemp(prefix="zops-ssh-"))
        self._said = (self._directory / "said").open("w+", encoding="utf-8", errors="replace")
        try:
            self._ssh = subprocess.Popen(
                ssh_argv(url, self.socket), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said
            )
        except FileNotFoundError:
            _clean(None, self._said, self._directory)
            raise self._failure("there is no ssh command here") from None
        self.close = weakref.finalize(self, _clean, self._ssh, self._said, self._directory)
        self._wait()

    @property
    def socket(self) -> Path:
        """The socket that leads to the remote engine."""
        return self._directory / "docker.sock"

    def _wait(self) -> None:
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while not self.socket.exists():
            reason = ""
            if self._ssh.poll() is not None:
                self._said.seek(0)
                said = self._said.read().strip().splitlines()
                reason = said[-1] if said else f"ssh ended with status {self._ssh.returncode}"
            elif time.monotonic() > deadline:
                reason = f"no answer within {OPEN_TIMEOUT_S:.0f} s"
            if reason:
                self.close()
                raise self._failure(reason)
            time.sleep(POLL_S)

    def _failure(self, reason: str) -> RuntimeUnreachable:
        *options, host = _destination(self._url)
        return RuntimeUnreachable(
            f"no engine can be reached over {self._url}: {reason}",
            code="engine-ssh-failed",
            hint=f"this must work without a question: ssh {' '.join([*options[:-1], host])} docker version",
            tried=self._url,
        )


def ssh_argv(url: str, socket: Path) -> list[str]:
    """Return the command that forwards a local socket to the engine's socket behind an ssh:// address."""
    remote = urlsplit(url).path.rstrip("/") or REMOTE_SOCKET
    # BatchMode: an ssh that cannot log in without asking fails instead of waiting for somebody to type.
    options = {"BatchMode": "yes", "ConnectTimeout": CONNECT_TIMEOUT_S, "ExitOnForwardFailure": "yes"}
    chosen = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", "-nNT", *chosen, "-L", f"{socket}:{remote}", *_destination(url)]


def _destination(url: str) -> list[str]:
    """Return ssh's own words for an address; the port and the user of ~/.ssh/config count where it names none."""
    address = urlsplit(url)
    port = ["-p", str(address.port)] if address.port else []
    user = ["-l", address.username] if address.username else []
    return [*user, *port, "--", address.hostname or ""]


def _clean(ssh: "subprocess.Popen[bytes] | None", said: IO[str], directory: Path) -> None:
    if ssh is not None:
        ssh.terminate()
        try:
            ssh.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # One that hangs in the middle of a login must not keep the command from ending.
            ssh.kill()
            ssh.wait()
    said.close()
    shutil.rmtree(directory, ignore_errors=True)

"""Ports of this machine: whether one is free, and who listens on it."""

import errno
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN in include/net/tcp_states.h, as /proc/net/tcp prints it


@dataclass(frozen=True, slots=True)
class Listener:
    """The process that listens on a port; `pid` is 0 and `command` empty where /proc does not show them."""

    pid: int = 0
    command: str = ""

    def __str__(self) -> str:
        return f"{self.command or 'process'} (pid {self.pid})" if self.pid else "a process that only root can see"


def why_not_bindable(host: str, port: int) -> str:
    """Try to bind and return why it cannot be done, in words; empty when the port is free."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"{host} is no address of this host: {error.strerror}"
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a connection in TIME_WAIT does not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "in use"
            if error.errno == errno.EACCES:
                return "only root may bind a port below 1024"
            return str(error.strerror).lower()
    return ""


def find_listener(port: int, proc: Path = Path("/proc")) -> Listener | None:
    """Return who listens on a TCP port, None when nobody does; processes of other users show no name."""
    inodes = _listening_inodes(port, proc)
    if not inodes:
        return None
    for directory in proc.iterdir():
        if directory.name.isdigit() and inodes & _socket_inodes(directory / "fd"):
            return Listener(int(directory.name), _command(directory))
    return Listener()


def _command(directory: Path) -> str:
    try:
        return (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _listening_inodes(port: int, proc: Path) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(columns[9])
    return found


def _socket_inodes(descriptors: Path) -> set[str]:
    """Return the inodes of a process' sockets; empty for another user's process, or one that ended while we looked."""
    found: set[str] = set()
    try:
        names = list(descriptors.iterdir())
    except OSError:
        return found
    for name in names:
        # A descriptor may be closed between listing and reading it.
        with suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", str(name.readlink()))
            if match:
                found.add(match[1])
    return found

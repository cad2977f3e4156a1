"""The first thing a worker's interpreter runs: `python -m zops.serving.boot FD`, with one end of a pipe as FD."""

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any


def main(descriptor: int) -> None:
    """Receive the settings, then be the worker that they describe."""
    # A terminal's Ctrl-C reaches the whole group; the HTTP process decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from zops.serving import worker  # noqa: PLC0415 - once the signals are taken care of

    connection: Connection[Any, Any] = Connection(descriptor)
    worker.main(connection, connection.recv())


if __name__ == "__main__":
    main(int(sys.argv[1]))

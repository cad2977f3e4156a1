"""The first thing a worker's or a follower's interpreter runs: `python -m zops.serving.boot FD`, FD being a pipe."""

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from zops.serving.messages import Post


def main(descriptor: int) -> None:
    """Receive what describes this process, then be it."""
    # A terminal's Ctrl-C reaches the whole group; the HTTP process decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    first = connection.recv()
    if isinstance(first, Post):
        from zops.serving import follower  # noqa: PLC0415 - as below

        follower.main(connection, first)
        return
    from zops.serving import worker  # noqa: PLC0415 - once the signals are taken care of

    worker.main(connection, first)


if __name__ == "__main__":
    main(int(sys.argv[1]))

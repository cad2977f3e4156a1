"""`python -m zops.serving.healthcheck`: the container's HEALTHCHECK; exit 0 when ready, 1 when not.

Only the standard library, and little of it: an engine starts this every few seconds.
"""

import http.client
import os
import sys

TIMEOUT_S = 5.0


def is_ready(port: int) -> bool:
    """Ask the server on this host's loopback whether it is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if is_ready(int(os.environ.get("ZOPS_SERVE_PORT", "8000"))) else 1)

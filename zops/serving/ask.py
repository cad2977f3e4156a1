"""`python -m zops.serving.ask`: put one question to the server in this container, for somebody outside of it.

An engine on another host publishes its ports there only, so the question goes in through the engine. It comes in the
environment, because arguments can be read in every list of processes, and an API key may be among it:

    ZOPS_ASK            JSON: method, path, timeout_s
    ZOPS_ASK_BODY       the body, where there is one
    ZOPS_API_KEY        the key, where there is one

On standard output come the status in one line and then the body of the answer, byte by byte. The exit status is 0 with
an answer, 3 when none came in time, and 4 when nothing listens; standard error says why.

Only the standard library, and little of it: an interpreter is started for each question.
"""

import http.client
import json
import os
import signal
import sys
from collections.abc import Mapping

TOO_LATE, UNREACHABLE = 3, 4


def ask(environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Put the question that the environment holds; return status and body of the answer.

    Raises:
        OSError: when nothing listens, or no answer came in time (`TimeoutError`).
        HTTPException: when what answers does not speak HTTP.
    """
    question = json.loads(environ["ZOPS_ASK"])
    body = environ.get("ZOPS_ASK_BODY")
    headers = {"Accept": "application/json", "User-Agent": "zops"}
    if environ.get("ZOPS_API_KEY"):
        headers["Authorization"] = f"Bearer {environ['ZOPS_API_KEY']}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    port = int(environ.get("ZOPS_SERVE_PORT", "8000"))
    connection = http.client.HTTPConnection(_loopback(environ), port, timeout=question["timeout_s"])
    try:
        connection.request(question["method"], question["path"], None if body is None else body.encode(), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _loopback(environ: Mapping[str, str]) -> str:
    """Return where the server of this place is reached."""
    host = environ.get("ZOPS_SERVE_HOST", "")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def main() -> int:
    """Answer the question of the environment on standard output."""
    # A server that drips never makes a socket time out; this ends it all the same.
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, json.loads(os.environ["ZOPS_ASK"])["timeout_s"])
    try:
        status, body = ask(os.environ)
    except TimeoutError:
        sys.stderr.write("no answer in time\n")
        return TOO_LATE
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"{str(error) or type(error).__name__}\n")
        return UNREACHABLE
    sys.stdout.buffer.write(b"%d\n" % status + body)
    return 0


def _give_up(_number: int, _frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    sys.exit(main())

"""One short question to the hub or mirror: whether it answers, takes our token, and what time it thinks it is."""

import http.client
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from zops import __version__

# A name that does not resolve hangs for longer than any socket's timeout, so the whole question has one of its own.
ANSWER_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a hub said: its status, and how far our clock is ahead of its, None when it told no time."""

    status: int
    ahead_s: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Silence:
    """That no hub answered, and why."""

    reason: str


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer too, and our token is for this host only."""

    def redirect_request(self, *_arguments: object) -> None:
        """Follow nowhere."""


def ask(url: str, authorization: str = "", *, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer | Silence:
    """Ask once, and return within the timeout whatever happens; the proxies of the environment are used."""
    said: list[Answer | Silence] = []
    # A daemon: where the resolver hangs, the thread is left behind and ends with the program.
    thread = threading.Thread(
        target=lambda: said.append(_ask(url, authorization, timeout_s)), name="ask-hub", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    return said[0] if said else Silence(f"no answer within {timeout_s:.1f} s")


def _ask(url: str, authorization: str, timeout_s: float) -> Answer | Silence:
    headers = {"User-Agent": f"zops/{__version__}"} | ({"Authorization": authorization} if authorization else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the specification allows http and https only
    opener = urllib.request.build_opener(_NoRedirects)
    began = time.monotonic()
    try:
        with opener.open(request, timeout=timeout_s) as response:
            status, date = response.status, response.headers.get("Date")
    except urllib.error.HTTPError as error:
        status, date = error.code, error.headers.get("Date")
        error.close()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        return Silence(_why(getattr(error, "reason", error)))
    return Answer(status, _ahead(date), time.monotonic() - began)


def _ahead(date: str | None) -> float | None:
    try:
        return time.time() - parsedate_to_datetime(date).timestamp() if date else None
    except (TypeError, ValueError):
        return None


def _why(error: object) -> str:
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__

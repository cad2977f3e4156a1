"""The webhook: each event as a JSON object in a POST, tried a few times and then let go.

Its URL is often a secret (chat services put the token into the path), so it comes from the environment or from a file,
never from an argument, and is never repeated: errors name its host alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import tenacity
import urllib3

from zops.errors import SpecError
from zops.watch.events import Occurrence

VARIABLE = "ZOPS_WATCH_WEBHOOK"
ATTEMPTS = 5
TIMEOUT_S = 5.0
# What a receiver is restarted in; after the last attempt 1 + 2 + 4 + 8 s have passed.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# A receiver that says so may be asked again; any other refusal would come again.
_AGAIN = frozenset({408, 425, 429, *range(500, 600)})


class Refused(Exception):
    """Raised when a receiver answered with an error; `again` tells whether another attempt makes sense."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.again = status in _AGAIN


class Webhook:
    """Sends events to one URL.

    Args:
        url: where to; never shown.
        first_pause_s: pause before the second attempt, doubled for each more.
        timeout_s: longest time for one attempt.
    """

    def __init__(self, url: str, *, first_pause_s: float = FIRST_PAUSE_S, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url
        self._timeout = urllib3.Timeout(total=timeout_s)
        self._pool = urllib3.PoolManager(retries=False, maxsize=1)
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=first_pause_s, max=LONGEST_PAUSE_S),
            retry=tenacity.retry_if_exception(_worth_another),
            reraise=True,
        )

    def __call__(self, occurrence: Occurrence) -> None:
        """Send one event; takes up to a minute where nobody answers.

        Raises:
            Refused: when the receiver answered with an error.
            urllib3.exceptions.HTTPError: when it did not answer.
        """
        self._retrying(self._post, f"{occurrence.as_line()}\n".encode())

    def _post(self, body: bytes) -> None:
        response = self._pool.request(
            "POST",
            self._url,
            body=body,
            headers={"Content-Type": "application/json", "User-Agent": "zops-watch"},
            timeout=self._timeout,
            redirect=False,
            preload_content=False,
        )
        try:
            status = response.status
        finally:
            # What it says besides is not read: it may be endless.
            response.close()
        if status >= 300:
            raise Refused(status)


def find_url(file: Path | None, environ: Mapping[str, str] | None = None) -> str:
    """Return the webhook's URL: from the environment, else from the first line of a file; empty when there is none.

    Raises:
        SpecError: when the file cannot be read, or what was found is no URL; it is not repeated.
    """
    environ = os.environ if environ is None else environ
    url, where = environ.get(VARIABLE, "").strip(), VARIABLE
    if not url and file:
        where = str(file)
        try:
            url = file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise SpecError(f"watch.webhook_file {file} cannot be read: {why}", code="webhook-invalid") from error
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:
        fits = False
    if not fits:
        raise SpecError(
            f"what {where} holds is no URL of a webhook",
            code="webhook-invalid",
            hint="put one line with the very address there, for example https://hooks.example.com/zops",
        )
    return url


def _worth_another(error: BaseException) -> bool:
    return error.again if isinstance(error, Refused) else isinstance(error, urllib3.exceptions.HTTPError)

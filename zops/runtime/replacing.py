"""Containers while one takes another's place: which of the two counts, and how each of them ends."""

import math
from contextlib import suppress
from typing import Any

import tenacity

from zops.errors import ZopsError
from zops.host.engine import engine_errors

# docker-py's; only the runtime itself knows docker-py.
Container = Any
Volume = Any

# A dot is allowed in a container's name and not in a deployment's, so this can be no other deployment's container.
NEXT = ".next"

# How long an engine may hold a volume after it said that the container which used it is gone.
RELEASE_TIMEOUT_S = 5.0
_CONFLICT = 409


def choose_container(containers: list[Container]) -> Container:
    """Return the container that counts: while one is being replaced there are two, and both carry the label.

    That is the one with the plain name, unless it was stopped already. If whoever replaces it has died, it must not
    look like one that somebody stopped on purpose, so then it is the new one, which was never started.
    """
    plain, following = (
        next((container for container in containers if str(container.name).endswith(NEXT) is is_next), None)
        for is_next in (False, True)
    )
    if plain is None or following is None:
        return containers[0]
    return following if plain.status == "exited" else plain


def stop_container(container: Container, grace_s: float | None = None) -> None:
    """Stop a container within some seconds, by default those that it was made with; the engine kills it afterwards."""
    timeout_s = container.attrs["Config"].get("StopTimeout") if grace_s is None else math.ceil(grace_s)
    container.stop(**({} if timeout_s is None else {"timeout": timeout_s}))


def discard_container(container: Container) -> None:
    """Remove a container that came to nothing; the error that is on its way matters more than one of this."""
    with suppress(ZopsError), engine_errors(f"removing {container.name}"):
        container.remove(v=True, force=True)


def remove_volume(volume: Volume) -> None:
    """Remove the volume of containers that are gone.

    Raises:
        APIError: docker-py's, when the engine refuses; when something still uses the volume, after a few seconds.
    """
    tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: getattr(error, "status_code", None) == _CONFLICT),
        stop=tenacity.stop_after_delay(RELEASE_TIMEOUT_S),
        wait=tenacity.wait_fixed(0.1),
        reraise=True,
    )(volume.remove)

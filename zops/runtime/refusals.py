"""What an engine's refusals mean for an operator.

Engines answer with sentences, not with codes, and the sentences differ from version to version: each is known here by
the words that did not change between Docker 20.10 and 29.
"""

import re
from dataclasses import dataclass

from zops.errors import HostShort, LockHeld, SnapshotMissing, ZopsError
from zops.host.engine import TOOLKIT
from zops.runtime.base import Deployment


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal, known by its words. `text` and `hint` may name {name}, {image}, {host}, {port} and {cache}."""

    words: str
    kind: type[ZopsError]
    code: str
    text: str
    hint: str


REFUSALS = (
    Refusal(
        r"no such image",
        HostShort,
        "image-missing",
        "the engine has no image {image}",
        "build it with: zops image build",
    ),
    Refusal(
        r"port is already allocated|address already in use",
        HostShort,
        "port-taken",
        "port {port} on {host} is already taken",
        "see by whom: sudo ss -ltnp 'sport = :{port}'; or choose another: --port",
    ),
    Refusal(
        r"cannot assign requested address|invalid host ?ip|invalid ip",
        HostShort,
        "address-missing",
        "{host} is no address of the engine's host",
        "set serve.host to one that it has, for example 127.0.0.1",
    ),
    Refusal(
        r"could not select device driver|unresolvable CDI devices|nvidia-container-cli|CDI device injection failed",
        HostShort,
        "gpu-missing",
        "the engine could not give the container its GPUs",
        TOOLKIT,
    ),
    Refusal(
        r"bind source path does not exist",
        SnapshotMissing,
        "snapshot-missing",
        "the engine's host has no directory {cache}",
        "the cache must lie on the host of the engine: run zops there, or set cache.dir",
    ),
    Refusal(
        r"no space left on device",
        HostShort,
        "disk-full",
        "the engine's disk is full",
        "make room, for example with: docker system prune",
    ),
    Refusal(
        r"minimum memory limit|cannot allocate memory|not enough memory",
        HostShort,
        "memory-short",
        "the engine cannot grant the memory that is wanted",
        "see resources.memory and resources.shm",
    ),
    Refusal(
        r"is already in use by container",
        LockHeld,
        "name-in-use",
        "another zops is just creating the container of {name}",
        "run the same command again when it is done",
    ),
)


def explain(error: Exception, deployment: Deployment, doing: str) -> ZopsError:
    """Return what an engine's refusal to create or start a container means.

    Args:
        error: what docker-py raised.
        deployment: whose container it was.
        doing: what was being done, as in "starting zops-demo".
    """
    said = " ".join(str(getattr(error, "explanation", None) or error).split())
    serve = deployment.spec.serve
    facts = {
        "name": deployment.name,
        "image": deployment.spec.image.name,
        "host": serve.host,
        "port": serve.port,
        "cache": deployment.spec.cache.dir,
    }
    for refusal in REFUSALS:
        if re.search(refusal.words, said, re.IGNORECASE):
            return refusal.kind(
                refusal.text.format(**facts), code=refusal.code, hint=refusal.hint.format(**facts), engine=said
            )
    return ZopsError(f"{doing}: the engine refused: {said}", code="engine-refused")

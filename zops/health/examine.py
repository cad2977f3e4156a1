"""The doctor's visit: what the deployment will need, what of ours runs already, and then every check."""

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from zops.catalog import lookup
from zops.errors import ZopsError
from zops.events import Report, silent
from zops.health.backups import BACKUP_CHECKS
from zops.health.needs import needs
from zops.host.capacity import Capacity, judge_capacity
from zops.host.checks import CHECKS
from zops.host.context import Context, Senses
from zops.host.doctor import Diagnosis, diagnose, refusal
from zops.host.engine import EngineFacts
from zops.runtime.base import Runtime
from zops.runtime.container import require_readable
from zops.runtime.deployment import deploy
from zops.spec import Loaded, Spec


def examine_host(
    loaded: Loaded,
    *,
    runtime: Runtime | None = None,
    only: Sequence[str] = (),
    senses: Senses | None = None,
    report: Report = silent,
) -> Diagnosis:
    """Run the doctor's checks for a specification.

    Args:
        loaded: the specification and where it came from.
        runtime: where instances of ours may run already; none when it cannot be reached.
        only: ids of the checks to run, all when empty.
        senses: how facts are read.
        report: where progress goes.

    Raises:
        UsageError: when `only` names a check that does not exist.
    """
    context = Context(
        spec=loaded.spec,
        file=loaded.file,
        need=needs(loaded.spec),
        own_ports=_own_ports(loaded.spec, runtime),
        senses=senses or Senses(),
        readable=_reader(loaded.spec),
    )
    return diagnose(context, (*CHECKS, *BACKUP_CHECKS), only=only, report=report)


def require_gpu_room(loaded: Loaded, senses: Senses | None = None) -> None:
    """Refuse a deployment on a fenced GPU, or whose largest allowed image cannot fit, as far as that is seen here.

    Raises:
        HostShort: naming the largest image that would fit, or why the GPU is fenced.
    """
    if error := refusal(examine_host(loaded, only=("gpu-memory", "gpu-fenced"), senses=senses)):
        raise error


def capacity(spec: Spec, senses: Senses | None = None) -> Capacity:
    """Return which precision and size fit on the GPUs that a specification wants, as far as they are seen here.

    Raises:
        ZopsError: when nobody knows what the model needs.
    """
    model = lookup(spec.model)
    if not model.resident_bytes:
        raise ZopsError(
            f"what {spec.model} needs of a GPU is not known",
            code="capacity-unknown",
            hint="see the models that are known with: zops model list",
        )
    context = Context(spec=spec, senses=senses or Senses())
    dtype = "float32" if spec.serve.dtype == "float32" else "bfloat16"
    gpus = context.wanted_gpus if context.on_this_host else ()
    return judge_capacity(
        spec.model, model.resident_bytes, dtype, spec.serve.max_pixels, gpus, preset=spec.serve.preset
    )


def _reader(spec: Spec) -> Callable[[EngineFacts | None], None] | None:
    """Return what a runtime itself asks before it starts an instance; None where no container's user is to read."""
    if spec.runtime != "docker":
        return None

    def require(facts: EngineFacts | None) -> None:
        if facts is not None:
            require_readable(deploy(spec), facts)

    return require


def _own_ports(spec: Spec, runtime: Runtime | None) -> frozenset[int]:
    """Return the port of our own instance when it runs: a port that it holds is not taken."""
    if runtime is None:
        return frozenset()
    try:
        instance = runtime.find(spec.name)
    except ZopsError:
        return frozenset()
    port = urlsplit(instance.url).port if instance and instance.running else None
    return frozenset({port}) if port else frozenset()

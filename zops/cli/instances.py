"""`zops up`, `down`, `ps` and `logs`: instances of the deployment."""

from dataclasses import fields
from typing import Any

import click

from zops.cli.options import with_spec
from zops.cli.output import Output
from zops.runtime.base import Instance
from zops.runtime.deployment import bring_up, deploy, drift_of
from zops.runtime.select import open_local_runtimes, open_runtime
from zops.spec import Loaded

COLUMNS = ("NAME", "RUNTIME", "STATE", "HEALTH", "MODEL", "URL", "UP SINCE", "RESTARTS", "DRIFT")


@click.command()
@click.option("--wait/--no-wait", default=True, help="Wait until it is ready (default: wait).")
@with_spec
def up(*, loaded: Loaded, out: Output, wait: bool) -> None:
    """Start the instance, or recreate it where it drifted.

    The snapshot must be in the cache and verified. The image is built (or pulled) where it is missing. An instance
    that runs as zops.yaml says is left alone. Refused where the largest allowed image cannot fit on a wanted GPU.

    \b
    Examples:
      zops up
      zops up --port 8001 --no-wait
      zops up --runtime process --gpus none
    """
    from zops.health.examine import require_gpu_room  # noqa: PLC0415 - as below; the other commands here need no GPU

    deployment = deploy(loaded.spec)
    require_gpu_room(loaded)
    runtime = open_runtime(loaded.spec)
    with out.progress() as report, runtime.claim(deployment.name, report):
        instance = bring_up(runtime, deployment, report)
        if wait:
            from zops.health.waiting import wait_instance  # noqa: PLC0415 - --no-wait need not pay for a client

            wait_instance(runtime, deployment, report)
            instance = runtime.find(deployment.name) or instance
    out.data(as_json(instance), f"{instance.name} {'is ready' if wait else 'is up'} at {instance.url}")


@click.command()
@click.option("--volumes", is_flag=True, help="Also remove what it compiled; the next start compiles anew.")
@with_spec
def down(*, loaded: Loaded, out: Output, volumes: bool) -> None:
    """Stop and remove the instance.

    Requests that run are finished first. The cache is never touched, and what the instance compiled is kept for the
    next one unless --volumes is given.

    \b
    Examples:
      zops down
      zops down --name demo --volumes
    """
    with out.progress() as report:
        was_there = open_runtime(loaded.spec).down(loaded.spec.name, report, volumes=volumes)
    if not was_there:
        out.note(f"there was no instance {loaded.spec.name}")
    out.data({"name": loaded.spec.name, "runtime": loaded.spec.runtime, "removed": was_there})


@click.command()
@with_spec
def ps(*, loaded: Loaded, out: Output) -> None:
    """List the instances on this host.

    Those of the runtime that zops.yaml names, and processes. DRIFT tells what of the deployment's own instance differs
    from zops.yaml now; - stands for another deployment's, ? for one whose snapshot is gone.

    \b
    Examples:
      zops ps
      zops ps --engine ssh://admin@gpu-1 --output json
    """
    found = [instance for runtime in open_local_runtimes(loaded.spec) for instance in runtime.instances()]
    drifts = [drift_of(loaded.spec, instance) for instance in found]
    rows = [_row(instance, loaded, drift) for instance, drift in zip(found, drifts, strict=True)]
    body = [as_json(instance) | {"drift": drift} for instance, drift in zip(found, drifts, strict=True)]
    out.table(COLUMNS, rows, body, empty="there are no instances; start one with: zops up")


@click.command()
@click.option("-F", "--follow", is_flag=True, help="Go on as lines come, until the instance ends.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@with_spec
def logs(*, loaded: Loaded, out: Output, follow: bool, tail: int | None) -> None:
    """Print the log of the instance.

    \b
    Examples:
      zops logs --tail 50
      zops logs -F
    """
    for line in open_runtime(loaded.spec).logs(loaded.spec.name, follow=follow, tail=tail):
        out.line(line)


def as_json(instance: Instance) -> dict[str, Any]:
    """Return an instance as documented in docs/reference/json.md; traits are the runtime's own business."""
    return {field.name: getattr(instance, field.name) for field in fields(instance) if field.name != "traits"}


def _row(instance: Instance, loaded: Loaded, drift: list[str] | None) -> tuple[str, ...]:
    own = (instance.name, instance.runtime) == (loaded.spec.name, loaded.spec.runtime)
    drifted = ("?" if own else "-") if drift is None else ", ".join(drift) or "none"
    ended = instance.exit_code is not None and not instance.running
    state = f"{instance.state} ({instance.exit_code})" if ended else instance.state
    return (
        instance.name,
        instance.runtime,
        state,
        instance.health or "-",
        instance.model,
        instance.url,
        instance.started_at or "-",
        str(instance.restarts),
        drifted,
    )

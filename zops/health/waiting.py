"""Waiting for a deployment's instance, by the way that its runtime leaves open."""

import time

from zops.errors import NotReady
from zops.events import Report, task
from zops.health.ready import LONGEST_PAUSE_S, wait_ready
from zops.runtime.base import Deployment, Runtime
from zops.runtime.deployment import end_of


def wait_instance(runtime: Runtime, deployment: Deployment, report: Report) -> float:
    """Wait until the instance is ready and return the seconds that it took.

    An instance on this host or behind a published port is asked over HTTP. One in a cluster answers only inside it:
    there the cluster's own readiness probe is believed, which asks the same /readyz.

    Raises:
        NotReady: when the instance is gone, gave up, or the time is over.
    """
    timeout_s = deployment.spec.serve.startup_timeout_s
    alive = end_of(runtime, deployment.name)
    if deployment.spec.runtime != "kubernetes":
        return wait_ready(deployment.url, timeout_s=timeout_s, alive=alive, report=report).seconds
    began = time.monotonic()
    with task(report, "ready", "instance: ready", unit=""):
        while not is_healthy(runtime, deployment.name):
            waited = time.monotonic() - began
            gone = alive()
            if gone or waited >= timeout_s:
                why = gone or f"not ready after {waited:.0f} s"
                hint = "see why with: zops logs; give it longer with: --set serve.startup_timeout_s=SECONDS"
                raise NotReady(f"the instance {deployment.name} is not ready: {why}", hint=hint)
            time.sleep(LONGEST_PAUSE_S)
    return time.monotonic() - began


def is_healthy(runtime: Runtime, name: str) -> bool:
    """Tell whether the runtime's own probe found the instance ready."""
    instance = runtime.find(name)
    return instance is not None and instance.health == "healthy"

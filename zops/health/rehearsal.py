"""A first start ahead of time: an instance runs until it is ready and ends, and leaves what it compiled."""

import time
from dataclasses import dataclass

from zops.errors import UsageError
from zops.events import Report
from zops.health.waiting import wait_instance
from zops.runtime.base import Deployment, Runtime
from zops.runtime.deployment import bring_up


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a rehearsal did; nothing when an instance is there, whose own start left the same."""

    done: bool
    seconds: float


def rehearse(runtime: Runtime, deployment: Deployment, report: Report) -> Rehearsed:
    """Start the deployment's instance, wait until it is ready, and stop it; its compile cache stays.

    The same start as a user's: kernels for this GPU and driver, the quality gate's verdict, the attention probe.

    Raises:
        UsageError: `kernels-not-kept` for a runtime that keeps nothing from one start to the next.
        ZopsError: when the instance does not become ready; it is stopped all the same.
    """
    if deployment.spec.runtime == "kubernetes":
        raise UsageError(
            "on Kubernetes the compile cache lives and dies with its pod, so there is nothing to fill ahead of time",
            code="kernels-not-kept",
            hint="the readiness probe holds traffic back until a new pod has compiled",
        )
    began = time.monotonic()
    if runtime.find(deployment.name):
        return Rehearsed(done=False, seconds=0.0)
    try:
        bring_up(runtime, deployment, report)
        wait_instance(runtime, deployment, report)
    finally:
        runtime.down(deployment.name, report)
    return Rehearsed(done=True, seconds=time.monotonic() - began)

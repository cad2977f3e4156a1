"""What the other runtimes do to heal an instance, and a cluster does by itself."""

from contextlib import AbstractContextManager, nullcontext

from zops.errors import UsageError
from zops.events import Report
from zops.runtime.base import CLAIM_TIMEOUT_S, HEAL_GRACE_S, Instance
from zops.runtime.kubernetes_render import NAMESPACE


class LeftToTheCluster:
    """The half of a runtime that Kubernetes has of its own: the kubelet restarts, the controller makes new pods."""

    def claim(self, name: str, report: Report, *, timeout_s: float = CLAIM_TIMEOUT_S) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's signature
        """Claim nothing: the API server itself orders what many hosts ask of it."""
        return nullcontext()

    def restart(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:  # noqa: ARG002 - as above
        """Refuse: the kubelet restarts what is not alive.

        Raises:
            UsageError: always, `cluster-heals`.
        """
        raise _cluster_heals(name, "restart it", f"kubectl -n {NAMESPACE} rollout restart deployment/{name}")

    def recreate(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:  # noqa: ARG002 - as above
        """Refuse: the cluster makes new pods by itself.

        Raises:
            UsageError: always, `cluster-heals`.
        """
        raise _cluster_heals(name, "recreate it", f"kubectl -n {NAMESPACE} rollout restart deployment/{name}")

    def stop(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:  # noqa: ARG002 - as above
        """Refuse: the cluster would put another pod in its place.

        Raises:
            UsageError: always, `cluster-heals`.
        """
        raise _cluster_heals(name, "stop it", f"kubectl -n {NAMESPACE} scale deployment/{name} --replicas=0")

    def ask(
        self,
        name: str,
        method: str,  # noqa: ARG002 - as above
        path: str,  # noqa: ARG002 - as above
        body: bytes | None = None,  # noqa: ARG002 - as above
        *,
        timeout_s: float,  # noqa: ARG002 - as above
        key: str = "",  # noqa: ARG002 - as above
    ) -> tuple[int, bytes]:
        """Refuse: the cluster's own probes ask a pod.

        Raises:
            UsageError: always, `cluster-heals`.
        """
        raise _cluster_heals(name, "ask it", f"kubectl -n {NAMESPACE} port-forward deployment/{name} 8000")


def _cluster_heals(name: str, what: str, command: str) -> UsageError:
    text = f"{name} is Kubernetes' to watch: zops does not {what} there"
    return UsageError(text, code="cluster-heals", hint=f"by hand: {command}")

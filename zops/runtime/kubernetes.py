"""Instances as Kubernetes Deployments, through the operator's own kubectl and its current context.

kubectl is what an operator can replay by hand, it knows every way to log in, and it costs no dependency. Everything is
sent and read as JSON. What this version does not do: reach an instance from outside the cluster. `Instance.url` is
where it answers while `kubectl port-forward` runs (docs/how-to/kubernetes.md).
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any, cast

from zops.errors import RuntimeUnreachable, ZopsError
from zops.events import Finished, Report, Started, Warned
from zops.runtime.base import LABEL, STOP_GRACE_S, Deployment, Instance, State
from zops.runtime.kubernetes_heals import LeftToTheCluster
from zops.runtime.kubernetes_render import NAMESPACE, Manifest, caveats, render
from zops.spec import Spec

FIELD_MANAGER = "zops"
# One answer of the API server, and whole runs of kubectl: it asks several times, and again where nobody answers.
REQUEST_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
WRITE_TIMEOUT_S = 60
# What `down` removes. The volume, its claim and the namespace stay: they hold no state of an instance, and others' pods
# and quotas may hang on them.
REMOVED_KINDS = "deployments,services,poddisruptionbudgets,networkpolicies"


# Warnings, and the client library's own log beside kubectl's words ("E1123 13:00:00.000000 ...").
_CHATTER = re.compile(r"^(Warning:|[EWIF]\d{4} )")


class KubernetesRuntime(LeftToTheCluster):
    """Runs a deployment in the cluster that kubectl's current context names, in the namespace `zops`."""

    WRITES = frozenset({"up", "down", "obtain_image", "claim", "restart", "recreate", "stop"})

    def __init__(self, spec: Spec) -> None:
        """Take the specification as every runtime does; which cluster is meant is kubectl's to say, not the file's."""
        self.spec = spec

    def check(self) -> str:
        """Return the cluster's version and the context by which it was reached."""
        version = json.loads(self._kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
        return f"Kubernetes {version} (context {self._context()})"

    def instances(self) -> list[Instance]:
        """Return an instance for each Deployment that carries our label."""
        return read_instances(self._items(f"{LABEL}.deployment"))

    def find(self, name: str) -> Instance | None:
        """Return the instance of a deployment, None when the cluster has no such Deployment."""
        return next((instance for instance in self.instances() if instance.name == name), None)

    def has_image(self, spec: Spec) -> bool:  # noqa: ARG002 - the protocol's signature
        """Return True: the nodes pull it, and only they know."""
        return True

    def obtain_image(self, spec: Spec, report: Report) -> None:
        """Say that the nodes pull the image; nothing is built here, for no node would get it."""
        report(Warned(f"{spec.image.name} must be on the nodes or in a registry that they can pull from"))

    def up(self, deployment: Deployment, report: Report) -> Instance:
        """Apply the deployment's objects, the namespace first, and return the instance. Does not wait until ready.

        Applying what is already so changes nothing. Where there are too few GPUs or too little memory, the pod waits:
        the scheduler knows of nodes that come later, so that is no error here.

        Raises:
            RuntimeUnreachable: when there is no kubectl or no cluster that answers it.
            SpecError: when Kubernetes cannot do what is asked.
            ZopsError: when the cluster refuses an object, with its words.
        """
        began = time.monotonic()
        objects = render(deployment)
        for caveat in caveats(deployment):
            report(Warned(caveat))
        report(Started("up", f"{deployment.name}: applying {len(objects)} objects", len(objects), "objects"))
        selector = f"{LABEL}.deployment={deployment.name}"
        before = _generation(self._items(selector))
        # Whatever lives in a namespace is refused until the namespace exists, in one request as in two.
        for shared in (True, False):
            self._apply([m for m in objects if (m["kind"] == "Namespace") is shared], report)
        items = self._items(selector)
        instances = read_instances(items)
        if not instances:
            raise ZopsError(
                f"{deployment.name}: the Deployment was applied and is gone",
                code="kubernetes-vanished",
                hint=f"see who removed it: kubectl -n {NAMESPACE} get events",
            )
        changed = _generation(items) != before
        said = "applied" if changed else "already as asked"
        report(Finished("up", f"{deployment.name}: {said}", time.monotonic() - began, changed))
        return instances[0]

    def down(self, name: str, report: Report, *, volumes: bool = False) -> bool:  # noqa: ARG002 - see below
        """Remove the deployment's objects and wait until its pod has finished its requests and is gone.

        What it compiled goes with the pod, so `volumes` adds nothing. The cache's volume and claim, and the namespace,
        stay. Returns whether there was an instance.
        """
        deployments, pods = _split(self._items(f"{LABEL}.deployment={name}"))
        grace_s = max((_grace_s(item) for item in (*deployments, *pods)), default=STOP_GRACE_S)
        began = time.monotonic()
        report(Started("down", f"{name}: stopping", 0, "objects"))
        # foreground: the Deployment goes last, when its pods are gone, so waiting for it is waiting for them.
        wait_s = grace_s + WRITE_TIMEOUT_S
        patience = ("--cascade=foreground", f"--timeout={wait_s:.0f}s")
        # Only who made a Secret needs the right to remove one.
        kinds = f"{REMOVED_KINDS},secrets" if any(map(_has_keys, deployments)) else REMOVED_KINDS
        selection = ("-n", NAMESPACE, "-l", f"{LABEL}.deployment={name}")
        self._kubectl("delete", kinds, *selection, *patience, timeout_s=wait_s + WRITE_TIMEOUT_S)
        found = bool(deployments)
        text = f"{name}: removed" if found else f"{name}: was not there"
        report(Finished("down", text, time.monotonic() - began, found))
        return found

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield the lines of the newest pod; of its previous container when that one crashed and none runs now.

        Raises:
            ZopsError: when there is no pod, or none of its containers has started.
        """
        _, pods = _split(self._items(f"{LABEL}.deployment={name}"))
        pod = _newest(pods)
        if pod is None:
            raise ZopsError(f"there is no pod of {name}", code="instance-missing", hint="start it with: zops up")
        arguments = ["logs", f"pod/{pod['metadata']['name']}", "-n", NAMESPACE, "-c", "serve"]
        arguments += ["--follow"] if follow else [f"--request-timeout={REQUEST_TIMEOUT_S}s"]
        arguments += [] if tail is None else [f"--tail={tail}"]
        process = subprocess.Popen(
            [_find_kubectl(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        with process:
            assert process.stdout
            assert process.stderr
            try:
                for line in process.stdout:
                    yield line.rstrip("\r\n")
                if process.wait():
                    raise self._failure(process.stderr.read())
            finally:
                process.kill()

    # --- kubectl

    def _apply(self, objects: list[Manifest], report: Report) -> None:
        """Apply objects and pass on what the API server warns of, such as a policy that the pods will break."""
        # One document after the other, no List: only then does kubectl leave checking field names to the API server.
        body = "\n".join(json.dumps(manifest) for manifest in objects)
        arguments = ("apply", "--server-side", f"--field-manager={FIELD_MANAGER}", "-f", "-")
        self._kubectl(*arguments, stdin=body, report=report, timeout_s=WRITE_TIMEOUT_S)

    def _items(self, selector: str) -> list[Manifest]:
        answer = self._kubectl("get", "deployments,pods", "-n", NAMESPACE, "-l", selector, "-o", "json")
        return cast("list[Manifest]", json.loads(answer)["items"])

    def _context(self) -> str:
        done = _run("config", "current-context")
        return done.stdout.strip() if done.returncode == 0 else "none, kubectl's default"

    def _kubectl(
        self, *arguments: str, stdin: str = "", report: Report | None = None, timeout_s: float | None = None
    ) -> str:
        """Run kubectl and return its stdout; its warnings go to `report`.

        Raises:
            RuntimeUnreachable: when kubectl is missing, takes too long, or the API server does not answer.
            ZopsError: when the API server answers and refuses.
        """
        done = _run(*arguments, f"--request-timeout={REQUEST_TIMEOUT_S}s", stdin=stdin, timeout_s=timeout_s)
        for line in done.stderr.splitlines():
            if report and line.startswith("Warning:"):
                report(Warned(line.removeprefix("Warning:").strip()))
        if done.returncode:
            raise self._failure(done.stderr)
        return done.stdout

    def _failure(self, stderr: str) -> ZopsError:
        """Tell a cluster that does not answer from one that says no: ask it for the one thing that all may read."""
        asked = _run("get", "--raw=/version", f"--request-timeout={REQUEST_TIMEOUT_S}s")
        if asked.returncode:
            return RuntimeUnreachable(
                f"no Kubernetes cluster answers kubectl: {_reason(asked.stderr)}",
                hint="check: kubectl config current-context, then kubectl version",
            )
        return ZopsError(
            f"Kubernetes refused: {_reason(stderr)}",
            code="kubernetes-refused",
            hint="all of its answer is in the details: --output json",
            answer=stderr.strip(),
        )


def _has_keys(deployment: Manifest) -> bool:
    """Tell whether the pods of a Deployment read API keys from a Secret."""
    return any("secret" in volume for volume in deployment["spec"]["template"]["spec"].get("volumes", ()))


def read_instances(items: list[Manifest]) -> list[Instance]:
    """Turn Deployments and their pods, as the API gives them, into instances, sorted by name."""
    deployments, pods = _split(items)
    found = []
    for deployment in deployments:
        name = _label(deployment)
        found.append(_read_instance(deployment, _newest([pod for pod in pods if _label(pod) == name])))
    return sorted(found, key=lambda instance: instance.name)


def _read_instance(deployment: Manifest, pod: Manifest | None) -> Instance:
    notes = deployment["metadata"].get("annotations", {})
    statuses = pod["status"].get("containerStatuses", []) if pod else []
    container: Manifest = statuses[0] if statuses else {}
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
    state = _state(deployment, pod, container)
    return Instance(
        name=_label(deployment),
        id=str((pod or deployment)["metadata"]["uid"]),
        runtime="kubernetes",
        state=state,
        url=notes.get(f"{LABEL}.url", ""),
        model=notes.get(f"{LABEL}.model", ""),
        snapshot=notes.get(f"{LABEL}.snapshot", ""),
        manifest_digest=notes.get(f"{LABEL}.manifest", ""),
        spec_digest=notes.get(f"{LABEL}.spec", ""),
        image=deployment["spec"]["template"]["spec"]["containers"][0]["image"],
        health=_health(container),
        started_at=container.get("state", {}).get("running", {}).get("startedAt", ""),
        # What runs has no status; but that it was killed for want of memory before stays worth knowing.
        exit_code=None if state == "running" else ended.get("exitCode"),
        oom_killed=ended.get("reason") == "OOMKilled",
        restarts=container.get("restartCount", 0),
        traits=_traits(notes),
    )


def _state(deployment: Manifest, pod: Manifest | None, container: Manifest) -> State:
    """Name the state in Docker's words: a container that waits to be started again is `restarting`."""
    if pod is None:
        return "exited" if deployment["spec"].get("replicas", 1) == 0 else "created"
    state = container.get("state", {})
    if "running" in state:
        return "running"
    if "terminated" in state or pod["status"].get("phase") in {"Failed", "Succeeded"}:
        return "exited"
    return "restarting" if container.get("restartCount", 0) else "created"


def _health(container: Manifest) -> str:
    """Say what the three probes say: `started` is the startup probe, `ready` the readiness probe."""
    if "running" not in container.get("state", {}):
        return ""
    if not container.get("started"):
        return "starting"
    return "healthy" if container.get("ready") else "unhealthy"


def _traits(notes: dict[str, str]) -> dict[str, Any]:
    """Return the traits that `up` noted; a Deployment that was applied by hand has none, so all of it is drift."""
    try:
        traits = json.loads(notes.get(f"{LABEL}.traits", "{}"))
    except json.JSONDecodeError:
        return {}
    return traits if isinstance(traits, dict) else {}


def _split(items: list[Manifest]) -> tuple[list[Manifest], list[Manifest]]:
    deployments = [item for item in items if item["kind"] == "Deployment"]
    return deployments, [item for item in items if item["kind"] == "Pod"]


def _generation(items: list[Manifest]) -> int:
    """Return the number that the API server raises with every change of the Deployment's spec, 0 without one."""
    deployments, _ = _split(items)
    return int(deployments[0]["metadata"]["generation"]) if deployments else 0


def _label(item: Manifest) -> str:
    return str(item["metadata"]["labels"][f"{LABEL}.deployment"])


def _newest(pods: list[Manifest]) -> Manifest | None:
    """Return the pod made last, one that is not being deleted before one that is; None without pods."""
    return max(
        pods,
        key=lambda pod: ("deletionTimestamp" not in pod["metadata"], pod["metadata"].get("creationTimestamp", "")),
        default=None,
    )


def _grace_s(item: Manifest) -> float:
    spec = item["spec"]["template"]["spec"] if item["kind"] == "Deployment" else item["spec"]
    return float(spec.get("terminationGracePeriodSeconds", STOP_GRACE_S))


def _find_kubectl() -> str:
    path = shutil.which("kubectl")
    if path is None:
        raise RuntimeUnreachable(
            "runtime: kubernetes needs kubectl, which is not on the PATH",
            code="kubectl-missing",
            hint="install kubectl, or choose runtime: docker",
        )
    return path


def _run(*arguments: str, stdin: str = "", timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    limit_s = timeout_s or READ_TIMEOUT_S
    try:
        return subprocess.run(
            [_find_kubectl(), *arguments],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeUnreachable(
            f"kubectl {arguments[0]} did not end within {limit_s:.0f} s",
            hint="check: kubectl config current-context, then kubectl version",
        ) from None


def _reason(stderr: str) -> str:
    """Return the line in which kubectl says what went wrong: the first that calls itself an error, else the last."""
    lines = [line for line in stderr.splitlines() if line.strip() and not _CHATTER.match(line)]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (
        next(iter(errors or lines[-1:]), "it gave no reason").removeprefix("error: ").removeprefix("Error from server ")
    )

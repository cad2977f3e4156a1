"""What the API server says of Deployments and pods, read as instances; and what kubectl says of failures."""

import pytest

from zops.errors import UsageError
from zops.events import silent
from zops.runtime.kubernetes import KubernetesRuntime, _reason, read_instances
from zops.spec import Spec

RUNNING = {"name": "serve", "state": {"running": {}}, "restartCount": 0, "started": True, "ready": True}


def deployment(name="zops"):
    labels = {"io.zops.deployment": name}
    container = {"name": "serve", "image": "zops-inference:1"}
    return {
        "kind": "Deployment",
        "metadata": {"name": name, "uid": f"deployment-{name}", "labels": labels, "generation": 1},
        "spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}},
    }


def pod(uid, *, name="zops", born="2026-01-01T00:00:00Z", status=None, **metadata):
    labels = {"io.zops.deployment": name}
    body = {"phase": "Running", "containerStatuses": [RUNNING]} if status is None else status
    return {
        "kind": "Pod",
        "metadata": {"uid": uid, "labels": labels, "creationTimestamp": born} | metadata,
        "spec": {},
        "status": body,
    }


def only(*items):
    (instance,) = read_instances(list(items))
    return instance


def test_the_newest_pod_must_speak_for_the_deployment():
    old, new = pod("old"), pod("new", born="2026-01-02T00:00:00Z")
    assert only(deployment(), old, new).id == only(deployment(), new, old).id == "new"


def test_a_pod_that_is_being_deleted_must_not_speak_while_another_is_there():
    going = pod("going", born="2026-01-02T00:00:00Z", deletionTimestamp="2026-01-03T00:00:00Z")
    assert only(deployment(), going, pod("staying")).id == "staying"
    assert only(deployment(), going).id == "going"


def test_a_deployment_without_pods_must_be_created_and_be_its_own_identity():
    instance = only(deployment())
    assert (instance.id, instance.state, instance.image) == ("deployment-zops", "created", "zops-inference:1")


def test_pods_must_be_counted_to_their_own_deployment():
    found = read_instances([deployment("b"), deployment("a"), pod("of-a", name="a")])
    assert [(instance.name, instance.state) for instance in found] == [("a", "running"), ("b", "created")]


def test_an_evicted_pod_must_be_exited_though_it_has_no_container():
    assert only(deployment(), pod("evicted", status={"phase": "Failed", "reason": "Evicted"})).state == "exited"


def test_a_pod_that_no_node_can_take_must_be_created():
    assert only(deployment(), pod("waiting", status={"phase": "Pending"})).state == "created"


def test_a_container_that_ended_and_waits_must_be_restarting():
    waits = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 1}
    assert (
        only(deployment(), pod("loop", status={"phase": "Running", "containerStatuses": [waits]})).state == "restarting"
    )


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("error: no such thing\n", "no such thing"),
        ('Error from server (Forbidden): pods "x" is forbidden\n', '(Forbidden): pods "x" is forbidden'),
        ("Warning: old API\nerror: first\nerror: second\n", "first"),
        ('E1123 13:00:00.1 1 memcache.go:265] "Unhandled"\nThe connection was refused\n', "The connection was refused"),
        ("Error in configuration: context was not found\n", "Error in configuration: context was not found"),
        ("", "it gave no reason"),
    ],
)
def test_the_reason_must_be_kubectls_own_line(stderr, reason):
    assert _reason(stderr) == reason


@pytest.mark.parametrize("act", ["restart", "recreate", "stop", "ask"])
def test_healing_must_be_left_to_the_cluster_with_the_command_for_it(act: str) -> None:
    runtime = KubernetesRuntime(Spec(runtime="kubernetes"))
    call = getattr(runtime, act)
    with pytest.raises(UsageError) as raised:
        call("demo", "GET", "/livez", timeout_s=1) if act == "ask" else call("demo", silent)
    assert raised.value.code == "cluster-heals"
    assert "kubectl -n zops" in raised.value.hint
    assert "demo" in raised.value.hint

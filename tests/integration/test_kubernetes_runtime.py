"""The Kubernetes runtime: the real kubectl against an API server in miniature on loopback."""

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.deployments import kubernetes_deployment
from tests.support.kubernetes_api import KubernetesApi, find_kubectl
from zops.errors import NotReady, RuntimeUnreachable, ZopsError
from zops.events import Finished, Warned, silent
from zops.health import waiting
from zops.health.waiting import wait_instance
from zops.runtime import kubernetes
from zops.runtime.base import drift
from zops.runtime.kubernetes import KubernetesRuntime
from zops.runtime.kubernetes_render import render
from zops.spec.keys import add_key

KEPT = {
    ("namespaces", "", "zops"),
    ("storageclasses", "", "zops-cache"),
    ("persistentvolumes", "", "zops-cache"),
    ("persistentvolumeclaims", "zops", "zops-cache"),
    ("networkpolicies", "zops", "default-deny"),
}


@pytest.fixture
def api(tmp_path, monkeypatch):
    server = KubernetesApi()
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "kubectl").symlink_to(find_kubectl())
    monkeypatch.setenv("PATH", str(bin_dir))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    (tmp_path / "kubeconfig").write_text(json.dumps(server.kubeconfig()), encoding="utf-8")
    yield server
    server.close()


@pytest.fixture
def deployment():
    return kubernetes_deployment()


@pytest.fixture
def runtime(deployment, api):
    return KubernetesRuntime(deployment.spec)


def set_status(api, **container):
    """Let the kubelet say how the only container of the only pod is."""
    (pod,) = (item for (resource, _, _), item in api.objects.items() if resource == "pods")
    phase = container.pop("phase", "Running")
    pod["status"] = {"phase": phase, "containerStatuses": [{"name": "serve", "restartCount": 0} | container]}


def test_check_must_name_the_version_and_the_context(runtime):
    assert runtime.check() == "Kubernetes v1.37.0 (context loopback)"


def test_an_empty_cluster_must_have_no_instances(runtime):
    assert runtime.instances() == []
    assert runtime.find("zops") is None


def test_up_must_create_everything_the_namespace_first(api, runtime, deployment):
    events = []
    instance = runtime.up(deployment, events.append)
    assert api.objects.keys() >= KEPT | {
        ("deployments", "zops", "zops"),
        ("services", "zops", "zops"),
        ("poddisruptionbudgets", "zops", "zops"),
        ("networkpolicies", "zops", "zops"),
    }
    assert api.writes()[0] == ("PATCH", "/api/v1/namespaces/zops")
    assert (instance.name, instance.state, instance.runtime) == ("zops", "created", "kubernetes")
    assert (instance.model, instance.manifest_digest) == (deployment.spec.model, deployment.manifest_digest)
    assert drift(deployment, instance) == []
    assert isinstance(events[-1], Finished)
    assert events[-1].changed


def test_up_again_must_change_nothing_and_say_so(api, runtime, deployment):
    first = runtime.up(deployment, lambda _: None)
    events = []
    assert runtime.up(deployment, events.append).id == first.id
    assert not events[-1].changed


def test_a_drifted_deployment_must_get_a_new_pod(api, runtime, deployment):
    first = runtime.up(deployment, lambda _: None)
    wanted = kubernetes_deployment(serve={"max_queue": 3})
    assert drift(wanted, runtime.find("zops")) == ["serve.max_queue: 16 -> 3"]
    events = []
    second = runtime.up(wanted, events.append)
    assert second.id != first.id
    assert events[-1].changed
    assert drift(wanted, second) == []


def test_two_deployments_must_be_told_apart(api, runtime, deployment):
    other = kubernetes_deployment(name="studio")
    runtime.up(deployment, lambda _: None)
    runtime.up(other, lambda _: None)
    assert [instance.name for instance in runtime.instances()] == ["studio", "zops"]
    assert runtime.down("studio", lambda _: None)
    assert [instance.name for instance in runtime.instances()] == ["zops"]
    assert ("services", "zops", "zops") in api.objects


def test_down_must_leave_the_cache_and_the_namespace(api, runtime, deployment):
    runtime.up(deployment, lambda _: None)
    assert runtime.down("zops", lambda _: None) is True
    assert api.objects.keys() == KEPT
    assert api.deletions["deployments"]["propagationPolicy"] == "Foreground"
    assert runtime.down("zops", lambda _: None) is False


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(
            {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "started": False, "ready": False},
            {"state": "running", "health": "starting", "started_at": "2026-01-01T00:00:00Z", "exit_code": None},
            id="starting",
        ),
        pytest.param(
            {"state": {"running": {}}, "started": True, "ready": True},
            {"state": "running", "health": "healthy"},
            id="healthy",
        ),
        pytest.param(
            {"state": {"running": {}}, "started": True, "ready": False},
            {"state": "running", "health": "unhealthy"},
            id="unhealthy",
        ),
        pytest.param(
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                "restartCount": 4,
            },
            {"state": "restarting", "health": "", "exit_code": 137, "oom_killed": True, "restarts": 4},
            id="out-of-memory",
        ),
        pytest.param(
            {
                "state": {"running": {}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                "restartCount": 1,
                "started": True,
                "ready": True,
            },
            {"state": "running", "health": "healthy", "exit_code": None, "oom_killed": True, "restarts": 1},
            id="restarted",
        ),
        pytest.param(
            {"state": {"waiting": {"reason": "ErrImagePull"}}, "phase": "Pending"},
            {"state": "created", "exit_code": None, "oom_killed": False},
            id="no-image",
        ),
        pytest.param(
            {"state": {"terminated": {"exitCode": 3, "reason": "Error"}}, "phase": "Failed"},
            {"state": "exited", "exit_code": 3, "oom_killed": False},
            id="ended",
        ),
    ],
)
def test_the_state_of_the_pod_must_be_the_state_of_the_instance(api, runtime, deployment, status, expected):
    runtime.up(deployment, lambda _: None)
    set_status(api, **status)
    instance = runtime.find("zops")
    assert {name: getattr(instance, name) for name in expected} == expected


def test_a_deployment_scaled_to_nothing_must_be_exited(api, runtime, deployment):
    runtime.up(deployment, lambda _: None)
    api.get("deployments", "zops")["spec"]["replicas"] = 0
    del api.objects[next(key for key in api.objects if key[0] == "pods")]
    assert runtime.find("zops").state == "exited"


@pytest.mark.parametrize("traits", ["{not json", '["a list"]', None])
def test_a_deployment_that_was_applied_by_hand_must_be_listed_and_be_all_drift(api, runtime, deployment, traits):
    runtime.up(deployment, lambda _: None)
    notes = api.get("deployments", "zops")["metadata"]["annotations"]
    notes.pop("io.zops.traits")
    notes |= {} if traits is None else {"io.zops.traits": traits}
    assert "name: None -> zops" in drift(deployment, runtime.find("zops"))


def test_logs_must_be_the_pods_lines(api, runtime, deployment):
    runtime.up(deployment, lambda _: None)
    api.log_text = "loading\nready é\n"
    assert list(runtime.logs("zops")) == ["loading", "ready é"]
    assert list(runtime.logs("zops", tail=1)) == ["ready é"]
    assert list(runtime.logs("zops", follow=True)) == ["loading", "ready é"]


def test_logs_that_nobody_reads_to_the_end_must_leave_no_kubectl(api, runtime, deployment, tmp_path):
    runtime.up(deployment, lambda _: None)
    api.log_text = "first\n"
    api.hold_logs = threading.Event()
    kubectl = tmp_path / "bin" / "kubectl"
    real, pid_file = kubectl.readlink(), tmp_path / "pid"
    kubectl.unlink()
    kubectl.write_text(f'#!/bin/sh\necho $$ > {pid_file}\nexec {real} "$@"\n', encoding="utf-8")
    kubectl.chmod(0o755)
    lines = runtime.logs("zops", follow=True)
    assert next(lines) == "first"
    pid = int(pid_file.read_text(encoding="utf-8"))
    os.kill(pid, 0)
    began = time.monotonic()
    lines.close()
    # The server goes on for 30 seconds: who only waits for kubectl waits as long.
    assert time.monotonic() - began < 10
    api.hold_logs.set()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_logs_of_nothing_must_be_one_clear_line(runtime):
    with pytest.raises(ZopsError, match="no pod of zops") as caught:
        list(runtime.logs("zops"))
    assert caught.value.code == "instance-missing"


def test_a_container_that_has_not_started_must_be_one_clear_line(api, runtime, deployment):
    runtime.up(deployment, lambda _: None)
    api.log_failure = (400, "BadRequest", 'container "serve" in pod "zops-5" is waiting to start: ErrImagePull')
    with pytest.raises(ZopsError, match="waiting to start: ErrImagePull"):
        list(runtime.logs("zops"))


def test_warnings_of_the_api_server_must_reach_the_operator(api, runtime, deployment):
    api.warning = "would violate PodSecurity restricted:latest"
    events = []
    runtime.up(deployment, events.append)
    assert Warned("would violate PodSecurity restricted:latest") in events


def test_a_refusal_must_be_told_in_the_servers_words(api, runtime, deployment):
    api.refuse = (403, "Forbidden", "exceeded quota: gpus")
    with pytest.raises(ZopsError, match="exceeded quota: gpus") as caught:
        runtime.up(deployment, lambda _: None)
    assert caught.value.code == "kubernetes-refused"
    assert caught.value.exit_status == 1


def test_fields_that_the_server_does_not_know_must_be_refused(api, runtime, deployment):
    namespace, *_ = render(deployment)
    namespace["metadata"]["lables"] = {}
    with pytest.raises(ZopsError, match="lables"):
        runtime._apply([namespace], lambda _: None)
    assert not api.objects


def test_a_dead_server_must_be_unreachable_for_everything_at_once(api, runtime, deployment):
    api.close()
    calls = [
        runtime.check,
        runtime.instances,
        lambda: runtime.find("zops"),
        lambda: runtime.up(deployment, lambda _: None),
        lambda: runtime.down("zops", lambda _: None),
        lambda: list(runtime.logs("zops")),
    ]
    for call in calls:
        with pytest.raises(RuntimeUnreachable, match="was refused"):
            call()


def test_a_silent_server_must_be_unreachable_within_the_limit(api, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes, "READ_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        config = api.kubeconfig()
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        (tmp_path / "kubeconfig").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(RuntimeUnreachable, match="did not end within 1 s"):
            runtime.instances()


def test_a_missing_kubectl_must_be_one_clear_line(runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnreachable, match="needs kubectl") as caught:
        runtime.check()
    assert caught.value.code == "kubectl-missing"


def test_no_write_must_be_reached_by_reading(api, runtime, deployment):
    runtime.up(deployment, lambda _: None)
    before = len(api.writes())
    assert runtime.check()
    assert runtime.instances() == [runtime.find("zops")]
    assert runtime.has_image(deployment.spec)
    list(runtime.logs("zops"))
    assert len(api.writes()) == before


def test_kubectl_alone_must_get_the_base_onto_the_server_as_documented(api, runtime):
    base = Path(__file__).parents[2] / "k8s" / "base"
    apply = [find_kubectl(), "apply", "--server-side", "--field-manager=zops"]
    for arguments in (["-f", base / "namespace.yaml"], ["-k", base]):
        subprocess.run([*apply, *arguments], check=True, capture_output=True, timeout=60)
    assert runtime.find("zops").model == "Tongyi-MAI/Z-Image-Turbo"


def test_waiting_must_believe_the_clusters_own_probe(api, runtime, deployment, monkeypatch):
    monkeypatch.setattr(waiting, "LONGEST_PAUSE_S", 0.01)
    runtime.up(deployment, silent)
    set_status(api, state={"running": {"startedAt": "2026-11-23T12:00:00Z"}}, started=False, ready=False)
    seen = []

    def answer(name):
        """Be ready from the third look on."""
        seen.append(KubernetesRuntime(deployment.spec).find(name))
        if len(seen) == 3:
            set_status(api, state={"running": {"startedAt": "2026-11-23T12:00:00Z"}}, started=True, ready=True)
        return seen[-1]

    monkeypatch.setattr(runtime, "find", answer)
    assert wait_instance(runtime, deployment, silent) >= 0
    assert seen[0].health == "starting"
    assert seen[-1].health == "healthy"


def test_waiting_for_an_instance_that_ended_must_say_so_at_once(api, runtime, deployment):
    runtime.up(deployment, silent)
    set_status(api, phase="Failed", state={"terminated": {"exitCode": 4}}, started=False, ready=False)
    with pytest.raises(NotReady, match="exited with status 4"):
        wait_instance(runtime, deployment, silent)


def test_keys_must_come_and_go_with_the_deployment_and_change_without_a_new_pod(api, runtime, tmp_path):
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "keys.yaml"
    add_key(file, "web")
    wanted = kubernetes_deployment(serve={"api_keys": str(file)})
    runtime.up(wanted, lambda _: None)
    secret, place = ("secrets", "zops", "zops-keys"), ("deployments", "zops", "zops")
    before, generation = api.objects[secret]["data"], api.objects[place]["metadata"]["generation"]
    add_key(file, "shop")
    runtime.up(wanted, lambda _: None)
    assert api.objects[secret]["data"] != before
    assert api.objects[place]["metadata"]["generation"] == generation
    runtime.down("zops", lambda _: None)
    assert secret not in api.objects

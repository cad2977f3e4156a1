"""Rules that schemas do not hold, each learnt from a real API server, over the objects that `zops up` applies.

Each rule is a function that tells whether the objects keep it; each is broken once below, and must then be the one that
reports. k8s/base and the overlay are held to the same objects in tests/integration/test_k8s_render.py.
"""

import re
from pathlib import Path

import pytest

from tests.support.deployments import cpu_deployment, kubernetes_deployment
from zops.errors import SpecError
from zops.runtime.base import CACHE_MOUNT, COMPILE_MOUNT, SERVE_PORT, Deployment, labels
from zops.runtime.container import GROUP_ID, USER_ID
from zops.runtime.kubernetes_render import GPU_RESOURCE, NODE_LABEL, caveats, find_kind, quantity, render

ROOT = Path(__file__).parents[2]
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim",
                      "projected", "secret"}  # fmt: skip
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "": 1}


def size_of(text):
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|)", text).groups()
    return int(number) * UNITS[unit]


def workload(objects):
    return find_kind(objects, "Deployment")


def pod(objects):
    return workload(objects)["spec"]["template"]["spec"]


def container(objects):
    return pod(objects)["containers"][0]


def volume(objects, name):
    return next(v for v in pod(objects)["volumes"] if v["name"] == name)


def mount(objects, name):
    return next(m for m in container(objects)["volumeMounts"] if m["name"] == name)


def policy(objects, name):
    return next(m for m in objects if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == name)


def environment(objects):
    return {entry["name"]: entry["value"] for entry in container(objects)["env"]}


# --- the rules: each is true when it is kept


def namespace_enforces_restricted(objects):
    found = find_kind(objects, "Namespace")["metadata"]["labels"]
    return all(found.get(f"pod-security.kubernetes.io/{mode}") == "restricted" for mode in ("enforce", "audit", "warn"))


def namespace_comes_first(objects):
    return objects[0]["kind"] == "Namespace"


def every_object_is_ours(objects):
    return all(m["metadata"]["labels"].get("app.kubernetes.io/managed-by") == "zops" for m in objects)


def pod_runs_as_the_images_user(objects):
    context = pod(objects)["securityContext"]
    wanted = {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": GROUP_ID}
    return wanted.items() <= context.items() and context["seccompProfile"] == {"type": "RuntimeDefault"}


def container_has_no_privileges(objects):
    return container(objects)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_shares_nothing_with_its_node(objects):
    return not pod(objects).keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}


def volumes_are_allowed_by_restricted(objects):
    return all(v.keys() - {"name"} <= RESTRICTED_VOLUMES for v in pod(objects)["volumes"])


def pod_has_no_token(objects):
    return pod(objects).get("automountServiceAccountToken") is False


def pod_has_no_service_variables(objects):
    return pod(objects).get("enableServiceLinks") is False


def gpu_holder_is_recreated(objects):
    return workload(objects)["spec"]["strategy"] == {"type": "Recreate"}


def requests_equal_limits(objects):
    resources = container(objects)["resources"]
    return resources["requests"] == resources["limits"] and "memory" in resources["limits"]


def cpu_is_not_limited(objects):
    return "cpu" not in container(objects)["resources"]["limits"]


def shm_fits_into_memory(objects):
    shm = volume(objects, "shm")["emptyDir"]
    limit = container(objects)["resources"]["limits"]["memory"]
    return shm["medium"] == "Memory" and size_of(shm["sizeLimit"]) < size_of(limit)


def scratch_space_is_bounded(objects):
    return all("sizeLimit" in v["emptyDir"] for v in pod(objects)["volumes"] if "emptyDir" in v)


def probes_ask_the_right_questions(objects):
    asked = {key: container(objects)[key]["httpGet"]["path"] for key in container(objects) if key.endswith("Probe")}
    return asked == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}


def startup_probe_waits_as_long_as_asked(objects):
    probe = container(objects)["startupProbe"]
    waits_s = probe["periodSeconds"] * probe["failureThreshold"]
    return waits_s >= 900 and workload(objects)["spec"]["progressDeadlineSeconds"] > waits_s


def requests_may_end_before_the_kill(objects):
    sleep_s = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    request_s = float(environment(objects)["ZOPS_SERVE_REQUEST_TIMEOUT_S"])
    return pod(objects)["terminationGracePeriodSeconds"] > request_s + sleep_s > request_s


def image_is_a_fixed_version(objects):
    name = container(objects)["image"].rpartition("/")[2]
    return "@sha256:" in name or (":" in name and not name.endswith(":latest"))


def drain_is_never_blocked(objects):
    spec = find_kind(objects, "PodDisruptionBudget")["spec"]
    return (
        spec.get("maxUnavailable") == 1
        and "minAvailable" not in spec
        and spec.get("unhealthyPodEvictionPolicy") == "AlwaysAllow"
    )


def selectors_find_the_pod(objects):
    found = workload(objects)["spec"]["template"]["metadata"]["labels"].items()
    name = workload(objects)["metadata"]["name"]
    selectors = [
        workload(objects)["spec"]["selector"]["matchLabels"],
        find_kind(objects, "Service")["spec"]["selector"],
        find_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        policy(objects, name)["spec"]["podSelector"]["matchLabels"],
    ]
    return all(selector and selector.items() <= found for selector in selectors)


def ports_are_named_alike(objects):
    (port,) = container(objects)["ports"]
    used = {find_kind(objects, "Service")["spec"]["ports"][0]["targetPort"]}
    used |= {container(objects)[probe]["httpGet"]["port"] for probe in container(objects) if probe.endswith("Probe")}
    allowed = policy(objects, workload(objects)["metadata"]["name"])["spec"]["ingress"][0]["ports"]
    return used | {entry["port"] for entry in allowed} == {port["name"]}


def port_is_the_servers(objects):
    (port,) = container(objects)["ports"]
    return port["containerPort"] == SERVE_PORT == int(environment(objects)["ZOPS_SERVE_PORT"])


def network_is_closed_by_default(objects):
    spec = policy(objects, "default-deny")["spec"]
    return spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def only_labelled_clients_come_in(objects):
    spec = policy(objects, workload(objects)["metadata"]["name"])["spec"]
    (rule,) = spec["ingress"]
    peers = rule.get("from", [])
    return (
        bool(peers) and all(peer.get("podSelector", {}).get("matchLabels") for peer in peers) and "egress" not in spec
    )


def cache_is_mounted_read_only(objects):
    return (
        volume(objects, "cache")["persistentVolumeClaim"].get("readOnly") is True
        and mount(objects, "cache").get("readOnly") is True
        and find_kind(objects, "PersistentVolume")["spec"]["accessModes"] == ["ReadOnlyMany"]
        and find_kind(objects, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadOnlyMany"]
    )


def cache_survives_its_claim(objects):
    kept = find_kind(objects, "PersistentVolume")["spec"]["persistentVolumeReclaimPolicy"]
    return kept == find_kind(objects, "StorageClass")["reclaimPolicy"] == "Retain"


def cache_waits_for_a_labelled_node(objects):
    storage = find_kind(objects, "StorageClass")
    terms = find_kind(objects, "PersistentVolume")["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    wanted = {"key": NODE_LABEL, "operator": "In", "values": [workload(objects)["metadata"]["name"]]}
    return (
        storage["volumeBindingMode"] == "WaitForFirstConsumer"
        and storage["provisioner"] == "kubernetes.io/no-provisioner"
        and terms == [{"matchExpressions": [wanted]}]
    )


def claim_and_volume_name_each_other(objects):
    kept, claim = find_kind(objects, "PersistentVolume"), find_kind(objects, "PersistentVolumeClaim")
    storage = find_kind(objects, "StorageClass")["metadata"]["name"]
    return (
        claim["spec"]["volumeName"] == kept["metadata"]["name"]
        and volume(objects, "cache")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        and claim["spec"]["storageClassName"] == kept["spec"]["storageClassName"] == storage
        and size_of(claim["spec"]["resources"]["requests"]["storage"]) <= size_of(kept["spec"]["capacity"]["storage"])
    )


def mounts_are_where_the_server_looks(objects):
    seen = environment(objects)
    inside = {seen["ZOPS_CACHE_DIR"], seen["MODELSCOPE_CACHE"], seen["HF_HOME"], mount(objects, "cache")["mountPath"]}
    compiled = mount(objects, "compile-cache")["mountPath"]
    return inside == {CACHE_MOUNT} and compiled == COMPILE_MOUNT and seen["ZOPS_SNAPSHOT"].startswith(f"{CACHE_MOUNT}/")


def mounts_and_volumes_match(objects):
    return {m["name"] for m in container(objects)["volumeMounts"]} == {v["name"] for v in pod(objects)["volumes"]}


def hubs_are_switched_off(objects):
    return environment(objects)["HF_HUB_OFFLINE"] == "1"


def label_values_are_valid(objects):
    values = [value for m in objects for value in m["metadata"]["labels"].values()]
    values += workload(objects)["spec"]["template"]["metadata"]["labels"].values()
    return all(len(value) <= 63 and re.fullmatch(r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?", value) for value in values)


# --- how each is broken


def extend(mapping, **more):
    mapping.update(more)


BREAKS = {
    namespace_enforces_restricted: lambda o: find_kind(o, "Namespace")["metadata"]["labels"].pop(
        "pod-security.kubernetes.io/enforce"
    ),
    namespace_comes_first: lambda o: o.append(o.pop(0)),
    every_object_is_ours: lambda o: find_kind(o, "StorageClass")["metadata"]["labels"].pop(
        "app.kubernetes.io/managed-by"
    ),
    pod_runs_as_the_images_user: lambda o: extend(pod(o)["securityContext"], runAsUser=1000),
    container_has_no_privileges: lambda o: extend(container(o)["securityContext"], readOnlyRootFilesystem=False),
    pod_shares_nothing_with_its_node: lambda o: extend(pod(o), hostIPC=True),
    volumes_are_allowed_by_restricted: lambda o: (
        volume(o, "tmp").pop("emptyDir"),
        extend(volume(o, "tmp"), hostPath={"path": "/tmp"}),
    ),
    pod_has_no_token: lambda o: pod(o).pop("automountServiceAccountToken"),
    pod_has_no_service_variables: lambda o: pod(o).pop("enableServiceLinks"),
    gpu_holder_is_recreated: lambda o: extend(workload(o)["spec"], strategy={"type": "RollingUpdate"}),
    requests_equal_limits: lambda o: container(o)["resources"]["requests"].pop("memory"),
    cpu_is_not_limited: lambda o: [extend(part, cpu="1") for part in container(o)["resources"].values()],
    shm_fits_into_memory: lambda o: extend(volume(o, "shm")["emptyDir"], sizeLimit="64Gi"),
    scratch_space_is_bounded: lambda o: volume(o, "tmp")["emptyDir"].pop("sizeLimit"),
    probes_ask_the_right_questions: lambda o: extend(container(o)["livenessProbe"]["httpGet"], path="/readyz"),
    startup_probe_waits_as_long_as_asked: lambda o: extend(container(o)["startupProbe"], failureThreshold=30),
    requests_may_end_before_the_kill: lambda o: extend(pod(o), terminationGracePeriodSeconds=30),
    image_is_a_fixed_version: lambda o: extend(container(o), image="registry:5000/zops-inference"),
    drain_is_never_blocked: lambda o: extend(find_kind(o, "PodDisruptionBudget")["spec"], minAvailable=1),
    selectors_find_the_pod: lambda o: extend(find_kind(o, "Service")["spec"]["selector"], app="other"),
    ports_are_named_alike: lambda o: extend(find_kind(o, "Service")["spec"]["ports"][0], targetPort="web"),
    port_is_the_servers: lambda o: extend(container(o)["ports"][0], containerPort=8080),
    network_is_closed_by_default: lambda o: policy(o, "default-deny")["spec"]["policyTypes"].remove("Egress"),
    only_labelled_clients_come_in: lambda o: policy(o, "zops")["spec"]["ingress"][0].pop("from"),
    cache_is_mounted_read_only: lambda o: mount(o, "cache").pop("readOnly"),
    cache_survives_its_claim: lambda o: extend(
        find_kind(o, "PersistentVolume")["spec"], persistentVolumeReclaimPolicy="Delete"
    ),
    cache_waits_for_a_labelled_node: lambda o: extend(find_kind(o, "StorageClass"), volumeBindingMode="Immediate"),
    claim_and_volume_name_each_other: lambda o: extend(find_kind(o, "PersistentVolumeClaim")["spec"], volumeName="x"),
    mounts_are_where_the_server_looks: lambda o: extend(mount(o, "compile-cache"), mountPath="/compiled"),
    mounts_and_volumes_match: lambda o: container(o)["volumeMounts"].pop(),
    hubs_are_switched_off: lambda o: next(e for e in container(o)["env"] if e["name"] == "HF_HUB_OFFLINE").update(
        value="0"
    ),
    label_values_are_valid: lambda o: extend(
        find_kind(o, "Service")["metadata"]["labels"], model="Tongyi-MAI/Z-Image-Turbo"
    ),
}
DEPLOYMENTS = [
    pytest.param(kubernetes_deployment(), id="default"),
    pytest.param(cpu_deployment(), id="cpu"),
    pytest.param(
        kubernetes_deployment(name="studio", gpus=[0, 1], image={"name": "registry:5000/zops@sha256:" + "0" * 64}),
        id="studio",
    ),
]


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_what_is_applied_must_keep_the_rule(deployment, rule):
    assert rule(render(deployment))


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_a_broken_rule_must_be_the_one_that_is_reported(rule):
    objects = render(kubernetes_deployment())
    BREAKS[rule](objects)
    assert [broken.__name__ for broken in BREAKS if not broken(objects)] == [rule.__name__]


# --- values of the specification


def test_the_names_of_two_deployments_must_only_meet_in_what_they_share():
    first, second = (
        {(m["kind"], m["metadata"]["name"]) for m in render(kubernetes_deployment(name=name))} for name in ("a", "b")
    )
    assert first & second == {("Namespace", "zops"), ("StorageClass", "zops-cache"), ("NetworkPolicy", "default-deny")}


def test_the_base_must_not_shine_through_another_name():
    objects = render(kubernetes_deployment(name="studio"))
    shared = [m for m in objects if "io.zops.deployment" not in m["metadata"]["labels"]]
    own = [m for m in objects if m not in shared]
    assert len(own) == 6
    for manifest in own:
        assert manifest["metadata"]["name"].startswith("studio")
        assert manifest["metadata"]["labels"]["io.zops.deployment"] == "studio"
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "studio"
        assert manifest["metadata"].get("namespace", "zops") == "zops"


def test_the_values_of_the_specification_must_arrive():
    changes = {
        "gpus": [0, "GPU-8f6e"],
        "serve": {"port": 9000, "startup_timeout_s": 601, "request_timeout_s": 300},
        "resources": {"memory": "64GiB", "shm": "1536MiB"},
        "image": {"name": "registry:5000/zops:2"},
    }
    objects = render(kubernetes_deployment(**changes))
    assert find_kind(objects, "Service")["spec"]["ports"][0]["port"] == 9000
    assert container(objects)["startupProbe"]["failureThreshold"] == 121
    assert pod(objects)["terminationGracePeriodSeconds"] == 300 + 15 + 5
    assert container(objects)["resources"]["limits"] == {"memory": "64Gi", GPU_RESOURCE: "2"}
    assert volume(objects, "shm")["emptyDir"]["sizeLimit"] == "1536Mi"
    assert container(objects)["image"] == "registry:5000/zops:2"


def test_the_cache_of_the_specification_must_be_what_is_mounted():
    wanted = kubernetes_deployment(cache={"dir": "/nvme/zops"})
    deployment = Deployment(wanted.spec, Path("/nvme/zops/models/a/snapshots/b"), "b", "0" * 64)
    objects = render(deployment)
    assert find_kind(objects, "PersistentVolume")["spec"]["local"]["path"] == "/nvme/zops"
    assert environment(objects)["ZOPS_SNAPSHOT"] == f"{CACHE_MOUNT}/models/a/snapshots/b"


def test_an_instance_must_carry_what_drift_is_told_by():
    deployment = kubernetes_deployment()
    metadata = workload(render(deployment))["metadata"]
    assert metadata["labels"]["io.zops.deployment"] == deployment.name
    assert metadata["annotations"] | {"io.zops.deployment": deployment.name} == labels(deployment)


def test_without_gpus_none_must_be_asked_for_or_slip_in():
    objects = render(kubernetes_deployment(gpus="none"))
    assert GPU_RESOURCE not in container(objects)["resources"]["limits"]
    assert environment(objects)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(render(kubernetes_deployment()))


def test_other_weights_under_the_same_path_must_give_a_new_pod():
    deployment = kubernetes_deployment()
    other = Deployment(deployment.spec, deployment.snapshot, deployment.revision, "f" * 64)
    template, others = (workload(render(d))["spec"]["template"] for d in (deployment, other))
    assert template != others
    assert template["spec"] == others["spec"]


@pytest.mark.parametrize("memory", ["1GiB", "512MiB"])
def test_shared_memory_that_fills_all_memory_must_be_refused(memory):
    with pytest.raises(SpecError, match=r"resources\.shm"):
        render(kubernetes_deployment(resources={"memory": memory}))


def test_a_snapshot_outside_the_cache_must_be_refused():
    inside = kubernetes_deployment()
    with pytest.raises(SpecError, match=r"outside cache\.dir"):
        render(Deployment(inside.spec, Path("/elsewhere/model"), inside.revision, inside.manifest_digest))


def test_an_operator_must_be_told_how_to_reach_the_service():
    (reach,) = caveats(kubernetes_deployment(name="studio", serve={"port": 9000}, gpus="none"))
    assert "kubectl -n zops port-forward service/studio 9000:9000" in reach


@pytest.mark.parametrize(("gpus", "told"), [("all", True), ([0, 3], True), (["GPU-8f6e"], True), ([0, 1], False)])
def test_gpus_that_kubernetes_cannot_pick_must_be_told(gpus, told):
    assert any("gpus:" in caveat for caveat in caveats(kubernetes_deployment(gpus=gpus))) is told


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(48 << 30, "48Gi"), (1536 << 20, "1536Mi"), (1000, "1000"), (0, "0"), (1 << 20, "1Mi")]
)
def test_a_quantity_must_be_exact_and_as_short_as_it_can(size_bytes, text):
    assert quantity(size_bytes) == text
    assert size_of(text) == size_bytes


def test_the_user_must_be_the_images_own():
    assert f"USER {USER_ID}:{GROUP_ID}" in (ROOT / "images" / "inference" / "Dockerfile").read_text(encoding="utf-8")


def test_pods_and_containers_must_get_the_same_environment():
    from zops.host.engine import EngineFacts
    from zops.runtime.container import container_options

    deployment = kubernetes_deployment(gpus="none")
    options = container_options(deployment, EngineFacts.from_info({}))
    inside = dict(entry.split("=", 1) for entry in options["Env"])
    # An engine publishes at an address of the host; a pod has its own, where the Service finds it.
    assert inside.pop("ZOPS_PUBLISHED") == "127.0.0.1"
    assert inside == environment(render(deployment))

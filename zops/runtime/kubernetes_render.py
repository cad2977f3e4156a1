"""A deployment as Kubernetes objects: the files of k8s/base with the deployment's own values in them.

The files are read as plain dictionaries and stay that: typed models drop what they do not know, a misspelt key
included. Whatever a value here replaces, k8s/base holds for the default specification, so that both can be compared.
"""

import base64
import math
from pathlib import Path
from typing import Any

import yaml

import zops
from zops.errors import SpecError
from zops.runtime.base import CACHE_MOUNT, KEYS_MOUNT, LABEL, Deployment, container_environment, labels
from zops.spec.keys import read_keys

NAMESPACE = "zops"
NODE_LABEL = "zops.io/model-cache"
"""A node carries it, with the deployment's name as value, while the deployment's cache on it is complete."""
GPU_RESOURCE = "nvidia.com/gpu"
# Scheduling and pulling an image of several GB come before the startup probe begins to count.
SCHEDULING_S = 300
MIB = 1 << 20
# What a pod gets when resources.memory is empty: a pod without a limit could take the node down. The model is 33 GB on
# disk and passes through page cache and staging buffers on its way to the GPU.
DEFAULT_MEMORY = 48 << 30

Manifest = dict[str, Any]


def render(deployment: Deployment) -> list[Manifest]:
    """Return the objects that make up the deployment, in the order in which they can be created.

    Pure but for reading k8s/base and the file of API keys. Objects without an `io.zops.deployment` label (Namespace,
    StorageClass, the network's default) are shared by all deployments.

    Raises:
        SpecError: when Kubernetes could not do what is asked: /dev/shm as large as all memory, a snapshot outside the
            cache, a broken file of API keys.
    """
    objects = read_base()
    for manifest in objects:
        if f"{LABEL}.deployment" in manifest["metadata"]["labels"]:
            _name(manifest, deployment.name)
    volume = find_kind(objects, "PersistentVolume")["spec"]
    volume["local"]["path"] = str(deployment.spec.cache.dir)
    find_kind(objects, "Service")["spec"]["ports"][0]["port"] = deployment.spec.serve.port
    workload = find_kind(objects, "Deployment")
    _set_workload(workload, deployment)
    if deployment.spec.serve.api_keys is not None:
        objects.insert(objects.index(workload), _add_keys(workload, deployment.name, deployment.spec.serve.api_keys))
    return objects


def read_base() -> list[Manifest]:
    """Return the objects of k8s/base, in the order of its kustomization."""
    directory = _base_directory()
    resources = _read(directory / "kustomization.yaml")[0]["resources"]
    return [manifest for name in resources for manifest in _read(directory / name)]


def find_kind(objects: list[Manifest], kind: str) -> Manifest:
    """Return the only object of a kind."""
    (found,) = (manifest for manifest in objects if manifest["kind"] == kind)
    return found


def caveats(deployment: Deployment) -> list[str]:
    """Return, in sentences, what of the specification means something else on Kubernetes than on one host."""
    name, port, gpus = deployment.name, deployment.spec.serve.port, deployment.spec.gpus
    reach = f"kubectl -n {NAMESPACE} port-forward service/{name} {port}:{port}"
    found = [f"{name} answers inside the cluster only; from here, keep this running: {reach}"]
    if gpus == "all":
        found.append("gpus: all is one GPU on Kubernetes; for more, write a list as long as their number")
    elif isinstance(gpus, tuple) and gpus != tuple(range(len(gpus))):
        found.append(f"gpus: {list(gpus)} is a number of {len(gpus)} on Kubernetes; the device plugin picks which")
    return found


def _base_directory() -> Path:
    """Return where the files are: in an installed wheel, or in a checkout."""
    package = Path(zops.__file__).parent
    packaged = package / "_assets" / "k8s" / "base"
    return packaged if packaged.is_dir() else package.parent / "k8s" / "base"


def _read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _name(manifest: Manifest, name: str) -> None:
    """Give an object and whatever it points to the deployment's name instead of the base's `zops`."""
    manifest["metadata"]["name"] = manifest["metadata"]["name"].replace("zops", name, 1)
    _relabel(manifest, name)
    spec = manifest["spec"]
    if manifest["kind"] == "PersistentVolume":
        (term,) = spec["nodeAffinity"]["required"]["nodeSelectorTerms"]
        term["matchExpressions"][0]["values"] = [name]
    elif manifest["kind"] == "PersistentVolumeClaim":
        spec["volumeName"] = f"{name}-cache"
    elif manifest["kind"] == "Deployment":
        _named(spec["template"]["spec"]["volumes"], "cache")["persistentVolumeClaim"]["claimName"] = f"{name}-cache"


def _relabel(tree: object, name: str) -> None:
    """Set the labels that tell deployments apart, in metadata, templates and selectors alike."""
    if isinstance(tree, dict):
        for key in tree.keys() & {f"{LABEL}.deployment", "app.kubernetes.io/instance"}:
            tree[key] = name
        for value in tree.values():
            _relabel(value, name)
    elif isinstance(tree, list):
        for value in tree:
            _relabel(value, name)


def _set_workload(manifest: Manifest, deployment: Deployment) -> None:
    serve = deployment.spec.serve
    template = manifest["spec"]["template"]
    pod = template["spec"]
    container = pod["containers"][0]

    # Values such as a path or a model's name are no valid label values, so all but the name are annotations.
    annotations = labels(deployment)
    del annotations[f"{LABEL}.deployment"]
    manifest["metadata"]["annotations"] = annotations
    manifest["metadata"]["labels"]["app.kubernetes.io/version"] = zops.__version__
    template["metadata"]["annotations"][f"{LABEL}.manifest"] = deployment.manifest_digest

    container["image"] = deployment.spec.image.name
    container["env"] = [{"name": key, "value": value} for key, value in _environment(deployment).items()]
    probe = container["startupProbe"]
    probe["failureThreshold"] = math.ceil(serve.startup_timeout_s / probe["periodSeconds"])
    manifest["spec"]["progressDeadlineSeconds"] = math.ceil(serve.startup_timeout_s) + SCHEDULING_S
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    pod["terminationGracePeriodSeconds"] = deployment.stop_timeout_s + sleep_s
    _set_resources(container["resources"], _named(pod["volumes"], "shm")["emptyDir"], deployment)


def _environment(deployment: Deployment) -> dict[str, str]:
    try:
        inside = deployment.snapshot.relative_to(deployment.spec.cache.dir)
    except ValueError:
        raise SpecError(
            f"{deployment.snapshot} is outside cache.dir ({deployment.spec.cache.dir}), which is all that a pod sees",
            hint="set cache.dir to a directory that holds the snapshot, on every node",
        ) from None
    environment = container_environment(deployment, snapshot=f"{CACHE_MOUNT}/{inside.as_posix()}")
    if deployment.spec.gpus == "none":
        # CUDA images ask for all GPUs in their environment, and nodes whose default runtime is NVIDIA's obey.
        environment["NVIDIA_VISIBLE_DEVICES"] = "void"
    return environment


def _add_keys(workload: Manifest, name: str, keys: Path) -> Manifest:
    """Let the pod read the API keys from a Secret, and return the Secret: it holds hashes, which open nothing.

    The whole Secret is mounted, for a single file of it would not follow when it changes.
    """
    read_keys(keys)
    pod, secret_name = workload["spec"]["template"]["spec"], f"{name}-keys"
    pod["containers"][0]["volumeMounts"].append({"name": "keys", "mountPath": KEYS_MOUNT, "readOnly": True})
    # Files of a Secret are root's, and the pod's user is another.
    pod["volumes"].append({"name": "keys", "secret": {"secretName": secret_name, "defaultMode": 0o444}})
    metadata = workload["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": secret_name, "namespace": metadata["namespace"], "labels": dict(metadata["labels"])},
        "type": "Opaque",
        "data": {keys.name: base64.b64encode(keys.read_bytes()).decode()},
    }


def _set_resources(resources: Manifest, shm: Manifest, deployment: Deployment) -> None:
    """Set memory, GPUs and /dev/shm. `gpus: all` keeps the base's one GPU, for a node's number is not known here.

    Requests equal limits: a server of one model gains nothing from memory that may be taken back, and the API refuses
    different numbers of GPUs.
    """
    wanted = deployment.spec.resources
    memory = DEFAULT_MEMORY if wanted.memory is None else wanted.memory
    if wanted.shm >= memory:
        raise SpecError(
            f"resources.shm ({quantity(wanted.shm)}) must be less than resources.memory ({quantity(memory)}): "
            "on Kubernetes /dev/shm counts as memory of the pod",
            hint="raise resources.memory or lower resources.shm",
            path="resources.shm",
        )
    limits = resources["limits"]
    limits["memory"] = quantity(memory)
    shm["sizeLimit"] = quantity(wanted.shm)
    gpus = deployment.spec.gpus
    if gpus == "none":
        del limits[GPU_RESOURCE]
    elif isinstance(gpus, tuple):
        limits[GPU_RESOURCE] = str(len(gpus))
    resources["requests"] = dict(limits)


def _named(items: list[Manifest], name: str) -> Manifest:
    return next(item for item in items if item["name"] == name)


def quantity(size_bytes: int) -> str:
    """Write a size as Kubernetes does, exactly: in GiB or MiB where it is whole, else in bytes.

    >>> quantity(48 << 30), quantity(1536 << 20), quantity(1000)
    ('48Gi', '1536Mi', '1000')
    """
    gib = MIB << 10
    if size_bytes and size_bytes % gib == 0:
        return f"{size_bytes // gib}Gi"
    if size_bytes and size_bytes % MIB == 0:
        return f"{size_bytes // MIB}Mi"
    return str(size_bytes)

"""k8s/ as kubectl renders it: equal to what zops applies, and valid for every version that is promised."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.support.deployments import cpu_deployment, kubernetes_deployment
from tests.support.kubernetes_api import find_kubectl
from zops.runtime.kubernetes_render import find_kind, render

K8S = Path(__file__).parents[2] / "k8s"
VERSIONS = ["1.33", "1.34", "1.35", "1.36", "1.37"]
# What only `zops up` notes: how the deployment was asked for, so that drift can be told in words.
NOTES_OF_UP = ("io.zops.spec", "io.zops.traits", "io.zops.url")


def kustomize(directory):
    done = subprocess.run(
        [find_kubectl(), "kustomize", directory], capture_output=True, check=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def in_order(objects):
    return sorted(objects, key=lambda item: (item["kind"], item["metadata"]["name"]))


def without_environment_order(objects):
    find_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"].sort(key=lambda e: e["name"])
    return in_order(objects)


def without_notes(objects, *notes):
    workload = find_kind(objects, "Deployment")
    for place in (workload, workload["spec"]["template"]):
        for note in notes:
            place["metadata"]["annotations"].pop(note, None)
        if place["metadata"].get("annotations") == {}:
            del place["metadata"]["annotations"]
    return objects


def test_the_base_must_be_what_up_applies_for_the_default_specification():
    wanted = without_notes(render(kubernetes_deployment()), *NOTES_OF_UP)
    assert in_order(kustomize(K8S / "base")) == in_order(wanted)


def test_the_cpu_overlay_must_be_what_up_applies_for_the_tiny_model_without_a_gpu():
    wanted = without_notes(render(cpu_deployment()), *NOTES_OF_UP, "io.zops.manifest")
    shipped = without_notes(kustomize(K8S / "overlays" / "cpu"))
    assert without_environment_order(shipped) == without_environment_order(wanted)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "objects",
    [
        pytest.param(lambda: kustomize(K8S / "base"), id="base"),
        pytest.param(lambda: kustomize(K8S / "overlays" / "cpu"), id="overlay-cpu"),
        pytest.param(lambda: render(kubernetes_deployment()), id="rendered"),
        pytest.param(lambda: render(kubernetes_deployment(name="b", gpus=[0, 1])), id="rendered-two-gpus"),
    ],
)
def test_every_object_must_fit_the_published_schema(objects, version):
    for manifest in objects():
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_a_misspelt_key_must_not_pass_the_schema():
    objects = render(kubernetes_deployment())
    container = find_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["failureTreshold"] = container["livenessProbe"].pop("failureThreshold")
    with pytest.raises(kubernetes_validate.ValidationError, match="failureTreshold"):
        kubernetes_validate.validate(find_kind(objects, "Deployment"), "1.37", strict=True)

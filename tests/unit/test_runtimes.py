"""What all runtimes promise: dry runs that change nothing, refusals in words, pulls with progress."""

import inspect

import pytest

from tests.support.instances import deployment
from zops.errors import HostShort, LockHeld, SnapshotMissing, SourceFailed, ZopsError
from zops.events import Progressed, silent
from zops.runtime.base import ReadOnly, Runtime, WriteRefused
from zops.runtime.docker import DockerRuntime
from zops.runtime.kubernetes import KubernetesRuntime
from zops.runtime.process import ProcessRuntime
from zops.runtime.pulling import follow
from zops.runtime.refusals import REFUSALS, explain
from zops.runtime.select import open_local_runtimes, open_runtime
from zops.spec import Spec

RUNTIMES = (DockerRuntime, ProcessRuntime, KubernetesRuntime)
READS = {"check", "instances", "find", "has_image", "logs", "ask"}


def public_methods(runtime: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(runtime, callable) if not name.startswith("_")}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_method_that_is_no_read_must_be_a_write(runtime: type) -> None:
    assert public_methods(runtime) - READS == runtime.WRITES
    assert public_methods(runtime) == public_methods(Runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_dry_run_must_reach_no_write(runtime: type) -> None:
    dry = ReadOnly(runtime(Spec()))
    for name in runtime.WRITES:
        with pytest.raises(WriteRefused, match=f"{runtime.__name__}.{name}"):
            getattr(dry, name)
    for name in READS:
        assert callable(getattr(dry, name))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_must_be_called_as_the_protocol_says(runtime: type) -> None:
    for name in public_methods(Runtime):
        promised = inspect.signature(getattr(Runtime, name)).parameters
        kept = inspect.signature(getattr(runtime, name)).parameters
        assert [(p.name, p.kind, p.default) for p in kept.values()] == [
            (p.name, p.kind, p.default) for p in promised.values()
        ]


@pytest.mark.parametrize(
    ("kind", "runtime"), [("docker", DockerRuntime), ("process", ProcessRuntime), ("kubernetes", KubernetesRuntime)]
)
def test_the_runtime_that_was_asked_for_must_be_opened(kind: str, runtime: type) -> None:
    spec = Spec.model_validate({"runtime": kind})
    assert type(open_runtime(spec)) is runtime
    assert [type(r) for r in open_local_runtimes(spec)] == (
        [ProcessRuntime] if kind == "process" else [runtime, ProcessRuntime]
    )


# What engines of several versions said.
SAID = [
    ("No such image: zops-inference:0.1.0", HostShort, "image-missing"),
    (
        "driver failed programming external connectivity: Bind for 127.0.0.1:8000 failed: port is already allocated",
        HostShort,
        "port-taken",
    ),
    (
        "Error starting userland proxy: listen tcp4 127.0.0.1:8000: bind: address already in use",
        HostShort,
        "port-taken",
    ),
    ("listen tcp4 10.9.9.9:8000: bind: cannot assign requested address", HostShort, "address-missing"),
    ('could not select device driver "nvidia" with capabilities: [[gpu]]', HostShort, "gpu-missing"),
    (
        "could not apply OCI runtime config: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=0",
        HostShort,
        "gpu-missing",
    ),
    (
        "OCI runtime create failed: nvidia-container-cli: device error: 7: unknown device: unknown",
        HostShort,
        "gpu-missing",
    ),
    (
        'invalid mount config for type "bind": bind source path does not exist: /srv/cache',
        SnapshotMissing,
        "snapshot-missing",
    ),
    ("mkdir /var/lib/docker/overlay2/ab: no space left on device", HostShort, "disk-full"),
    ("Minimum memory limit allowed is 6MB", HostShort, "memory-short"),
    (
        'Conflict. The container name "/zops-demo" is already in use by container "c0ffee".',
        LockHeld,
        "name-in-use",
    ),
    ("something that nobody knows yet", ZopsError, "engine-refused"),
]


@pytest.mark.parametrize(("said", "kind", "code"), SAID)
def test_a_refusal_must_be_said_in_one_clear_line(tmp_path, said: str, kind: type, code: str) -> None:
    error = explain(RuntimeError(said), deployment(tmp_path), "starting zops-demo")
    assert (type(error), error.code) == (kind, code)
    assert "\n" not in error.message
    assert "{" not in error.message + error.hint
    assert code == "engine-refused" or error.details["engine"] == said


def test_every_refusal_must_have_been_heard() -> None:
    assert {refusal.code for refusal in REFUSALS} == {code for _, _, code in SAID} - {"engine-refused"}


def test_a_pull_must_count_its_layers_together() -> None:
    events: list[object] = []
    lines = [
        {"status": "Pulling from library/debian", "id": "bookworm"},
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 10, "total": 100}},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 5, "total": 50}},
        {"status": "Download complete", "id": "a", "progressDetail": {}},
        {"status": "Extracting", "id": "a", "progressDetail": {"current": 1, "total": 100}},
    ]
    follow(lines, "debian", events.append)
    assert events == [Progressed("image", 10, 100), Progressed("image", 15, 150), Progressed("image", 105, 150)]


def test_a_pull_that_breaks_off_must_fail_with_the_registrys_words() -> None:
    with pytest.raises(SourceFailed, match="manifest unknown") as raised:
        follow([{"error": "manifest\nunknown"}], "debian:nope", silent)
    assert raised.value.code == "image-pull-failed"

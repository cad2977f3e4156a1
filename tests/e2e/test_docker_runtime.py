"""Containers of a real engine: made, compared, replaced, stopped. What counts is what the engine says of them.

The image is a shell script beside this host's own shell, so that nothing is pulled and a container starts at once.
"""

import gc
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.support.host import free_port
from tests.support.instances import deployment, recorded
from tests.support.waiting import eventually
from zops.errors import HostShort, LockHeld, RuntimeUnreachable, SnapshotMissing, ZopsError
from zops.events import Event, Finished, silent
from zops.host.engine import inspect
from zops.runtime.base import Deployment, drift
from zops.runtime.container import container_options
from zops.runtime.docker import DockerRuntime
from zops.runtime.replacing import remove_volume
from zops.runtime.supervisor import Identity
from zops.spec import Spec

pytestmark = pytest.mark.engine

SERVER = b"""#!/bin/sh
trap 'echo stopping; exit 0' TERM
echo started
while :; do sleep 1 & wait $!; done
"""


def root_file_system() -> bytes:
    """A tar of this host's shell with its libraries, the script, and the directories that an instance expects."""
    programs = [Path(shutil.which(name) or name) for name in ("sh", "sleep")]
    libraries = {
        Path(found)
        for program in programs
        for found in re.findall(r"(/\S+)", subprocess.check_output(["ldd", program], text=True))
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for directory, owner, mode in (("tmp", 0, 0o1777), ("cache", 0, 0o755), ("compile-cache", 10001, 0o755)):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
            tar.addfile(entry)
        for path, name in [*((p, f"bin/{p.name}") for p in programs), *((lib, str(lib)[1:]) for lib in libraries)]:
            add(tar, name, path.read_bytes())
        add(tar, "server", SERVER)
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    client = docker.DockerClient.from_env(use_context=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> Iterator[Callable[[str], str]]:
    """Import an image with a given entrypoint, under a name of its own."""
    repository = f"zops-test-{uuid.uuid4().hex[:12]}"
    made: list[str] = []

    def make(entrypoint: str) -> str:
        name = f"{repository}:{len(made)}"
        changes = [f'ENTRYPOINT ["{entrypoint}"]', 'HEALTHCHECK CMD ["/bin/sh", "-c", "exit 0"]', f"ENV N={len(made)}"]
        engine.api.import_image_from_data(
            root_file_system(), repository=repository, tag=str(len(made)), changes=changes
        )
        made.append(name)
        return name

    yield make
    for name in made:
        engine.images.remove(name, force=True)


@pytest.fixture(scope="module")
def good_image(image: Callable[[str], str]) -> str:
    return image("/server")


@pytest.fixture
def name(engine: docker.DockerClient) -> Iterator[str]:
    """A deployment's name that nobody else has; whatever was made under it goes when the test ends."""
    name = f"t-{uuid.uuid4().hex[:12]}"
    yield name
    for container in engine.containers.list(all=True, filters={"name": f"zops-{name}"}):
        container.remove(force=True, v=True)
    for volume in engine.volumes.list(filters={"name": f"zops-{name}"}):
        remove_volume(volume)


@pytest.fixture
def make(tmp_path: Path, name: str, good_image: str) -> Callable[..., Deployment]:
    port = free_port()

    def make(**changes: Any) -> Deployment:
        serve = {"port": port, "request_timeout_s": 5} | changes.pop("serve", {})
        return deployment(tmp_path, **{"name": name, "image": {"name": good_image}, "serve": serve} | changes)

    return make


@pytest.fixture
def runtime() -> DockerRuntime:
    return DockerRuntime(Spec())


def container(engine: docker.DockerClient, name: str) -> Any:
    return engine.containers.get(f"zops-{name}")


def names(engine: docker.DockerClient, name: str) -> list[str]:
    return [c.name for c in engine.containers.list(all=True, filters={"name": f"zops-{name}"})]


def shell(target: Any, command: str) -> tuple[int, str]:
    status, output = target.exec_run(["/bin/sh", "-c", command])
    return status, output.decode()


def test_the_engine_must_tell_what_it_is(runtime: DockerRuntime, engine: docker.DockerClient) -> None:
    facts = inspect("local")
    info = engine.info()
    assert (facts.name, facts.version, facts.memory_bytes) == (info["Name"], info["ServerVersion"], info["MemTotal"])
    assert facts.api_version == engine.version()["ApiVersion"]
    assert facts.is_local
    assert runtime.check() == f"Docker {facts.version} on {facts.name}"


def test_an_engine_that_is_not_there_must_be_named(tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/docker.sock"
    with pytest.raises(RuntimeUnreachable, match=re.escape(nowhere)) as raised:
        DockerRuntime(Spec(engine=nowhere)).instances()
    assert raised.value.code == "engine-not-running"


# Stands for ssh: forwards a socket of this host to another one, or says what ssh says when it may not log in.
SSH = """#!{python}
import os, socket, sys, threading
options, host = sys.argv[1:-1], sys.argv[-1]
if host == "closed":
    sys.exit("Warning: Permanently added 'closed'\\nops@closed: Permission denied (publickey).")
assert "BatchMode=yes" in options
local, _, remote = options[options.index("-L") + 1].partition(":")
def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
listener = socket.socket(socket.AF_UNIX)
listener.bind(local)
listener.listen()
open(os.environ["SSH_PID"], "w").write(str(os.getpid()))
while True:
    near, _ = listener.accept()
    far = socket.socket(socket.AF_UNIX)
    far.connect(remote)
    for pair in ((near, far), (far, near)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for ssh first on the PATH; return the file into which it writes its process number."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(SSH.replace("{python}", sys.executable))
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_PID", str(tmp_path / "ssh.pid"))
    return tmp_path / "ssh.pid"


def test_an_engine_behind_ssh_must_be_used_like_any_other(ssh: Path, make, name: str) -> None:
    def use() -> Identity:
        far = DockerRuntime(Spec(engine="ssh://ops@gpu-1"))
        instance = far.up(make(engine="ssh://ops@gpu-1"), silent)
        assert (instance.name, instance.state) == (name, "running")
        assert "started" in eventually(lambda: list(far.logs(name)), "the log")
        forwarder = Identity.of(int(ssh.read_text()))
        assert forwarder
        return forwarder

    forwarder = use()
    gc.collect()
    eventually(lambda: not forwarder.alive, "the end of ssh")


@pytest.mark.usefixtures("ssh")
def test_an_ssh_that_may_not_log_in_must_say_so() -> None:
    with pytest.raises(RuntimeUnreachable, match=r"ops@closed: Permission denied \(publickey\)") as raised:
        DockerRuntime(Spec(engine="ssh://ops@closed")).check()
    assert raised.value.code == "engine-ssh-failed"
    assert "ssh -l ops closed docker version" in raised.value.hint


def test_up_must_make_a_container_as_it_was_asked_for(runtime, make, name: str, engine) -> None:
    wanted = make(resources={"memory": "256MiB", "shm": "128MiB"})
    instance = runtime.up(wanted, silent)
    found = container(engine, name).attrs
    asked = container_options(wanted, inspect("local"))
    assert found["State"]["Running"]
    for key in ("User", "Labels", "StopTimeout", "Hostname"):
        assert found["Config"][key] == asked[key]
    assert set(asked["Env"]) <= set(found["Config"]["Env"])
    for key in ("CapDrop", "SecurityOpt", "ReadonlyRootfs", "PidsLimit", "ShmSize", "Memory", "Tmpfs", "LogConfig"):
        assert found["HostConfig"][key] == asked["HostConfig"][key]
    assert found["HostConfig"]["PortBindings"] == asked["HostConfig"]["PortBindings"]
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert not found["HostConfig"]["Privileged"]
    # The test is the image's, its times are the deployment's.
    assert found["Config"]["Healthcheck"]["Test"] == ["CMD", "/bin/sh", "-c", "exit 0"]
    assert found["Config"]["Healthcheck"]["StartPeriod"] == asked["Healthcheck"]["StartPeriod"]
    mounts = {mount["Destination"]: mount for mount in found["Mounts"]}
    assert (mounts["/cache"]["Source"], mounts["/cache"]["RW"]) == (str(wanted.spec.cache.dir), False)
    assert (mounts["/compile-cache"]["Name"], mounts["/compile-cache"]["RW"]) == (f"zops-{name}-compile", True)
    assert (instance.name, instance.state, instance.id) == (name, "running", found["Id"])
    assert (instance.health, instance.exit_code, drift(wanted, instance)) == ("starting", None, [])


def test_a_container_must_be_able_to_do_no_more_than_it_needs(runtime, make, name: str, engine) -> None:
    wanted = make()
    runtime.up(wanted, silent)
    target = container(engine, name)
    inside = "/cache/" + str(wanted.snapshot.relative_to(wanted.spec.cache.dir))
    assert shell(target, f"read -r line < {inside}/model_index.json; echo $line") == (0, "{}\n")
    status = shell(target, "while read -r line; do echo $line; done < /proc/self/status")[1]
    facts = dict(line.split(":", 1) for line in status.splitlines())
    assert facts["Uid"].split() == ["10001"] * 4
    assert facts["Gid"].split() == ["10001"] * 4
    assert {facts[f"Cap{kind}"].strip("0 ") for kind in ("Inh", "Prm", "Eff", "Bnd")} == {""}
    assert facts["NoNewPrivs"].strip() == "1"
    for path in ("/tmp/x", "/compile-cache/x"):
        assert shell(target, f"echo > {path}")[0] == 0, path
    for path in ("/x", "/bin/x", "/cache/x", f"{inside}/model_index.json"):
        assert shell(target, f"echo > {path}")[0] != 0, path


def test_up_again_must_leave_a_running_container_alone(runtime, make, name: str, engine) -> None:
    runtime.up(make(), silent)
    before = container(engine, name).attrs
    events: list[Event] = []
    DockerRuntime(Spec()).up(make(), events.append)
    after = container(engine, name).attrs
    assert (after["Id"], after["State"]["StartedAt"]) == (before["Id"], before["State"]["StartedAt"])
    assert events == []


def test_a_stopped_container_must_be_started_again(runtime, make, name: str, engine) -> None:
    first = runtime.up(make(), silent)
    container(engine, name).stop(timeout=5)
    assert runtime.find(name).state == "exited"
    again = runtime.up(make(), silent)
    assert (again.id, again.state) == (first.id, "running")


def test_a_killed_server_must_come_back_by_itself(runtime, make, name: str, engine) -> None:
    runtime.up(make(), silent)
    os.kill(container(engine, name).attrs["State"]["Pid"], 9)
    found = eventually(lambda: (i := runtime.find(name)).restarts == 1 and i.state == "running" and i, "the restart")
    assert found.restarts == 1


def test_a_changed_deployment_must_get_a_new_container(runtime, make, name: str, engine) -> None:
    first = runtime.up(make(), silent)
    shell(container(engine, name), "echo > /compile-cache/kernel")
    second = runtime.up(make(serve={"max_queue": 3}), silent)
    assert first.id != second.id
    assert names(engine, name) == [f"zops-{name}"]
    assert second.state == "running"
    assert drift(make(serve={"max_queue": 3}), second) == []
    assert shell(container(engine, name), "read -r line < /compile-cache/kernel")[0] == 0


def test_a_rebuilt_image_must_get_a_new_container(runtime, make, name: str, engine, image) -> None:
    tag = image("/server")
    wanted = make(image={"name": tag})
    first = runtime.up(wanted, silent)
    newer = engine.images.get(image("/server"))
    newer.tag(*tag.split(":"))
    assert drift(wanted, runtime.find(name))
    second = runtime.up(wanted, silent)
    assert second.id != first.id
    assert container(engine, name).attrs["Image"] == newer.id
    assert drift(wanted, second) == []


@pytest.mark.parametrize("failure", ["image", "start", "port"])
def test_a_replacement_that_fails_must_leave_the_previous_one_running(
    *, runtime, make, name: str, engine, image, failure: str
) -> None:
    first = runtime.up(make(), silent)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        changes: dict[str, Any] = {
            "image": {"image": {"name": "zops-test-nowhere:1"}},
            "start": {"image": {"name": image("/nowhere")}},
            "port": {"serve": {"port": holder.getsockname()[1]}},
        }[failure]
        with pytest.raises(ZopsError) as raised:
            runtime.up(make(**changes), silent)
    assert raised.value.code == {"image": "image-missing", "start": "engine-refused", "port": "port-taken"}[failure]
    assert names(engine, name) == [f"zops-{name}"]
    found = runtime.find(name)
    assert (found.id, found.state) == (first.id, "running")


def test_what_an_interrupted_replacement_left_must_be_tidied_up(runtime, make, name: str, engine) -> None:
    first = runtime.up(make(), silent)
    old = container(engine, name)
    options = container_options(make(), inspect("local"))
    # Cut after the new one was made: the old one counts.
    engine.api.create_container_from_config(options, f"zops-{name}.next")
    assert runtime.up(make(), silent).id == first.id
    assert names(engine, name) == [f"zops-{name}"]
    # Cut after the old one was removed: the new one counts.
    old.remove(force=True)
    made = engine.api.create_container_from_config(options, f"zops-{name}.next")
    assert runtime.find(name).id == made["Id"]
    assert runtime.up(make(), silent).id == made["Id"]
    assert names(engine, name) == [f"zops-{name}"]


@pytest.mark.parametrize("failure", ["image", "start", "port", "address", "memory", "unreadable", "cache", "gpu"])
def test_a_first_start_that_fails_must_leave_nothing(
    *, runtime, make, name: str, engine, image, tmp_path, failure: str
) -> None:
    expected: dict[str, tuple[type[ZopsError], str, dict[str, Any]]] = {
        "image": (HostShort, "image-missing", {"image": {"name": "zops-test-nowhere:1"}}),
        "start": (ZopsError, "engine-refused", {"image": {"name": image("/nowhere")}}),
        "port": (HostShort, "port-taken", {}),
        "address": (HostShort, "address-missing", {"serve": {"host": "192.0.2.1"}}),
        "memory": (HostShort, "memory-short", {"resources": {"memory": "99TiB"}}),
        "unreadable": (HostShort, "cache-unreadable", {}),
        "cache": (SnapshotMissing, "snapshot-missing", {}),
        "gpu": (HostShort, "gpu-not-offered", {"gpus": "all"}),
    }
    kind, code, changes = expected[failure]
    wanted = make(**changes)
    if failure == "unreadable":
        (wanted.snapshot / "model_index.json").chmod(0o600)
    if failure == "cache":
        shutil.rmtree(tmp_path / "cache")
    with socket.socket() as holder:
        if failure == "port":
            holder.bind((wanted.spec.serve.host, wanted.spec.serve.port))
            holder.listen()
        with pytest.raises(kind) as raised:
            runtime.up(wanted, silent)
    assert raised.value.code == code
    assert "\n" not in raised.value.message
    assert names(engine, name) == []
    assert engine.volumes.list(filters={"name": f"zops-{name}"}) == []


def test_gpu_requests_must_reach_the_engine_as_they_were_meant(make, name: str, engine) -> None:
    # This engine has no GPU: the containers are made and looked at, never started.
    for number, facts in enumerate((recorded("docker-27-nvidia"), recorded("docker-29-cdi", "1.41"))):
        options = container_options(make(gpus=[0, 1]), facts)
        made = engine.api.create_container_from_config(options, f"zops-{name}-gpu{number}")
        (request,) = engine.api.inspect_container(made["Id"])["HostConfig"]["DeviceRequests"]
        (asked,) = options["HostConfig"]["DeviceRequests"]
        assert {key: request[key] for key in asked} == asked


def test_a_gpu_that_the_engine_cannot_give_must_be_said_in_words(runtime, make, name, engine, monkeypatch) -> None:
    # An engine that claims the nvidia runtime and cannot use it, as after a driver was removed.
    monkeypatch.setitem(runtime.__dict__, "_facts", recorded("docker-27-nvidia"))
    with pytest.raises(HostShort) as raised:
        runtime.up(make(gpus="all"), silent)
    assert raised.value.code == "gpu-missing"
    assert names(engine, name) == []


def test_a_container_that_is_not_ours_must_be_left_alone(runtime, make, name: str, engine, good_image) -> None:
    stranger = engine.containers.create(good_image, name=f"zops-{name}")
    for touch in (lambda: runtime.up(make(), silent), lambda: runtime.down(name, silent)):
        with pytest.raises(ZopsError) as raised:
            touch()
        assert raised.value.code == "name-foreign"
    stranger.reload()
    assert stranger.status == "created"
    assert name not in {instance.name for instance in runtime.instances()}
    assert runtime.find(name) is None


def test_down_must_let_the_server_finish_and_keep_what_it_compiled(runtime, make, name: str, engine) -> None:
    runtime.up(make(), silent)
    target = container(engine, name)
    eventually(lambda: b"started" in target.logs(), "the server's first line")
    log = runtime.logs(name, follow=True)
    assert next(log) == "started"
    events: list[Event] = []
    assert runtime.down(name, events.append)
    assert list(log) == ["stopping"]
    assert names(engine, name) == []
    assert len(engine.volumes.list(filters={"name": f"zops-{name}-compile"})) == 1
    assert isinstance(events[-1], Finished)
    assert f"kept its volume zops-{name}-compile" in events[-1].text
    assert not runtime.down(name, silent)


def test_down_with_volumes_must_leave_nothing(runtime, make, name: str, engine) -> None:
    runtime.up(make(), silent)
    assert runtime.down(name, silent, volumes=True)
    assert names(engine, name) == []
    assert engine.volumes.list(filters={"name": f"zops-{name}"}) == []


def test_down_must_wait_for_a_volume_that_the_engine_lets_go_late(runtime, make, name: str, engine, good_image) -> None:
    runtime.up(make(), silent)
    holder = engine.containers.create(good_image, name=f"zops-{name}-holder", volumes=[f"zops-{name}-compile:/held"])

    def let_go() -> None:
        eventually(lambda: f"zops-{name}" not in names(engine, name), "the container to go")
        holder.remove()

    later = threading.Thread(target=let_go)
    later.start()
    assert runtime.down(name, silent, volumes=True)
    later.join()
    assert engine.volumes.list(filters={"name": f"zops-{name}"}) == []


def test_a_volume_that_somebody_uses_must_be_left_to_them(runtime, make, name: str, engine, good_image) -> None:
    runtime.up(make(), silent)
    engine.containers.create(good_image, name=f"zops-{name}-holder", volumes=[f"zops-{name}-compile:/held"])
    with pytest.raises(ZopsError, match="volume is in use") as caught:
        runtime.down(name, silent, volumes=True)
    assert caught.value.code == "engine-refused"
    assert len(engine.volumes.list(filters={"name": f"zops-{name}-compile"})) == 1


def test_broken_labels_must_not_hide_the_other_instances(runtime, make, name: str, engine, good_image) -> None:
    runtime.up(make(), silent)
    labels = {"io.zops.deployment": f"{name}-odd", "io.zops.traits": "{"}
    engine.containers.create(good_image, name=f"zops-{name}-odd", labels=labels)
    assert {name, f"{name}-odd"} <= {instance.name for instance in runtime.instances()}
    assert runtime.find(f"{name}-odd").state == "created"


def test_the_log_must_be_cut_where_it_was_asked_to_be(runtime, make, name: str, engine) -> None:
    runtime.up(make(), silent)
    target = container(engine, name)
    eventually(lambda: b"started" in target.logs(), "the server's first line")
    target.restart(timeout=5)
    eventually(lambda: target.logs().count(b"started") == 2, "the second start")
    assert list(runtime.logs(name)) == ["started", "stopping", "started"]
    assert list(runtime.logs(name, tail=2)) == ["stopping", "started"]


def test_the_log_of_an_unknown_instance_must_say_so(runtime, name: str) -> None:
    with pytest.raises(ZopsError) as raised:
        list(runtime.logs(name))
    assert raised.value.code == "instance-missing"


def test_an_image_must_be_found_or_missed(runtime, make) -> None:
    assert runtime.has_image(make().spec)
    assert not runtime.has_image(make(image={"name": "zops-test-nowhere:1"}).spec)


def test_an_image_that_cannot_be_pulled_must_be_named(runtime, make) -> None:
    # Nobody listens on port 9 of the loopback, which engines take for a registry without TLS.
    unreachable = make(image={"name": "127.0.0.1:9/zops-test-nowhere:1", "build": False}).spec
    with pytest.raises(ZopsError, match=r"127\.0\.0\.1:9/zops-test-nowhere:1 could not be pulled") as raised:
        runtime.obtain_image(unreachable, silent)
    assert raised.value.code == "image-pull-failed"


# --- healing


def started(runtime: DockerRuntime, wanted: Deployment, engine, name: str) -> Any:
    """Bring it up and wait until it listens to signals."""
    runtime.up(wanted, silent)
    eventually(lambda: b"started" in container(engine, name).logs(), "the first line")
    return container(engine, name)


def test_a_restart_must_keep_the_container_and_have_the_engine_restart_it_again(
    runtime, make, name: str, engine
) -> None:
    before = started(runtime, make(), engine, name)
    after = runtime.restart(name, silent)
    assert (after.id, after.state) == (before.id, "running")
    assert after.started_at != "", after
    assert container(engine, name).attrs["State"]["Pid"] != before.attrs["State"]["Pid"]
    # A container that was stopped by hand is not restarted by the engine; this one must be again.
    os.kill(container(engine, name).attrs["State"]["Pid"], 9)
    eventually(lambda: (i := runtime.find(name)).restarts == 1 and i.state == "running", "the engine's own restart")


@pytest.mark.parametrize("state", ["hung", "exited", "created"])
def test_a_restart_must_bring_back_whatever_does_not_run(runtime, make, name, engine, state) -> None:
    wanted = make(serve={"request_timeout_s": 300}) if state == "hung" else make()
    if state == "created":
        engine.api.create_container_from_config(container_options(wanted, inspect("local")), f"zops-{name}")
    else:
        running = started(runtime, wanted, engine, name)
        if state == "exited":
            running.kill()
            running.wait()
        else:
            os.kill(running.attrs["State"]["Pid"], signal.SIGSTOP)
    began = time.monotonic()
    after = runtime.restart(name, silent, grace_s=1)
    assert after.state == "running"
    assert time.monotonic() - began < 20, "it got the grace that it was made with"
    assert container(engine, name).attrs["State"]["Status"] == "running"


def test_a_restart_must_resume_what_is_only_paused(runtime, make, name: str, engine) -> None:
    paused = started(runtime, make(), engine, name)
    before = paused.attrs["State"]
    paused.pause()
    assert runtime.find(name).state == "paused"
    after = runtime.restart(name, silent)
    paused.reload()
    assert (after.state, paused.attrs["State"]["Paused"]) == ("running", False)
    assert paused.attrs["State"]["Pid"] == before["Pid"], "it lost what it was doing"


def test_a_recreated_container_must_be_new_and_have_the_same_options(runtime, make, name: str, engine) -> None:
    wanted = make(serve={"max_queue": 7}, resources={"memory": "64MB", "shm": "32MB"})
    old = started(runtime, wanted, engine, name)
    shell(old, "echo > /compile-cache/kernel")
    after = runtime.recreate(name, silent)
    new = container(engine, name)
    assert names(engine, name) == [f"zops-{name}"]
    assert (new.id, new.status) == (after.id, "running")
    assert new.id != old.id
    assert new.attrs["HostConfig"] == old.attrs["HostConfig"]
    assert new.attrs["Image"] == old.attrs["Image"]
    for side in (old.attrs["Config"], new.attrs["Config"]):
        side.pop("Image")
        side["Env"] = sorted(side["Env"])
    assert new.attrs["Config"] == old.attrs["Config"]
    assert shell(new, "read -r line < /compile-cache/kernel")[0] == 0
    assert drift(wanted, after) == []
    # It can be done again, and `up` has nothing to do after it.
    again = runtime.recreate(name, silent)
    assert again.id != after.id
    assert runtime.up(wanted, silent).id == again.id


def test_a_recreated_container_must_not_take_a_newer_image(runtime, make, name: str, engine, image) -> None:
    tag = image("/server")
    wanted = make(image={"name": tag})
    old = started(runtime, wanted, engine, name)
    engine.images.get(image("/server")).tag(*tag.split(":"))
    after = runtime.recreate(name, silent)
    assert container(engine, name).attrs["Image"] == old.attrs["Image"]
    assert after.image == tag
    assert drift(wanted, after), "the newer image is not told any more"


@pytest.mark.parametrize("state", ["paused", "exited", "hung"])
def test_whatever_its_state_a_container_must_be_recreated(runtime, make, name: str, engine, state: str) -> None:
    old = started(runtime, make(serve={"request_timeout_s": 300}), engine, name)
    if state == "paused":
        old.pause()
    elif state == "hung":
        os.kill(old.attrs["State"]["Pid"], signal.SIGSTOP)
    else:
        old.stop(timeout=5)
    after = runtime.recreate(name, silent, grace_s=1)
    assert (after.state, after.id != old.id) == ("running", True)
    assert names(engine, name) == [f"zops-{name}"]


def test_a_recreation_that_cannot_be_made_must_leave_the_old_one_running(
    runtime, make, name: str, engine, tmp_path: Path
) -> None:
    old = started(runtime, make(), engine, name)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(ZopsError) as raised:
        runtime.recreate(name, silent)
    assert raised.value.code == "engine-refused"
    assert names(engine, name) == [f"zops-{name}"]
    found = container(engine, name)
    assert (found.id, found.status) == (old.id, "running")


def test_a_recreation_whose_start_fails_must_bring_the_old_one_back(runtime, make, name, engine, monkeypatch) -> None:
    old = started(runtime, make(), engine, name)

    def refuse(*_: object) -> None:
        raise HostShort("no GPU", code="gpu-missing")

    monkeypatch.setattr(runtime, "_start", refuse)
    with pytest.raises(HostShort):
        runtime.recreate(name, silent)
    assert names(engine, name) == [f"zops-{name}"]
    assert (container(engine, name).id, container(engine, name).status) == (old.id, "running")


def test_an_interrupted_recreation_must_not_look_like_a_stop_on_purpose(runtime, make, name: str, engine) -> None:
    old = started(runtime, make(), engine, name)
    # Cut after the old one was stopped, before the new one was started.
    engine.api.create_container_from_config(container_options(make(), inspect("local")), f"zops-{name}.next")
    old.stop(timeout=5)
    found = runtime.find(name)
    assert (found.state, found.exit_code) == ("created", None)
    assert [instance.state for instance in runtime.instances() if instance.name == name] == ["created"]
    assert runtime.restart(name, silent).state == "running"
    assert names(engine, name) == [f"zops-{name}"]


@pytest.mark.parametrize("state", ["running", "paused", "hung"])
def test_a_container_that_was_stopped_must_stay_so(runtime, make, name: str, engine, state: str) -> None:
    running = started(runtime, make(serve={"request_timeout_s": 300}), engine, name)
    if state == "paused":
        running.pause()
    elif state == "hung":
        os.kill(running.attrs["State"]["Pid"], signal.SIGSTOP)
    stopped = runtime.stop(name, silent, grace_s=1)
    assert stopped.state == "exited"
    assert stopped.exit_code == (137 if state == "hung" else 0)
    found = container(engine, name)
    assert (found.status, found.attrs["State"]["Running"]) == ("exited", False)
    assert runtime.restart(name, silent).state == "running"


@pytest.mark.parametrize("act", ["restart", "recreate", "stop"])
def test_what_is_not_there_must_not_be_healed(runtime, name: str, engine, act: str) -> None:
    with pytest.raises(ZopsError) as raised:
        getattr(runtime, act)(name, silent)
    assert raised.value.code == "instance-missing"
    assert names(engine, name) == []


@pytest.mark.parametrize("act", ["restart", "recreate", "stop"])
def test_nothing_must_be_healed_while_somebody_deploys(runtime, make, name: str, engine, act: str) -> None:
    before = started(runtime, make(), engine, name)
    has, may_go = threading.Event(), threading.Event()

    def deploy() -> None:
        with DockerRuntime(Spec()).claim(name, silent):
            has.set()
            may_go.wait(30)

    other = threading.Thread(target=deploy)
    other.start()
    try:
        assert has.wait(10)
        with pytest.raises(LockHeld):
            getattr(runtime, act)(name, silent)
    finally:
        may_go.set()
        other.join(10)
    after = container(engine, name)
    assert (after.id, after.attrs["State"]["Pid"]) == (before.id, before.attrs["State"]["Pid"])


def test_a_question_to_what_cannot_be_asked_must_be_answered_with_the_reason(runtime, make, name, engine) -> None:
    with pytest.raises(ZopsError) as missing:
        runtime.ask(name, "GET", "/livez", timeout_s=1)
    assert missing.value.code == "instance-missing"
    running = started(runtime, make(), engine, name)
    with pytest.raises(RuntimeUnreachable) as no_python:
        runtime.ask(name, "GET", "/livez", timeout_s=1)
    assert no_python.value.code == "instance-unreachable"
    running.pause()
    with pytest.raises(RuntimeUnreachable) as paused:
        runtime.ask(name, "GET", "/livez", timeout_s=1)
    assert "paused" in paused.value.message
    running.unpause()

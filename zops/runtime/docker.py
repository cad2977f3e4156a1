"""Instances as containers of a Docker engine, through the Engine API.

The labels on a container are the only record of it. A container without them is never touched, whatever its name.
A changed deployment gets a new container beside the old one, and the old one goes only after the new one has started;
until then it waits, stopped, and is started again if the new one cannot be.

Imported only by what needs an engine (see select.py): docker-py costs 100 ms.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from docker.errors import APIError, NotFound
from docker.utils import parse_repository_tag

from zops.errors import RuntimeUnreachable, ZopsError
from zops.events import Finished, Report, Started, Warned, task
from zops.host.engine import EngineFacts, connect, engine_errors, read_facts, resolve
from zops.once import once
from zops.runtime.asking import ask_inside, question_environment
from zops.runtime.base import CLAIM_TIMEOUT_S, HEAL_GRACE_S, LABEL, Deployment, Instance, drift
from zops.runtime.claim import claim
from zops.runtime.container import (
    compile_volume,
    container_name,
    container_options,
    image_name,
    instance_of,
    require_readable,
    same_options,
)
from zops.runtime.pulling import follow, pull_failed
from zops.runtime.refusals import explain
from zops.runtime.replacing import NEXT, choose_container, discard_container, remove_volume, stop_container
from zops.spec import Spec

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container


class DockerRuntime:
    """Instances as containers; connects when it is first asked something."""

    WRITES = frozenset({"up", "down", "obtain_image", "claim", "restart", "recreate", "stop"})

    def __init__(self, spec: Spec) -> None:
        self._engine = spec.engine

    @once
    def _client(self) -> "DockerClient":
        client = connect(self._engine)
        weakref.finalize(self, client.close)
        return client

    @once
    def _facts(self) -> EngineFacts:
        return read_facts(self._client, is_local=resolve(self._engine).is_local)

    # --- reads

    def check(self) -> str:
        """Return the engine's version and the host that it runs on."""
        return f"Docker {self._facts.version} on {self._facts.name}"

    def instances(self) -> list[Instance]:
        """Return every instance that carries our label, stopped ones included."""
        found: dict[str, list[Container]] = {}
        for container in self._labelled(f"{LABEL}.deployment"):
            found.setdefault(container.labels[f"{LABEL}.deployment"], []).append(container)
        return [self._describe(choose_container(containers)) for containers in found.values()]

    def find(self, name: str) -> Instance | None:
        """Return the instance of a deployment, None when there is none."""
        containers = self._labelled(f"{LABEL}.deployment={name}")
        return self._describe(choose_container(containers)) if containers else None

    def has_image(self, spec: Spec) -> bool:
        """Tell whether the engine has the image."""
        return bool(self._image_id(spec.image.name))

    def logs(self, name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield the instance's log lines without their line ends.

        Raises:
            ZopsError: `instance-missing` when there is no such instance.
        """
        container = self._get(container_name(name))
        if container is None:
            raise _missing(name)
        with engine_errors(f"reading the log of {container.name}"):
            stream = container.logs(stream=True, follow=follow, tail="all" if tail is None else tail)
            try:
                yield from _lines(stream)
            finally:
                stream.close()

    # --- writes

    def obtain_image(self, spec: Spec, report: Report) -> None:
        """Build the image, or pull it where the specification says not to build.

        Raises:
            SourceFailed: when the registry does not deliver it.
        """
        image = spec.image
        if image.build:
            from zops.runtime.image import build_image  # noqa: PLC0415 - packing a build context is a rare need

            build_image(self._engine, image, report)
        else:
            self._pull(image.name, report)

    def up(self, deployment: Deployment, report: Report) -> Instance:
        """Make the deployment's container run, recreating it only if it drifted; return it. Does not wait until ready.

        Raises:
            HostShort: when the image, a GPU, memory or the port is missing; what ran before runs again.
        """
        with self.claim(deployment.name, report):
            return self._instance(self._up(deployment, report))

    def down(self, name: str, report: Report, *, volumes: bool = False) -> bool:
        """Stop and remove the container, letting it finish its requests; return whether there was one."""
        self._get(container_name(name))  # refuses a stranger of that name
        with self.claim(name, report):
            began = time.monotonic()
            containers = self._labelled(f"{LABEL}.deployment={name}")
            if containers:
                report(Started("down", f"stop {container_name(name)}"))
            with engine_errors(f"stopping {container_name(name)}"):
                for container in containers:
                    stop_container(container)
                    container.remove(v=True, force=True)
            removed = volumes and self._remove_volume(name)
            kept = not volumes and self._volume(name) is not None
        if containers or removed:
            fate = f"; kept its volume {compile_volume(name)}" if kept else "; removed its volume" if removed else ""
            text = f"stopped and removed {container_name(name)}{fate}"
            report(Finished("down", text, time.monotonic() - began))
        return bool(containers)

    def claim(self, name: str, report: Report, *, timeout_s: float = CLAIM_TIMEOUT_S) -> AbstractContextManager[None]:
        """Keep everybody else of this host from changing the deployment."""
        return claim(resolve(self._engine).url, name, report, timeout_s=timeout_s)

    def restart(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the container and start it again, in one request, so that it runs again even if zops dies meanwhile."""
        with self.claim(name, report, timeout_s=0):
            container = self._present(name)
            if container.status == "dead":  # it cannot be started again
                return self.recreate(name, report, grace_s=grace_s)
            doing = f"{'resuming' if container.status == 'paused' else 'restarting'} {container.name}"
            with task(report, "restart", doing), engine_errors(doing):
                if container.status == "paused":
                    container.unpause()
                else:
                    container.restart(timeout=math.ceil(grace_s))
            return self._instance(container)

    def recreate(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Put a new container in the place of the old one, with the options that the engine remembers of that."""
        with self.claim(name, report, timeout_s=0):
            old = self._present(name)
            options = same_options(old.attrs)
            with task(report, "recreate", f"recreating {old.name}"):
                return self._instance(self._replace(old, lambda name: self._create_as(options, name), report, grace_s))

    def stop(self, name: str, report: Report, *, grace_s: float = HEAL_GRACE_S) -> Instance:
        """Stop the container; the engine does not start it again, for it was stopped on purpose."""
        with self.claim(name, report, timeout_s=0):
            container = self._present(name)
            doing = f"stopping {container.name}"
            with task(report, "stop", doing), engine_errors(doing):
                stop_container(container, grace_s)
            return self._instance(container)

    def ask(
        self, name: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float, key: str = ""
    ) -> tuple[int, bytes]:
        """Put an HTTP question to the server from inside its container; return status and body of the answer."""
        instance = self.find(name)
        if instance is None:
            raise _missing(name)
        question = question_environment(method, path, body, timeout_s=timeout_s, key=key)
        try:
            with engine_errors(f"asking {name} from inside"):
                return ask_inside(self._client.api, instance.id, name, question, timeout_s=timeout_s)
        except ZopsError as error:
            if error.code == "engine-refused":  # it is paused, restarting, or has ended
                raise RuntimeUnreachable(error.message, code="instance-unreachable") from error
            raise

    # --- containers

    def _labelled(self, label: str) -> "list[Container]":
        with engine_errors("listing containers"):
            return list(self._client.containers.list(all=True, filters={"label": label}, ignore_removed=True))

    def _get(self, full_name: str) -> "Container | None":
        """Return our container of that name; refuse one of that name that is not ours."""
        with engine_errors(f"looking for {full_name}"):
            try:
                container = self._client.containers.get(full_name)
            except NotFound:
                return None
        # The engine also finds a container by the beginning of its id.
        if container.name != full_name:
            return None
        if f"{LABEL}.deployment" not in container.labels:
            raise ZopsError(
                f"there is a container {full_name} that zops did not make; it is left alone",
                code="name-foreign",
                hint=f"rename it: docker rename {full_name} NEW, or choose another --name",
            )
        return container

    def _settle(self, name: str) -> "Container | None":
        """Return the deployment's container after tidying up what an interrupted replacement left."""
        current, following = self._get(container_name(name)), self._get(container_name(name) + NEXT)
        if following is None:
            return current
        with engine_errors(f"tidying up after an interrupted replacement of {container_name(name)}"):
            if current is None:
                following.rename(container_name(name))
                following.reload()
                return following
            following.remove(force=True)
        return current

    def _present(self, name: str) -> "Container":
        """Return the deployment's container, tidied up and looked at anew."""
        container = self._settle(name)
        if container is None:
            raise _missing(name)
        with engine_errors(f"looking at {container.name}"):
            container.reload()
        return container

    def _up(self, deployment: Deployment, report: Report) -> "Container":
        old = self._settle(deployment.name)
        if old is None:
            with task(report, "up", f"starting {container_name(deployment.name)}"):
                return self._make(deployment)
        instance = self._instance(old)
        if drift(deployment, instance) or instance.state == "dead":
            with task(report, "up", f"recreating {old.name}, which differs"):
                return self._replace(old, lambda name: self._create(deployment, name), report, deployment=deployment)
        if instance.state in {"running", "restarting"}:
            return old
        with task(report, "up", f"starting {old.name} again"):
            if instance.state == "paused":
                with engine_errors(f"resuming {old.name}"):
                    old.unpause()
            else:
                self._start(old, deployment)
            return old

    def _make(self, deployment: Deployment) -> "Container":
        had_volume = self._volume(deployment.name) is not None
        try:
            container = self._create(deployment, container_name(deployment.name))
            try:
                self._start(container, deployment)
            except BaseException:
                discard_container(container)
                raise
        except BaseException:
            if not had_volume:
                self._remove_volume(deployment.name)
            raise
        return container

    def _replace(
        self,
        old: "Container",
        create: "Callable[[str], Container]",
        report: Report,
        grace_s: float | None = None,
        *,
        deployment: Deployment | None = None,
    ) -> "Container":
        """Put what `create` makes of a name in the place of a container; if that cannot be started, nothing changes.

        Args:
            old: the container.
            create: makes the new one.
            report: is told when the old one could not be started again.
            grace_s: seconds that the old one gets to stop; by default those that it was made with.
            deployment: what the new one is made of, where an operator could change that after an error.
        """
        name = str(old.name)
        fresh = create(name + NEXT)
        was_running = old.status == "running"
        try:
            with engine_errors(f"stopping {name}"):
                stop_container(old, grace_s)
            self._start(fresh, deployment)
        except BaseException:
            discard_container(fresh)
            if was_running:
                try:
                    with engine_errors(f"starting the previous {name} again"):
                        old.start()
                except ZopsError as error:  # the one that is on its way matters more
                    report(Warned(error.message))
            raise
        with engine_errors(f"removing the previous {name}"):
            old.remove(v=True, force=True)
            fresh.rename(name)
        return fresh

    def _create(self, deployment: Deployment, full_name: str) -> "Container":
        options = container_options(deployment, self._facts)
        if self._facts.is_local:
            require_readable(deployment, self._facts)
        return self._create_as(options, full_name, deployment)

    def _create_as(self, options: dict[str, Any], full_name: str, deployment: Deployment | None = None) -> "Container":
        with engine_errors(f"creating {full_name}"):
            try:
                made = self._client.api.create_container_from_config(options, full_name)  # type: ignore[no-untyped-call] # its stub has no types
            except APIError as error:
                if deployment is None:
                    raise
                raise explain(error, deployment, f"creating {full_name}") from error
            return self._client.containers.get(made["Id"])

    def _start(self, container: "Container", deployment: Deployment | None) -> None:
        with engine_errors(f"starting {container.name}"):
            try:
                container.start()
            except APIError as error:
                if deployment is None:
                    raise
                raise explain(error, deployment, f"starting {container.name}") from error

    def _instance(self, container: "Container") -> Instance:
        with engine_errors(f"looking at {container.name}"):
            container.reload()
        return self._describe(container)

    def _describe(self, container: "Container") -> Instance:
        """Return a container as it was when the engine was last asked: it may be gone by now."""
        return instance_of(container.attrs, image_id=self._image_id(image_name(container.attrs)))

    # --- images and volumes

    def _pull(self, name: str, report: Report) -> None:
        repository, tag = parse_repository_tag(name)
        with task(report, "image", f"pulling {name}"), engine_errors(f"pulling {name}"):
            try:
                follow(self._client.api.pull(repository, tag=tag or "latest", stream=True, decode=True), name, report)
            except APIError as error:
                raise pull_failed(name, error.explanation or str(error)) from error

    def _image_id(self, name: str) -> str:

        with engine_errors(f"looking for the image {name}"):
            try:
                return str(self._client.images.get(name).id)
            except NotFound:
                return ""

    def _volume(self, name: str) -> Any:
        """Return the compile volume of a deployment if it is ours, None otherwise."""
        with engine_errors(f"looking for the volume {compile_volume(name)}"):
            try:
                volume = self._client.volumes.get(compile_volume(name))
            except NotFound:
                return None
        return volume if f"{LABEL}.deployment" in (volume.attrs.get("Labels") or {}) else None

    def _remove_volume(self, name: str) -> bool:
        volume = self._volume(name)
        if volume is None:
            return False
        with engine_errors(f"removing the volume {compile_volume(name)}"):
            remove_volume(volume)
        return True


def _missing(name: str) -> ZopsError:
    return ZopsError(f"there is no instance {name}", code="instance-missing", hint="start it with: zops up")


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.rstrip(b"\r").decode("utf-8", "replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", "replace")

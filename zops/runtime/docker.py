"""Instances as containers of a Docker engine, through the Engine API.

The labels on a container are the only record of it. A container without them is never touched, whatever its name.
A changed deployment gets a new container beside the old one, and the old one goes only after the new one has started;
until then it waits, stopped, and is started again if the new one cannot be.

Imported only by what needs an engine (see select.py): docker-py costs 100 ms.
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from docker.errors import APIError, NotFound
from docker.utils import parse_repository_tag

from zops.errors import ZopsError
from zops.events import Finished, Report, Started, task
from zops.host.engine import EngineFacts, connect, engine_errors, read_facts, resolve
from zops.runtime.base import LABEL, Deployment, Instance, drift
from zops.runtime.container import (
    compile_volume,
    container_name,
    container_options,
    instance_of,
    require_readable,
)
from zops.runtime.pulling import follow, pull_failed
from zops.runtime.refusals import explain
from zops.spec import Spec

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

# A dot is allowed in a container's name and not in a deployment's, so this can be no other deployment's container.
NEXT = ".next"


class DockerRuntime:
    """Instances as containers; connects when it is first asked something."""

    WRITES = frozenset({"up", "down", "obtain_image"})

    def __init__(self, spec: Spec) -> None:
        self._engine = spec.engine

    @cached_property
    def _client(self) -> "DockerClient":
        client = connect(self._engine)
        weakref.finalize(self, client.close)
        return client

    @cached_property
    def _facts(self) -> EngineFacts:
        return read_facts(self._client, is_local=resolve(self._engine).is_local)

    # --- reads

    def check(self) -> str:
        """Return the engine's version and the host that it runs on."""
        return f"Docker {self._facts.version} on {self._facts.name}"

    def instances(self) -> list[Instance]:
        """Return every instance that carries our label, stopped ones included."""
        return [self._instance(container) for container in self._labelled(f"{LABEL}.deployment")]

    def find(self, name: str) -> Instance | None:
        """Return the instance of a deployment, None when there is none."""
        containers = self._labelled(f"{LABEL}.deployment={name}")
        # While one is being replaced there are two; the one with the plain name counts.
        containers.sort(key=lambda container: container.name != container_name(name))
        return self._instance(containers[0]) if containers else None

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
            raise ZopsError(f"there is no instance {name}", code="instance-missing", hint="start it with: zops up")
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
        old = self._settle(deployment.name)
        if old is None:
            with task(report, "up", f"starting {container_name(deployment.name)}"):
                return self._instance(self._make(deployment))
        instance = self._instance(old)
        if drift(deployment, instance) or instance.state == "dead":
            with task(report, "up", f"recreating {old.name}, which differs"):
                return self._instance(self._replace(old, deployment))
        if instance.state in {"running", "restarting"}:
            return instance
        with task(report, "up", f"starting {old.name} again"):
            if instance.state == "paused":
                with engine_errors(f"resuming {old.name}"):
                    old.unpause()
            else:
                self._start(old, deployment)
            return self._instance(old)

    def down(self, name: str, report: Report, *, volumes: bool = False) -> bool:
        """Stop and remove the container, letting it finish its requests; return whether there was one."""
        self._get(container_name(name))  # refuses a stranger of that name
        began = time.monotonic()
        containers = self._labelled(f"{LABEL}.deployment={name}")
        if containers:
            report(Started("down", f"stop {container_name(name)}"))
        with engine_errors(f"stopping {container_name(name)}"):
            for container in containers:
                _stop(container)
                container.remove(v=True, force=True)
        removed = volumes and self._remove_volume(name)
        kept = not volumes and self._volume(name) is not None
        if containers or removed:
            fate = f"; kept its volume {compile_volume(name)}" if kept else "; removed its volume" if removed else ""
            text = f"stopped and removed {container_name(name)}{fate}"
            report(Finished("down", text, time.monotonic() - began))
        return bool(containers)

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

    def _make(self, deployment: Deployment) -> "Container":
        had_volume = self._volume(deployment.name) is not None
        try:
            container = self._create(deployment, container_name(deployment.name))
            try:
                self._start(container, deployment)
            except BaseException:
                _discard(container)
                raise
        except BaseException:
            if not had_volume:
                self._remove_volume(deployment.name)
            raise
        return container

    def _replace(self, old: "Container", deployment: Deployment) -> "Container":
        name = container_name(deployment.name)
        fresh = self._create(deployment, name + NEXT)
        was_running = old.status == "running"
        try:
            with engine_errors(f"stopping {name}"):
                _stop(old)
            self._start(fresh, deployment)
        except BaseException:
            _discard(fresh)
            if was_running:
                with engine_errors(f"starting the previous {name} again"):
                    old.start()
            raise
        with engine_errors(f"removing the previous {name}"):
            old.remove(v=True, force=True)
            fresh.rename(name)
        return fresh

    def _create(self, deployment: Deployment, full_name: str) -> "Container":
        options = container_options(deployment, self._facts)
        if self._facts.is_local:
            require_readable(deployment, self._facts)

        with engine_errors(f"creating {full_name}"):
            try:
                made = self._client.api.create_container_from_config(options, full_name)  # type: ignore[no-untyped-call] # its stub has no types
            except APIError as error:
                raise explain(error, deployment, f"creating {full_name}") from error
            return self._client.containers.get(made["Id"])

    def _start(self, container: "Container", deployment: Deployment) -> None:

        with engine_errors(f"starting {container.name}"):
            try:
                container.start()
            except APIError as error:
                raise explain(error, deployment, f"starting {container.name}") from error

    def _instance(self, container: "Container") -> Instance:
        with engine_errors(f"looking at {container.name}"):
            container.reload()
        return instance_of(container.attrs, image_id=self._image_id(str(container.attrs["Config"].get("Image", ""))))

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
            volume.remove()
        return True


def _stop(container: "Container") -> None:
    """Stop a container within the time that it was made with; the engine kills it afterwards."""
    timeout_s = container.attrs["Config"].get("StopTimeout")
    container.stop(**({} if timeout_s is None else {"timeout": timeout_s}))


def _discard(container: "Container") -> None:
    """Remove a container that came to nothing; the error that is on its way matters more than one of this."""
    with suppress(ZopsError), engine_errors(f"removing {container.name}"):
        container.remove(v=True, force=True)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.rstrip(b"\r").decode("utf-8", "replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", "replace")

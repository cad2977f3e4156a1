"""The container engine: how to reach it, what it can do, and how it hands out GPUs.

One of the two places that know docker-py (runtime/docker.py is the other), and only when they are called.
"""

import os
import socket
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from zops.errors import HostShort, RuntimeUnreachable, ZopsError
from zops.host.tunnel import Tunnel
from zops.spec.model import Gpus

if TYPE_CHECKING:
    from docker import DockerClient

DEFAULT_URL = "unix:///var/run/docker.sock"
CONNECT_TIMEOUT_S = 5
# Creating a container may wait for a slow disk; the engine's own client gives up after as long.
CALL_TIMEOUT_S = 60

CDI_GPU = "nvidia.com/gpu"
TOOLKIT = "install nvidia-container-toolkit on the engine's host, then: sudo nvidia-ctk runtime configure && sudo "
TOOLKIT += "systemctl restart docker; or run without a GPU: --gpus none"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens, and (for tcp) with which certificates."""

    url: str
    tls: Any = None

    @property
    def is_local(self) -> bool:
        """Whether the engine runs on this host, so that its paths and ports are ours."""
        return self.url.startswith("unix://")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself."""

    name: str
    version: str
    api_version: str
    cgroup_version: str
    cgroup_driver: str
    storage_driver: str
    default_runtime: str
    runtimes: tuple[str, ...]
    memory_bytes: int
    """Memory of the engine's host; 0 when it does not say."""
    nvidia_driver: bool
    """Whether it serves requests to the nvidia device driver (its runtime is configured, or its hook is installed)."""
    cdi_spec_dirs: tuple[str, ...]
    """Where it looks for CDI specifications; empty when CDI is off or unknown to it."""
    cdi_devices: tuple[str, ...] | None
    """CDI devices that it found; None where it does not say (before Docker 28.2)."""
    security_options: tuple[str, ...]
    is_local: bool = True

    @classmethod
    def from_info(
        cls, info: Mapping[str, Any], *, api_version: str = "", is_local: bool = True, has_hook: bool = False
    ) -> "EngineFacts":
        """Read the body of the engine's `GET /info`.

        Args:
            info: the body.
            api_version: newest version of the API that the engine speaks.
            is_local: whether the engine runs on this host.
            has_hook: whether NVIDIA's container hook is on the engine's PATH, which `info` does not tell.
        """
        runtimes = tuple(sorted(info.get("Runtimes") or {}))
        discovered = info.get("DiscoveredDevices")
        return cls(
            name=str(info.get("Name", "")),
            version=str(info.get("ServerVersion", "")),
            api_version=api_version,
            cgroup_version=str(info.get("CgroupVersion", "1")),
            cgroup_driver=str(info.get("CgroupDriver", "")),
            storage_driver=str(info.get("Driver", "")),
            default_runtime=str(info.get("DefaultRuntime", "")),
            runtimes=runtimes,
            memory_bytes=int(info.get("MemTotal") or 0),
            nvidia_driver="nvidia" in runtimes or has_hook,
            cdi_spec_dirs=tuple(info.get("CDISpecDirs") or ()),
            cdi_devices=None
            if discovered is None
            else tuple(str(device.get("ID", "")) for device in discovered if device.get("Source") == "cdi"),
            security_options=tuple(info.get("SecurityOptions") or ()),
            is_local=is_local,
        )

    @property
    def gpu_devices(self) -> tuple[str, ...]:
        """NVIDIA GPUs that the engine offers through CDI, for example nvidia.com/gpu=0."""
        return tuple(device for device in self.cdi_devices or () if device.startswith(f"{CDI_GPU}="))

    @property
    def offers_cdi(self) -> bool:
        """Whether a CDI request for a GPU can be served, as far as the engine tells."""
        return bool(self.gpu_devices) or (self.cdi_devices is None and bool(self.cdi_spec_dirs))

    @property
    def remaps_users(self) -> bool:
        """Whether user ids inside a container are other ones outside (rootless engine, user namespaces)."""
        names = {part for option in self.security_options for part in option.split(",")}
        return bool(names & {"name=rootless", "name=userns"})


def resolve(engine: str, environ: Mapping[str, str] | None = None) -> Endpoint:
    """Return where an engine listens.

    Args:
        engine: local, context:NAME, or a unix://, tcp:// or ssh:// address, as in the specification.
        environ: the environment, `os.environ` by default; `DOCKER_HOST` and its companions mean what they mean to
            the docker command.

    Raises:
        RuntimeUnreachable: when there is no such context.
    """
    environ = os.environ if environ is None else environ
    if engine.startswith("context:"):
        return _context(engine.removeprefix("context:"))
    if engine not in {"local", ""}:
        return Endpoint(engine, _environment_tls(environ) if engine.startswith("tcp://") else None)
    url = environ.get("DOCKER_HOST") or DEFAULT_URL
    return Endpoint(url, _environment_tls(environ) if url.startswith("tcp://") else None)


def connect(engine: str) -> "DockerClient":
    """Return a client of an engine that has answered.

    Args:
        engine: local, context:NAME, or a unix://, tcp:// or ssh:// address, as in the specification.

    Raises:
        RuntimeUnreachable: saying what was tried and what to do.
    """
    import docker  # noqa: PLC0415 - 100 ms that only commands which talk to an engine pay
    import docker.errors  # noqa: PLC0415
    import requests  # noqa: PLC0415

    endpoint = resolve(engine)
    url, tunnel = endpoint.url, None
    if url.startswith("ssh://"):
        tunnel = Tunnel(url)
        url = f"unix://{tunnel.socket}"
    elif endpoint.is_local:
        _try_socket(url)
    options: dict[str, Any] = {"tls": endpoint.tls} if endpoint.tls else {}
    try:
        client = docker.DockerClient(base_url=url, version="auto", timeout=CONNECT_TIMEOUT_S, **options)
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        raise unreachable(endpoint.url, error) from error
    client.api.timeout = CALL_TIMEOUT_S
    if tunnel:
        # Holding the tunnel is what keeps it open; it ends with the client.
        weakref.finalize(client, lambda held: held.close(), tunnel)
    return client


def read_facts(client: "DockerClient", *, is_local: bool) -> EngineFacts:
    """Ask a connected engine what it is and can do.

    Args:
        client: the engine.
        is_local: whether it runs on this host, which a client does not tell; see `resolve`.

    Raises:
        RuntimeUnreachable: when it stopped answering.
    """
    with engine_errors("asking the engine for its facts"):
        has_hook = is_local and which("nvidia-container-runtime-hook") is not None
        info = client.info()
        return EngineFacts.from_info(
            info, api_version=client.version()["ApiVersion"], is_local=is_local, has_hook=has_hook
        )


def inspect(engine: str) -> EngineFacts:
    """Connect, return what the engine says of itself, and hang up.

    Raises:
        RuntimeUnreachable: saying what was tried and what to do.
    """
    client = connect(engine)
    try:
        return read_facts(client, is_local=resolve(engine).is_local)
    finally:
        client.close()


def read_labels(engine: str, image: str) -> Mapping[str, str] | None:
    """Return the labels of an image, None when the engine does not have it.

    Raises:
        RuntimeUnreachable: saying what was tried and what to do.
    """
    import docker.errors  # noqa: PLC0415 - as in connect

    client = connect(engine)
    try:
        with engine_errors(f"looking for the image {image}"):
            return dict(client.images.get(image).labels)
    except ZopsError as error:
        if isinstance(error.__cause__, docker.errors.ImageNotFound):
            return None
        raise
    finally:
        client.close()


def gpu_request(facts: EngineFacts, gpus: Gpus) -> dict[str, Any] | None:
    """Return the `DeviceRequest` that gives a container its GPUs, None when it wants none.

    CDI device ids are preferred where the engine knows NVIDIA's: they are what it resolves itself, and a container
    keeps them through `systemctl daemon-reload`. Else the nvidia driver is asked.

    Raises:
        HostShort: when GPUs are wanted and the engine offers no way to get them, or not these.
    """
    if gpus == "none":
        return None
    if facts.offers_cdi and (facts.gpu_devices or not facts.nvidia_driver):
        wanted = ["all"] if gpus == "all" else [str(gpu) for gpu in gpus]
        ids = [f"{CDI_GPU}={gpu}" for gpu in wanted]
        unknown = [device for device in ids if facts.gpu_devices and device not in facts.gpu_devices]
        if unknown:
            raise HostShort(
                f"the engine on {facts.name} has no {', '.join(unknown)}; it offers {', '.join(facts.gpu_devices)}",
                code="gpu-missing",
                hint="choose others, or list anew: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
            )
        return {"Driver": "cdi", "DeviceIDs": ids}
    if facts.nvidia_driver:
        request: dict[str, Any] = {"Driver": "nvidia", "Capabilities": [["gpu"]]}
        return request | ({"Count": -1} if gpus == "all" else {"DeviceIDs": [str(gpu) for gpu in gpus]})
    raise HostShort(
        f"GPUs are wanted ({gpus if gpus == 'all' else ', '.join(map(str, gpus))}), but the engine on {facts.name} "
        f"(Docker {facts.version}) offers neither CDI devices of NVIDIA nor the nvidia runtime",
        code="gpu-not-offered",
        hint=TOOLKIT,
    )


@contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn whatever docker-py raises into an error for people.

    Args:
        doing: what was being done, as in "starting the container".

    Raises:
        RuntimeUnreachable: when the engine no longer answers.
        ZopsError: with the engine's own words, when it refused.
    """
    import docker.errors  # noqa: PLC0415 - as in connect
    import requests  # noqa: PLC0415

    try:
        yield
    except docker.errors.APIError as error:
        raise ZopsError(
            f"{doing}: the engine refused: {_one_line(error.explanation or error)}", code="engine-refused"
        ) from error
    except (requests.RequestException, docker.errors.DockerException) as error:
        raise RuntimeUnreachable(f"{doing}: the engine did not answer: {_one_line(error)}") from error


def unreachable(url: str, error: BaseException) -> RuntimeUnreachable:
    """Say why an engine cannot be talked to, and what to do, from the error that its client raised."""
    causes = list(_causes(error))
    if any(isinstance(cause, PermissionError) for cause in causes):
        return RuntimeUnreachable(
            f"no permission to talk to the engine at {url}",
            code="engine-no-permission",
            hint="sudo usermod -aG docker $USER, then log in again; or run zops with sudo",
            tried=url,
        )
    if any(isinstance(cause, FileNotFoundError | ConnectionRefusedError) for cause in causes):
        missing = url.startswith("unix://") and not Path(url.removeprefix("unix://")).exists()
        return RuntimeUnreachable(
            f"no engine runs at {url} ({'there is no such socket' if missing else 'nobody listens'})",
            code="engine-not-running",
            hint="sudo systemctl start docker; or name another with --engine; or do without: --runtime process",
            tried=url,
        )
    return RuntimeUnreachable(
        f"the engine at {url} does not answer: {_one_line(causes[-1])}",
        hint="check the address and the network; see which engines the docker command knows: docker context ls",
        tried=url,
    )


def _try_socket(url: str) -> None:
    """Find out whether anybody listens: docker-py leaves its socket open when nobody does, and hides the reason."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect("/" + url.removeprefix("unix://").lstrip("/"))
        except OSError as error:
            raise unreachable(url, error) from error


def _context(name: str) -> Endpoint:
    from docker.context import ContextAPI  # noqa: PLC0415 - as in connect

    if name == "default":
        return Endpoint(DEFAULT_URL)
    try:
        context = ContextAPI.get_context(name)
    except Exception as error:  # docker-py raises bare Exception for a file that it cannot read
        raise RuntimeUnreachable(
            f"the docker context {name} cannot be read: {error}", code="engine-no-context"
        ) from error
    if context is None:
        raise RuntimeUnreachable(
            f"there is no docker context {name}",
            code="engine-no-context",
            hint="list them with: docker context ls; make one with: docker context create",
        )
    return Endpoint(str(context.Host), context.TLSConfig)


def _environment_tls(environ: Mapping[str, str]) -> Any:
    import docker.errors  # noqa: PLC0415 - as in connect
    from docker.utils import kwargs_from_env  # noqa: PLC0415

    try:
        return kwargs_from_env(dict(environ) or {"": ""}).get("tls")
    except docker.errors.TLSParameterError as error:
        raise RuntimeUnreachable(
            f"the certificates of DOCKER_CERT_PATH cannot be used: {_one_line(error)}", code="engine-no-certificates"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and what these carry as arguments, outermost first."""
    while error is not None:
        yield error
        for argument in error.args:
            if isinstance(argument, BaseException):
                yield from _causes(argument)
        error = error.__cause__ or error.__context__


def _one_line(text: object) -> str:
    return " ".join(str(text).split())

"""compose/ must be the very container that the docker runtime makes, option by option."""

import re
from pathlib import Path

import pytest
import yaml

from zops.host.engine import EngineFacts
from zops.runtime.base import Deployment
from zops.runtime.container import container_options
from zops.spec import RESERVED_VARIABLES, Spec, fields, variable

COMPOSE = Path(__file__).parents[2] / "compose"
CACHE = Path("/srv/zops/cache")
# What only zops needs (labels), or what is the engine's default and needs no words in a compose file.
NOT_COMPARED = {"Labels", "StopSignal"}
NANOSECONDS = 1_000_000_000
CHANGED = {
    "name": "painter",
    "model": "zops/synthetic-tiny",
    "image": {"name": "elsewhere:2"},
    "serve": {
        "host": "0.0.0.0",
        "port": 9000,
        "dtype": "float32",
        "max_pixels": 1 << 20,
        "max_images": 2,
        "max_queue": 3,
        "warmup_size": 64,
        "request_timeout_s": 30,
        "startup_timeout_s": 60,
    },
    "resources": {"memory": "4GiB", "shm": "2GiB", "log_bytes": "1MB", "log_files": 2},
}
MINIMAL: dict = {}


def engine(**changes) -> EngineFacts:
    info = {"Name": "host", "ServerVersion": "20.10.24", "MemTotal": 1 << 40, **changes}
    return EngineFacts.from_info(info, api_version="1.41")


def deployment(settings: dict) -> Deployment:
    spec = Spec.model_validate({"cache": {"dir": CACHE}, "gpus": "none"} | settings)
    return Deployment(spec, CACHE / "models" / "m" / "snapshots" / "r", "r", "0" * 64)


def environ_of(wanted: Deployment) -> dict[str, str]:
    """The .env that an operator would write for a specification: only what is not the default."""
    flat = {path: _value(wanted.spec, path) for path, _ in fields()}
    usual = {path: _value(Spec(), path) for path, _ in fields()}
    chosen = {variable(path): str(value) for path, value in flat.items() if value is not None and value != usual[path]}
    # A memory limit and the like are numbers in the spec by now, as the .env has them.
    chosen["ZOPS_STOP_GRACE_S"] = str(wanted.stop_timeout_s)
    return chosen | {"ZOPS_SNAPSHOT": "/cache/models/m/snapshots/r"}


def _value(spec: Spec, path: str):
    for part in path.split("."):
        spec = getattr(spec, part)
    return spec


def interpolate(node, environ: dict[str, str]):
    """Fill in `${NAME:-default}` and `${NAME:?message}` as compose does."""
    if isinstance(node, dict):
        return {key: interpolate(value, environ) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, environ) for value in node]
    if not isinstance(node, str):
        return node

    def fill(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if environ.get(name):
            return environ[name]
        assert kind == ":-", f"{name} must be given: {text}"
        return text

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", fill, node)


def service(environ: dict[str, str], *files: str) -> dict:
    """The service of compose.yaml with overrides merged in, the way compose merges mappings."""
    merged: dict = {}
    for file in files:
        part = interpolate(yaml.safe_load((COMPOSE / file).read_text()), environ)["services"]["zops"]
        environment = merged.get("environment", {}) | part.get("environment", {})
        merged |= part | {"environment": environment}
    return merged


def nanoseconds(text: str) -> int:
    return int(float(text.removesuffix("s")) * NANOSECONDS)


def as_engine_body(service: dict) -> dict:
    """What compose sends to the engine for a service."""
    address, published, inside = service["ports"][0].rsplit(":", 2)
    check, logging = service["healthcheck"], service["logging"]
    tmpfs = dict(entry.split(":", 1) for entry in service["tmpfs"])
    mounts = [
        {"Type": m["type"], "Source": m["source"], "Target": m["target"]}
        | ({"ReadOnly": True} if m.get("read_only") else {})
        for m in service["volumes"]
    ]
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    requests = [
        {"Driver": d["driver"], "Capabilities": [d["capabilities"]], "Count": -1 if d["count"] == "all" else d["count"]}
        for d in reserved
    ]
    memory = int(service["mem_limit"])
    host = {
        "Mounts": mounts,
        "PortBindings": {f"{inside}/tcp": [{"HostIp": address, "HostPort": published}]},
        "RestartPolicy": {"Name": service["restart"]},
        "LogConfig": {"Type": logging["driver"], "Config": logging["options"]},
        "ShmSize": int(service["shm_size"]),
        "PidsLimit": service["pids_limit"],
        "CapDrop": service["cap_drop"],
        "SecurityOpt": service["security_opt"],
        "Privileged": service.get("privileged", False),
        "ReadonlyRootfs": service["read_only"],
        "Tmpfs": tmpfs,
    }
    host |= {"Memory": memory, "MemorySwap": int(service["memswap_limit"])} if memory else {}
    host |= {"DeviceRequests": requests} if requests else {}
    return {
        "Image": service["image"],
        "Hostname": service["hostname"],
        "User": service["user"],
        "Env": sorted(f"{name}={value}" for name, value in service["environment"].items()),
        "ExposedPorts": {f"{inside}/tcp": {}},
        "Healthcheck": {
            "Interval": nanoseconds(check["interval"]),
            "Timeout": nanoseconds(check["timeout"]),
            "Retries": check["retries"],
            "StartPeriod": nanoseconds(check["start_period"]),
        },
        "StopTimeout": int(service["stop_grace_period"].removesuffix("s")),
        "HostConfig": host,
    }


def comparable(body: dict) -> dict:
    """An engine body without what depends on who made the container: its labels, and the volume's name."""
    kept = {key: value for key, value in body.items() if key not in NOT_COMPARED}
    mounts = [
        {key: value for key, value in mount.items() if key != "VolumeOptions"}
        | ({"Source": "a volume"} if mount["Type"] == "volume" else {})
        for mount in body["HostConfig"]["Mounts"]
    ]
    return kept | {"HostConfig": body["HostConfig"] | {"Mounts": mounts}}


@pytest.mark.parametrize("settings", [MINIMAL, CHANGED], ids=["defaults", "everything changed"])
def test_the_compose_file_must_be_the_container_of_the_docker_runtime(settings):
    wanted = deployment(settings)
    environ = environ_of(wanted)
    made = comparable(as_engine_body(service(environ, "compose.yaml")))
    assert made == comparable(container_options(wanted, engine()))


def test_the_gpu_file_must_ask_for_gpus_as_the_docker_runtime_does():
    wanted = deployment({"gpus": "all"})
    environ = environ_of(wanted) | {"ZOPS_CACHE_DIR": str(CACHE)}
    made = as_engine_body(service(environ, "compose.yaml", "compose.gpu.yaml"))
    expected = container_options(wanted, engine(Runtimes={"nvidia": {}}))
    assert made["HostConfig"]["DeviceRequests"] == expected["HostConfig"]["DeviceRequests"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in made["Env"]


def test_without_a_cache_directory_compose_must_refuse():
    with pytest.raises(AssertionError, match="ZOPS_CACHE_DIR must be given"):
        service({}, "compose.yaml")


def test_every_variable_of_the_compose_file_must_be_one_that_zops_knows():
    named = set(re.findall(r"\$\{(\w+):", (COMPOSE / "compose.yaml").read_text()))
    known = {variable(path) for path, _ in fields()} | RESERVED_VARIABLES
    # Compose cannot add 15 to another number.
    assert named - known == {"ZOPS_STOP_GRACE_S"}


def test_the_example_of_settings_must_name_every_variable_with_its_default():
    example = dict(re.findall(r"^(?:# )?(ZOPS_\w+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (COMPOSE / "compose.yaml").read_text()))
    shown_otherwise = {"ZOPS_SNAPSHOT", "ZOPS_RESOURCES_MEMORY"}  # unset by default, so that an example says more
    assert example.keys() == defaults.keys() | {"ZOPS_CACHE_DIR"}
    assert {name: example[name] for name in defaults.keys() - shown_otherwise} == {
        name: value for name, value in defaults.items() if name not in shown_otherwise
    }

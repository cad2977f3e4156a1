"""Building the inference image: what goes into the context, the build itself, and what came of it.

What the image is made of is in images/inference/Dockerfile. The same files are found in a source checkout and in an
installed zops, so that an operator needs no checkout to build.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import zops
from zops.errors import HostShort, SourceFailed, SpecError, ZopsError
from zops.events import Report, task
from zops.host.engine import connect, engine_errors
from zops.host.paths import state_dir
from zops.runtime.buildkit import find_builder, reason, run_build
from zops.spec import Image

DOCKERFILE = "images/inference/Dockerfile"
WHEELS = "wheels"
"""Directory of the context that holds `image.wheels`; the Dockerfile's default."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "FTP_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class _Failure:
    """A way in which builds fail for reasons outside of them: what they say then, and what to do."""

    said: str
    kind: type[ZopsError]
    code: str
    remedy: str


# The first that fits.
_FAILURES = (
    _Failure(
        said="no space left on device",
        kind=HostShort,
        code="image-no-space",
        remedy="free space where the engine keeps its images, for example with: docker builder prune",
    ),
    _Failure(
        said="certificate_verify_failed|certificate verification failed|x509:",
        kind=SourceFailed,
        code="image-certificate",
        remedy="behind a company proxy, name its CA bundle: --set image.ca=/etc/ssl/certs/ca-certificates.crt",
    ),
    _Failure(
        said="no matching distribution found|could not find a version",
        kind=SourceFailed,
        code="image-package-missing",
        remedy="name an index or a directory that has it: --set image.torch_index=URL or --set image.wheels=DIR",
    ),
    _Failure(
        said="failed to resolve source metadata|pull access denied|failed to do request",
        kind=SourceFailed,
        code="image-base-missing",
        remedy="give the engine the base image first: docker pull {base}; or, without a registry, docker load",
    ),
)


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that the engine now has."""

    name: str
    id: str
    size_bytes: int
    seconds: float
    """How long the build took; a second or two when everything was cached."""
    log: Path
    """The whole output of the build."""


def build_image(engine: str, image: Image, report: Report, *, tag: str | None = None) -> BuiltImage:
    """Build the inference image on an engine.

    Args:
        engine: local, context:NAME, or an address, as in the specification.
        image: what to build it from.
        report: gets each step that is not cached.
        tag: name of the image instead of `image.name`.

    Raises:
        SpecError: when `image` names files that are not there, or cannot be built.
        RuntimeUnreachable: when the engine does not answer, or no docker command here can build.
        HostShort: when the engine's disk is full.
        SourceFailed: when the base image or a package could not be fetched.
        ZopsError: when the build failed for another reason; names the log.
    """
    name = tag or image.name
    _refuse_impossible(image, name)
    connect(engine).close()  # says better than any build why an engine does not answer
    builder = find_builder()
    log = state_dir() / "builds" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (
        task(report, "image-build", f"building {name}", unit="steps"),
        tempfile.TemporaryDirectory(prefix="zops-build-") as temporary,
        tempfile.TemporaryDirectory(prefix="zops-built-") as output,
        log.open("w", encoding="utf-8") as stream,
    ):
        context = Path(temporary)
        assemble(context, image)

        def build(arguments: list[str]) -> None:
            argv, environment = builder.argv(engine, arguments), builder.environment(engine, os.environ)
            status, tail = run_build(argv, environment=environment, log=stream, report=report)
            if status != 0:
                raise _failure(name, image, tail, log)

        arguments = build_arguments(context, image, os.environ)
        build([*arguments, *_only_torch(output), str(context)])
        build([*arguments, *_with_torch(output), f"--tag={name}", str(context)])
    present = find_image(engine, name)
    if present is None:
        raise ZopsError(f"the build of {name} ended well, but the engine does not have it", code="image-not-loaded")
    return BuiltImage(name, *present, time.monotonic() - began, log)


def find_image(engine: str, name: str) -> tuple[str, int] | None:
    """Return the id of an image and its size in bytes, None when the engine does not have it.

    Raises:
        RuntimeUnreachable: when the engine does not answer.
    """
    client = connect(engine)
    try:
        with engine_errors(f"looking for the image {name}"):
            found = client.images.list(name=name)
    finally:
        client.close()
    return (str(found[0].id), int(found[0].attrs["Size"])) if found else None


def image_size(engine: str, name: str) -> int | None:
    """Return the size of an image in bytes, None when the engine does not have it."""
    found = find_image(engine, name)
    return found[1] if found else None


def assets(package: Path | None = None) -> dict[str, Path]:
    """Return what the context is made of: name in the context -> file or directory.

    Args:
        package: directory of the zops package; the running one by default.

    Raises:
        ZopsError: when zops was installed without them.
    """
    package = package or Path(zops.__file__).parent
    for root in (package.parent, package / "_assets"):
        if (root / DOCKERFILE).is_file():
            break
    else:
        raise ZopsError(
            f"what the image is built from is missing beside {package}",
            code="image-assets-missing",
            hint="install zops from its wheel, or run it from its source checkout",
        )
    names = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "images/inference")
    return {name: root / name for name in names} | {"zops": package}


def assemble(context: Path, image: Image, package: Path | None = None) -> None:
    """Fill an empty directory with exactly what the Dockerfile needs.

    Args:
        context: the directory.
        image: whose wheels to add.
        package: as in `assets`.

    Raises:
        ZopsError: when a part is missing.
    """
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", "_assets")
    for name, source in assets(package).items():
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=leave)
        elif source.is_file():
            shutil.copy2(source, target)
        else:
            raise ZopsError(f"{source} is missing, the image cannot be built without it", code="image-assets-missing")
    (context / WHEELS).mkdir()
    if image.wheels:
        for wheel in sorted(image.wheels.expanduser().glob("*.whl")):
            _link(wheel, context / WHEELS / wheel.name)


def build_arguments(context: Path, image: Image, environ: Mapping[str, str]) -> list[str]:
    """Return the arguments of the build, whatever command runs it, but for what is to become of it."""
    values = {
        "BASE": image.base,
        "TORCH_INDEX": image.torch_index or "",
        "WHEELS": WHEELS,
        "ZOPS_VERSION": zops.__version__,
        "REVISION": _revision(),
        "CREATED": _created(context, environ),
    }
    arguments = [f"--build-arg={key}={value}" for key, value in values.items()]
    # Named without their values, which may carry a password: the command reads them from its environment, and the
    # engine keeps these few out of the image's history.
    arguments += [f"--build-arg={key}" for proxy in PROXIES for key in (proxy, proxy.lower()) if environ.get(key)]
    if image.ca:
        arguments.append(f"--secret=id=ca,src={image.ca.expanduser()}")
    return [*arguments, f"--file={context / DOCKERFILE}"]


def _only_torch(output: str) -> list[str]:
    """Return the arguments that have the build write down which torch it found, and make no image."""
    return ["--target=torch", f"--output=type=local,dest={output}"]


def _with_torch(output: str) -> list[str]:
    """Return the arguments for the labels of the image, which nothing inside the build could set."""
    version, cuda = (Path(output) / "torch.txt").read_text(encoding="utf-8").split()
    return [f"--build-arg=TORCH={version}", f"--build-arg=TORCH_CUDA={cuda}"]


def _refuse_impossible(image: Image, name: str) -> None:
    if "@" in name:
        raise SpecError(
            f"image.name is {name}: what is built here cannot have a digest given in advance",
            hint="name it without a digest, or take it from a registry with: image.build: false",
            path="image.name",
        )
    if image.wheels and not image.wheels.expanduser().is_dir():
        raise SpecError(f"image.wheels is {image.wheels}: there is no such directory", path="image.wheels")
    if image.ca and not image.ca.expanduser().is_file():
        raise SpecError(f"image.ca is {image.ca}: there is no such file", path="image.ca")
    if image.torch_index and "@" in urlsplit(image.torch_index).netloc:
        raise SpecError(
            "image.torch_index carries a user name or password, which would stay readable in the image's history",
            hint="download the wheels first and hand them in: --set image.wheels=DIR",
            path="image.torch_index",
        )


def _link(source: Path, target: Path) -> None:
    """Give a wheel a second name, or copy it where that is not possible (another disk, another owner)."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        # With its time: the newest input dates the image, and equal inputs must give an equal one.
        shutil.copy2(source, target)


def _revision() -> str:
    """Return the commit of the source checkout (with `-dirty` when files differ from it), empty without one."""
    root = Path(zops.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    argv = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _created(context: Path, environ: Mapping[str, str]) -> str:
    """Return the time of the newest input, so that the same inputs give the same image; SOURCE_DATE_EPOCH wins."""
    epoch = environ.get("SOURCE_DATE_EPOCH", "")
    newest = max(path.stat().st_mtime for path in context.rglob("*") if path.is_file())
    moment = datetime.fromtimestamp(int(epoch) if epoch.isdecimal() else int(newest), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _failure(name: str, image: Image, tail: list[str], log: Path) -> ZopsError:
    why, said = reason(tail), "\n".join(tail).lower()
    for failure in _FAILURES:
        if re.search(failure.said, said):
            hint = f"{failure.remedy.format(base=image.base)} (the whole log: {log})"
            return failure.kind(
                f"building {name} failed: {why}", code=failure.code, hint=hint, log=str(log), lines=tail
            )
    return ZopsError(
        f"building {name} failed: {why}",
        code="image-build-failed",
        hint=f"see the log: {log}",
        log=str(log),
        lines=tail,
    )

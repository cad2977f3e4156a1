"""What the doctor's checks look at: the specification, what it needs, and the facts of this host, each read once."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

from zops.errors import RuntimeUnreachable
from zops.host.cdi import CdiFacts, read_cdi
from zops.host.devices import missing_char_links
from zops.host.disk import Disk, disk_of, measure_read
from zops.host.engine import EngineFacts, inspect, resolve
from zops.host.fences import Fence, standing_fences
from zops.host.gpu import Gpu, GpuFacts, read_gpus
from zops.host.hub import Answer, Silence, ask
from zops.host.kernel_log import KernelLog, read_xids
from zops.host.memory import Memory, read_memory, read_shared_memory
from zops.host.ports import Listener, find_listener, why_not_bindable
from zops.spec import Spec

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Need:
    """What the deployment will ask of this host, as far as it is known; the model's numbers come from the catalog.

    Attributes:
        gpu_weights_bytes: GPU memory for the weights, 0 when it is not known.
        gpu_activation_bytes: GPU memory on top of that while the largest allowed image is made.
        load_bytes: host memory that loading takes at its peak, 0 when it is not known.
        disk_bytes: bytes that the cache still lacks, None when it is not known.
        files: files that it still lacks.
        read_bytes: bytes that a cold start reads from the cache, 0 when it is not known.
        slim_bytes: the same once the snapshot is slim (`zops cache slim`), 0 when it is not known.
        snapshot: the snapshot that will be served, None while the cache has none.
        torch_cuda: CUDA version that torch is built for, "cpu" for none at all, empty when it is not known.
        torch_from: how that is known.
        hub: address that tells of the model at its hub or mirror, empty when no hub is asked for anything.
        authorization: the header with the token or password for it, empty without one; never printed.
        has_other_source: whether the weights can also be had without that hub.
    """

    gpu_weights_bytes: int = 0
    gpu_activation_bytes: int = 0
    load_bytes: int = 0
    disk_bytes: int | None = None
    files: int = 0
    read_bytes: int = 0
    slim_bytes: int = 0
    snapshot: Path | None = None
    torch_cuda: str = ""
    torch_from: str = ""
    hub: str = ""
    authorization: str = field(default="", repr=False)
    has_other_source: bool = False


@dataclass(frozen=True, slots=True)
class Senses:
    """How facts are read; a test puts its own in place of the ones that need hardware."""

    gpus: Callable[[], GpuFacts] = read_gpus
    memory: Callable[[], Memory] = read_memory
    shared_memory: Callable[[], int | None] = read_shared_memory
    disk: Callable[[Path], Disk] = disk_of
    measure_read: Callable[[Path], float | None] = measure_read
    engine: Callable[[str], EngineFacts] = inspect
    cdi: Callable[[Sequence[str]], CdiFacts] = read_cdi
    missing_char_links: Callable[[], tuple[str, ...] | None] = missing_char_links
    kernel_log: Callable[[], KernelLog] = read_xids
    fences: Callable[[], tuple[Fence, ...]] = standing_fences
    hub: Callable[[str, str], Answer | Silence] = ask
    why_not_bindable: Callable[[str, int], str] = why_not_bindable
    listener: Callable[[int], Listener | None] = find_listener


class Fact(Generic[Value]):
    """A property that is read once, at its first use, and not twice when several checks ask at the same time."""

    def __init__(self, read: Callable[[Any], Value]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        """Remember under which name the value is kept."""
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Self: ...
    @overload
    def __get__(self, holder: "Context", owner: type) -> Value: ...
    def __get__(self, holder: "Context | None", owner: type) -> Value | Self:
        """Return the value, reading it where nobody has."""
        if holder is None:
            return self
        with holder.guard:
            lock = holder.locks.setdefault(self._name, threading.RLock())
        with lock:
            if self._name not in holder.seen:
                holder.seen[self._name] = self._read(holder)
            value: Value = holder.seen[self._name]
            return value


@dataclass(frozen=True)
class Context:
    """What the checks judge: the specification, what it needs, and the facts, each read once and only when asked for.

    Attributes:
        spec: the deployment.
        file: where it was read from, None when everything is default.
        need: what it will ask of the host.
        own_ports: ports on which an instance of ours serves already.
        senses: how facts are read.
        readable: raises where the one who serves could not read the snapshot; None where that is the one who asks.
        seen: the facts that were read.
    """

    spec: Spec
    file: Path | None = None
    need: Need = Need()
    own_ports: frozenset[int] = frozenset()
    senses: Senses = field(default_factory=Senses)
    readable: Callable[[EngineFacts | None], None] | None = None
    seen: dict[str, Any] = field(default_factory=dict, repr=False)
    locks: dict[str, threading.RLock] = field(default_factory=dict, repr=False)
    guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @Fact
    def gpus(self) -> GpuFacts:
        """GPUs of this host."""
        return self.senses.gpus()

    @Fact
    def memory(self) -> Memory:
        """Memory of this host."""
        return self.senses.memory()

    @Fact
    def disk(self) -> Disk:
        """The file system in which the cache lies."""
        return self.senses.disk(self.spec.cache.dir)

    @Fact
    def engine(self) -> EngineFacts | RuntimeUnreachable:
        """The container engine, or why it cannot be talked to."""
        try:
            return self.senses.engine(self.spec.engine)
        except RuntimeUnreachable as error:
            return error

    @Fact
    def kernel_log(self) -> KernelLog:
        """What the kernel's log says of the GPUs."""
        return self.senses.kernel_log()

    @Fact
    def fences(self) -> tuple[Fence, ...]:
        """GPUs of this host that must not be used."""
        return self.senses.fences()

    @Fact
    def hub(self) -> Answer | Silence:
        """What the hub answers to a question about the model."""
        return self.senses.hub(self.need.hub, self.need.authorization)

    @property
    def asks_hub(self) -> bool:
        """Whether a hub has to be asked for anything: the cache lacks something, and a hub is its source."""
        return bool(self.need.hub) and self.need.disk_bytes != 0

    @Fact
    def on_this_host(self) -> bool:
        """Whether instances run on this machine, so that its disks, memory, ports and GPUs are the ones that matter."""
        if self.spec.runtime != "docker":
            return self.spec.runtime == "process"
        try:
            return resolve(self.spec.engine).is_local
        except RuntimeUnreachable:
            # The engine check says what is wrong with it; whose host it would be on is not known.
            return False

    @property
    def wanted_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs of this host that the specification asks for."""
        if self.spec.gpus == "none":
            return ()
        if self.spec.gpus == "all":
            return self.gpus.gpus
        return tuple(gpu for gpu in self.gpus.gpus if gpu.index in self.spec.gpus or gpu.uuid in self.spec.gpus)

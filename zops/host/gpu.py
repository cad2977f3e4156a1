"""GPUs of this machine as NVIDIA's management library (NVML) sees them; the only place that talks to it.

A host without GPUs is a fact, not an error: `read_gpus` never raises, it says why it saw nothing. Meanings of the
answers: NVIDIA's NVML API reference.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

BFLOAT16_SINCE = (8, 0)
"""First compute capability with bfloat16 in hardware (Ampere); CUDA C programming guide, arithmetic instructions."""

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that mean trouble. The others (idle, set clocks, the power cap that
# every busy card reaches) are how a sound GPU works.
SLOWDOWNS = {0x08: "hardware", 0x20: "heat, by the driver", 0x40: "heat, by the hardware", 0x80: "power brake"}
FULL_SPEED_STATE = 0
PROC = Path("/proc")
NO_DRIVER = "no NVIDIA driver here (libnvidia-ml.so.1 not found)"
"""What `GpuFacts.reason` says where there is not even the library: no GPU was given to this host or container."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A program that computes on a GPU. `name` is empty and `memory_bytes` None where they cannot be seen."""

    pid: int
    name: str = ""
    memory_bytes: int | None = None

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f" with {self.memory_bytes / 1e9:.1f} GB"
        return f"{self.name or 'process'} (pid {self.pid}){memory}"


@dataclass(frozen=True, slots=True)
class Link:
    """The PCIe link of a GPU: what it runs at, and the most that card and slot allow together."""

    generation: int
    width: int
    max_generation: int
    max_width: int

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.width} of {self.max_generation} x{self.max_width}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. What a GPU or its driver does not tell is None (consumer cards, for example, count no ECC errors)."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    compute_capability: tuple[int, int] | None = None
    temperature_c: int | None = None
    ecc_uncorrected: int | None = None
    """Uncorrectable memory errors since the driver was loaded."""
    ecc_uncorrected_ever: int | None = None
    """Uncorrectable memory errors in the life of the board."""
    slowdown_c: int | None = None
    """Temperature at which it slows itself down."""
    slowdowns: tuple[str, ...] | None = None
    """Why its clocks are held down now, where that means trouble."""
    retired_pages: int | None = None
    """Pages of memory taken out of use for double-bit errors (before Ampere)."""
    repair_pending: bool | None = None
    """Whether pages or rows of memory wait for a reset to be taken out of use."""
    repair_failed: bool | None = None
    """Whether a broken row of memory could not be replaced by a spare one."""
    remapped_rows: int | None = None
    """Rows of memory replaced for uncorrectable errors (Ampere and newer)."""
    persistence: bool | None = None
    """Whether the driver stays loaded while nobody uses the GPU."""
    at_full_speed: bool | None = None
    """Whether it is in its fastest performance state; an idle GPU lowers its clocks and its link."""
    link: Link | None = None
    pci: str = ""
    """Its address as the kernel's log has it: domain:bus:device, in hexadecimal digits."""
    processes: tuple[GpuProcess, ...] | None = None

    @property
    def memory_free_bytes(self) -> int:
        """Bytes that nobody uses now."""
        return self.memory_total_bytes - self.memory_used_bytes

    @property
    def has_bfloat16(self) -> bool | None:
        """Whether the GPU computes bfloat16 in hardware; None when its generation is not known."""
        return None if self.compute_capability is None else self.compute_capability >= BFLOAT16_SINCE


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """Every GPU of this host, with the driver behind them; without any, or where one is missing, `reason` says why."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: str = ""
    """Newest CUDA version that the driver can run, for example 13.0."""
    reason: str = ""
    lost: tuple[int, ...] = ()
    """Indices of GPUs that fell off the bus, or that answer nothing before they are reset."""


def read_gpus() -> GpuFacts:
    """Ask NVML for every GPU; a host without driver, GPU or permission gives empty facts and the reason."""
    import pynvml  # noqa: PLC0415 - 40 ms and a C library that only this question needs

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuFacts(reason=_why(pynvml, error))
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return GpuFacts(reason=_why(pynvml, error))
    finally:
        _told(pynvml, pynvml.nvmlShutdown)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a GPU runs at now; figures that were measured while it is throttled are not its own."""

    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    temperature_c: int | None

    def as_json(self) -> dict[str, float | int | None]:
        """Return them as a JSON object."""
        return asdict(self)


def read_clocks() -> tuple[Clocks, ...]:
    """Ask NVML what every GPU runs at now; empty where there is none."""
    import pynvml  # noqa: PLC0415 - as above

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_read_clocks(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        _told(pynvml, pynvml.nvmlShutdown)


def _read_clocks(nvml: Any, index: int) -> Clocks:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    milliwatts = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return Clocks(
        sm_mhz=_told(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        sm_max_mhz=_told(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_mhz=_told(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        power_w=None if milliwatts is None else round(milliwatts / 1000, 1),
        temperature_c=_told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    )


def _read(nvml: Any) -> GpuFacts:
    driver = _told(nvml, nvml.nvmlSystemGetDriverVersion)
    cuda = _told(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    gpus: list[Gpu] = []
    unreadable = ""
    lost: list[int] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        # A GPU that fell off the bus must not hide its healthy neighbours.
        try:
            gpus.append(_read_gpu(nvml, index))
        except nvml.NVMLError as error:
            unreadable = f"GPU {index} cannot be read: {_why(nvml, error)}"
            if error.value in {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED}:
                lost.append(index)
    return GpuFacts(
        gpus=tuple(gpus),
        driver=driver or "",
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
        reason=unreadable or ("" if gpus else "the driver is there but sees no GPU"),
        lost=tuple(lost),
    )


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[..., Value], *more: object) -> Value | None:
        return _told(nvml, lambda: ask(handle, *more))

    def errors(counter: int) -> int | None:
        return told(nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, counter)

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = told(nvml.nvmlDeviceGetCudaComputeCapability)
    pages = told(nvml.nvmlDeviceGetRetiredPages, nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR)
    rows = told(nvml.nvmlDeviceGetRemappedRows)
    pending = [_flag(told(nvml.nvmlDeviceGetRetiredPagesPendingStatus)), _flag(rows[2] if rows else None)]
    state = told(nvml.nvmlDeviceGetPerformanceState)
    running = told(nvml.nvmlDeviceGetComputeRunningProcesses_v3)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        memory_total_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        compute_capability=(int(capability[0]), int(capability[1])) if capability else None,
        temperature_c=told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        ecc_uncorrected=errors(nvml.NVML_VOLATILE_ECC),
        ecc_uncorrected_ever=errors(nvml.NVML_AGGREGATE_ECC),
        slowdown_c=told(nvml.nvmlDeviceGetTemperatureThreshold, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        slowdowns=_slowdowns(told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)),
        retired_pages=None if pages is None else len(pages),
        repair_pending=None if pending == [None, None] else any(pending),
        repair_failed=_flag(rows[3] if rows else None),
        remapped_rows=rows[1] if rows else None,
        persistence=_flag(told(nvml.nvmlDeviceGetPersistenceMode)),
        at_full_speed=None if state is None else state == FULL_SPEED_STATE,
        link=_link(nvml, told),
        pci=_pci(told(nvml.nvmlDeviceGetPciInfo)),
        processes=None if running is None else tuple(_process(entry) for entry in running),
    )


def _link(nvml: Any, told: Callable[..., Any]) -> Link | None:
    asked = (
        nvml.nvmlDeviceGetCurrPcieLinkGeneration,
        nvml.nvmlDeviceGetCurrPcieLinkWidth,
        nvml.nvmlDeviceGetMaxPcieLinkGeneration,
        nvml.nvmlDeviceGetMaxPcieLinkWidth,
    )
    answers = [told(ask) for ask in asked]
    return None if None in answers else Link(*answers)


def _slowdowns(bits: int | None) -> tuple[str, ...] | None:
    return None if bits is None else tuple(word for bit, word in SLOWDOWNS.items() if bits & bit)


def _pci(info: Any) -> str:
    """Return the address without the function, in the kernel's lower case: PCI:0000:3b:00 in a line of its log."""
    return "" if info is None else f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}"


def _process(entry: Any) -> GpuProcess:
    # A program in a container, or of another user, may have no entry of its own here.
    try:
        name = (PROC / str(entry.pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        name = ""
    return GpuProcess(int(entry.pid), name, None if entry.usedGpuMemory is None else int(entry.usedGpuMemory))


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _told(nvml: Any, ask: Callable[[], Value]) -> Value | None:
    """Return what NVML answers, None where this GPU or driver does not know the question.

    A GPU that is lost in the middle knows no answer at all: that one is raised, lest it be taken for a sound one.
    """
    try:
        return ask()
    except nvml.NVMLError as error:
        if error.value in {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED}:
            raise
        return None


def _why(nvml: Any, error: Exception) -> str:
    """Say in the operator's words what an NVML error means."""
    meanings = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_DRIVER,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA library and kernel driver differ in version (reboot)",
        nvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it fell off the bus",
        nvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset before it can be used again",
        # What a container sees whose device access was taken away, for example by `systemctl daemon-reload`.
        nvml.NVML_ERROR_UNKNOWN: "NVML says Unknown Error: access to the GPU was taken away",
    }
    code = getattr(error, "value", None)
    return meanings.get(code, f"NVML error: {error}")

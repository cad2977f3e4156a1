"""GPUs of this machine as NVIDIA's management library (NVML) sees them; the only place that talks to it.

A host without GPUs is a fact, not an error: `read_gpus` never raises, it says why it saw nothing.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")

BFLOAT16_SINCE = (8, 0)
"""First compute capability with bfloat16 in hardware (Ampere); CUDA C programming guide, arithmetic instructions."""


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
    """Every GPU of this host, with the driver behind them; without any, `reason` says why."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: str = ""
    """Newest CUDA version that the driver can run, for example 13.0."""
    reason: str = ""


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
    for index in range(nvml.nvmlDeviceGetCount()):
        # A GPU that fell off the bus must not hide its healthy neighbours.
        try:
            gpus.append(_read_gpu(nvml, index))
        except nvml.NVMLError as error:
            unreadable = f"GPU {index} cannot be read: {_why(nvml, error)}"
    return GpuFacts(
        gpus=tuple(gpus),
        driver=driver or "",
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
        reason=unreadable or ("" if gpus else "the driver is there but sees no GPU"),
    )


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _told(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        memory_total_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        compute_capability=(int(capability[0]), int(capability[1])) if capability else None,
        temperature_c=_told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ecc_uncorrected=_told(
            nvml,
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        ),
    )


def _told(nvml: Any, ask: Callable[[], Value]) -> Value | None:
    """Return what NVML answers, None where this GPU or driver does not know the question."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _why(nvml: Any, error: Exception) -> str:
    """Say in the operator's words what an NVML error means."""
    meanings = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver here (libnvidia-ml.so.1 not found)",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA library and kernel driver differ in version (reboot)",
        nvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it fell off the bus",
        # What a container sees whose device access was taken away, for example by `systemctl daemon-reload`.
        nvml.NVML_ERROR_UNKNOWN: "NVML says Unknown Error: access to the GPU was taken away",
    }
    code = getattr(error, "value", None)
    return meanings.get(code, f"NVML error: {error}")

"""A stand-in for NVML's Python binding: the functions a profiler needs, on simulated GPUs."""

from dataclasses import dataclass
from typing import Any

from tightship_simulation.client import (  # type: ignore[import-not-found]
    DeviceUnavailableError,
    list_visible,
)

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
_MESSAGES = {
    NVML_ERROR_UNINITIALIZED: "Uninitialized",
    NVML_ERROR_NOT_FOUND: "Not Found",
    NVML_ERROR_DRIVER_NOT_LOADED: "Driver Not Loaded",
}


class NVMLError(Exception):
    """An NVML status other than success."""

    def __init__(self, value: int) -> None:
        super().__init__(_MESSAGES[value])
        self.value = value


class NVMLError_Uninitialized(NVMLError):
    """nvmlInit wasn't called."""


class NVMLError_NotFound(NVMLError):
    """There is no such device."""


class NVMLError_DriverNotLoaded(NVMLError):
    """There is no driver."""


@dataclass(frozen=True)
class _Memory:
    total: int
    free: int
    used: int


@dataclass(frozen=True)
class _Utilization:
    gpu: int
    memory: int


_initialized = 0


def nvmlInit() -> None:
    global _initialized
    if not _gpus():
        raise NVMLError_DriverNotLoaded(NVML_ERROR_DRIVER_NOT_LOADED)
    _initialized += 1


def nvmlShutdown() -> None:
    global _initialized
    if not _initialized:
        raise NVMLError_Uninitialized(NVML_ERROR_UNINITIALIZED)
    _initialized -= 1


def nvmlSystemGetDriverVersion() -> str:
    return str(_known()[0]["driver"])


def nvmlDeviceGetCount() -> int:
    return len(_known())


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    gpus = _known()
    if not 0 <= index < len(gpus):
        raise NVMLError_NotFound(NVML_ERROR_NOT_FOUND)
    return str(gpus[index]["uuid"])


def nvmlDeviceGetHandleByUUID(uuid: str | bytes) -> str:
    return str(_device(uuid.decode() if isinstance(uuid, bytes) else uuid)["uuid"])


def nvmlDeviceGetUUID(handle: str) -> str:
    return str(_device(handle)["uuid"])


def nvmlDeviceGetName(handle: str) -> str:
    return str(_device(handle)["product"])


def nvmlDeviceGetMemoryInfo(handle: str) -> _Memory:
    gpu = _device(handle)
    return _Memory(total=gpu["total"], free=gpu["free"], used=gpu["used"])


def nvmlDeviceGetUtilizationRates(handle: str) -> _Utilization:
    gpu = _device(handle)
    return _Utilization(round(100 * gpu["gpu_utilization"]), round(100 * gpu["memory_utilization"]))


def _gpus() -> list[dict[str, Any]]:
    try:
        gpus: list[dict[str, Any]] = list_visible()
    except DeviceUnavailableError as error:
        raise NVMLError_DriverNotLoaded(NVML_ERROR_DRIVER_NOT_LOADED) from error
    return gpus


def _known() -> list[dict[str, Any]]:
    if not _initialized:
        raise NVMLError_Uninitialized(NVML_ERROR_UNINITIALIZED)
    return _gpus()


def _device(uuid: str) -> dict[str, Any]:
    for gpu in _known():
        if gpu["uuid"] == uuid:
            return gpu
    raise NVMLError_NotFound(NVML_ERROR_NOT_FOUND)

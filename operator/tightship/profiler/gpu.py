"""The device as a port: its memory and how busy it is, read from outside the engine.

The profiling Job owns its device, so what the engine takes is the device's used memory minus its value before the start;
per-process figures of NVML carry host PIDs and are no use in a container. For the CPU back end the device is the memory and the time of
the engine's processes, which are exactly the profiler's descendants.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tightship.profiler.clock import Clock
from tightship.profiler.errors import EngineError

GIB: Final = 1024**3


@dataclass(frozen=True)
class DeviceIdentity:
    """Which device it is."""

    kind: str
    """"cuda" or "cpu"."""
    product: str | None
    memory: int
    """Total, bytes."""
    uuid: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Utilization:
    """How busy the device is, 0..1 each; None where that can't be read."""

    compute: float | None
    memory: float | None


class Device(Protocol):
    """One GPU, or what plays its part."""

    @property
    def identity(self) -> DeviceIdentity:
        """Which device it is."""

    def used(self) -> int:
        """Bytes of its memory in use, by anyone. Raises DeviceError when it can't be read any more."""

    def utilization(self) -> Utilization:
        """How busy it is: over the driver's last sampling period, or since the last call."""


class DeviceError(EngineError):
    """There is no device, or it can't be read: what was measured on it stands, and nothing more can be."""


class NvmlDevice:
    """The one GPU this container sees, through NVML."""

    def __init__(self, nvml: Any, visible: str = "") -> None:
        """`nvml`: the module `pynvml` or its equal; `visible`: NVIDIA_VISIBLE_DEVICES, which may name the GPU.

        Raises:
            DeviceError: no driver, or no GPU in this container.
        """
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = self._find(visible)
            total = int(self._memory().total)
            self._identity = DeviceIdentity(
                kind="cuda",
                product=_text(nvml.nvmlDeviceGetName(self._handle)),
                memory=total,
                uuid=_text(nvml.nvmlDeviceGetUUID(self._handle)),
                driver=_text(nvml.nvmlSystemGetDriverVersion()),
            )
        except nvml.NVMLError as error:
            raise DeviceError(f"NVML can't read the GPU ({error}): does this container see one?") from error

    def _memory(self) -> Any:
        return self._nvml.nvmlDeviceGetMemoryInfo(self._handle)

    def _find(self, visible: str) -> Any:
        if "GPU-" in visible:
            uuid = visible.split(",", maxsplit=1)[0]
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid[uuid.index("GPU-") :])
        if not self._nvml.nvmlDeviceGetCount():
            raise DeviceError("NVML reports no GPU in this container: check runtimeClassName and the GPU request")
        return self._nvml.nvmlDeviceGetHandleByIndex(0)

    @property
    def identity(self) -> DeviceIdentity:
        """Product, UUID, driver and memory, as the driver names them."""
        return self._identity

    def used(self) -> int:
        """Used memory of the whole device, bytes."""
        with contextlib.suppress(self._nvml.NVMLError):  # a driver that is busy may fail once
            return int(self._memory().used)
        try:
            return int(self._memory().used)
        except self._nvml.NVMLError as error:
            raise DeviceError(
                f"NVML can no longer read {self._identity.uuid} ({error}): the GPU may be lost, or its driver gone; the kernel's log on "
                "the node (dmesg, Xid) says why"
            ) from error

    def utilization(self) -> Utilization:
        """`utilization.gpu` and `utilization.memory`; None where the device doesn't support them."""
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        except self._nvml.NVMLError:
            return Utilization(None, None)
        return Utilization(rates.gpu / 100, rates.memory / 100)


class CpuDevice:
    """Memory and CPU time of this process's descendants."""

    def __init__(
        self, memory: int, cores: int, clock: Clock, proc: Path = Path("/proc"), root: int | None = None
    ) -> None:
        """`memory`: bytes the device counts as having; `cores`: cores of one engine; `root`: whose descendants (this process)."""
        self._identity = DeviceIdentity(kind="cpu", product="cpu", memory=memory)
        self._cores = cores
        self._clock = clock
        self._proc = proc
        self._root = os.getpid() if root is None else root
        self._tick = os.sysconf("SC_CLK_TCK")
        self._last = (clock.now(), 0.0)

    @property
    def identity(self) -> DeviceIdentity:
        """The cores and their memory."""
        return self._identity

    def used(self) -> int:
        """Resident memory of the engine's processes, pages they share counted once, in bytes."""
        return sum(self._resident(pid) for pid in self._descendants())

    def utilization(self) -> Utilization:
        """CPU time of the engine's processes over the time of its cores, since the last call."""
        now, busy = self._clock.now(), sum(self._cpu_seconds(pid) for pid in self._descendants())
        (before, had), self._last = self._last, (now, busy)
        if now <= before or busy < had:
            return Utilization(None, None)
        return Utilization(min(1.0, (busy - had) / (now - before) / self._cores), None)

    def _descendants(self) -> Iterator[int]:
        children: dict[int, list[int]] = {}
        for entry in self._proc.iterdir():
            if entry.name.isdigit():
                fields = self._stat(int(entry.name))
                if fields:
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
        pending = list(children.get(self._root, []))
        while pending:
            pid = pending.pop()
            yield pid
            pending += children.get(pid, [])

    def _stat(self, pid: int) -> list[str]:
        """Fields of /proc/PID/stat from the third (state) on; empty for a process that has gone."""
        try:
            return (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return []

    def _cpu_seconds(self, pid: int) -> float:
        fields = self._stat(pid)
        return (int(fields[11]) + int(fields[12])) / self._tick if fields else 0.0

    def _resident(self, pid: int) -> int:
        for name, field in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
            try:
                for line in (self._proc / str(pid) / name).read_text().splitlines():
                    if line.startswith(field):
                        return int(line.split()[1]) * 1024
            except OSError:
                continue
        return 0


def open_nvml(environ: dict[str, str]) -> NvmlDevice:
    """The GPU through `pynvml`, or through the copy that vLLM carries.

    Raises:
        DeviceError: neither module is there, or NVML sees no GPU.
    """
    for name in ("pynvml", "vllm.third_party.pynvml"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return NvmlDevice(module, environ.get("NVIDIA_VISIBLE_DEVICES", ""))
    raise DeviceError("the engine image has neither pynvml (package nvidia-ml-py) nor vllm.third_party.pynvml")


def memory_limit(environ: dict[str, str], cgroup: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Bytes a CPU engine may use: TIGHTSHIP_DEVICE_MEMORY, else the container's limit, else the machine's memory."""
    if environ.get("TIGHTSHIP_DEVICE_MEMORY"):
        return int(environ["TIGHTSHIP_DEVICE_MEMORY"])
    total = next(
        int(line.split()[1]) * 1024
        for line in (proc / "meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

"""Starts engines on one simulated GPU, and reads the GPU as NVML would.

The command line is the one a process would get and goes through the simulated vLLM's own parser; memory is taken by its own
start, phase by phase, with its messages. So a second engine finds what the first has left, and is refused as it would be.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tightship.profiler.engine import EngineInfo, EngineSettings
from tightship.profiler.errors import EngineError, kind_of
from tightship.profiler.gpu import DeviceIdentity, Utilization
from tightship.profiler.lastwords import last_words
from tightship.sandbox.simulation.costs import Model
from tightship.sandbox.simulation.gpu import Gpu, OutOfMemoryError
from tightship.sandbox.simulation.serving import models
from tightship.sandbox.simulation.serving.arguments import parse
from tightship.sandbox.simulation.serving.channel import RefusedError
from tightship.sandbox.simulation.serving.startup import Started, StartError, start
from tightship.sandbox.virtual.disturbance import Faults, Noise
from tightship.sandbox.virtual.engine import Place, VirtualEngine

START_SECONDS: Final = 45.0
VERSION: Final = "0.33.0+virtual"
DRIVER: Final = "580.0"
_PORT: Final = 8000  # nobody listens: it only completes the command line


class VirtualDevice:
    """A simulated GPU as the profiler reads it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    @property
    def identity(self) -> DeviceIdentity:
        """Which GPU it is."""
        gpu = self._gpu
        return DeviceIdentity("cuda", gpu.product, gpu.memory.total, uuid=gpu.uuid, driver=DRIVER)

    def used(self) -> int:
        """Bytes in use by all engines together."""
        return self._gpu.memory.used

    def utilization(self) -> Utilization:
        """Shares of the last second, in whole per cent as NVML tells them."""
        busy = self._gpu.utilization(asyncio.get_running_loop().time())
        return Utilization(round(busy.gpu, 2), round(busy.memory, 2))


class VirtualLauncher:
    """Starts engines on one GPU, one after the other or several at once; `engines` are those that became healthy."""

    def __init__(
        self,
        gpu: Gpu,
        *,
        start_seconds: float = START_SECONDS,
        known: Mapping[str, Model] | None = None,
        noise: Noise | None = None,
        faults: Sequence[Faults] = (),
    ) -> None:
        """`known`: models by name, before those of the simulated hub; `faults`: of the first engines, in order of their start."""
        self._gpu = gpu
        self._start_seconds = start_seconds
        self._known = known or {}
        self._noise = noise
        self._faults = list(faults)
        self.engines: list[VirtualEngine] = []
        self.launched: list[EngineSettings] = []

    async def launch(self, settings: EngineSettings, *, timeout: float) -> VirtualEngine:
        """Start an engine and wait until it is healthy.

        Raises:
            OutOfMemory: the GPU, or what is left of it, is too small.
            EngineError: it didn't start for another reason, or not within `timeout` seconds.
        """
        self.launched.append(settings)
        faults = self._faults.pop(0) if self._faults else Faults()
        memory = _Memory(self._gpu)
        try:
            engine = await asyncio.wait_for(self._start(settings, memory, faults), timeout)
        except asyncio.TimeoutError:
            memory.release()
            raise EngineError(f"the engine was not healthy after {timeout:.0f} s; its last words: none") from None
        except BaseException:
            memory.release()
            raise
        self.engines.append(engine)
        return engine

    async def _start(self, settings: EngineSettings, memory: _Memory, faults: Faults) -> VirtualEngine:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options = parse(settings.arguments(_PORT))
            model = self._known.get(settings.model) or models.find(settings.model)
            if faults.start_fails is not None:
                await asyncio.sleep(0.2 * self._start_seconds)
                raise StartError(faults.start_fails)
            started = await start(
                options,
                model,
                memory,
                self._gpu.uuid,
                seconds=self._start_seconds if faults.start_takes is None else faults.start_takes,
                log=lambda line: None,
            )
        except SystemExit as error:
            words = last_words(said.getvalue().splitlines())
            raise EngineError(f"the engine did not start: exit status {error.code}; its last words: {words}") from None
        except (StartError, models.ModelError) as error:
            raise kind_of(str(error))(f"the engine did not start: exit status 1; its last words: {error}") from error
        return VirtualEngine(Place(self._gpu, memory, self._noise, faults), model, started, _info(started))


class _Memory:
    """What the start of one engine asks of its GPU; also the owner of what it got."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer as the device server does."""
        memory = self._gpu.memory
        if message["op"] == "alloc":
            try:
                memory.allocate(self, int(message["bytes"]))
            except OutOfMemoryError as error:
                raise RefusedError({"error": str(error), "free": error.free}) from error
        return {"total": memory.total, "free": memory.free}

    def release(self) -> None:
        """Give everything back."""
        self._gpu.memory.release(self)


def _info(started: Started) -> EngineInfo:
    scheduling = started.scheduling
    return EngineInfo(
        version=VERSION,
        block_size=scheduling.block_size,
        blocks=scheduling.num_blocks,
        kv_tokens=scheduling.num_blocks * scheduling.block_size,
        kv_bytes=started.kv_bytes,
        max_model_len=scheduling.max_model_len,
        max_num_batched_tokens=scheduling.max_num_batched_tokens,
        capture_sizes=started.graph_sizes,
    )

"""The HTTP path against the one in virtual time: the same engine, once behind a server in real time, once in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from simulation_helpers import Process, machine, wait_for
from tightship.profiler.clock import Clock, SystemClock
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings
from tightship.profiler.errors import EngineError
from tightship.profiler.gpu import Device, DeviceIdentity, Utilization
from tightship.profiler.lengths import Lengths, Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.meter import Meter
from tightship.profiler.metrics import EngineSample, parse_sample
from tightship.profiler.wire import Channel, HttpChannel
from tightship.sandbox.virtual.clock import VirtualClock, in_virtual_time
from tightship.sandbox.virtual.launcher import VirtualDevice, VirtualLauncher
from tightship.sandbox.virtual.settings import OPT

TIME_SCALE = 5
"""Real seconds a simulated one, so that two busy cores keep up."""
BATCHES = (1, 8, 16)
SECONDS = 1.5
LENGTHS = Lengths.constant(100, 300)


async def rates(channel: Channel, clock: Clock, scale: float) -> dict[int, float]:
    """Output tokens a simulated second at each batch, as the client counts them."""
    load = ClosedLoop(channel, LENGTHS, Prompts(1000, 1), clock, seed=1)
    found = {}
    try:
        for batch in BATCHES:
            load.resize(batch)
            while not load.settled:
                await clock.sleep(0.05)
            await clock.sleep(0.3 * scale)
            began = clock.now()
            recording = load.begin()
            await clock.sleep(SECONDS * scale)
            found[batch] = recording.tokens / (clock.now() - began) * scale
            load.check()
    finally:
        await load.close()
    return found


def in_process() -> dict[int, float]:
    async def story() -> dict[int, float]:
        settings = EngineSettings(OPT.hub, max_num_seqs=256, max_model_len=2048)
        engine = await VirtualLauncher(OPT.gpu()).launch(settings, timeout=100)
        return await rates(engine.channel(), VirtualClock(), 1.0)

    return in_virtual_time(story)


def test_over_http_the_engine_is_as_fast_as_in_virtual_time(tmp_path: Path) -> None:
    with machine(tmp_path, time_scale=float(TIME_SCALE), memory="64Gi") as host:
        engine = host.engine("--max-num-seqs", "256", "--max-model-len", "2048")
        wait_for("the engine is healthy", engine.healthy)

        async def story() -> dict[int, float]:
            return await rates(HttpChannel("127.0.0.1", engine.port, OPT.hub), SystemClock(), float(TIME_SCALE))

        over_http = asyncio.run(story())
    assert over_http == pytest.approx(in_process(), rel=0.1)


# --- the same, as the profiler measures it ---

LEVEL_SECONDS = 8.0


class Remote:
    """A simulated engine behind its server, as the profiler's port."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{process.port}", trust_env=False)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo()

    def channel(self) -> Channel:
        return HttpChannel("127.0.0.1", self._process.port, OPT.hub)

    async def check(self) -> None:
        if self._process.popen.poll() is not None:
            raise EngineError("the engine died")

    def owns(self, pid: int) -> bool:
        return False

    def last_words(self) -> str:
        return ""

    async def sample(self) -> EngineSample:
        clock = SystemClock()
        before = clock.now()
        text = (await self._http.get("/metrics")).text
        return parse_sample(text, at=(before + clock.now()) / 2)

    async def stop(self) -> None:
        await self._http.aclose()


class Unread:
    """A device that nothing is read from."""

    identity = DeviceIdentity("cuda", None, 64 << 30)

    def used(self) -> int:
        return 0

    def utilization(self) -> Utilization:
        return Utilization(None, None)


async def levels(engine: Engine, device: Device, clock: Clock, scale: float) -> dict[int, tuple[float, float]]:
    """Total tokens a simulated second and simulated seconds between tokens at each batch, as a level of the sweep says."""
    load = ClosedLoop(engine.channel(), LENGTHS, Prompts(1000, 1), clock, seed=1)
    meter = Meter(engine, load, device, clock, input_per_output=LENGTHS.mean_input / LENGTHS.mean_output)
    found = {}
    try:
        for batch in BATCHES:
            reading = await meter.measure(batch, LEVEL_SECONDS, 10 * LEVEL_SECONDS, LENGTHS.mean_output)
            assert reading is not None
            assert reading.undriven is None
            found[batch] = (reading.throughput * scale, reading.itl / scale)
    finally:
        await load.close()
        await engine.stop()
    return found


def levels_in_process() -> dict[int, tuple[float, float]]:
    async def story() -> dict[int, tuple[float, float]]:
        gpu = OPT.gpu()
        engine = await VirtualLauncher(gpu).launch(
            EngineSettings(OPT.hub, max_num_seqs=256, max_model_len=2048), timeout=100
        )
        return await levels(engine, VirtualDevice(gpu), VirtualClock(), 1.0)

    return in_virtual_time(story)


def test_over_http_a_level_of_the_sweep_is_what_it_is_in_virtual_time(tmp_path: Path) -> None:
    with machine(tmp_path, time_scale=float(TIME_SCALE), memory="64Gi") as host:
        process = host.engine("--max-num-seqs", "256", "--max-model-len", "2048")
        wait_for("the engine is healthy", process.healthy)

        async def story() -> dict[int, tuple[float, float]]:
            return await levels(Remote(process), Unread(), SystemClock(), float(TIME_SCALE))

        over_http = asyncio.run(story())
    expected = levels_in_process()
    for batch in BATCHES:
        assert over_http[batch] == pytest.approx(expected[batch], rel=0.1), f"batch {batch}"

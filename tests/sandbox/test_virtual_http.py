"""The HTTP path against the one in virtual time: the same engine, once behind a server in real time, once in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from simulation_helpers import machine, wait_for
from tightship.profiler.clock import Clock, SystemClock
from tightship.profiler.engine import EngineSettings
from tightship.profiler.lengths import Lengths, Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.wire import Channel, HttpChannel
from tightship.sandbox.virtual.clock import VirtualClock, in_virtual_time
from tightship.sandbox.virtual.launcher import VirtualLauncher
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

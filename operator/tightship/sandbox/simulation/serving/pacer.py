"""Drives an engine in real time: host part, turn on the GPU, tokens, again.

Time is accounted in the moments the device server names, not in the moments this process wakes up, so lateness of timers
doesn't add up. A process that can't keep up at all falls behind by `MAX_LAG` at most; then the simulation is slower than
it claims, and says so once. Use a larger time scale then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..engine import Engine, Outcome, Sequence, Step
from .channel import Channel

MAX_LAG = 0.5
# asyncio's timers fire up to a millisecond late; aiming half of that early, tokens come on time on average.
_EARLY = 0.0005


class Pacer:
    """Runs an engine's steps on its GPU until it is cancelled."""

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        time_scale: float,
        *,
        before_step: Callable[[Step], Awaitable[None]],
        on_outcome: Callable[[Outcome, float], None],
        log: Callable[[str], None],
    ) -> None:
        """`time_scale` in real seconds a simulated second; `before_step` may take memory for a step, or raise."""
        self._engine = engine
        self._channel = channel
        self._scale = time_scale
        self._before_step = before_step
        self._on_outcome = on_outcome
        self._log = log
        self._work = asyncio.Event()
        self._warned = False

    def add(self, sequence: Sequence) -> None:
        """Queue a request. Raises ValueError as the engine does."""
        self._engine.add(sequence)
        self._work.set()

    async def run(self) -> None:
        """Run steps for ever.

        Raises:
            RefusedError: the device refused a step.
            Exception: what `before_step` raises.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        while True:
            step = self._engine.plan(now)
            if step is None:
                self._work.clear()
                await self._work.wait()
                now = loop.time()
                continue
            await self._before_step(step)
            ready = now + step.cost.host * self._scale
            end = await self._channel.run(ready, step.cost.gpu, step.cost.memory_share)
            now = await self._until(end)
            self._on_outcome(self._engine.complete(step, now), now)

    async def _until(self, end: float) -> float:
        """Wait for a step's end and return it, or a later moment when this process has fallen too far behind."""
        late = asyncio.get_running_loop().time() - end
        if late < 0:
            await asyncio.sleep(max(0.0, -late - _EARLY))
        elif late > MAX_LAG:
            if not self._warned:
                self._warned = True
                self._log(f"the simulation is {late:.1f} s late and slower than it claims; use a larger time scale")
            return end + late - MAX_LAG
        return end

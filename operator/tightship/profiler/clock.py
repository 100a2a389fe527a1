"""Time as a port: what the profiler measures with, and waits by."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """One reading of time and a way to wait; under simulation both are virtual."""

    def now(self) -> float:
        """Seconds that never jump; only differences mean something."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""


class SystemClock:
    """The machine's monotonic clock, the one asyncio's timers use."""

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def cpu(self) -> float:
        """CPU seconds that the calling thread took so far."""
        return time.thread_time()

    async def sleep(self, seconds: float) -> None:
        """Wait that long; negative means not at all."""
        await asyncio.sleep(max(0.0, seconds))

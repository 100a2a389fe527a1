"""Time as a port: whoever waits or stamps gets it from here, so that tests decide what time it is."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    """Two readings of time and a way to wait."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""

    def monotonic(self) -> float:
        """Seconds that never jump; only differences mean something."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait that long; negative means not at all."""
        await asyncio.sleep(max(0.0, seconds))


def parse_timestamp(text: str) -> datetime:
    """Read a `metav1.Time` or `metav1.MicroTime`. Raises ValueError for anything else."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))

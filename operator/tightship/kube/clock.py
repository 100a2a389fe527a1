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


def timestamp(moment: datetime) -> str:
    """A moment as `metav1.Time` ("2026-01-02T03:04:05Z", whole seconds, UTC)."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: str) -> datetime:
    """Read a `metav1.Time` or `metav1.MicroTime`. Raises ValueError for anything else."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))

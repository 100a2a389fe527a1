"""The budget: wall time from the first healthy engine, over all attempts, and how it is shared out.

Starting the engine the first time (and fetching image and model) is free; all after it counts, restarts included. A part is kept for
the confirmation run, since without it no replica's memory is known.
"""

from __future__ import annotations

import math
from typing import Final

from tightship.profiler.clock import Clock

LEVEL_MOST: Final = 20.0
CONFIRM_SHARE: Final = 0.6
CONFIRM_LEAST: Final = 15.0


class Budget:
    """Seconds of device time, spent and left."""

    def __init__(self, seconds: float, spent: float, clock: Clock) -> None:
        """`spent`: what earlier attempts used."""
        self._seconds = seconds
        self._before = spent
        self._clock = clock
        self._since: float | None = None
        self._start_cost = 0.0

    def engine_healthy(self, took: float) -> None:
        """An engine became healthy `took` seconds after its start: from the first on, time counts."""
        self._start_cost = max(self._start_cost, took)
        if self._since is None:
            self._since = self._clock.now()

    @property
    def spent(self) -> float:
        """Device seconds used, over all attempts."""
        return self._before + (0.0 if self._since is None else self._clock.now() - self._since)

    @property
    def left(self) -> float:
        """Seconds until the cap."""
        return self._seconds - self.spent

    @property
    def for_sweep(self) -> float:
        """Seconds the sweep may still take: what is left, less an engine start and a measurement for the confirmation run."""
        keep = self._start_cost + max(CONFIRM_LEAST, 0.15 * self._seconds)
        return self.left - min(keep, CONFIRM_SHARE * self._seconds)

    def for_level(self, batch: int, top: int, most: float = LEVEL_MOST) -> float:
        """Seconds for one level: an even share of the sweep's time over the levels still possible, at most `most`."""
        levels = 1 + max(0, math.ceil(math.log2(max(top, batch) / batch)))
        return min(most, self.for_sweep / levels)

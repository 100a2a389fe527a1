"""What a machine does to an engine: noise of its speed, and faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

WINDOW = 1.0
"""Seconds for which one speed holds."""
_SLOWEST = 0.5


@dataclass(frozen=True)
class Noise:
    """A speed that is drawn anew for every second: normal around 1 with the given deviation, never below a half.

    It depends on the seed and the second only, so all engines of a GPU slow down together, as they do when clocks are throttled.
    """

    deviation: float
    seed: int = 0
    _known: dict[int, float] = field(default_factory=dict, init=False, compare=False, repr=False)

    def stretch(self, now: float) -> float:
        """By how much a step that begins at `now` seconds takes longer than without noise."""
        window = int(now / WINDOW)
        known = self._known.get(window)
        if known is None:
            speed = random.Random(f"{self.seed}/{window}").gauss(1.0, self.deviation)
            known = self._known[window] = 1.0 / max(_SLOWEST, speed)
        return known


@dataclass(frozen=True)
class Faults:
    """What goes wrong with one engine; seconds count from when it is healthy."""

    start_fails: str | None = None
    """Last words of an engine that doesn't start."""
    dies_after: float | None = None
    last_words: str = "torch.AcceleratorError: CUDA error: unspecified launch failure"
    hangs_after: float | None = None
    says: str = ""
    """The end of what it prints while it runs."""
    start_takes: float | None = None
    """Seconds of its start, instead of the usual ones."""

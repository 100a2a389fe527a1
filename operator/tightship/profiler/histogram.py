"""A histogram with relative precision: millions of latencies in constant memory, added in well under a microsecond.

Bins are logarithmic, each 0.5 % wider than the one before, so any quantile is right within 0.25 % of its value, while
sum and count, and so the mean, are exact. Nothing is sorted: reading a quantile never stalls the load that is being measured.
"""

from __future__ import annotations

import math
from typing import Final

_SMALLEST: Final = 1e-6
_GROWTH: Final = math.log(1.005)
_PER_SMALLEST: Final = 1 / _SMALLEST
_PER_GROWTH: Final = 1 / _GROWTH
_BINS: Final = int(math.log(1e10) / _GROWTH) + 2  # 1 us to 10,000 s; the first bin takes everything below


class Histogram:
    """Weighted durations in seconds."""

    __slots__ = ("_bins", "count", "total")

    def __init__(self) -> None:
        self._bins = [0] * _BINS
        self.count = 0
        self.total = 0.0

    def add(self, seconds: float, weight: int = 1) -> None:
        """Count a duration `weight` times."""
        self.count += weight
        self.total += seconds * weight
        if seconds <= _SMALLEST:
            self._bins[0] += weight
            return
        index = 1 + int(math.log(seconds * _PER_SMALLEST) * _PER_GROWTH)
        self._bins[index if index < _BINS else -1] += weight

    def merge(self, other: Histogram) -> None:
        """Add all that another histogram counted."""
        self.count += other.count
        self.total += other.total
        self._bins = [mine + theirs for mine, theirs in zip(self._bins, other._bins, strict=True)]

    @property
    def mean(self) -> float | None:
        """Exact mean in seconds; None when nothing was counted."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The duration that `share` (0..1) of the weight does not exceed, within 0.25 %; None when nothing was counted."""
        if not self.count:
            return None
        rank = max(1, math.ceil(share * self.count))
        seen = 0
        for index, weight in enumerate(self._bins):
            seen += weight
            if seen >= rank:
                return _SMALLEST * math.exp((index - 0.5) * _GROWTH) if index else 0.0
        raise AssertionError("bins and count disagree")

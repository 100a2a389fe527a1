"""Which batch to measure next: a pure function of the points measured so far.

The ladder is the powers of two from 1 (T(1) is what efficiency is measured against), up to the engine's largest batch, and ends early where
more can't be learned: at preemption, at less than 2 % more throughput for a doubling, or at an efficiency below 0.05. No objective is in
it, so a changed objective finds its points already there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tightship.core.advisor import allowed_preemptions
from tightship.core.curve import Curve, Point

LEAST_GAIN = 1.02
LEAST_EFFICIENCY = 0.05
TOLERATED_NOISE = math.hypot(0.03, 0.03)
"""Relative error of a ratio of two points that were measured to the sweep's precision."""


@dataclass(frozen=True)
class Step:
    """What to do next."""

    batch: int | None
    """The batch to measure; None when the ladder has ended."""
    reason: str
    """Why it has ended, or why this batch."""


def rungs(top: int) -> list[int]:
    """The ladder's batches: powers of two up to `top`, and `top` itself."""
    powers = [1 << power for power in range(top.bit_length()) if 1 << power <= top]
    return powers if powers[-1] == top else [*powers, top]


def next_batch(points: Iterable[Point], top: int, half_widths: Mapping[int, float] | None = None) -> Step:
    """The next batch of the ladder after the points measured so far, in any order.

    Args:
        points: what was measured, also by an earlier run.
        top: the largest batch the engine takes.
        half_widths: relative half-width of each point's throughput, by batch; a gain that such noise may hide does not end
            the ladder.
    """
    widths = half_widths or {}
    measured = {point.batch: point for point in points}
    previous: Point | None = None
    for batch in rungs(top):
        point = measured.get(batch)
        if point is None:
            return Step(batch, "next on the ladder")
        noise = 0.0 if previous is None else math.hypot(widths.get(previous.batch, 0.0), widths.get(batch, 0.0))
        ended = _ended(Curve(measured.values()), previous, point, max(0.0, noise - TOLERATED_NOISE))
        if ended:
            return Step(None, ended)
        previous = point
    return Step(None, f"batch {top} is the engine's largest")


def _ended(curve: Curve, previous: Point | None, point: Point, doubt: float) -> str | None:
    """Why nothing above this point is worth measuring, if so; `doubt`: relative error of the gain beyond what precise points have."""
    if (point.preemptions or 0) > allowed_preemptions(point.requests):
        return f"batch {point.batch} preempts ({point.preemptions} of {point.requests} requests): the KV cache is full"
    if previous is not None and point.batch == 2 * previous.batch:
        gain = point.throughput / previous.throughput
        if gain * (1 + doubt) < LEAST_GAIN:
            return f"batch {point.batch} brings {gain:.3f} times the throughput of {previous.batch}, below {LEAST_GAIN}"
    efficiency = curve.efficiency(point)
    if efficiency is not None and efficiency < LEAST_EFFICIENCY:
        return f"batch {point.batch} keeps {efficiency:.3f} of linear scaling, below {LEAST_EFFICIENCY}"
    return None

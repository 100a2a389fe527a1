"""Which batch to measure next: a pure function of the points measured so far.

First the ladder: the powers of two from 1 (T(1) is what efficiency is measured against), up to the engine's largest batch, ended early
where more can't be learned: at preemption, at less than 2 % more throughput for a doubling, or at an efficiency below 0.05. No objective
shortens it, so a changed objective finds its points already there.

Then the bisection. A batch is acceptable when it meets the objectives, keeps more than the efficiency floor and doesn't preempt: the
answer lies between the largest acceptable batch and the smallest above it that is not. That gap is halved in multiples of 8, down
to max(8, B/8). Where preemption ends it, the first probe is the batch at which the mean context just fills the KV cache.

What must hold: the answer depends on the set of points only; a batch is proposed once at most, whatever noise made of its neighbours,
since each proposal lies strictly inside a gap between measured batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tightship.core.advisor import allowed_preemptions
from tightship.core.curve import Curve, Objective, Point

LEAST_GAIN = 1.02
LEAST_EFFICIENCY = 0.05
TOLERATED_NOISE = math.hypot(0.03, 0.03)
"""Relative error of a ratio of two points that were measured to the sweep's precision."""
GRID = 8
"""Bisection proposes multiples of this."""
UNDRIVEN_IN_A_ROW = 2
"""Rungs in a row that the load could not drive before the ladder ends there: one alone may be the machine's hiccup."""
UNDRIVEN_AT_FIRST = 5
"""The same below the first point. There it isn't the load that has grown too large: a busy machine may calm down, and the larger batches'
longer steps leave a late load more time."""


@dataclass(frozen=True)
class Goals:
    """What places the bisection; nothing of it shortens the ladder."""

    objectives: Sequence[Objective] = ()
    efficiency_floor: float = 0.0
    full_batch: int | None = None
    """The batch at which the mean context in flight fills the KV cache; None when its size is unknown."""


@dataclass(frozen=True)
class Noise:
    """What is known of the measurement's own limits."""

    half_widths: Mapping[int, float] = field(default_factory=dict)
    """Relative half-width of each point's throughput, by batch: a gain that such noise may hide doesn't end the ladder."""
    undriven: Collection[int] = ()
    """Batches that the load could not drive: they have no point."""


@dataclass(frozen=True)
class Step:
    """What to do next."""

    batch: int | None
    """The batch to measure; None when the sweep has ended."""
    reason: str
    """Why it has ended, or why this batch."""


def rungs(top: int) -> list[int]:
    """The ladder's batches: powers of two up to `top`, and `top` itself."""
    powers = [1 << power for power in range(top.bit_length()) if 1 << power <= top]
    return powers if powers[-1] == top else [*powers, top]


def next_batch(points: Iterable[Point], top: int, goals: Goals | None = None, noise: Noise | None = None) -> Step:
    """The next batch after the points measured so far, in any order.

    Args:
        points: what was measured, also by an earlier run.
        top: the largest batch the engine takes.
        goals: what places the bisection; without, only preemption does.
        noise: half-widths, and what the load could not drive.
    """
    noise = noise or Noise()
    measured = {point.batch: point for point in points}
    climbed = _climb(measured, top, noise)
    if climbed.batch is not None or not measured:
        return climbed
    return _bisect(Curve(measured.values()), goals or Goals(), noise) or climbed


def _climb(measured: Mapping[int, Point], top: int, noise: Noise) -> Step:
    """The ladder's next rung, or why it has ended."""
    previous: Point | None = None
    undriven, largest = 0, max(measured, default=0)
    for batch in rungs(top):
        point = measured.get(batch)
        if point is None and batch in noise.undriven:
            # what lies below a point that the load could drive says nothing of the batches above it
            undriven += batch > largest
            if undriven == (UNDRIVEN_IN_A_ROW if measured else UNDRIVEN_AT_FIRST):
                before = "one" if undriven == UNDRIVEN_IN_A_ROW else str(undriven - 1)
                return Step(None, f"the load could not drive batch {batch}, nor the {before} before it")
            continue
        if point is None:
            return Step(batch, "next on the ladder")
        ended = _ended(Curve(measured.values()), previous, point, _doubt(previous, point, noise))
        if ended:
            return Step(None, ended)
        previous, undriven = point, 0
    return Step(None, f"batch {top} is the engine's largest")


def _doubt(previous: Point | None, point: Point, noise: Noise) -> float:
    """Relative error of the gain from one rung to the next, beyond what two precise points have."""
    if previous is None:
        return 0.0
    widths = noise.half_widths
    return max(0.0, math.hypot(widths.get(previous.batch, 0.0), widths.get(point.batch, 0.0)) - TOLERATED_NOISE)


def _ended(curve: Curve, previous: Point | None, point: Point, doubt: float) -> str | None:
    """Why nothing above this point is worth measuring, if so."""
    if _preempts(point):
        return f"batch {point.batch} preempts ({point.preemptions} of {point.requests} requests): the KV cache is full"
    if previous is not None and point.batch == 2 * previous.batch:
        gain = point.throughput / previous.throughput
        if gain * (1 + doubt) < LEAST_GAIN:
            return f"batch {point.batch} brings {gain:.3f} times the throughput of {previous.batch}, below {LEAST_GAIN}"
    efficiency = curve.efficiency(point)
    if efficiency is not None and efficiency < LEAST_EFFICIENCY:
        return f"batch {point.batch} keeps {efficiency:.3f} of linear scaling, below {LEAST_EFFICIENCY}"
    return None


def _bisect(curve: Curve, goals: Goals, noise: Noise) -> Step | None:
    """The next batch inside the gap that the answer lies in; None where the gap is closed, or where nothing limits the batch."""
    flaws = {point.batch: _flaw(curve, point, goals) for point in curve.points}
    low = max((batch for batch, flaw in flaws.items() if flaw is None), default=None)
    if low is None:
        return None
    high = min((batch for batch, flaw in flaws.items() if flaw is not None and batch > low), default=None)
    if high is None:
        return None
    limit = flaws[high]
    high = min([high, *(batch for batch in noise.undriven if batch > low)])
    if limit == "memory" and _inside(_on_grid(goals.full_batch or 0), low, high):
        return Step(_on_grid(goals.full_batch or 0), "where the mean context just fills the KV cache")
    middle = _on_grid((low + high + GRID) // 2)  # nearest multiple of the grid
    if high - low <= max(GRID, low // GRID) or not low < middle < high:
        return None
    return Step(middle, f"between {low}, which is acceptable, and {high}, where {limit} ends it")


def _flaw(curve: Curve, point: Point, goals: Goals) -> str | None:
    """What makes a batch unacceptable, if anything; a statistic that is not known speaks neither for nor against it."""
    if _preempts(point):
        return "memory"
    for objective in goals.objectives:
        latency = point.latency(objective.metric, objective.statistic)
        if latency is not None and latency > objective.maximum:
            return "the SLO"
    efficiency = curve.efficiency(point)
    if efficiency is not None and efficiency <= goals.efficiency_floor:
        return "the efficiency floor"
    return None


def _preempts(point: Point) -> bool:
    return (point.preemptions or 0) > allowed_preemptions(point.requests)


def _on_grid(batch: int) -> int:
    """The largest multiple of the grid that is not above."""
    return batch // GRID * GRID


def _inside(batch: int, low: int, high: int) -> bool:
    """Whether probing `batch` says more than the gap's ends do."""
    least = max(GRID, low // GRID)
    return low + least <= batch < high

"""The profiler held against the published procedure in the same simulation: what they choose, what they measure, what they cost.

Choices are compared as published: mean inter-token latency, efficiency above 0.1, the bound a multiple of the *reference's* latency at
batch 32. Throughput is compared on the saturated part only: a finite run drains, so its own figure is low by about B / N.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tightship.api.units import parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.advisor import advise, allowed_preemptions
from tightship.core.curve import Curve, Metric, Objective, Statistic
from tightship.profiler import points
from tightship.sandbox.virtual import reference
from tightship.sandbox.virtual.launcher import START_SECONDS
from tightship.sandbox.virtual.profile import Profiled
from tightship.sandbox.virtual.reference import FinitePoint
from tightship.sandbox.virtual.settings import REFERENCE_BATCH, Setting

EFFICIENCY_FLOOR = 0.1


@dataclass(frozen=True)
class Level:
    """One batch of the sweep: what it took and what it gave, beside the steady state. Seconds, tokens per second."""

    batch: int
    seconds: float
    """From the report before to its own."""
    window: str
    throughput: float
    half_width: float
    itl: float
    preemptions: int
    steady: float | None
    """Throughput of the saturated part of a long finite run."""

    @property
    def deviation(self) -> float | None:
        """Relative deviation of the throughput from the steady state."""
        return self.throughput / self.steady - 1 if self.steady else None


@dataclass(frozen=True)
class Agreement:
    """Both procedures on one setting, under one bound on the mean inter-token latency in seconds."""

    slo: float
    published_batch: int | None
    batch: int | None
    steps: float | None
    """Steps of the published grid between the two choices; None where only one has an answer."""
    levels: tuple[Level, ...]
    published_seconds: float
    seconds: float
    """The sweep, its own engine's start not counted."""
    published_starts: int

    @property
    def ratio(self) -> float:
        """How much less engine time the sweep takes."""
        return self.published_seconds / self.seconds

    @property
    def ratio_with_starts(self) -> float:
        """The same, with a start of 45 s for every engine of both."""
        return (self.published_seconds + self.published_starts * START_SECONDS) / (self.seconds + START_SECONDS)

    @property
    def largest_deviation(self) -> float:
        """Of the throughput from the steady state, over all batches that don't preempt."""
        return max(abs(level.deviation) for level in self.levels if level.deviation is not None)


def bound(published: Sequence[FinitePoint], multiple: float) -> float:
    """The published kind of objective: a multiple of the mean inter-token latency at batch 32, seconds."""
    return multiple * next(point.itl for point in published if point.batch == REFERENCE_BATCH)


def choose(curve: Curve, slo: float) -> int | None:
    """The advised batch under a bound on the mean inter-token latency in seconds."""
    objective = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, slo)
    return advise(curve, [objective], efficiency_floor=EFFICIENCY_FLOOR, max_replicas=1).batch


def compare(setting: Setting, published: Sequence[FinitePoint], ours: Profiled, slo: float) -> Agreement:
    """Hold a profile against the published procedure; the steady state is simulated at each of its batches."""
    curve = points.curve(ours.status.points)
    theirs = choose(reference.curve(published), slo)
    batch = choose(curve, slo) if curve else None
    steps = None
    if theirs is not None and batch is not None:
        steps = abs(position(setting.grid, batch) - position(setting.grid, theirs))
    return Agreement(
        slo=slo,
        published_batch=theirs,
        batch=batch,
        steps=steps,
        levels=tuple(levels(setting, ours)),
        published_seconds=sum(point.seconds for point in published),
        seconds=ours.sweep_seconds,
        published_starts=len(published),
    )


def position(grid: Sequence[int], batch: int) -> float:
    """Where a batch lies on a grid, in steps: whole numbers are the grid's own batches."""
    left = min(max(bisect_right(grid, batch) - 1, 0), len(grid) - 2)
    return left + (batch - grid[left]) / (grid[left + 1] - grid[left])


def levels(setting: Setting, ours: Profiled) -> list[Level]:
    """The sweep batch by batch, in the order in which it measured."""
    found: list[Level] = []
    known: set[int] = set()
    last = ours.sweep_began
    for at, status in ours.written:
        for raw in status.get("points", ()):
            if raw["batch"] in known:
                continue
            known.add(raw["batch"])
            point = next(point for point in ours.status.points if point.batch == raw["batch"])
            preempts = (point.preemptions or 0) > allowed_preemptions(point.requests)
            steady = None if preempts else reference.steady(setting, point.batch).saturated_throughput
            found.append(_level(point, at - last, steady))
            last = at
    return found


def _level(point: api.Point, seconds: float, steady: float | None) -> Level:
    latency = point.inter_token_latency
    return Level(
        batch=point.batch,
        seconds=seconds,
        window=point.window or "",
        throughput=points.throughput(point) or 0.0,
        half_width=float(point.half_width or 0),
        itl=parse_duration(latency.mean) if latency is not None and latency.mean else 0.0,
        preemptions=point.preemptions or 0,
        steady=steady,
    )

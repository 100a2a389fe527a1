"""The measured curve of one model on one GPU, and what a user asks of it.

A curve is a set of points, one for each batch size that was measured; a point holds only what was read, and `None` where
nothing was. Seconds, bytes and tokens throughout. A curve is kept sorted by batch and holds each batch once, so that
nothing decided from it depends on the order in which points arrived.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum


class Metric(str, Enum):
    """The latency an objective bounds; the values are the API's words."""

    INTER_TOKEN_LATENCY = "InterTokenLatency"
    TIME_TO_FIRST_TOKEN = "TimeToFirstToken"


class Statistic(str, Enum):
    """Which statistic of the latency an objective bounds."""

    MEAN = "mean"
    P50 = "p50"
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"


@dataclass(frozen=True)
class Latency:
    """Statistics of one latency in seconds; `None` for what was not measured or not resolved."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None

    def __post_init__(self) -> None:
        for statistic in fields(self):
            _check_positive(f"latency {statistic.name}", getattr(self, statistic.name))

    def get(self, statistic: Statistic) -> float | None:
        """Seconds of one statistic, or `None`."""
        value: float | None = getattr(self, statistic.value)
        return value


@dataclass(frozen=True)
class Point:
    """What was measured with `batch` requests always in flight.

    `throughput` is the T of the method in tokens per second (input and output tokens where both are known);
    `gpu_utilization` and `memory_utilization` are NVML's shares of time, 0 to 1; `kv_tokens_peak` is the largest number of
    tokens seen in the KV cache.

    Raises:
        ValueError: a number that no measurement can give.
    """

    batch: int
    throughput: float
    inter_token_latency: Latency = field(default_factory=Latency)
    time_to_first_token: Latency = field(default_factory=Latency)
    kv_tokens_peak: int | None = None
    requests: int | None = None
    preemptions: int | None = None
    gpu_utilization: float | None = None
    memory_utilization: float | None = None
    requests_per_second: float | None = None
    running_mean: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is below 1")
        _check_positive("throughput", self.throughput)
        for name in ("kv_tokens_peak", "requests", "preemptions"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise ValueError(f"batch {self.batch}: {name} {count} is negative")
        for name in ("gpu_utilization", "memory_utilization"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"batch {self.batch}: {name} {share} is not between 0 and 1")

    def latency(self, metric: Metric, statistic: Statistic) -> float | None:
        """Seconds of one statistic of one metric, or `None` where it was not measured."""
        latencies = self.inter_token_latency if metric is Metric.INTER_TOKEN_LATENCY else self.time_to_first_token
        return latencies.get(statistic)


@dataclass(frozen=True)
class Objective:
    """A bound in seconds on one statistic of one latency: what the SLO is made of."""

    metric: Metric
    statistic: Statistic
    maximum: float

    def __post_init__(self) -> None:
        _check_positive(f"the maximum of {self.metric.value}", self.maximum)

    def __str__(self) -> str:
        return f"{self.statistic.value} {self.metric.value}"


@dataclass(frozen=True)
class Curve:
    """All points of a sweep, sorted by batch.

    Raises:
        ValueError: no points, or two of the same batch.
    """

    points: tuple[Point, ...]

    def __init__(self, points: Iterable[Point]) -> None:
        ordered = tuple(sorted(points, key=lambda point: point.batch))
        if not ordered:
            raise ValueError("a curve needs at least one point")
        for left, right in itertools.pairwise(ordered):
            if left.batch == right.batch:
                raise ValueError(f"batch {left.batch} occurs more than once")
        object.__setattr__(self, "points", ordered)

    def at(self, batch: int) -> Point | None:
        """The point measured at `batch`, or `None`: between measured points one measures, one does not interpolate."""
        return next((point for point in self.points if point.batch == batch), None)

    def efficiency(self, point: Point) -> float | None:
        """T(B) / (B T(1)): the share of linear scaling kept at this batch; `None` where T(1) was not measured."""
        single = self.at(1)
        return None if single is None else point.throughput / (point.batch * single.throughput)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value} is not a positive number")

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
    tokens seen in the KV cache; `half_width` is the half-width of the throughput's 95 % interval, relative to it.

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
    half_width: float | None = None

    def __post_init__(self) -> None:
        _check_measured(f"batch {self.batch}", self)
        _check_count(f"batch {self.batch}", "kv_tokens_peak", self.kv_tokens_peak)

    def latency(self, metric: Metric, statistic: Statistic) -> float | None:
        """Seconds of one statistic of one metric, or `None` where it was not measured."""
        latencies = self.inter_token_latency if metric is Metric.INTER_TOKEN_LATENCY else self.time_to_first_token
        return latencies.get(statistic)


@dataclass(frozen=True)
class Trial:
    """What was measured with `replicas` engines on one GPU, each with `batch` requests always in flight, all loaded at once.

    `throughput` is that of all replicas together, in the same tokens per second as the curve's; latencies, utilizations and
    `half_width` are a `Point`'s; `requests` and `preemptions` are the sums over all replicas. `memory` is the bytes of the GPU that
    these replicas took at the most, all together, `kv_cache` the bytes of each one's KV cache.

    Raises:
        ValueError: a number that no measurement can give.
    """

    batch: int
    replicas: int
    throughput: float
    inter_token_latency: Latency = field(default_factory=Latency)
    time_to_first_token: Latency = field(default_factory=Latency)
    half_width: float | None = None
    preemptions: int | None = None
    requests: int | None = None
    gpu_utilization: float | None = None
    memory_utilization: float | None = None
    running_mean: float | None = None
    memory: int | None = None
    kv_cache: int | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"{self.replicas} replicas are fewer than 1")
        name = f"batch {self.batch} with {self.replicas} replicas"
        _check_measured(name, self)
        _check_count(name, "memory", self.memory)
        _check_count(name, "kv_cache", self.kv_cache)

    @property
    def pair(self) -> tuple[int, int]:
        """Batch and replicas."""
        return self.batch, self.replicas

    @property
    def non_kv(self) -> int | None:
        """Bytes that a replica took beside its KV cache at the least, rounded up; `None` where that was not read."""
        if self.memory is None or self.kv_cache is None:
            return None
        return -(-self.memory // self.replicas) - self.kv_cache

    def latency(self, metric: Metric, statistic: Statistic) -> float | None:
        """Seconds of one statistic of one metric with all replicas loaded, or `None` where it was not measured."""
        latencies = self.inter_token_latency if metric is Metric.INTER_TOKEN_LATENCY else self.time_to_first_token
        return latencies.get(statistic)


@dataclass(frozen=True)
class Confirmation:
    """What one engine showed that ran as a replica would, with `batch` requests always in flight, beside the sweep's point of that batch.

    `throughput` and the latency are a `Point`'s, `None` where not measured or not resolved; the ratios are of these figures (of the latency
    the mean) over the sweep's; `agrees` says whether both are within what the two measurements leave open.

    Raises:
        ValueError: a number that no measurement can give.
    """

    batch: int
    throughput: float | None = None
    inter_token_latency: Latency = field(default_factory=Latency)
    throughput_ratio: float | None = None
    latency_ratio: float | None = None
    agrees: bool | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is below 1")
        for name in ("throughput", "throughput_ratio", "latency_ratio"):
            _check_positive(name, getattr(self, name))

    def latency(self, metric: Metric, statistic: Statistic) -> float | None:
        """Seconds of one statistic of one metric, or `None` where it was not measured: a closed loop tells no time to first token."""
        return self.inter_token_latency.get(statistic) if metric is Metric.INTER_TOKEN_LATENCY else None


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


def _check_measured(name: str, measured: Point | Trial) -> None:
    if measured.batch < 1:
        raise ValueError(f"batch {measured.batch} is below 1")
    _check_positive("throughput", measured.throughput)
    _check_count(name, "requests", measured.requests)
    _check_count(name, "preemptions", measured.preemptions)
    for share in ("gpu_utilization", "memory_utilization"):
        value = getattr(measured, share)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: {share} {value} is not between 0 and 1")
    if measured.half_width is not None and not 0 <= measured.half_width < math.inf:
        raise ValueError(f"{name}: half_width {measured.half_width} is not a number from 0")


def _check_count(name: str, field_name: str, count: int | None) -> None:
    if count is not None and count < 0:
        raise ValueError(f"{name}: {field_name} {count} is negative")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value} is not a positive number")

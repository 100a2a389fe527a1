"""The measured curve and trials refuse what no measurement can give."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.core.curve import Curve, Latency, Metric, Point, Statistic, Trial


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch 0 is below 1"),
        ({"throughput": 0}, "throughput 0 is not a positive number"),
        ({"throughput": float("inf")}, "throughput inf"),
        ({"requests": -1}, "requests -1 is negative"),
        ({"preemptions": -1}, "preemptions -1 is negative"),
        ({"gpu_utilization": 1.1}, "gpu_utilization 1.1 is not between 0 and 1"),
        ({"memory_utilization": -0.1}, "memory_utilization -0.1"),
        ({"half_width": -0.1}, "half_width -0.1"),
        ({"half_width": float("nan")}, "half_width nan"),
    ],
)
def test_impossible_measurements_are_refused(changes: dict[str, Any], words: str) -> None:
    for make in (Point, lambda **values: Trial(replicas=2, **values)):
        with pytest.raises(ValueError, match=words):
            make(**({"batch": 8, "throughput": 100.0} | changes))


def test_a_trial_needs_replicas() -> None:
    with pytest.raises(ValueError, match="0 replicas are fewer than 1"):
        Trial(8, 0, 100.0)


def test_a_trial_tells_its_pair_and_its_latencies() -> None:
    trial = Trial(96, 2, 12_313.9, Latency(mean=0.019), Latency(p95=0.4))
    assert trial.pair == (96, 2)
    assert trial.latency(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN) == 0.019
    assert trial.latency(Metric.TIME_TO_FIRST_TOKEN, Statistic.P95) == 0.4
    assert trial.latency(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN) is None


def test_a_curve_holds_each_batch_once_and_sorts_them() -> None:
    assert [point.batch for point in Curve([Point(8, 1.0), Point(2, 1.0)]).points] == [2, 8]
    with pytest.raises(ValueError, match="batch 8 occurs more than once"):
        Curve([Point(8, 1.0), Point(8, 2.0)])
    with pytest.raises(ValueError, match="at least one point"):
        Curve([])

"""What the benchmark on the real engine says of its goals; what it measures takes half an hour and an idle machine."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("ratio", "deviations", "missed"),
    [
        (10.0, [0.02, 0.10], []),
        (6.8, [0.02], ["1/6.8 of the reference's time, the goal is 1/10"]),
        (12.0, [0.02, 0.16], ["T deviates by 16.0%, the goal is 10%"]),
        (9.9, [0.25], ["1/9.9 of the reference's time, the goal is 1/10", "T deviates by 25.0%, the goal is 10%"]),
        (12.0, [], ["at no batch was the reference saturated and measured by the sweep too: T can't be compared"]),
    ],
)
def test_the_engines_benchmark_names_each_goal_it_misses(
    monkeypatch: pytest.MonkeyPatch, ratio: float, deviations: list[float], missed: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module("cost_engine").missed(ratio, deviations) == missed


@pytest.mark.parametrize(
    ("batches", "throughput", "count", "found"),
    [
        ([1, 2, 4, 8], {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 2, [[1], [2, 4, 8]]),
        ([1, 2, 4, 8], {1: 1.0, 2: 1.0, 4: 1.0}, 2, [[1, 2], [4, 8]]),
        ([1, 2, 4, 8], {}, 1, [[1, 2, 4, 8]]),
        ([64], {1: 1.0}, 3, [[64]]),
    ],
)
def test_the_reference_is_cut_into_parts_that_take_about_as_long(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[int],
    throughput: dict[int, float],
    count: int,
    found: list[list[int]],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module("cost_engine").parts(batches, throughput, count) == found

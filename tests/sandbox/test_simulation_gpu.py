"""A simulated GPU: memory that runs out, and time that is queued for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship.sandbox.simulation.gpu import Gpu, Memory, OutOfMemoryError


def make_gpu(seed: int = 1) -> Gpu:
    return Gpu("GPU-1", "H100", Memory(100), seed=seed)


def test_memory_is_what_is_left_of_the_total() -> None:
    memory = Memory(100)
    memory.allocate("a", 60)
    memory.allocate("b", 30)
    with pytest.raises(OutOfMemoryError) as failure:
        memory.allocate("a", 11)
    assert (failure.value.requested, failure.value.free, failure.value.total) == (11, 10, 100)
    assert memory.used == 90, "a refused allocation takes nothing"
    memory.release("a")
    assert (memory.used, memory.free, memory.owned("b")) == (30, 70, 30)


@pytest.mark.parametrize("amount", [-1, 31])
def test_memory_that_was_not_given_cannot_be_taken_back(amount: int) -> None:
    memory = Memory(100)
    memory.allocate("a", 30)
    with pytest.raises(ValueError, match="of 30 bytes"):
        memory.release("a", amount)


def test_services_have_the_mean_asked_for_and_the_spread_of_an_exponential() -> None:
    gpu = make_gpu()
    services = []
    at = 0.0
    for _ in range(20_000):
        end = gpu.serve(at, 0.010)
        services.append(end - at)
        at = end
    mean = sum(services) / len(services)
    variance = sum((service - mean) ** 2 for service in services) / len(services)
    assert mean == pytest.approx(0.010, rel=0.03)
    assert variance == pytest.approx(mean**2, rel=0.06)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.001, 0.5)), min_size=1, max_size=60))
def test_one_thing_at_a_time_and_none_before_it_is_ready(requests: list[tuple[float, float]]) -> None:
    """Whatever the order requests come in, late ones included: no overlap, no early start, no second lost."""
    gpu = make_gpu()
    for ready, mean in requests:
        assert gpu.serve(ready, mean) > ready
    end = 2 * max(ready for ready, _ in requests) + 1000
    assert gpu.utilization(end, window=end).gpu * end <= gpu.busy + 1e-6
    intervals = sorted((start, stop) for start, stop, _ in gpu._recent)
    assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(intervals))


def test_a_late_request_uses_the_time_others_left_idle() -> None:
    gpu = make_gpu()
    first = gpu.serve(0.0, 1e-3)
    second = gpu.serve(5.0, 1e-3)
    late = gpu.serve(1.0, 1e-3)
    assert first < 1.0 < late < 5.0 < second


def test_utilization_looks_back_over_its_window() -> None:
    gpu = make_gpu()
    end = gpu.serve(10.0, 0.2, memory_share=0.5)
    found = gpu.utilization(end, window=2 * (end - 10.0))
    assert (found.gpu, found.memory) == (pytest.approx(0.5), pytest.approx(0.25))
    assert gpu.utilization(end + 100).gpu == 0

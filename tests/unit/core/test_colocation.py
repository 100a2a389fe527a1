"""The prediction of packed latency and throughput: published packings, and what must hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship.core.colocation import packed_latency, packed_throughput, slowdown

SHARES = st.floats(0, 1)


# OPT-1.3B on ShareGPT under MPS (arXiv:2503.08311, published raw runs, those without preemption): batch, replicas, mean ITL
# alone and packed in ms, total tokens/s alone and packed, share of GPU time alone.
PACKINGS = [
    (96, 2, 13.78, 18.98, 9120.9, 12313.9, 0.57),
    (96, 4, 13.78, 31.52, 9120.9, 13172.4, 0.57),
    (256, 2, 29.26, 37.07, 10870.9, 14669.5, 0.53),
]


@pytest.mark.parametrize(("batch", "replicas", "alone", "packed", "single", "total", "share"), PACKINGS)
def test_published_packings(  # noqa: PLR0917
    batch: int, replicas: int, alone: float, packed: float, single: float, total: float, share: float
) -> None:
    """Within 4 % in ITL and 7 % in throughput; a finite run of N requests drains, which lowers its raw throughput."""
    drain = (1 + batch / 2000) / (1 + replicas * batch / 2000)
    assert packed_latency(alone, share, replicas) == pytest.approx(packed, rel=0.04)
    assert packed_throughput(single, share, replicas) * drain == pytest.approx(total, rel=0.07)


@given(SHARES)
def test_exact_alone(share: float) -> None:
    assert slowdown(share, 1) == 1


@given(SHARES, st.integers(1, 32))
def test_between_no_and_full_contention(share: float, replicas: int) -> None:
    assert 1 <= slowdown(share, replicas) <= replicas


@given(SHARES, st.integers(1, 32))
def test_more_replicas_never_run_faster(share: float, replicas: int) -> None:
    assert slowdown(share, replicas) <= slowdown(share, replicas + 1) + 1e-9


@given(SHARES, SHARES, st.integers(1, 32))
def test_a_busier_gpu_never_runs_faster(one: float, other: float, replicas: int) -> None:
    low, high = sorted((one, other))
    assert slowdown(low, replicas) <= slowdown(high, replicas) + 1e-9


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_a_saturated_gpu_gives_no_gain_and_an_idle_one_full_gain(replicas: int) -> None:
    assert packed_throughput(100, 1, replicas) == 100
    assert packed_throughput(100, 0, replicas) == 100 * replicas


@pytest.mark.parametrize(("share", "replicas"), [(-0.1, 1), (1.1, 1), (0.5, 0), (float("nan"), 1)])
def test_impossible_arguments_are_refused(share: float, replicas: int) -> None:
    with pytest.raises(ValueError, match=r"not between|fewer"):
        slowdown(share, replicas)

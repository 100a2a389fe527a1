"""The prediction of packed latency and throughput: published packings, and what must hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship.core.colocation import packed_latency, packed_throughput, predict, slowdown, utilization_at
from tightship.core.curve import Curve, Latency, Metric, Point, Statistic

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


# From curves.

# OPT-1.3B, same source: batch, total tokens/s, mean ITL in ms, share of GPU time.
OPT = [(32, 5734.1, 7.51, 0.643), (64, 8143.7, 10.40, 0.612), (128, 9506.9, 17.35, 0.536), (256, 10809.8, 29.27, 0.548)]


def make_curve(rows: list[tuple[int, float, float, float]] = OPT, **changes: Any) -> Curve:
    points = [
        Point(batch, throughput, Latency(mean=itl / 1000, p95=itl / 500), Latency(p95=itl / 10), gpu_utilization=share)
        for batch, throughput, itl, share in rows
    ]
    return Curve(dataclasses.replace(point, **changes) for point in points)


def test_a_measured_batch_is_taken_as_it_is() -> None:
    made = predict(make_curve(), 64, 2)
    assert (made.interpolated, made.batch_effective, made.notes) == (False, 64, ())
    assert made.inter_token_latency == packed_latency(0.0104, 0.612, 2)
    assert made.total_tokens_per_second == packed_throughput(8143.7, 0.612, 2)
    assert made.latency(Metric.TIME_TO_FIRST_TOKEN, Statistic.P95) == pytest.approx(1.04 * made.slowdown)
    assert made.latency(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN) is None


def test_a_batch_between_two_points_is_interpolated_and_that_is_said() -> None:
    """96 was measured in the same sweep: 9032.8 tokens/s, 13.89 ms, busy 0.575."""
    made = predict(make_curve(), 96, 1)
    assert made.interpolated
    assert "batch 96 was not measured" in made.notes[0]
    assert made.inter_token_latency == pytest.approx(0.01389, rel=0.01)
    assert made.total_tokens_per_second == pytest.approx(9032.8, rel=0.01)
    assert made.utilization == pytest.approx(0.575, abs=0.01)


def test_a_missing_utilization_comes_from_the_neighbours() -> None:
    points = list(make_curve().points)
    points[1] = dataclasses.replace(points[1], gpu_utilization=None)
    made = predict(Curve(points), 64, 2)
    assert made.utilization == pytest.approx((0.643 + 0.536) / 2)
    assert made.interpolated
    assert "not recorded at batch 64" in made.notes[0]
    assert utilization_at(Curve(points[:2]), 64) == utilization_at(Curve(points[:2]), 1) == 0.643


def test_without_any_utilization_only_one_replica_is_predicted() -> None:
    blind = make_curve(gpu_utilization=None)
    assert predict(blind, 64, 1).total_tokens_per_second == 8143.7
    assert predict(blind, 64, 3, utilization=0).total_tokens_per_second == pytest.approx(3 * 8143.7)
    with pytest.raises(ValueError, match=r"no point of the curve has gpuUtilization.*profiling\.extend"):
        predict(blind, 64, 2)


def test_a_small_kv_cache_limits_the_batch() -> None:
    """The published 4 x 256 with 3,570 blocks each preempts: 14,720 tokens/s after draining, 45.8 ms with recomputing."""
    made = predict(make_curve(), 256, 4, kv_tokens_per_replica=3570 * 16, mean_context=411)
    assert made.batch_effective == pytest.approx(139, abs=0.1)
    assert "holds 139.0 requests" in made.notes[0]
    assert made.total_tokens_per_second < predict(make_curve(), 256, 4).total_tokens_per_second
    assert made.inter_token_latency == pytest.approx(0.0458, rel=0.15)
    assert predict(make_curve(), 64, 2, kv_tokens_per_replica=64 * 411, mean_context=411) == predict(
        make_curve(), 64, 2
    )


@pytest.mark.parametrize(
    ("batch", "settings", "words"),
    [
        (16, {}, "batch 16 lies outside the curve, which was measured from batch 32 to 256"),
        (512, {}, "batch 512 lies outside"),
        (64, {"kv_tokens_per_replica": 4000, "mean_context": 400}, "holds 10.0 requests .* smallest batch"),
        (64, {"kv_tokens_per_replica": -1, "mean_context": 400}, "impossible"),
        (64, {"utilization": 2}, "not between 0 and 1"),
        (0, {}, "need a batch"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_words(batch: int, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict(make_curve(), batch, 2, **settings)


def test_without_latencies_throughput_is_predicted_all_the_same() -> None:
    made = predict(make_curve(inter_token_latency=Latency()), 96, 2)
    assert made.inter_token_latency is None
    assert made.alone.throughput == pytest.approx(9032.8, rel=0.03)


def test_the_papers_raw_packings(paper_data: Path) -> None:
    """ITL within 5 %, throughput within 10 % after the drain; where the cache is too small, as near as leaving recomputing out can be."""
    runs = json.loads((paper_data / "replication" / "opt-1.3b.json").read_text())["runs"]
    alone = {run["max_num_seqs"]: run for run in runs if run["replicas"] == 1 and not run["chunked_prefill"]}
    curve = Curve(
        Point(
            batch,
            run["total_token_throughput"],
            Latency(mean=run["mean_itl_ms"] / 1000),
            gpu_utilization=run["gpu_util_mean_pct"] / 100,
        )
        for batch, run in alone.items()
    )
    packed = [run for run in runs if run["replicas"] > 1 and not any(e["preemptions"] for e in run["engines"])]
    assert len(packed) == 3
    for run in packed:
        batch, replicas, requests = run["max_num_seqs"], run["replicas"], run["num_prompts"]
        made = predict(curve, batch, replicas)
        drain = (1 + batch / requests) / (1 + replicas * batch / requests)
        assert made.inter_token_latency == pytest.approx(run["mean_itl_ms"] / 1000, rel=0.05)
        assert made.total_tokens_per_second * drain == pytest.approx(run["total_token_throughput"], rel=0.10)

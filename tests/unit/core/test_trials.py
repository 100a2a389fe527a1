"""Which packing is tried next, and when trying ends: stories on the published OPT-1.3B curve, and what must hold on all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tightship.core.advisor import Question
from tightship.core.curve import Curve, Latency, Metric, Objective, Point, Statistic, Trial
from tightship.core.memory import Context, Ledger
from tightship.core.trials import next_trial, trial_order

GIB = 1 << 30

# OPT-1.3B, ShareGPT, one H100 64 GB, vLLM 0.6 (arXiv:2503.08311, published raw runs): batch, total tokens/s, mean ITL in ms, share
# of GPU time.
OPT = [
    (1, 381.4, 3.623, 0.865),
    (32, 5734.1, 7.51, 0.643),
    (64, 8143.7, 10.40, 0.612),
    (96, 9032.8, 13.89, 0.575),
    (128, 9506.9, 17.35, 0.536),
    (256, 10809.8, 29.27, 0.548),
]
# The published packings without preemption: (batch, replicas) -> total tokens/s, mean ITL in ms.
PACKED = {(96, 2): (12313.9, 18.98), (96, 4): (13172.4, 31.52), (256, 2): (14669.5, 37.07)}


def make_curve(**changes: Any) -> Curve:
    points = [Point(b, t, Latency(mean=itl / 1000), requests=2000, gpu_utilization=u) for b, t, itl, u in OPT]
    return Curve(dataclasses.replace(point, **changes) for point in points)


def make_slo(milliseconds: float) -> list[Objective]:
    return [Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, milliseconds / 1000)]


def make_ledger(total: float = 64) -> Ledger:
    return Ledger(
        device_total=int(total * GIB),
        non_kv=4 * GIB,
        kv_bytes_per_token=196_608,
        block_size=16,
        context=Context(mean=411, std=312),
        max_model_len=2048,
    )


def make_trial(batch: int, replicas: int, throughput: float, itl: float, **changes: Any) -> Trial:
    return Trial(batch, replicas, throughput, Latency(mean=itl / 1000), **changes)


def published(*pairs: tuple[int, int]) -> list[Trial]:
    return [make_trial(*pair, *PACKED[pair]) for pair in pairs]


def test_the_published_best_packing_is_among_the_first_tried() -> None:
    order = [pair.pair for pair in trial_order(Question(make_curve(), make_slo(40), ledger=make_ledger()))]
    assert (256, 2) in order[:2]


def test_pairs_predicted_far_beyond_the_slo_are_left_out() -> None:
    maximum = 0.015
    for pair in trial_order(Question(make_curve(), make_slo(15), ledger=make_ledger())):
        assert pair.latencies[0] is not None
        assert pair.latencies[0] <= 1.1 * maximum


def test_a_busy_gpu_promises_nothing_and_is_tried_once_all_the_same() -> None:
    busy, slo, ledger = make_curve(gpu_utilization=1.0), make_slo(15.02), make_ledger()

    first = next_trial(Question(busy, slo, ledger=ledger))
    assert first.pair is not None
    assert first.predicted is not None

    batch, replicas = first.pair
    trial = make_trial(batch, replicas, first.predicted.throughput, 15)
    assert next_trial(Question(busy, slo, ledger=ledger, trials=[trial])).pair is None


def test_an_objective_missed_packed_leads_to_fewer_replicas_or_a_smaller_batch() -> None:
    slo, ledger = make_slo(30), make_ledger()
    missed = make_trial(96, 4, 13172.4, 31.52)

    step = next_trial(Question(make_curve(), slo, ledger=ledger, trials=[missed]))

    assert step.pair is not None
    assert step.pair[0] < 96 or step.pair[1] < 4


def test_trying_ends_where_nothing_left_can_beat_the_best() -> None:
    slo, ledger, trials = make_slo(40), make_ledger(), published((256, 2))
    for measured in ((128, 3, 12_100.0, 33.0), (128, 2, 12_600.0, 23.5)):
        assert next_trial(Question(make_curve(), slo, ledger=ledger, trials=trials)).pair == measured[:2]
        trials.append(make_trial(*measured))

    step = next_trial(Question(make_curve(), slo, ledger=ledger, trials=trials))

    assert step.pair is None
    assert "even 1.15 x that can't beat batch 256 with 2 replicas with 14670 tokens/s" in step.reason


def test_a_pair_that_could_not_be_tried_is_not_named_again() -> None:
    first = next_trial(Question(make_curve(), make_slo(40), ledger=make_ledger())).pair
    assert first is not None
    second = next_trial(Question(make_curve(), make_slo(40), ledger=make_ledger(), failed=[first])).pair
    assert second not in (None, first)


@pytest.mark.parametrize(("total", "words"), [(5, "no pair is left"), (None, "memory per replica is unknown")])
def test_without_room_for_two_nothing_is_tried(total: float | None, words: str) -> None:
    step = next_trial(Question(make_curve(), make_slo(40), ledger=None if total is None else make_ledger(total)))
    assert step.pair is None
    assert words in step.reason


def test_an_unknown_utilization_still_gives_an_order() -> None:
    assert trial_order(Question(make_curve(gpu_utilization=None), make_slo(40), ledger=make_ledger()))


def test_dedicated_cores_are_taken_to_scale() -> None:
    best = trial_order(
        Question(make_curve(gpu_utilization=None), make_slo(15), ledger=make_ledger(), max_replicas=3, dedicated=True)
    )[0]
    assert (best.pair, best.throughput) == ((96, 3), pytest.approx(3 * 9032.8))


def test_a_trial_corrects_the_predictions_of_the_others() -> None:
    plain = {pair.pair: pair for pair in trial_order(Question(make_curve(), (), ledger=make_ledger()))}
    trial = make_trial(256, 2, plain[256, 2].throughput * 0.9, 40)
    corrected = {
        pair.pair: pair for pair in trial_order(Question(make_curve(), (), ledger=make_ledger(), trials=[trial]))
    }
    assert (256, 2) not in corrected
    assert corrected[128, 3].throughput == pytest.approx(0.9 * plain[128, 3].throughput)

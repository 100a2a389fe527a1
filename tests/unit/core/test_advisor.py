"""The advisor: published anchors, the limits it names, and what must hold on every curve."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tightship.core.advisor import Basis, BestLatency, Candidate, Failure, Limit, Recommendation, advise
from tightship.core.curve import Confirmation, Curve, Latency, Metric, Objective, Point, Statistic, Trial
from tightship.core.memory import Context, Ledger, Reserve

GIB = 1 << 30

# OPT-1.3B, ShareGPT, one H100 64 GB, vLLM 0.6 (arXiv:2503.08311, published raw runs): batch, total tokens/s, mean ITL in ms,
# share of GPU time, preemptions.
OPT = [
    (1, 381.4, 3.623, 0.865, 0),
    (32, 5734.1, 7.51, 0.643, 0),
    (64, 8143.7, 10.40, 0.612, 0),
    (96, 9032.8, 13.89, 0.575, 0),
    (128, 9506.9, 17.35, 0.536, 0),
    (256, 10809.8, 29.27, 0.548, 0),
    (384, 11144.6, 40.88, 0.514, 0),
    (512, 11203.6, 52.11, 0.514, 0),
    (640, 11298.4, 61.68, 0.497, 0),
    (768, 11050.1, 72.89, 0.473, 0),
]
# Llama-2-7B, same source; 2,000 requests a run.
LLAMA = [
    (1, 124.0, 10.90, 0.952, 0),
    (64, 3538.7, 23.38, 0.847, 0),
    (96, 3950.6, 31.19, 0.823, 0),
    (128, 4412.4, 36.67, 0.784, 0),
    (192, 4973.7, 47.84, 0.798, 0),
    (256, 5255.7, 56.75, 0.801, 543),
    (512, 5373.8, 60.34, 0.794, 802),
]


def make_curve(rows: list[tuple[int, float, float, float, int]]) -> Curve:
    return Curve(
        Point(
            batch=batch,
            throughput=throughput,
            inter_token_latency=Latency(mean=itl / 1000),
            requests=2000,
            preemptions=preemptions,
            gpu_utilization=utilization,
        )
        for batch, throughput, itl, utilization, preemptions in rows
    )


def make_slo(milliseconds: float, statistic: Statistic = Statistic.MEAN) -> list[Objective]:
    return [Objective(Metric.INTER_TOKEN_LATENCY, statistic, milliseconds / 1000)]


def make_ledger(total: float = 64, non_kv: float = 4, **changes: Any) -> Ledger:
    """OPT-1.3B's: 196,608 bytes of KV cache a token, 403 tokens a request on average."""
    ledger = Ledger(
        device_total=int(total * GIB),
        non_kv=int(non_kv * GIB),
        kv_bytes_per_token=196_608,
        block_size=16,
        context=Context(mean=411, std=312, assumed=True),
        max_model_len=2048,
    )
    return dataclasses.replace(ledger, **changes)


@pytest.mark.parametrize(
    ("rows", "slo", "batch", "limit"),
    [
        (OPT, 2 * 7.51, 96, Limit.SLO),
        (OPT, 4 * 7.51, 256, Limit.SLO),
        (OPT, 1000, 256, Limit.EFFICIENCY),
        (OPT, 3.7, 1, Limit.SLO),
        (OPT[:5], 1000, 128, Limit.SWEEP),
        (LLAMA, 4 * 17.64, 192, Limit.MEMORY),
        (LLAMA, 2 * 17.64, 96, Limit.SLO),
    ],
)
def test_published_curves_give_the_published_batches(
    rows: list[tuple[int, float, float, float, int]], slo: float, batch: int, limit: Limit
) -> None:
    answer = advise(make_curve(rows), make_slo(slo))

    assert (answer.batch, answer.binding_limit, answer.replicas) == (batch, limit, 1)
    assert answer.basis is Basis.MEASURED


def paper(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def paper_curve(data: dict[str, Any]) -> Curve:
    return Curve(
        Point(
            batch=point["max_num_seqs"],
            throughput=point["total_token_throughput"],
            inter_token_latency=Latency(mean=point["mean_itl_ms"] / 1000, p99=point["p99_itl_ms"] / 1000),
            requests=point["completed"],
            preemptions=int(sum(engine["preemptions"] for engine in point["engines"])),
            gpu_utilization=point["gpu_util_mean_pct"] / 100,
        )
        for point in data["points"]
    )


@pytest.mark.parametrize(("factor", "batch", "kv_share"), [(2, 96, 0.16), (4, 256, 0.38)])
def test_anchors_on_the_papers_raw_runs(paper_data: Path, factor: int, batch: int, kv_share: float) -> None:
    data = paper(paper_data, "sweep/opt-1.3b_sharegpt.json")
    curve = paper_curve(data)
    at_32 = curve.at(32)
    assert at_32 is not None
    itl = at_32.latency(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN)
    assert itl is not None

    answer = advise(curve, make_slo(factor * itl * 1000))

    assert answer.batch == batch
    chosen = next(point for point in data["points"] if point["max_num_seqs"] == batch)
    assert chosen["engines"][0]["peak_kv_cache_usage"] == pytest.approx(kv_share, abs=0.005)


def test_the_preemption_clause_changes_nothing_on_opt_and_something_on_llama(paper_data: Path) -> None:
    for name, loses in [("opt-1.3b", False), ("llama-2-7b", True)]:
        curve = paper_curve(paper(paper_data, f"sweep/{name}_sharegpt.json"))
        without = Curve(dataclasses.replace(point, preemptions=0) for point in curve.points)
        changed = advise(curve, efficiency_floor=0.05).batch != advise(without, efficiency_floor=0.05).batch
        assert changed is loses, name


def test_preemption_names_what_was_forgone() -> None:
    answer = advise(make_curve(LLAMA), make_slo(58))

    assert answer.batch == 192
    assert any("282 tokens/s forgone at batch 256" in note for note in answer.notes)


@pytest.mark.parametrize(("preemptions", "requests", "batch"), [(3, 10, 2), (4, 10, 1), (20, 2000, 2), (21, 2000, 1)])
def test_preemptions_are_forgiven_up_to_three_or_one_percent(preemptions: int, requests: int, batch: int) -> None:
    points = [Point(1, 100.0), Point(2, 190.0, preemptions=preemptions, requests=requests)]
    assert advise(Curve(points)).batch == batch


def test_without_batch_one_the_floor_is_not_evaluated_and_that_is_said() -> None:
    answer = advise(make_curve(OPT[1:]), make_slo(1000))

    assert (answer.batch, answer.floor_evaluated) == (640, False)
    assert any("floor not evaluated" in note for note in answer.notes)


def test_a_curve_that_only_falls_beyond_the_choice_is_bound_by_efficiency() -> None:
    answer = advise(make_curve(OPT[1:]), [])
    assert (answer.batch, answer.binding_limit) == (640, Limit.EFFICIENCY)
    assert "batch 768 brings no more" in answer.message


def test_ties_go_to_the_smaller_batch() -> None:
    assert advise(Curve([Point(4, 100.0), Point(8, 100.0)])).batch == 4


def test_an_infeasible_slo_gives_the_smallest_latency_and_its_batch() -> None:
    answer = advise(make_curve(OPT), make_slo(2), ledger=make_ledger())

    assert not answer.feasible
    assert answer.failure is Failure.SLO_INFEASIBLE
    assert answer.best_latency is not None
    assert (answer.best_latency.batch, answer.best_latency.latencies) == (1, pytest.approx((0.003623,)))
    assert "3.623ms > 2ms" in answer.message
    assert answer.batch is None


def test_a_statistic_that_no_point_holds_is_infeasible_and_named() -> None:
    answer = advise(make_curve(OPT), make_slo(15, Statistic.P99))
    assert (answer.failure, answer.best_latency) == (Failure.SLO_INFEASIBLE, None)
    assert "p99 InterTokenLatency" in answer.message


def test_all_objectives_bind_together() -> None:
    curve = Curve(
        Point(batch, 100.0 * batch, Latency(p95=0.01 * batch), Latency(mean=0.1 * batch)) for batch in (1, 2, 4, 8)
    )
    itl = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.P95, 0.04)
    ttft = Objective(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN, 0.2)

    assert advise(curve, [itl]).batch == 4
    assert advise(curve, [itl, ttft]).batch == 2
    impossible = advise(curve, [itl, Objective(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN, 0.05)])
    assert impossible.best_latency is not None
    assert impossible.best_latency.latencies == (0.01, 0.1)


def test_a_floor_that_no_point_reaches() -> None:
    assert advise(make_curve(OPT), efficiency_floor=1.0).failure is Failure.EFFICIENCY_FLOOR_NOT_MET


def test_a_gpu_too_small_is_named_with_numbers() -> None:
    answer = advise(make_curve(OPT), make_slo(15), ledger=make_ledger(total=3))
    assert answer.failure is Failure.INSUFFICIENT_MEMORY
    assert "4.4Gi per replica > 3.0Gi" in answer.message


def test_the_next_batch_binds_whatever_noise_has_above_it() -> None:
    noisy = [*OPT[:4], (112, 9550.0, 15.6, 0.55, 0), (128, 9506.9, 17.35, 0.536, 0)]
    answer = advise(make_curve(noisy), make_slo(15))
    assert (answer.batch, answer.binding_limit) == (96, Limit.SLO)
    assert "batch 112 has" in answer.message


def test_memory_binds_where_the_next_batch_does_not_fit() -> None:
    answer = advise(make_curve(OPT), ledger=make_ledger(total=15), max_replicas=1)
    assert (answer.batch, answer.binding_limit) == (96, Limit.MEMORY)


def test_packing_pays_for_opt_with_a_loose_slo() -> None:
    """The published packings found two replicas at batch 256 (14.7k tokens/s) best, over four at 96."""
    answer = advise(make_curve(OPT), make_slo(60), ledger=make_ledger(), reserve=Reserve(share=Fraction(5, 100)))

    assert answer.replicas is not None
    assert answer.replicas >= 2
    assert answer.basis is Basis.ESTIMATED
    assert answer.expected_gain is not None
    assert answer.expected_gain >= 1.05
    assert answer.memory_per_replica is not None
    assert answer.replicas * answer.memory_per_replica <= 0.95 * 64 * GIB


def test_packing_that_would_miss_the_slo_is_not_advised() -> None:
    answer = advise(make_curve(OPT), make_slo(15.02), ledger=make_ledger())
    assert (answer.batch, answer.replicas, answer.basis) == (96, 1, Basis.MEASURED)
    assert any("leaves" in note for note in answer.notes)


def test_a_gpu_that_is_always_busy_gains_nothing_from_packing() -> None:
    busy = Curve(dataclasses.replace(point, gpu_utilization=1.0) for point in make_curve(OPT).points)
    assert advise(busy, make_slo(1000), ledger=make_ledger()).replicas == 1


def test_without_utilization_nothing_is_predicted_and_that_is_said() -> None:
    blind = Curve(dataclasses.replace(point, gpu_utilization=None) for point in make_curve(OPT).points)
    answer = advise(blind, make_slo(1000), ledger=make_ledger())
    assert answer.replicas == 1
    assert any("GPU utilization was not recorded" in note for note in answer.notes)


def test_dedicated_cores_do_not_contend_so_memory_and_cores_alone_bound_replicas() -> None:
    blind = Curve(dataclasses.replace(point, gpu_utilization=None) for point in make_curve(OPT).points)
    answer = advise(blind, make_slo(16), ledger=make_ledger(total=100), max_replicas=3, dedicated=True)
    assert (answer.batch, answer.replicas) == (96, 3)
    assert answer.chosen is not None
    assert answer.chosen.throughput == pytest.approx(3 * 9032.8)
    assert (answer.basis, answer.applied_batch, answer.applied_replicas) == (Basis.ESTIMATED, 96, 1)


def test_the_confirmed_batch_takes_what_the_confirmation_measured() -> None:
    ledger = make_ledger(confirmed_batch=96, confirmed_kv_tokens=48_000)
    answer = advise(make_curve(OPT), make_slo(15.02), ledger=ledger)
    assert (answer.kv_tokens, answer.kv_cache) == (48_000, 48_000 * 196_608)


@pytest.mark.parametrize("settings", [{"efficiency_floor": -1}, {"minimum_gain": 0.9}, {"max_replicas": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need efficiency floor"):
        advise(make_curve(OPT), **settings)


# What was tried. The published packings: 96 x 2 has 12,314 tokens/s and 18.98 ms, 96 x 4 13,172 and 31.52, 256 x 2 14,670 and 37.07.


def make_trial(batch: int, replicas: int, throughput: float, itl: float, **changes: Any) -> Trial:
    return Trial(batch, replicas, throughput, Latency(mean=itl / 1000), requests=2000, **changes)


PACKED = [make_trial(96, 2, 12_313.9, 18.98), make_trial(96, 4, 13_172.4, 31.52), make_trial(256, 2, 14_669.5, 37.07)]


def candidate(answer: Recommendation, batch: int, replicas: int) -> Candidate:
    return next(c for c in answer.candidates if c.pair == (batch, replicas))


def without_utilization() -> Curve:
    """Nothing untried can win."""
    return Curve(dataclasses.replace(point, gpu_utilization=None) for point in make_curve(OPT).points)


@pytest.mark.parametrize(
    ("slo", "pair"), [(60, (256, 2)), (37.5, (256, 2)), (37, (96, 4)), (31, (96, 2)), (18, (128, 1)), (15, (96, 1))]
)
def test_the_published_packings_are_decided_by_what_they_measured(slo: float, pair: tuple[int, int]) -> None:
    """Measured packed, a latency may use the whole SLO. At 31 ms the best single replica is 256 with 10,810 tokens/s."""
    answer = advise(without_utilization(), make_slo(slo), ledger=make_ledger(), trials=PACKED)

    assert answer.chosen is not None
    assert answer.chosen.pair == pair
    assert answer.applied == answer.chosen
    assert answer.basis is Basis.MEASURED


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (make_trial(256, 2, 14_669.5, 40.5), "mean InterTokenLatency 40.5ms > 40ms"),
        (Trial(256, 2, 14_669.5, Latency(p95=0.037)), "mean InterTokenLatency was not measured"),
        (make_trial(256, 2, 11_200, 37), "1.036 x the best single replica < 1.05"),
        (make_trial(256, 2, 12_000, 37, half_width=0.11), "1.110 x the best single replica, measured to 11.0%, is no certain gain"),
        (make_trial(256, 2, 14_669.5, 37, preemptions=21), "21 preemptions > 20"),
        (make_trial(128, 4, 14_669.5, 37), "4 x 16.2Gi > 64.0Gi"),
        (make_trial(96, 9, 14_669.5, 37), "9 replicas > 8, the most that are allowed"),
    ],
)  # fmt: skip
def test_a_trial_that_fails_leaves_one_replica_and_says_what_was_tried(trial: Trial, words: str) -> None:
    answer = advise(without_utilization(), make_slo(40), ledger=make_ledger(), trials=[trial])

    assert (answer.batch, answer.replicas, answer.basis) == (256, 1, Basis.MEASURED)
    assert any(words in rejection.text for rejection in candidate(answer, *trial.pair).rejections)
    tried = next(note for note in answer.notes if note.startswith("packing was tried and does not pay here"))
    assert f"batch {trial.batch} with {trial.replicas} replicas has {trial.throughput:.0f} tokens/s" in tried
    assert words in tried
    assert any("one replica leaves" in note for note in answer.notes)


def test_the_half_widths_of_both_sides_count() -> None:
    """1.077 x less sqrt(5 %^2 + 6 %^2) = 7.8 % is below 1; with either alone it is above."""
    for packed, alone, replicas in ((0.05, 0.06, 1), (0.05, None, 2), (None, 0.06, 2)):
        curve = Curve(dataclasses.replace(point, half_width=alone) for point in without_utilization().points)
        trial = make_trial(256, 2, 11_642, 37, half_width=packed)
        assert advise(curve, make_slo(40), ledger=make_ledger(), trials=[trial]).replicas == replicas


def test_an_untried_best_waits_for_its_trial() -> None:
    answer = advise(make_curve(OPT), make_slo(40), ledger=make_ledger(), trials=PACKED[:1])

    assert answer.chosen is not None
    assert (answer.basis, answer.chosen.basis) == (Basis.ESTIMATED, Basis.ESTIMATED)
    assert (answer.applied_batch, answer.applied_replicas) == (96, 2)
    assert answer.applied_memory == candidate(answer, 96, 2).memory
    assert answer.applied_kv_tokens == make_ledger().kv_tokens(96)
    assert answer.applied_kv_cache == make_ledger().kv_bytes(96)
    assert answer.applied_gain == pytest.approx(12_313.9 / 10_809.8)
    assert any(
        "not applied until profiling.extend has had it tried; meanwhile batch 96 with 2 replicas runs: 12314 tokens/s"
        in note
        for note in answer.notes
    )


def with_p95(rows: Any, factor: float = 1.2) -> Curve:
    """The curve with a p95 that is so many times the mean."""
    return Curve(
        dataclasses.replace(
            point, inter_token_latency=Latency(mean=(mean := point.inter_token_latency.mean), p95=factor * (mean or 0))
        )
        for point in make_curve(rows).points
    )


@pytest.mark.parametrize(
    ("slo", "changes", "basis", "words"),
    [
        pytest.param(make_slo(19), {}, Basis.MEASURED, None, id="its mean is known"),
        pytest.param(make_slo(40, Statistic.P95), {}, Basis.ESTIMATED, None, id="its p95 is open"),
        pytest.param(
            make_slo(20, Statistic.P95), {}, Basis.ESTIMATED, "20ms x 0.9 (predicted)", id="predicted to miss"
        ),
        pytest.param(
            [*make_slo(18), Objective(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN, 1.0)],
            {},
            Basis.MEASURED,
            "mean InterTokenLatency 18.98ms > 18ms",
            id="what it tells misses",
        ),
        pytest.param(
            make_slo(40, Statistic.P95), {"preemptions": 900}, Basis.MEASURED, "900 preemptions", id="it preempted"
        ),
        pytest.param(
            make_slo(40, Statistic.P99),
            {},
            Basis.MEASURED,
            "p99 InterTokenLatency was not measured",
            id="known nowhere",
        ),
    ],
)
def test_a_trial_that_leaves_an_objective_open_is_an_estimate(
    slo: list[Objective], changes: dict[str, Any], basis: Basis, words: str | None
) -> None:
    trial = dataclasses.replace(make_trial(96, 2, 12_313.9, 18.98), **changes)
    answer = advise(with_p95(OPT), slo, ledger=make_ledger(), max_replicas=2, trials=[trial])
    found = candidate(answer, 96, 2)
    assert (found.basis, found.throughput) == (basis, 12_313.9)
    assert found.eligible is (words is None)
    assert words is None or any(words in rejection.text for rejection in found.rejections), found.rejections


def test_an_estimate_of_a_trial_is_not_what_may_run_and_says_what_is_open() -> None:
    trial = make_trial(96, 2, 20_000, 18.98)
    answer = advise(with_p95(OPT), make_slo(40, Statistic.P95), ledger=make_ledger(), max_replicas=2, trials=[trial])
    assert (answer.batch, answer.replicas, answer.basis) == (96, 2, Basis.ESTIMATED)
    assert answer.applied_replicas == 1
    assert (
        "the trial of batch 96 with 2 replicas did not resolve p95 InterTokenLatency, which is predicted"
        in answer.notes
    )


def test_predictions_are_corrected_by_trials_of_as_many_replicas_else_of_all() -> None:
    plain = advise(make_curve(OPT), make_slo(1000), ledger=make_ledger())
    two = make_trial(96, 2, 0.9 * candidate(plain, 96, 2).throughput, 20)
    four = make_trial(32, 4, 0.4 * candidate(plain, 32, 4).throughput, 20)

    answer = advise(make_curve(OPT), make_slo(1000), ledger=make_ledger(), trials=[two, four])

    for pair, ratio in (((64, 2), 0.9), ((64, 4), 0.4), ((64, 3), 0.6)):
        assert candidate(answer, *pair).throughput == pytest.approx(ratio * candidate(plain, *pair).throughput), pair


def test_no_correction_leads_beyond_what_is_possible() -> None:
    wonderful = make_trial(96, 2, 90_000, 1)
    for c in advise(make_curve(OPT), make_slo(1000), ledger=make_ledger(), trials=[wonderful]).candidates:
        point = make_curve(OPT).at(c.batch)
        assert point is not None
        if c.basis is Basis.ESTIMATED:
            assert c.throughput <= c.replicas * point.throughput
            assert c.latencies[0] == point.inter_token_latency.mean


def test_what_a_milder_trial_missed_is_not_predicted_to_hold() -> None:
    missed = make_trial(96, 2, 12_313.9, 18.98)
    answer = advise(make_curve(OPT), make_slo(18.9), ledger=make_ledger(), trials=[missed])
    assert any(
        "batch 96 with 2 replicas already had mean InterTokenLatency 18.98ms > 18.9ms" in rejection.text
        for rejection in candidate(answer, 96, 3).rejections
    )


def confirmed(batch: int, itl: float, *, agrees: bool = False) -> Confirmation:
    """A replica that ran alone; the sweep's own figures are OPT's."""
    sweep = make_curve(OPT).at(batch)
    assert sweep is not None
    alone = sweep.inter_token_latency.mean
    assert alone is not None
    return Confirmation(
        batch=batch,
        throughput=0.98 * sweep.throughput,
        inter_token_latency=Latency(mean=itl / 1000),
        throughput_ratio=0.98,
        latency_ratio=itl / 1000 / alone,
        agrees=agrees,
    )


@pytest.mark.parametrize(
    ("slo", "replica", "batch"),
    [
        (18, None, 128),
        (18, confirmed(128, 17.9), 128),  # it disagrees, and is met all the same
        (18, confirmed(128, 19.1), 96),
        (18, confirmed(96, 19.1), 64),  # a larger batch is no quicker, whatever the sweep says
        (18, confirmed(256, 40.0), 128),  # where the sweep says no itself
        (20, confirmed(128, 19.1), 128),  # the objective was changed
        (None, confirmed(128, 19.1), 640),  # nothing is asked of latency
    ],
)
def test_a_replica_that_missed_the_slo_alone_lowers_the_batch(
    slo: float | None, replica: Confirmation | None, batch: int
) -> None:
    objectives = make_slo(slo) if slo else []
    answer = advise(make_curve(OPT), objectives, efficiency_floor=0.01, confirmation=replica)
    assert (answer.batch, answer.basis) == (batch, Basis.MEASURED)


def test_what_a_replica_showed_is_said_with_numbers() -> None:
    answer = advise(make_curve(OPT), make_slo(18), confirmation=confirmed(128, 19.1))
    assert answer.message.endswith(
        "; SLO binds: batch 128 has mean InterTokenLatency 19.1ms > 18ms as a replica (17.35ms in the sweep)"
    )
    assert (
        "batch 128 as a replica disagrees with the sweep: throughput 0.980 times the sweep's, time between tokens 1.101 times the "
        "sweep's; mean InterTokenLatency is 19.1ms, above the SLO of 18ms: neither it nor a larger batch is advised for one replica"
    ) in answer.notes
    fell = candidate(answer, 128, 1)
    assert (fell.eligible, fell.latencies) == (False, (pytest.approx(0.0191),))
    packed = advise(make_curve(OPT), make_slo(18), ledger=make_ledger(), confirmation=confirmed(128, 19.1))
    untried = candidate(packed, 128, 2)
    assert any("batch 128 as a replica alone already had" in each.text for each in untried.rejections)


def test_a_confirmation_that_agrees_is_not_worth_a_word() -> None:
    answer = advise(make_curve(OPT), make_slo(18), confirmation=confirmed(128, 17.4, agrees=True))
    assert not [note for note in answer.notes if "as a replica" in note]


def test_a_pair_that_was_tried_is_judged_by_its_trial_and_not_by_a_replica_alone() -> None:
    tried = make_trial(128, 2, 12_900, 17.9)
    answer = advise(
        make_curve(OPT), make_slo(18), ledger=make_ledger(), trials=[tried], confirmation=confirmed(128, 18.1)
    )
    assert (answer.batch, answer.replicas) == (128, 2)


def test_an_slo_that_only_the_replica_misses_is_infeasible_with_what_the_replica_had() -> None:
    curve = make_curve(OPT[:2])
    answer = advise(curve, make_slo(4), confirmation=confirmed(1, 4.5))
    assert answer.failure is Failure.SLO_INFEASIBLE
    assert answer.best_latency == BestLatency(1, (pytest.approx(0.0045),))
    assert "batch 1 with mean InterTokenLatency 4.5ms > 4ms" in answer.message


def test_a_limit_that_is_a_sentence_of_its_own_is_not_said_to_be_had() -> None:
    unknown = Trial(256, 2, 10_900, Latency(p95=0.037))
    curve = Curve(without_utilization().points[:6])
    answer = advise(curve, make_slo(40), ledger=make_ledger(), trials=[unknown])
    assert answer.message.endswith("; SLO binds: batch 256 with 2 replicas: mean InterTokenLatency was not measured")


def test_a_trial_of_a_batch_that_the_sweep_has_not_is_a_candidate_too() -> None:
    answer = advise(without_utilization(), make_slo(40), ledger=make_ledger(), trials=[make_trial(200, 2, 14_900, 33)])
    assert (answer.batch, answer.replicas) == (200, 2)
    assert answer.kv_tokens == make_ledger().kv_tokens(200)


def test_without_a_ledger_a_trial_cannot_be_placed() -> None:
    answer = advise(without_utilization(), make_slo(60), trials=PACKED)
    assert answer.replicas == 1
    assert candidate(answer, 256, 2).limits == (Limit.MEMORY,)


def test_a_trial_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 96 with 2 replicas occurs more than once"):
        advise(make_curve(OPT), trials=[PACKED[0], PACKED[0]])


@pytest.mark.parametrize(
    ("slo", "meets", "words"),
    [
        (make_slo(60), True, "52.11ms, which meets the SLO"),
        (make_slo(40), False, "52.11ms, which misses the SLO"),
        (make_slo(40, Statistic.P99), None, "batch 512: 11204 tokens/s"),
    ],
)
def test_the_default_engine_stands_beside_the_choice(slo: list[Objective], meets: bool | None, words: str) -> None:
    baseline = Point(512, 11_203.6, Latency(mean=0.05211))
    answer = advise(make_curve(OPT), slo, ledger=make_ledger(), trials=PACKED, baseline=baseline)

    assert answer.baseline is not None
    assert (answer.baseline.point, answer.baseline.meets_objectives) == (baseline, meets)
    assert any("the engine's default, batch 512" in note and words in note for note in answer.notes)


def test_a_choice_above_the_confirmed_batch_says_where_its_memory_is_from() -> None:
    notes = {
        confirmed: advise(
            make_curve(OPT), make_slo(30), ledger=make_ledger(confirmed_batch=confirmed), max_replicas=1
        ).notes
        for confirmed in (64, 256)
    }
    words = "memory beside the KV cache was read at batch 64 and is taken to be the same at batch 256 where no trial took more"
    assert any(note.startswith(words) for note in notes[64])
    assert not any("memory beside the KV cache" in note for note in notes[256])


@pytest.mark.parametrize(
    ("each", "fits", "memory"),
    [
        (None, True, 10.64),
        # What was seen in the trial is below the ledger's figure: that stays.
        (9, True, 10.64),
        # Two replicas with 6 GiB of KV cache took 20 GiB each: 14 beside it instead of 4, and so they don't fit any more.
        (20, False, 20.64),
    ],
)
def test_what_a_trials_replicas_took_counts_against_their_pair(each: float | None, fits: bool, memory: float) -> None:
    curve = make_curve(OPT)
    single = curve.at(64)
    assert single is not None
    trial = Trial(
        64,
        2,
        1.5 * max(point.throughput for point in curve.points),
        Latency(mean=0.010),
        requests=100,
        memory=None if each is None else int(2 * each * GIB),
        kv_cache=6 * GIB,
    )
    # What was read at its worst step no trial knows better.
    read = advise(curve, make_slo(11), ledger=make_ledger(total=30, confirmed_batch=64), trials=[trial])
    assert (read.batch, read.replicas) == (64, 2)
    answer = advise(curve, make_slo(11), ledger=make_ledger(total=30), trials=[trial])
    tried = next(one for one in answer.candidates if (one.batch, one.replicas) == (64, 2))
    assert tried.memory is not None
    assert tried.memory / GIB == pytest.approx(memory, abs=0.01)
    assert ((answer.batch, answer.replicas) == (64, 2)) is fits
    assert tried.limits == (() if fits else (Limit.MEMORY,))

"""What must hold on every curve, with every ledger and whatever was tried (the method's section on properties)."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core.advisor import ESTIMATE_MARGIN, Basis, Failure, Limit, Question, Recommendation, advise
from tightship.core.colocation import predict
from tightship.core.curve import Curve, Latency, Metric, Objective, Point, Statistic, Trial
from tightship.core.memory import Context, Ledger, Reserve
from tightship.core.trials import next_trial

GIB = 1 << 30
ROOMY = st.floats(80, 400)
"""Memory in GiB that holds one replica at any batch drawn here."""
MEMORY = st.floats(5, 200)
SLOS = st.floats(0.0005, 1)
WIDEST = 0.05


def make_ledger(total: float) -> Ledger:
    return Ledger(
        device_total=int(total * GIB),
        non_kv=4 * GIB,
        kv_bytes_per_token=196_608,
        block_size=16,
        context=Context(mean=411, std=312, assumed=True),
        max_model_len=2048,
    )


def objective(seconds: float) -> list[Objective]:
    return [Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, seconds)]


def itl(measured: Point | Trial) -> float:
    mean = measured.inter_token_latency.mean
    assert mean is not None
    return mean


def total(answer: Recommendation) -> float:
    return 0.0 if answer.chosen is None else answer.chosen.throughput


def best_meeting_slo(answer: Recommendation) -> float:
    """The best single replica within the SLO: the bar that packing has to pass."""
    singles = (c for c in answer.candidates if c.replicas == 1 and Limit.SLO not in c.limits)
    return max((single.throughput for single in singles), default=0.0)


@st.composite
def curves(draw: st.DrawFn, *, preempting: bool = True, blind: bool = False) -> Curve:
    """L non-decreasing and T/B non-increasing, as physics has it."""
    batches = sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=6)))
    per_request, latency, points = draw(st.floats(10, 1000)), draw(st.floats(0.001, 0.1)), []
    for batch in batches:
        per_request *= draw(st.floats(0.3, 1))
        latency *= draw(st.floats(1, 3))
        points.append(
            Point(
                batch,
                per_request * batch,
                Latency(mean=latency),
                requests=100,
                preemptions=draw(st.sampled_from([0, 0, 0, 50])) if preempting else 0,
                gpu_utilization=draw(st.none() | st.floats(0, 1)) if blind else draw(st.floats(0, 1)),
                kv_tokens_peak=draw(st.integers(0, batch * 800)),
                half_width=draw(st.none() | st.floats(0, WIDEST)),
            )
        )
    return Curve(points)


def trial_of(curve: Curve, batch: int, replicas: int, share: float, slower: float, **changes: object) -> Trial:
    """A trial with this share of perfect scaling, its steps this many times as long as alone."""
    point = curve.at(batch)
    assert point is not None
    trial = Trial(batch, replicas, replicas * point.throughput * share, Latency(mean=itl(point) * slower), requests=100)
    return dataclasses.replace(trial, **changes)  # type: ignore[arg-type]


@st.composite
def tried_curves(
    draw: st.DrawFn, *, preempting: bool = True, half_widths: bool = True
) -> tuple[Curve, tuple[Trial, ...]]:
    """A curve with some packings measured, which may have done better or worse than predicted."""
    curve = draw(curves(preempting=preempting))
    if not half_widths:
        curve = Curve(dataclasses.replace(point, half_width=None) for point in curve.points)
    batches = st.sampled_from([point.batch for point in curve.points])
    pairs = draw(st.sets(st.tuples(batches, st.integers(2, 4)), max_size=4))
    trials = [
        trial_of(
            curve,
            batch,
            replicas,
            draw(st.floats(0.2, 1)),
            draw(st.floats(1, 5)),
            half_width=draw(st.none() | st.floats(0, WIDEST)) if half_widths else None,
            preemptions=draw(st.sampled_from([0, 0, 0, 50])) if preempting else 0,
        )
        for batch, replicas in sorted(pairs)
    ]
    return curve, tuple(trials)


# One replica.


@given(curves(), SLOS, SLOS)
def test_a_tighter_slo_never_gives_a_larger_batch(curve: Curve, one: float, other: float) -> None:
    tight, loose = sorted((one, other))
    assert (advise(curve, objective(tight)).batch or 0) <= (advise(curve, objective(loose)).batch or 0)


@given(curves(), SLOS, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_floor_never_gives_a_larger_batch(curve: Curve, slo: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    higher = advise(curve, objective(slo), efficiency_floor=high)
    lower = advise(curve, objective(slo), efficiency_floor=low)
    assert (higher.batch or 0) <= (lower.batch or 0)


@given(curves(), SLOS)
def test_an_infeasible_slo_is_answered_with_the_smallest_latency_and_its_batch(curve: Curve, slo: float) -> None:
    answer = advise(curve, objective(slo), ledger=make_ledger(200))
    fastest = min(curve.points, key=lambda point: (itl(point), point.batch))
    if itl(fastest) > slo:
        assert answer.failure is Failure.SLO_INFEASIBLE
        assert answer.best_latency is not None
        assert (answer.best_latency.batch, answer.best_latency.latencies) == (fastest.batch, (itl(fastest),))
    else:
        assert answer.failure is not Failure.SLO_INFEASIBLE


# Batch and replicas together.


@given(tried_curves(), SLOS, MEMORY, MEMORY)
def test_less_memory_never_gives_a_larger_total(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, one: float, other: float
) -> None:
    curve, trials = tried
    less, more = (
        advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials) for memory in sorted((one, other))
    )
    assert total(less) <= total(more)


@given(tried_curves(), SLOS, SLOS, MEMORY)
def test_a_tighter_slo_never_allows_a_larger_total(
    tried: tuple[Curve, tuple[Trial, ...]], one: float, other: float, memory: float
) -> None:
    """Of the pairs that no limit speaks against, whether or not they gain enough over one replica."""
    curve, trials = tried
    tight, loose = (
        advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials) for slo in sorted((one, other))
    )
    allowed_tight, allowed_loose = (
        max((c.throughput for c in answer.candidates if not c.limits), default=0.0) for answer in (tight, loose)
    )
    assert allowed_tight <= allowed_loose


@given(tried_curves(preempting=False, half_widths=False), SLOS, SLOS, ROOMY)
def test_a_tighter_slo_never_gives_a_larger_total(
    tried: tuple[Curve, tuple[Trial, ...]], one: float, other: float, memory: float
) -> None:
    """Where every batch may run alone, and without the margins of the gain: both compare with another batch's best."""
    curve, trials = tried
    tight, loose = (
        advise(curve, objective(slo), efficiency_floor=0, minimum_gain=1, ledger=make_ledger(memory), trials=trials)
        for slo in sorted((one, other))
    )
    assert total(tight) <= total(loose)


@given(tried_curves(), SLOS, SLOS, MEMORY, st.floats(1, 1.5))
def test_a_tighter_slo_gains_at_most_the_bar_that_packing_had_to_pass(
    tried: tuple[Curve, tuple[Trial, ...]], one: float, other: float, memory: float, gain: float
) -> None:
    """A looser SLO raises the bar, which may drop a pair just above the tighter SLO's bar; nothing else makes it lose."""
    curve, trials = tried
    tight, loose = (
        advise(curve, objective(slo), minimum_gain=gain, ledger=make_ledger(memory), trials=trials)
        for slo in sorted((one, other))
    )
    margin = max(gain, 1 / (1 - math.hypot(WIDEST, WIDEST)))
    assert total(tight) <= max(total(loose), margin * best_meeting_slo(loose) * (1 + 1e-9))


@given(tried_curves(), SLOS, st.integers(-6, 6), MEMORY)
def test_scaling_all_latencies_and_the_slo_changes_nothing(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, exponent: int, memory: float
) -> None:
    """Powers of two keep it free of rounding."""
    (curve, trials), factor = tried, 2.0**exponent
    slower = Curve(dataclasses.replace(p, inter_token_latency=Latency(mean=itl(p) * factor)) for p in curve.points)
    others = [dataclasses.replace(t, inter_token_latency=Latency(mean=itl(t) * factor)) for t in trials]

    here = advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials)
    there = advise(slower, objective(slo * factor), ledger=make_ledger(memory), trials=others)

    assert (here.batch, here.replicas, here.binding_limit) == (there.batch, there.replicas, there.binding_limit)
    assert (here.applied_batch, here.applied_replicas) == (there.applied_batch, there.applied_replicas)
    steps = (
        next_trial(Question(curve, objective(slo), ledger=make_ledger(memory), trials=trials)),
        next_trial(Question(slower, objective(slo * factor), ledger=make_ledger(memory), trials=others)),
    )
    assert steps[0].pair == steps[1].pair


@given(tried_curves(), SLOS, st.randoms(use_true_random=False))
def test_the_order_of_points_and_trials_changes_nothing(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, shuffle: random.Random
) -> None:
    curve, trials = tried
    points, others = list(curve.points), list(trials)
    shuffle.shuffle(points)
    shuffle.shuffle(others)
    here = advise(Curve(points), objective(slo), ledger=make_ledger(64), trials=others)
    assert here == advise(curve, objective(slo), ledger=make_ledger(64), trials=trials)


@given(tried_curves(), SLOS, MEMORY, st.integers(0, 99))
def test_replicas_never_exceed_the_device(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, memory: float, percent: int
) -> None:
    curve, trials = tried
    reserve, ledger = Reserve(share=Fraction(percent, 100)), make_ledger(memory)
    answer = advise(curve, objective(slo), ledger=ledger, reserve=reserve, trials=trials)
    available = ledger.device_total - reserve.of(ledger.device_total)
    if answer.feasible:
        assert answer.replicas is not None
        assert answer.memory_per_replica is not None
        assert answer.replicas * answer.memory_per_replica <= available
        assert answer.applied_replicas is not None
        assert answer.applied_memory is not None
        assert answer.applied_replicas * answer.applied_memory <= available


@given(tried_curves(), SLOS, MEMORY)
def test_what_is_advised_meets_the_slo_and_every_loser_has_a_reason(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, memory: float
) -> None:
    curve, trials = tried
    answer = advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials)
    if answer.chosen is None:
        assert all(candidate.rejections for candidate in answer.candidates)
        return
    latency = answer.chosen.latencies[0]
    assert latency is not None
    assert latency <= slo * (ESTIMATE_MARGIN if answer.basis is Basis.ESTIMATED else 1)
    assert all(c.rejections or c.throughput <= answer.chosen.throughput for c in answer.candidates)
    if answer.chosen.replicas > 1:
        assert answer.chosen.throughput >= 1.05 * best_meeting_slo(answer)


# Trials.


@given(tried_curves(), SLOS, MEMORY)
def test_what_runs_was_measured_and_is_the_choice_unless_that_was_not(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, memory: float
) -> None:
    curve, trials = tried
    answer = advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials)
    if answer.chosen is None:
        assert answer.applied is None
        return
    assert answer.applied is not None
    measured = {(point.batch, 1) for point in curve.points} | {trial.pair for trial in trials}
    assert answer.applied.pair in measured
    assert answer.applied.basis is Basis.MEASURED
    assert answer.applied.eligible
    assert (answer.applied == answer.chosen) is (answer.basis is Basis.MEASURED)


@given(tried_curves(), SLOS, MEMORY)
def test_an_objective_missed_packed_never_wins(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, memory: float
) -> None:
    """Nor does an untried pair with at least the batch and the replicas of one that missed."""
    curve, trials = tried
    answer = advise(curve, objective(slo), ledger=make_ledger(memory), trials=trials)
    if answer.chosen is None:
        return
    for trial in trials:
        if itl(trial) > slo:
            assert answer.chosen.pair != trial.pair
            milder = trial.batch <= answer.chosen.batch and trial.replicas <= answer.chosen.replicas
            assert not milder or answer.basis is Basis.MEASURED


@settings(max_examples=60)
@given(
    curves(blind=True),
    st.none() | SLOS,
    MEMORY,
    st.floats(1, 1.3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_trying_ends_and_then_no_untried_pair_wins(  # noqa: PLR0917
    curve: Curve, slo: float | None, memory: float, gain: float, dedicated: bool, chance: random.Random
) -> None:
    """Whatever the trials show, and even where some can't be made."""
    objectives = [] if slo is None else objective(slo)
    ledger, most = make_ledger(memory), 4
    trials: list[Trial] = []
    failed: list[tuple[int, int]] = []
    for _ in range((most - 1) * len(curve.points) + 1):
        step = next_trial(
            Question(
                curve,
                objectives,
                ledger=ledger,
                max_replicas=most,
                minimum_gain=gain,
                dedicated=dedicated,
                trials=trials,
                failed=failed,
            )
        )
        if step.pair is None:
            break
        assert step.pair not in failed
        assert step.pair not in [trial.pair for trial in trials]
        batch, replicas = step.pair
        assert 2 <= replicas <= most
        assert replicas * ledger.replica_bytes(batch, getattr(curve.at(batch), "kv_tokens_peak", None)) <= memory * GIB
        if chance.random() < 0.1:
            failed.append(step.pair)
        else:
            share, slower = chance.uniform(0.2, 1), chance.uniform(1, 4)
            trials.append(trial_of(curve, batch, replicas, share, slower, half_width=0.03))
    else:
        raise AssertionError("more steps than pairs")

    answer = advise(
        curve,
        objectives,
        ledger=ledger,
        max_replicas=most,
        minimum_gain=gain,
        dedicated=dedicated,
        trials=trials,
        failed=failed,
    )
    assert answer.basis is Basis.MEASURED
    assert answer.applied == answer.chosen


@given(curves(preempting=False), SLOS, ROOMY)
def test_the_first_trial_is_never_forbidden(curve: Curve, slo: float, memory: float) -> None:
    """Where some batch may run alone, and memory holds two of it, something is tried."""
    ledger = make_ledger(2 * memory)
    step = next_trial(Question(curve, objective(slo), ledger=ledger))
    assert (step.pair is not None) is advise(curve, objective(slo), ledger=ledger).feasible


# Predictions.


@given(curves(), st.integers(2, 16), st.data())
def test_predictions_are_exact_alone_and_lie_between_no_and_full_contention(
    curve: Curve, replicas: int, data: st.DataObject
) -> None:
    """At every batch within the curve, measured or not."""
    batch = data.draw(st.integers(curve.points[0].batch, curve.points[-1].batch))
    alone, packed = predict(curve, batch, 1), predict(curve, batch, replicas)
    more = predict(curve, batch, replicas + 1)
    point = curve.at(batch)
    if point is not None:
        assert (alone.total_tokens_per_second, alone.inter_token_latency) == (point.throughput, itl(point))
    one, several, further = (made.inter_token_latency or 0.0 for made in (alone, packed, more))
    assert one <= several <= one * replicas
    assert several <= further * (1 + 1e-9)
    assert alone.total_tokens_per_second <= packed.total_tokens_per_second * (1 + 1e-9)
    assert packed.total_tokens_per_second <= replicas * alone.total_tokens_per_second * (1 + 1e-9)


@given(curves(), st.data())
def test_between_two_points_predictions_lie_between_theirs(curve: Curve, data: st.DataObject) -> None:
    batch = data.draw(st.integers(curve.points[0].batch, curve.points[-1].batch))
    made = predict(curve, batch, 1)
    below = max((p for p in curve.points if p.batch <= batch), key=lambda p: p.batch)
    above = min((p for p in curve.points if p.batch >= batch), key=lambda p: p.batch)
    assert made.inter_token_latency is not None
    assert itl(below) * (1 - 1e-9) <= made.inter_token_latency <= itl(above) * (1 + 1e-9)
    per_request = sorted(p.throughput / p.batch * itl(p) for p in (below, above))
    product = made.total_tokens_per_second / batch * made.inter_token_latency
    assert per_request[0] * (1 - 1e-9) <= product <= per_request[1] * (1 + 1e-9)


@given(curves(), st.integers(2, 8), st.floats(0, 1), st.floats(0, 1))
def test_a_busier_gpu_is_never_predicted_faster(curve: Curve, replicas: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    batch = curve.points[0].batch
    idle, busy = (predict(curve, batch, replicas, utilization=share) for share in (low, high))
    assert (idle.inter_token_latency or 0) <= (busy.inter_token_latency or 0) * (1 + 1e-9)
    assert idle.total_tokens_per_second * (1 + 1e-9) >= busy.total_tokens_per_second


@given(tried_curves(), SLOS, MEMORY, st.integers(0, 200), st.integers(0, 100))
def test_what_trials_took_never_makes_room(
    tried: tuple[Curve, tuple[Trial, ...]], slo: float, memory: float, taken: int, cache: int
) -> None:
    curve, trials = tried
    read = [dataclasses.replace(trial, memory=taken * GIB, kv_cache=cache * GIB) for trial in trials]
    ledger = make_ledger(memory)
    before, after = (advise(curve, objective(slo), ledger=ledger, trials=given) for given in (trials, read))
    needs = {candidate.pair: candidate.memory for candidate in before.candidates}
    for candidate in after.candidates:
        assert (candidate.memory or 0) >= (needs.get(candidate.pair) or 0)
    if after.chosen is not None:
        assert after.chosen.replicas * (after.chosen.memory or 0) <= memory * GIB

"""The advisor: from a measured curve and objectives to a batch, and from a memory ledger and trials to replicas per GPU.

One replica (arXiv:2503.08311, the batching configuration advisor):

    B_opt = argmax_B T(B)   subject to   L(B) <= SLO   and   T(B) / (B T(1)) > floor

and a point that preempts more than max(3, 1 % of its requests) is no candidate, because its KV need can't be read. Several
replicas, with T_R and L_R measured with R replicas running, M(B) from the ledger:

    (B, R) = argmax R T_R(B)   subject to   L_R(B) <= SLO,   R M(B) <= device - reserve,
             R T_R(B) >= minimum gain x max T_1(B') over all B' that meet the SLO,
             that ratio less its half-width sqrt(h_R^2 + h_1^2) still above 1

and R = 1 with the single choice where no pair passes. A pair that has no trial is predicted (`colocation`, corrected by what the
trials of other pairs showed, `calibration`): it is `Estimated`, must meet the SLO with 10 % to spare, and is not what may run.
`applied` is: the best among one replica and the pairs that were tried. So is a pair whose trial leaves an objective's statistic open
and has nothing else against it: that one latency is predicted, the rest is as measured. Ties go to the smaller batch, then to
fewer replicas.

The sweep measures one engine with room for every batch; a replica has room for its own. Where a replica of some batch was run alone
(`confirmation`) and missed an objective, neither that batch nor a larger one is a candidate for one replica, whatever the sweep says, nor
is an untried pair of them; where it disagrees with the sweep a note says by how much.

What must hold: the answer depends on the sets of points and trials only; every pair looked at is in `candidates` with the
reasons it fell, or none; nothing is relaxed, so an SLO that no batch meets is answered with the smallest latency reached; a pair
that was tried and missed the SLO never wins, nor does an untried one with at least its batch and its replicas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from tightship.core.calibration import Calibration, calibrate
from tightship.core.colocation import predict
from tightship.core.curve import Confirmation, Curve, Objective, Point, Trial
from tightship.core.memory import Ledger, Reserve

ESTIMATE_MARGIN = 0.9
"""A predicted latency may use this share of the SLO: what was not measured keeps 10 % to spare."""


class Limit(str, Enum):
    """What kept a better choice out, in the order in which it is named when several did."""

    SLO = "SLO"
    EFFICIENCY = "Efficiency"
    MEMORY = "Memory"
    SWEEP = "Sweep"


class Basis(str, Enum):
    """Whether the figures of a recommendation were measured as they would run, or predicted."""

    MEASURED = "Measured"
    ESTIMATED = "Estimated"


class Failure(str, Enum):
    """Why there is no recommendation; the values are condition reasons."""

    SLO_INFEASIBLE = "SLOInfeasible"
    EFFICIENCY_FLOOR_NOT_MET = "EfficiencyFloorNotMet"
    INSUFFICIENT_MEMORY = "InsufficientMemory"


@dataclass(frozen=True)
class Rejection:
    """One reason why a candidate fell; `limit` is `None` where packing merely doesn't pay.

    `text` says what the pair has (`efficiency 0.09 <= floor 0.1`), or where `clause` is set it is a sentence of its own.
    """

    limit: Limit | None
    text: str
    clause: bool = False


@dataclass(frozen=True)
class Candidate:
    """A pair of batch and replicas that was looked at.

    `throughput` is the total of all replicas in tokens per second; `latencies` are in seconds, one for each objective, `None`
    where not measured; `memory` is bytes per replica. Where `basis` is `Estimated` throughput and latencies are predictions.
    """

    batch: int
    replicas: int
    throughput: float
    latencies: tuple[float | None, ...]
    efficiency: float | None
    memory: int | None
    basis: Basis = Basis.MEASURED
    rejections: tuple[Rejection, ...] = ()

    @property
    def pair(self) -> tuple[int, int]:
        """Batch and replicas."""
        return self.batch, self.replicas

    @property
    def eligible(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.rejections

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits it hit, in order of naming."""
        return tuple(limit for limit in Limit if any(rejection.limit is limit for rejection in self.rejections))


@dataclass(frozen=True)
class BestLatency:
    """The nearest that the sweep came to the objectives: a batch, and its latency in seconds for each objective."""

    batch: int
    latencies: tuple[float, ...]


@dataclass(frozen=True)
class Baseline:
    """The engine as its user would have run it: one replica with its own default batch, saturated.

    `latencies` are in seconds, one for each objective; `meets_objectives` is `None` where one of them was not measured.
    """

    point: Point
    latencies: tuple[float | None, ...]
    meets_objectives: bool | None


@dataclass(frozen=True)
class Recommendation:
    """The advisor's answer; the optional fields are `None` where the answer, or the memory, is not known.

    Attributes:
        failure: why there is no answer; `None` when there is one.
        chosen: the winning pair.
        applied: the pair that may run now: `chosen`, or the best that was measured where `chosen` has not been tried.
        binding_limit: what kept a better choice out.
        basis: `Estimated` as soon as a figure of `chosen` is a prediction.
        kv_tokens, kv_cache, memory_per_replica: KV(B) in tokens and bytes, M(B) in bytes, of `chosen`.
        expected_gain: total throughput of `chosen` over the best single replica's that meets the SLO.
        applied_kv_tokens, applied_kv_cache, applied_memory, applied_gain: the same of `applied`.
        best_latency: the nearest the sweep came, when the SLO is infeasible.
        baseline: the engine with its own default batch, where it was measured.
        floor_evaluated: whether T(1) was there to evaluate the efficiency floor with.
        message: the decision in one sentence, with numbers.
        notes: what the reader must know beside it, such as assumptions and what was forgone.
        candidates: every pair looked at.
    """

    objectives: tuple[Objective, ...]
    failure: Failure | None
    chosen: Candidate | None
    applied: Candidate | None
    binding_limit: Limit
    basis: Basis
    kv_tokens: int | None
    kv_cache: int | None
    memory_per_replica: int | None
    expected_gain: float | None
    applied_kv_tokens: int | None
    applied_kv_cache: int | None
    applied_memory: int | None
    applied_gain: float | None
    best_latency: BestLatency | None
    baseline: Baseline | None
    floor_evaluated: bool
    message: str
    notes: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    @property
    def feasible(self) -> bool:
        """Whether there is an answer."""
        return self.failure is None

    @property
    def batch(self) -> int | None:
        """The advised batch (`max_num_seqs`)."""
        return None if self.chosen is None else self.chosen.batch

    @property
    def replicas(self) -> int | None:
        """The advised replicas per GPU."""
        return None if self.chosen is None else self.chosen.replicas

    @property
    def applied_batch(self) -> int | None:
        """The batch that may run now."""
        return None if self.applied is None else self.applied.batch

    @property
    def applied_replicas(self) -> int | None:
        """The replicas per GPU that may run now."""
        return None if self.applied is None else self.applied.replicas


@dataclass(frozen=True)
class Question:
    """All that a choice depends on; the fields are the arguments of `advise`.

    Raises:
        ValueError: a setting out of its range.
    """

    curve: Curve
    objectives: tuple[Objective, ...] = ()
    efficiency_floor: float = 0.1
    ledger: Ledger | None = None
    reserve: Reserve = field(default_factory=Reserve)
    max_replicas: int = 8
    minimum_gain: float = 1.05
    dedicated: bool = False
    trials: tuple[Trial, ...] = ()
    failed: frozenset[tuple[int, int]] = frozenset()
    baseline: Point | None = None
    confirmation: Confirmation | None = None

    def __post_init__(self) -> None:
        if self.efficiency_floor < 0 or self.minimum_gain < 1 or self.max_replicas < 1:
            raise ValueError(
                "need efficiency floor >= 0, minimum gain >= 1 and replicas >= 1, "
                f"got {self.efficiency_floor}, {self.minimum_gain}, {self.max_replicas}"
            )
        # Nothing that is decided may depend on the order in which trials arrived.
        object.__setattr__(self, "trials", tuple(sorted(self.trials, key=lambda trial: trial.pair)))
        pairs = [trial.pair for trial in self.trials]
        for batch, replicas in pairs:
            if pairs.count((batch, replicas)) > 1:
                raise ValueError(f"the trial of batch {batch} with {replicas} replicas occurs more than once")
        if self.ledger is not None:
            # Up to the confirmed batch memory was read at its worst step; of larger ones the trials know more.
            known = self.ledger.confirmed_batch or 0
            seen = tuple(
                (trial.batch, taken)
                for trial in self.trials
                if trial.batch > known and (taken := trial.non_kv) is not None
            )
            object.__setattr__(self, "ledger", replace(self.ledger, seen=(*self.ledger.seen, *seen)))

    def memory(self, batch: int) -> int | None:
        """M(B) in bytes, from the ledger, the peak seen at that batch, and what the trials' replicas took."""
        return None if self.ledger is None else self.ledger.replica_bytes(batch, self.peak(batch))

    def peak(self, batch: int) -> int | None:
        """Most tokens that the sweep saw in the KV cache at a batch; `None` where it was not measured."""
        point = self.curve.at(batch)
        return None if point is None else point.kv_tokens_peak

    def latencies(self, measured: Point | Trial | Confirmation) -> tuple[float | None, ...]:
        """Seconds of each objective's statistic."""
        return tuple(measured.latency(objective.metric, objective.statistic) for objective in self.objectives)


def advise(
    curve: Curve,
    objectives: Sequence[Objective] = (),
    *,
    efficiency_floor: float = 0.1,
    ledger: Ledger | None = None,
    reserve: Reserve | None = None,
    max_replicas: int = 8,
    minimum_gain: float = 1.05,
    dedicated: bool = False,
    trials: Sequence[Trial] = (),
    failed: Collection[tuple[int, int]] = (),
    baseline: Point | None = None,
    confirmation: Confirmation | None = None,
) -> Recommendation:
    """Choose batch and replicas per GPU (formulas in the module docstring).

    Args:
        curve: what was measured with one replica alone.
        objectives: the SLO; without any, latency doesn't bound the choice.
        efficiency_floor: epsilon of the efficiency constraint; 0 turns it off.
        ledger: the memory ledger; `None` when memory is unknown, then one replica is advised.
        reserve: device memory that replicas must leave.
        max_replicas: most replicas on one device (for dedicated cores: as many as the pack has cores for).
        minimum_gain: the least ratio of packed to single throughput that is worth packing for.
        dedicated: replicas share memory but have their own cores, so they are predicted not to slow each other down and only
            memory and `max_replicas` bound their number.
        trials: what was measured with several replicas; those of one replica are left out, since the curve holds one.
        failed: pairs of batch and replicas whose trial could not be made; they are no candidates.
        baseline: the engine with its own default batch, to be reported beside the choice.
        confirmation: one engine that ran as a replica would, alone.

    Raises:
        ValueError: a setting out of its range, or two trials of one pair.
    """
    question = Question(
        curve,
        tuple(objectives),
        efficiency_floor,
        ledger,
        reserve or Reserve(),
        max_replicas,
        minimum_gain,
        dedicated,
        tuple(trials),
        frozenset(failed),
        baseline,
        confirmation,
    )
    singles, packed = evaluate(question)
    candidates = singles + packed
    eligible = [candidate for candidate in candidates if candidate.eligible]
    if not eligible:
        return _failed(question, singles, candidates)
    chosen = _best(eligible)
    measured = [candidate for candidate in eligible if candidate.basis is Basis.MEASURED]
    return _decided(question, chosen, _best(measured) if measured else None, singles, candidates)


def _baseline(question: Question) -> Baseline | None:
    point = question.baseline
    if point is None:
        return None
    latencies = question.latencies(point)
    missed = any(
        latency is not None and latency > objective.maximum
        for objective, latency in zip(question.objectives, latencies, strict=True)
    )
    meets = False if missed else None if None in latencies else True
    return Baseline(point, latencies, meets)


def _best(eligible: Iterable[Candidate]) -> Candidate:
    return max(eligible, key=lambda c: (c.throughput, -c.batch, -c.replicas))


def evaluate(
    question: Question, *, assumed_utilization: float | None = None
) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """Every candidate with what speaks against it: those of one replica, and those of two and more.

    Args:
        assumed_utilization: u to predict with where no point of the curve has it; without it such pairs are left out.
    """
    singles = tuple(_single(question, point) for point in question.curve.points)
    outlook = _outlook(question, assumed_utilization)
    tried = tuple(_tried(question, trial, singles, outlook) for trial in question.trials if trial.replicas > 1)
    packed = (*tried, *_untried(question, singles, outlook))
    return singles, tuple(sorted(packed, key=lambda candidate: candidate.pair))


def allowed_preemptions(requests: int | None) -> float:
    """Preemptions up to which a point's KV need can still be read: max(3, 1 % of its requests)."""
    return max(3.0, 0.01 * (requests or 0))


def _single(question: Question, point: Point) -> Candidate:
    efficiency, memory = question.curve.efficiency(point), question.memory(point.batch)
    latencies = question.latencies(point)
    rejections = [
        *_check_latencies(question, latencies),
        *_check_confirmation(question, point.batch, latencies),
        *_check_efficiency(efficiency, question.efficiency_floor),
        *_check_preemptions(point),
        *_check_memory(question, memory, replicas=1),
    ]
    worst = _as_confirmed(question, point.batch, latencies)
    return Candidate(point.batch, 1, point.throughput, worst, efficiency, memory, Basis.MEASURED, tuple(rejections))


def _as_confirmed(question: Question, batch: int, latencies: Sequence[float | None]) -> tuple[float | None, ...]:
    """Seconds of each objective alone: of the batch that ran as a replica the longer one of both measurements."""
    confirmation = question.confirmation
    if confirmation is None or batch != confirmation.batch:
        return tuple(latencies)
    shown = question.latencies(confirmation)
    return tuple(
        own if own is None or replica is None else max(own, replica)
        for own, replica in zip(latencies, shown, strict=True)
    )


def _tried(question: Question, trial: Trial, singles: Sequence[Candidate], outlook: _Outlook | None) -> Candidate:
    """A pair that was measured as it would run. Its own preemptions count, not those its batch had alone.

    Where nothing speaks against it but a latency that its trial left open, that latency is predicted.
    """
    point, memory = question.curve.at(trial.batch), question.memory(trial.batch)
    efficiency = None if point is None else question.curve.efficiency(point)
    latencies = question.latencies(trial)
    late, basis = list(_check_latencies(question, latencies)), Basis.MEASURED
    against = [
        *_check_efficiency(efficiency, question.efficiency_floor),
        *_check_preemptions(trial),
        *_check_memory(question, memory, trial.replicas),
        *_check_replicas(question, trial.replicas),
        *_check_gain(question, trial.throughput, singles),
        *_check_certainty(question, trial, singles),
    ]
    if memory is None:
        against.append(Rejection(Limit.MEMORY, "memory per replica unknown"))
    expected = outlook.latencies(trial) if outlook is not None else latencies
    whole = tuple(guess if told is None else told for told, guess in zip(latencies, expected, strict=True))
    if len(late) == latencies.count(None) > 0 and not against and None not in whole:
        missing, latencies, basis = tuple(told is None for told in latencies), whole, Basis.ESTIMATED
        late = [
            *_check_latencies(question, whole, predicted=missing),
            *_check_milder_trials(question, *trial.pair),
        ]
    return Candidate(
        trial.batch, trial.replicas, trial.throughput, latencies, efficiency, memory, basis, (*late, *against)
    )


@dataclass(frozen=True)
class _Outlook:
    """What predicts pairs: the curve, corrected by the trials."""

    curve: Curve
    calibration: Calibration
    utilization: float | None

    def figures(self, batch: int, replicas: int) -> tuple[float, tuple[float | None, ...]]:
        """Total tokens per second, and seconds of each objective."""
        return self.calibration.figures(predict(self.curve, batch, replicas, utilization=self.utilization))

    def latencies(self, trial: Trial) -> tuple[float | None, ...]:
        """Seconds of each objective at a trial's pair; all None outside the curve."""
        if not self.curve.points[0].batch <= trial.batch <= self.curve.points[-1].batch:
            return (None,) * len(self.calibration.objectives)
        return self.figures(trial.batch, trial.replicas)[1]


def _outlook(question: Question, assumed: float | None) -> _Outlook | None:
    """What pairs are predicted by; None where memory or the GPU's utilization isn't known."""
    if question.ledger is None:
        return None
    known = any(point.gpu_utilization is not None for point in question.curve.points)
    utilization = 0.0 if question.dedicated else None if known else assumed
    if utilization is None and not known:
        return None
    usable = [trial for trial in question.trials if next(_check_preemptions(trial), None) is None]
    calibration = calibrate(question.curve, question.objectives, usable, utilization=utilization)
    return _Outlook(question.curve, calibration, utilization)


def _untried(question: Question, singles: Sequence[Candidate], outlook: _Outlook | None) -> Iterator[Candidate]:
    """Pairs of two and more replicas that have no trial, of each batch up to the first number that memory refuses."""
    if outlook is None:
        return
    tried = {trial.pair for trial in question.trials}
    for single in singles:
        for replicas in range(2, question.max_replicas + 1):
            if (single.batch, replicas) in tried:
                continue
            pair = _predicted(question, single, replicas, outlook, singles)
            yield pair
            if Limit.MEMORY in pair.limits:
                break


def _predicted(
    question: Question, single: Candidate, replicas: int, outlook: _Outlook, singles: Sequence[Candidate]
) -> Candidate:
    total, latencies = outlook.figures(single.batch, replicas)
    inherited = [rejection for rejection in single.rejections if rejection.limit in (Limit.EFFICIENCY, Limit.MEMORY)]
    rejections = [
        *_check_latencies(question, latencies, predicted=(True,) * len(latencies)),
        *_check_milder_trials(question, single.batch, replicas),
        *inherited,
        *([] if _memory_failed(inherited) else _check_memory(question, single.memory, replicas)),
        *_check_gain(question, total, singles),
        *_check_failed(question, single.batch, replicas),
    ]
    return Candidate(
        single.batch, replicas, total, latencies, single.efficiency, single.memory, Basis.ESTIMATED, tuple(rejections)
    )


def _memory_failed(rejections: Iterable[Rejection]) -> bool:
    return any(rejection.limit is Limit.MEMORY for rejection in rejections)


def _check_latencies(
    question: Question, latencies: Sequence[float | None], *, predicted: Sequence[bool] | None = None
) -> Iterator[Rejection]:
    """`predicted`: for each objective, whether its latency is a prediction; by default none is."""
    guessed = predicted or (False,) * len(latencies)
    for objective, latency, guess in zip(question.objectives, latencies, guessed, strict=True):
        margin = ESTIMATE_MARGIN if guess else 1.0
        if latency is None:
            yield Rejection(Limit.SLO, f"{objective} was not measured", clause=True)
        elif latency > margin * objective.maximum:
            spare = f" x {margin:g} (predicted)" if guess else ""
            yield Rejection(Limit.SLO, f"{objective} {_ms(latency)} > {_ms(objective.maximum)}{spare}")


def _check_confirmation(question: Question, batch: int, latencies: Sequence[float | None]) -> Iterator[Rejection]:
    """What a replica missed that ran alone, with at most this batch, where the sweep's own `latencies` are not above the SLO."""
    confirmation = question.confirmation
    if confirmation is None or batch < confirmation.batch:
        return
    shown = question.latencies(confirmation)
    for objective, own, replica in zip(question.objectives, latencies, shown, strict=True):
        if own is None or own > objective.maximum or replica is None or replica <= objective.maximum:
            continue
        figures = f"{objective} {_ms(replica)} > {_ms(objective.maximum)}"
        if batch == confirmation.batch:
            yield Rejection(Limit.SLO, f"{figures} as a replica ({_ms(own)} in the sweep)")
        else:
            yield Rejection(Limit.SLO, f"batch {confirmation.batch} as a replica already had {figures}", clause=True)


def _check_efficiency(efficiency: float | None, floor: float) -> Iterator[Rejection]:
    if efficiency is not None and not efficiency > floor:
        yield Rejection(Limit.EFFICIENCY, f"efficiency {efficiency:.3f} <= floor {floor:g}")


def _check_preemptions(measured: Point | Trial) -> Iterator[Rejection]:
    allowed = allowed_preemptions(measured.requests)
    if measured.preemptions is not None and measured.preemptions > allowed:
        yield Rejection(Limit.MEMORY, f"{measured.preemptions} preemptions > {allowed:g}: its KV need can't be read")


def _check_memory(question: Question, memory: int | None, replicas: int) -> Iterator[Rejection]:
    if question.ledger is None or memory is None:
        return
    available = question.ledger.available(question.reserve)
    if replicas * memory > available:
        need = f"{_gib(memory)} per replica" if replicas == 1 else f"{replicas} x {_gib(memory)}"
        yield Rejection(
            Limit.MEMORY, f"{need} > {_gib(available)} ({_gib(question.ledger.device_total)} less the reserve)"
        )


def _check_replicas(question: Question, replicas: int) -> Iterator[Rejection]:
    if replicas > question.max_replicas:
        yield Rejection(None, f"{replicas} replicas > {question.max_replicas}, the most that are allowed")


def missed_by_milder_trial(question: Question, batch: int, replicas: int) -> str | None:
    """The trial, or the replica alone, with at most this batch and these replicas that missed an objective, in words; `None` where there is none.

    More requests or more replicas never make a step faster, so what a milder trial missed this pair misses too.
    """
    alone = question.confirmation
    if alone is not None and alone.batch <= batch:
        for objective, latency in zip(question.objectives, question.latencies(alone), strict=True):
            if latency is not None and latency > objective.maximum:
                return f"batch {alone.batch} as a replica alone already had {objective} {_ms(latency)} > {_ms(objective.maximum)}"
    for trial in question.trials:
        if trial.replicas < 2 or trial.batch > batch or trial.replicas > replicas:
            continue
        for objective, latency in zip(question.objectives, question.latencies(trial), strict=True):
            if latency is not None and latency > objective.maximum:
                tried = f"batch {trial.batch} with {trial.replicas} replicas"
                return f"{tried} already had {objective} {_ms(latency)} > {_ms(objective.maximum)}"
    return None


def _check_milder_trials(question: Question, batch: int, replicas: int) -> Iterator[Rejection]:
    missed = missed_by_milder_trial(question, batch, replicas)
    if missed is not None:
        yield Rejection(Limit.SLO, missed, clause=True)


def _check_gain(question: Question, total: float, singles: Sequence[Candidate]) -> Iterator[Rejection]:
    best = best_single(singles)
    if best is None:
        yield Rejection(Limit.SLO, "no single replica meets the SLO")
        return
    gain = total / best.throughput
    if total < question.minimum_gain * best.throughput:
        yield Rejection(None, f"{gain:.3f} x the best single replica < {question.minimum_gain:g}")


def _check_certainty(question: Question, trial: Trial, singles: Sequence[Candidate]) -> Iterator[Rejection]:
    """The lower bound of the gain's 95 % interval; a half-width that was not recorded counts as 0."""
    best = best_single(singles)
    point = None if best is None else question.curve.at(best.batch)
    if best is None or point is None:
        return
    gain, width = trial.throughput / best.throughput, math.hypot(trial.half_width or 0.0, point.half_width or 0.0)
    if gain >= question.minimum_gain and not gain * (1 - width) > 1:
        yield Rejection(None, f"{gain:.3f} x the best single replica, measured to {width:.1%}, is no certain gain")


def _check_failed(question: Question, batch: int, replicas: int) -> Iterator[Rejection]:
    if (batch, replicas) in question.failed:
        yield Rejection(None, "its trial could not be made")


def _meets_slo(candidate: Candidate) -> bool:
    return Limit.SLO not in candidate.limits


def best_single(singles: Iterable[Candidate]) -> Candidate | None:
    """The single replica with the largest T_1 among all batches that meet the SLO, whatever else speaks against them."""
    meeting = [single for single in singles if _meets_slo(single)]
    return _best(meeting) if meeting else None


def _gain(candidate: Candidate, singles: Sequence[Candidate]) -> float | None:
    best = best_single(singles)
    return None if best is None else candidate.throughput / best.throughput


def _decided(
    question: Question,
    chosen: Candidate,
    applied: Candidate | None,
    singles: Sequence[Candidate],
    candidates: tuple[Candidate, ...],
) -> Recommendation:
    limit, cause = _binding(chosen, candidates)
    kv_tokens, kv_cache = _kv(question, chosen)
    applied_tokens, applied_cache = _kv(question, applied)
    return Recommendation(
        objectives=question.objectives,
        failure=None,
        chosen=chosen,
        applied=applied,
        binding_limit=limit,
        basis=chosen.basis,
        kv_tokens=kv_tokens,
        kv_cache=kv_cache,
        memory_per_replica=chosen.memory,
        expected_gain=_gain(chosen, singles),
        applied_kv_tokens=applied_tokens,
        applied_kv_cache=applied_cache,
        applied_memory=None if applied is None else applied.memory,
        applied_gain=None if applied is None else _gain(applied, singles),
        best_latency=None,
        baseline=_baseline(question),
        floor_evaluated=question.curve.at(1) is not None,
        message=_sentence(question, chosen, singles, limit, cause),
        notes=(*_applied_notes(question, chosen, applied), *_notes(question, chosen, singles, candidates)),
        candidates=candidates,
    )


def _kv(question: Question, candidate: Candidate | None) -> tuple[int | None, int | None]:
    """KV(B) of a candidate in tokens and in bytes."""
    ledger = question.ledger
    if candidate is None or ledger is None:
        return None, None
    peak = question.peak(candidate.batch)
    return ledger.kv_tokens(candidate.batch, peak), ledger.kv_bytes(candidate.batch, peak)


def _binding(chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[Limit, str]:
    """The limit that kept out the nearest better pair, with the reason.

    Nearest is the next larger batch with as many replicas, whatever a noisy curve has above it; else the pair with the least
    throughput. Where no better pair was kept out the batch above tells: what it hits, or that it brings nothing (`Efficiency`);
    and where there is none above, the sweep itself was the limit.
    """
    better = [c for c in candidates if c.limits and c.throughput > chosen.throughput]
    above = [c for c in candidates if c.batch > chosen.batch and c.replicas == chosen.replicas]
    larger = [c for c in above if c in better]
    if larger:
        nearest = min(larger, key=lambda c: c.batch)
    elif better:
        nearest = min(better, key=lambda c: (c.throughput, c.batch, c.replicas))
    elif not above:
        return Limit.SWEEP, "the largest batch of the sweep was still best"
    else:
        nearest = min(above, key=lambda c: c.batch)
    if not nearest.limits:
        return Limit.EFFICIENCY, f"batch {nearest.batch} brings no more: {nearest.throughput:.0f} tokens/s"
    limit = nearest.limits[0]
    reason = next(rejection for rejection in nearest.rejections if rejection.limit is limit)
    joint = ":" if reason.clause or limit is Limit.MEMORY else " has"
    return limit, f"{_pair_name(nearest)}{joint} {reason.text}"


def _sentence(question: Question, chosen: Candidate, singles: Sequence[Candidate], limit: Limit, cause: str) -> str:
    figures = [f"{chosen.throughput:.0f} tokens/s"]
    gain = _gain(chosen, singles)
    if chosen.replicas > 1 and gain is not None:
        figures.append(f"{gain:.2f} x the best single replica")
    figures += [
        f"{objective} {_ms(latency)} (SLO {_ms(objective.maximum)})"
        for objective, latency in zip(question.objectives, chosen.latencies, strict=True)
        if latency is not None
    ]
    if chosen.memory is not None and question.ledger is not None:
        figures.append(f"{_gib(chosen.memory)} per replica of {_gib(question.ledger.available(question.reserve))}")
    verb = "predicted " if chosen.basis is Basis.ESTIMATED else ""
    return f"{_pair_name(chosen)}: {verb}{', '.join(figures)}; {limit.value} binds: {cause}"


def _applied_notes(question: Question, chosen: Candidate, applied: Candidate | None) -> Iterator[str]:
    if applied is None or applied == chosen:
        return
    for trial in question.trials:
        if trial.pair == chosen.pair:
            told = zip(question.objectives, question.latencies(trial), strict=True)
            open_ones = " and ".join(str(objective) for objective, latency in told if latency is None)
            yield f"the trial of {_pair_name(chosen)} did not resolve {open_ones}, which is predicted"
    replicas = "1 replica" if applied.replicas == 1 else f"{applied.replicas} replicas"
    yield (
        f"{_pair_name(chosen)} is not applied until profiling.extend has had it tried; "
        f"meanwhile batch {applied.batch} with {replicas} runs: {applied.throughput:.0f} tokens/s"
    )


def _notes(
    question: Question,
    chosen: Candidate | None,
    singles: Sequence[Candidate],
    candidates: Sequence[Candidate],
) -> Iterator[str]:
    curve, ledger = question.curve, question.ledger
    baseline = _baseline(question)
    if baseline is not None:
        yield _baseline_note(question, baseline, chosen)
    yield from _confirmation_notes(question)
    if curve.at(1) is None and question.efficiency_floor > 0:
        yield "efficiency floor not evaluated: batch 1 was not measured"
    if ledger is None:
        yield "memory per replica unknown: one replica per device; a confirmation run in the profile makes it known"
    elif ledger.context.assumed:
        yield "context lengths assumed with a coefficient of variation of 1: only mean lengths are known"
    if ledger is not None and not question.dedicated:
        yield from _blind_notes(curve)
    if chosen is not None:
        yield from _extrapolated_notes(ledger, chosen)
        yield from _forgone(curve, chosen, singles)
        if chosen.replicas == 1:
            yield from _tried_notes(candidates)
            if ledger is not None and chosen.memory is not None:
                freed = ledger.available(question.reserve) - chosen.memory
                yield f"one replica leaves {_gib(freed)} of the device free"


def _baseline_note(question: Question, baseline: Baseline, chosen: Candidate | None) -> str:
    """The default engine beside the choice: its figures, whether it meets the SLO, and how the choice compares."""
    figures = [f"{baseline.point.throughput:.0f} tokens/s"]
    figures += [
        f"{objective} {_ms(latency)}"
        for objective, latency in zip(question.objectives, baseline.latencies, strict=True)
        if latency is not None
    ]
    verdict = {True: ", which meets the SLO", False: ", which misses the SLO", None: ""}[baseline.meets_objectives]
    text = f"the engine's default, batch {baseline.point.batch}: {', '.join(figures)}{verdict if question.objectives else ''}"
    if chosen is None:
        return text
    return f"{text}; {_pair_name(chosen)} has {chosen.throughput / baseline.point.throughput:.2f} x its throughput"


def _confirmation_notes(question: Question) -> Iterator[str]:
    """That a replica, run alone, disagreed with the sweep, by how much, and what it missed."""
    confirmation = question.confirmation
    if confirmation is None:
        return
    told = zip(question.objectives, question.latencies(confirmation), strict=True)
    missed = [
        f"{objective} is {_ms(latency)}, above the SLO of {_ms(objective.maximum)}"
        for objective, latency in told
        if latency is not None and latency > objective.maximum
    ]
    if confirmation.agrees is not False and not missed:
        return
    ratios = [
        f"{name} {ratio:.3f} times the sweep's"
        for name, ratio in (
            ("throughput", confirmation.throughput_ratio),
            ("time between tokens", confirmation.latency_ratio),
        )
        if ratio is not None
    ]
    verb = "disagrees with the sweep" if confirmation.agrees is False else "was measured"
    text = f"batch {confirmation.batch} as a replica {verb}"
    if ratios:
        text += f": {', '.join(ratios)}"
    yield f"{text}; {'; '.join(missed)}: neither it nor a larger batch is advised for one replica" if missed else text


def _extrapolated_notes(ledger: Ledger | None, chosen: Candidate) -> Iterator[str]:
    """That memory was read at a smaller batch than the one chosen."""
    if ledger is not None and ledger.confirmed_batch is not None and chosen.batch > ledger.confirmed_batch:
        yield (
            f"memory beside the KV cache was read at batch {ledger.confirmed_batch} and is taken to be the same at batch {chosen.batch} "
            "where no trial took more; activations grow with the batch, and profiling.rerun with this objective reads them there"
        )


def _blind_notes(curve: Curve) -> Iterator[str]:
    blind = [str(point.batch) for point in curve.points if point.gpu_utilization is None]
    if len(blind) == len(curve.points):
        yield "GPU utilization was not recorded: packing can't be predicted, only tried"
    elif blind:
        yield f"GPU utilization was not recorded at batch {', '.join(blind)}: taken from its neighbours there"


def _tried_notes(candidates: Sequence[Candidate]) -> Iterator[str]:
    """What packings were measured, each with why it fell (or that one replica does better)."""
    tried = [c for c in candidates if c.replicas > 1 and c.basis is Basis.MEASURED]
    if tried:
        results = (
            f"{_pair_name(c)} has {c.throughput:.0f} tokens/s"
            + (f" ({'; '.join(rejection.text for rejection in c.rejections)})" if c.rejections else "")
            for c in tried
        )
        yield f"packing was tried and does not pay here: {', '.join(results)}"


def _forgone(curve: Curve, chosen: Candidate, singles: Sequence[Candidate]) -> Iterator[str]:
    """The throughput that the preemption clause alone costs."""
    lost = [c for c in singles if c.limits == (Limit.MEMORY,) and c.throughput > chosen.throughput]
    preempting = [
        c
        for c in lost
        if (point := curve.at(c.batch)) is not None and next(_check_preemptions(point), None) is not None
    ]
    if preempting:
        best = max(preempting, key=lambda c: (c.throughput, -c.batch))
        more = best.throughput - chosen.throughput
        yield f"{more:.0f} tokens/s forgone at batch {best.batch}, which preempts: a larger KV cache would be needed"


def _failed(question: Question, singles: Sequence[Candidate], candidates: tuple[Candidate, ...]) -> Recommendation:
    failure, limit, message, best = _diagnose(question, singles)
    return Recommendation(
        objectives=question.objectives,
        failure=failure,
        chosen=None,
        applied=None,
        binding_limit=limit,
        basis=Basis.MEASURED,
        kv_tokens=None,
        kv_cache=None,
        memory_per_replica=None,
        expected_gain=None,
        applied_kv_tokens=None,
        applied_kv_cache=None,
        applied_memory=None,
        applied_gain=None,
        best_latency=best,
        baseline=_baseline(question),
        floor_evaluated=question.curve.at(1) is not None,
        message=message,
        notes=tuple(_notes(question, None, singles, candidates)),
        candidates=candidates,
    )


def _diagnose(question: Question, singles: Sequence[Candidate]) -> tuple[Failure, Limit, str, BestLatency | None]:
    """Why no candidate is left: the first limit, in the order SLO, memory, floor, without which one would be."""
    meeting = [single for single in singles if _meets_slo(single)]
    if not meeting:
        best = _best_latency(question, singles)
        return Failure.SLO_INFEASIBLE, Limit.SLO, _infeasible_sentence(question, best), best
    for failure, limit, advice in (
        (
            Failure.INSUFFICIENT_MEMORY,
            Limit.MEMORY,
            "choose a larger device, a shorter maxModelLen or a smaller reserve",
        ),
        (Failure.EFFICIENCY_FLOOR_NOT_MET, Limit.EFFICIENCY, "lower advisor.efficiencyFloor"),
    ):
        stopped = [single for single in meeting if limit in single.limits]
        if stopped:
            first = stopped[0]
            text = next(rejection.text for rejection in first.rejections if rejection.limit is limit)
            return failure, limit, f"no batch that meets the SLO remains: batch {first.batch}: {text}; {advice}", None
    raise AssertionError("a candidate without rejections is eligible")


def _best_latency(question: Question, singles: Sequence[Candidate]) -> BestLatency | None:
    """The batch whose worst ratio of latency to objective is smallest: for one objective, its smallest latency."""
    measured = [
        (max(known[i] / objective.maximum for i, objective in enumerate(question.objectives)), single.batch, known)
        for single in singles
        if len(known := tuple(latency for latency in single.latencies if latency is not None))
        == len(question.objectives)
    ]
    if not measured:
        return None
    # One that fell by a smaller batch's replica alone came no nearer.
    _, batch, latencies = min([each for each in measured if each[0] > 1] or measured)
    return BestLatency(batch, latencies)


def _infeasible_sentence(question: Question, best: BestLatency | None) -> str:
    if best is None:
        names = " and ".join(str(objective) for objective in question.objectives)
        return f"no point of the curve holds {names}: choose a statistic that was measured, or measure again"
    figures = ", ".join(
        f"{objective} {_ms(latency)} > {_ms(objective.maximum)}"
        for objective, latency in zip(question.objectives, best.latencies, strict=True)
        if latency > objective.maximum
    )
    return f"no batch meets the SLO: the nearest is batch {best.batch} with {figures}; relax the objective or choose a faster device"


def _pair_name(candidate: Candidate) -> str:
    return f"batch {candidate.batch}" + (f" with {candidate.replicas} replicas" if candidate.replicas > 1 else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g}ms" if seconds < 1 else f"{seconds:.4g}s"


def _gib(amount: int) -> str:
    return f"{amount / (1 << 30):.1f}Gi"

"""The advisor: from a measured curve and objectives to a batch, and from a memory ledger to replicas per GPU.

One replica (arXiv:2503.08311, the batching configuration advisor):

    B_opt = argmax_B T(B)   subject to   L(B) <= SLO   and   T(B) / (B T(1)) > floor

and a point that preempts more than max(3, 1 % of its requests) is no candidate, because its KV need can't be read. Several
replicas, where nothing has been measured packed yet (`colocation` predicts T_R and L_R):

    (B, R) = argmax R T_R(B)   subject to   L_R(B) <= 0.9 SLO,   R M(B) <= device - reserve,
             R T_R(B) >= minimum gain x max T_1(B') over all B' that meet the SLO

and R = 1 with the single choice where no pair passes. Ties go to the smaller batch, then to fewer replicas.

What must hold: the answer depends on the set of points only; every pair looked at is in `candidates` with the reasons it fell,
or none; nothing is relaxed, so an SLO that no batch meets is answered with the smallest latency reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from tightship.core.colocation import packed_latency, packed_throughput
from tightship.core.curve import Curve, Objective, Point
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
    """One reason why a candidate fell; `limit` is `None` where packing merely doesn't pay."""

    limit: Limit | None
    text: str


@dataclass(frozen=True)
class Candidate:
    """A pair of batch and replicas that was looked at.

    `throughput` is the total of all replicas in tokens per second; `latencies` are in seconds, one for each objective, `None`
    where not measured; `memory` is bytes per replica. For more than one replica the figures are predictions.
    """

    batch: int
    replicas: int
    throughput: float
    latencies: tuple[float | None, ...]
    efficiency: float | None
    memory: int | None
    rejections: tuple[Rejection, ...] = ()

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
class Recommendation:
    """The advisor's answer; the optional fields are `None` where the answer, or the memory, is not known.

    Attributes:
        failure: why there is no answer; `None` when there is one.
        chosen: the winning pair.
        binding_limit: what kept a better choice out.
        basis: `Estimated` as soon as a figure is a prediction.
        kv_tokens, kv_cache, memory_per_replica: KV(B) in tokens and bytes, M(B) in bytes.
        expected_gain: total throughput over the best single replica's that meets the SLO.
        best_latency: the nearest the sweep came, when the SLO is infeasible.
        floor_evaluated: whether T(1) was there to evaluate the efficiency floor with.
        message: the decision in one sentence, with numbers.
        notes: what the reader must know beside it, such as assumptions and what was forgone.
        candidates: every pair looked at.
    """

    objectives: tuple[Objective, ...]
    failure: Failure | None
    chosen: Candidate | None
    binding_limit: Limit
    basis: Basis
    kv_tokens: int | None
    kv_cache: int | None
    memory_per_replica: int | None
    expected_gain: float | None
    best_latency: BestLatency | None
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


@dataclass(frozen=True)
class _Question:
    """All that the checks of a candidate need."""

    curve: Curve
    objectives: tuple[Objective, ...]
    efficiency_floor: float
    ledger: Ledger | None
    reserve: Reserve
    minimum_gain: float
    dedicated: bool

    def memory(self, point: Point) -> int | None:
        return None if self.ledger is None else self.ledger.replica_bytes(point.batch, point.kv_tokens_peak)

    def latencies(self, point: Point) -> tuple[float | None, ...]:
        return tuple(point.latency(objective.metric, objective.statistic) for objective in self.objectives)


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
        dedicated: replicas share memory but have their own cores, so they don't slow each other down and only memory and
            `max_replicas` bound their number.

    Raises:
        ValueError: a setting out of its range.
    """
    if efficiency_floor < 0 or minimum_gain < 1 or max_replicas < 1:
        raise ValueError(
            f"need efficiency floor >= 0, minimum gain >= 1 and replicas >= 1, got {efficiency_floor}, {minimum_gain}, {max_replicas}"
        )
    question = _Question(
        curve, tuple(objectives), efficiency_floor, ledger, reserve or Reserve(), minimum_gain, dedicated
    )
    singles = tuple(_single(question, point) for point in curve.points)
    candidates = singles + tuple(_packed(question, singles, max_replicas))
    eligible = [candidate for candidate in candidates if candidate.eligible]
    if not eligible:
        return _failed(question, singles, candidates)
    chosen = max(eligible, key=lambda c: (c.throughput, -c.batch, -c.replicas))
    return _decided(question, chosen, singles, candidates)


def allowed_preemptions(requests: int | None) -> float:
    """Preemptions up to which a point's KV need can still be read: max(3, 1 % of its requests)."""
    return max(3.0, 0.01 * (requests or 0))


def _single(question: _Question, point: Point) -> Candidate:
    efficiency = question.curve.efficiency(point)
    rejections = [
        *_check_latencies(question, question.latencies(point), margin=1.0),
        *_check_efficiency(efficiency, question.efficiency_floor),
        *_check_preemptions(point),
        *_check_memory(question, question.memory(point), replicas=1),
    ]
    return Candidate(
        point.batch,
        1,
        point.throughput,
        question.latencies(point),
        efficiency,
        question.memory(point),
        tuple(rejections),
    )


def _packed(question: _Question, singles: Sequence[Candidate], max_replicas: int) -> Iterator[Candidate]:
    """Pairs of two and more replicas, of each batch up to the first number that memory refuses."""
    if question.ledger is None:
        return
    bar = question.minimum_gain * _best_meeting_slo(singles)
    for point, single in zip(question.curve.points, singles, strict=True):
        if point.gpu_utilization is None and not question.dedicated:
            continue
        utilization = 0.0 if question.dedicated else point.gpu_utilization or 0.0
        for replicas in range(2, max_replicas + 1):
            pair = _pair(question, single, utilization, replicas, bar)
            yield pair
            if Limit.MEMORY in pair.limits:
                break


def _pair(question: _Question, single: Candidate, utilization: float, replicas: int, bar: float) -> Candidate:
    total = packed_throughput(single.throughput, utilization, replicas)
    latencies = tuple(
        None if latency is None else packed_latency(latency, utilization, replicas) for latency in single.latencies
    )
    inherited = [rejection for rejection in single.rejections if rejection.limit in (Limit.EFFICIENCY, Limit.MEMORY)]
    rejections = [
        *_check_latencies(question, latencies, margin=1.0 if question.dedicated else ESTIMATE_MARGIN),
        *inherited,
        *([] if _memory_failed(inherited) else _check_memory(question, single.memory, replicas)),
        *_check_gain(total, bar, question.minimum_gain),
    ]
    return Candidate(single.batch, replicas, total, latencies, single.efficiency, single.memory, tuple(rejections))


def _memory_failed(rejections: Iterable[Rejection]) -> bool:
    return any(rejection.limit is Limit.MEMORY for rejection in rejections)


def _check_latencies(question: _Question, latencies: Sequence[float | None], *, margin: float) -> Iterator[Rejection]:
    for objective, latency in zip(question.objectives, latencies, strict=True):
        if latency is None:
            yield Rejection(Limit.SLO, f"{objective} was not measured")
        elif latency > margin * objective.maximum:
            spare = "" if margin == 1 else f" x {margin:g} (predicted)"
            yield Rejection(Limit.SLO, f"{objective} {_ms(latency)} > {_ms(objective.maximum)}{spare}")


def _check_efficiency(efficiency: float | None, floor: float) -> Iterator[Rejection]:
    if efficiency is not None and not efficiency > floor:
        yield Rejection(Limit.EFFICIENCY, f"efficiency {efficiency:.3f} <= floor {floor:g}")


def _check_preemptions(point: Point) -> Iterator[Rejection]:
    allowed = allowed_preemptions(point.requests)
    if point.preemptions is not None and point.preemptions > allowed:
        yield Rejection(Limit.MEMORY, f"{point.preemptions} preemptions > {allowed:g}: its KV need can't be read")


def _check_memory(question: _Question, memory: int | None, replicas: int) -> Iterator[Rejection]:
    if question.ledger is None or memory is None:
        return
    available = question.ledger.available(question.reserve)
    if replicas * memory > available:
        need = f"{_gib(memory)} per replica" if replicas == 1 else f"{replicas} x {_gib(memory)}"
        yield Rejection(
            Limit.MEMORY, f"{need} > {_gib(available)} ({_gib(question.ledger.device_total)} less the reserve)"
        )


def _check_gain(total: float, bar: float, minimum_gain: float) -> Iterator[Rejection]:
    if total < bar:
        yield Rejection(None, f"{total / bar * minimum_gain:.3f} x the best single replica < {minimum_gain:g}")


def _meets_slo(candidate: Candidate) -> bool:
    return Limit.SLO not in candidate.limits


def _best_meeting_slo(singles: Iterable[Candidate]) -> float:
    """The largest T_1 among all batches that meet the SLO, whatever else speaks against them; 0 where none does."""
    return max((single.throughput for single in singles if _meets_slo(single)), default=0.0)


def _decided(
    question: _Question, chosen: Candidate, singles: Sequence[Candidate], candidates: tuple[Candidate, ...]
) -> Recommendation:
    limit, cause = _binding(chosen, candidates)
    point = question.curve.at(chosen.batch)
    ledger, peak = question.ledger, None if point is None else point.kv_tokens_peak
    predicted = chosen.replicas > 1 and not question.dedicated
    return Recommendation(
        objectives=question.objectives,
        failure=None,
        chosen=chosen,
        binding_limit=limit,
        basis=Basis.ESTIMATED if chosen.replicas > 1 else Basis.MEASURED,
        kv_tokens=None if ledger is None else ledger.kv_tokens(chosen.batch, peak),
        kv_cache=None if ledger is None else ledger.kv_bytes(chosen.batch, peak),
        memory_per_replica=chosen.memory,
        expected_gain=chosen.throughput / _best_meeting_slo(singles),
        best_latency=None,
        floor_evaluated=question.curve.at(1) is not None,
        message=_sentence(question, chosen, limit, cause, predicted=predicted),
        notes=tuple(_notes(question, chosen, singles)),
        candidates=candidates,
    )


def _binding(chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[Limit, str]:
    """The limit that kept out the nearest better pair, with the reason.

    Where no better pair was kept out the batch above tells: what it hits, or that it brings nothing (`Efficiency`); and where
    there is none above, the sweep itself was the limit.
    """
    better = [c for c in candidates if c.limits and c.throughput > chosen.throughput]
    above = [c for c in candidates if c.batch > chosen.batch and c.replicas == chosen.replicas]
    if better:
        nearest = min(better, key=lambda c: (c.throughput, c.batch, c.replicas))
    elif not above:
        return Limit.SWEEP, "the largest batch of the sweep was still best"
    else:
        nearest = min(above, key=lambda c: c.batch)
    if not nearest.limits:
        return Limit.EFFICIENCY, f"batch {nearest.batch} brings no more: {nearest.throughput:.0f} tokens/s"
    limit = nearest.limits[0]
    text = next(rejection.text for rejection in nearest.rejections if rejection.limit is limit)
    return limit, f"{_pair_name(nearest)} has {text}" if limit is not Limit.MEMORY else f"{_pair_name(nearest)}: {text}"


def _sentence(question: _Question, chosen: Candidate, limit: Limit, cause: str, *, predicted: bool) -> str:
    figures = [f"{chosen.throughput:.0f} tokens/s"] + [
        f"{objective} {_ms(latency)} (SLO {_ms(objective.maximum)})"
        for objective, latency in zip(question.objectives, chosen.latencies, strict=True)
        if latency is not None
    ]
    if chosen.memory is not None and question.ledger is not None:
        figures.append(f"{_gib(chosen.memory)} per replica of {_gib(question.ledger.available(question.reserve))}")
    verb = "predicted " if predicted else ""
    return f"{_pair_name(chosen)}: {verb}{', '.join(figures)}; {limit.value} binds: {cause}"


def _notes(question: _Question, chosen: Candidate | None, singles: Sequence[Candidate]) -> Iterator[str]:
    curve, ledger = question.curve, question.ledger
    if curve.at(1) is None and question.efficiency_floor > 0:
        yield "efficiency floor not evaluated: batch 1 was not measured"
    if ledger is None:
        yield "memory per replica unknown: one replica per device; a confirmation run in the profile makes it known"
    elif ledger.context.assumed:
        yield "context lengths assumed with a coefficient of variation of 1: only mean lengths are known"
    blind = [str(point.batch) for point in curve.points if point.gpu_utilization is None]
    if blind and ledger is not None and not question.dedicated:
        yield f"GPU utilization was not recorded at batch {', '.join(blind)}: packing can't be predicted there"
    if chosen is not None:
        yield from _forgone(curve, chosen, singles)
        if chosen.replicas == 1 and ledger is not None and chosen.memory is not None:
            freed = ledger.available(question.reserve) - chosen.memory
            yield f"one replica leaves {_gib(freed)} of the device free"


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


def _failed(question: _Question, singles: Sequence[Candidate], candidates: tuple[Candidate, ...]) -> Recommendation:
    failure, limit, message, best = _diagnose(question, singles)
    return Recommendation(
        objectives=question.objectives,
        failure=failure,
        chosen=None,
        binding_limit=limit,
        basis=Basis.MEASURED,
        kv_tokens=None,
        kv_cache=None,
        memory_per_replica=None,
        expected_gain=None,
        best_latency=best,
        floor_evaluated=question.curve.at(1) is not None,
        message=message,
        notes=tuple(_notes(question, None, singles)),
        candidates=candidates,
    )


def _diagnose(question: _Question, singles: Sequence[Candidate]) -> tuple[Failure, Limit, str, BestLatency | None]:
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


def _best_latency(question: _Question, singles: Sequence[Candidate]) -> BestLatency | None:
    """The batch whose worst ratio of latency to objective is smallest: for one objective, its smallest latency."""
    measured = [
        (max(known[i] / objective.maximum for i, objective in enumerate(question.objectives)), single.batch, known)
        for single in singles
        if len(known := tuple(latency for latency in single.latencies if latency is not None))
        == len(question.objectives)
    ]
    if not measured:
        return None
    _, batch, latencies = min(measured)
    return BestLatency(batch, latencies)


def _infeasible_sentence(question: _Question, best: BestLatency | None) -> str:
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

"""Which packing to try next: an order of pairs (batch, replicas), and when to stop.

A trial costs GPU time, so pairs are tried in the order of what they are predicted to yield, corrected by what the trials so far
have shown (`calibration`), until no pair can win any more. A pair of two or more replicas is worth a trial while

- it has not been tried, its trial is not known to be impossible, and R M(B) fits beside the reserve;
- its batch is a candidate alone: it meets the SLO, keeps the efficiency floor and does not preempt, and no trial with at most
  its batch and its replicas has missed the SLO;
- its predicted latencies are at most 1.1 x the SLO: what is just missed on paper may be met;
- 1.15 x its predicted total beats the best so far: the best trial that passes, or else the best single replica that meets the SLO
  times the minimum gain.

Prediction orders the pairs, it never forbids the first trial: while no trial has been made the last two conditions do not end
the phase; the best predicted pair is tried, and where all are predicted to miss the SLO, the one that misses it least. Where no
point tells the GPU's utilization every engine is taken to keep it busy half of the time, which decides the order and nothing else.

What must hold: no pair is named twice, so the phase ends; once it has ended no untried pair wins `advisor.advise` under the same
objectives, because that asks for more (0.9 x the SLO, a total above the best) of the same corrected figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tightship.core.advisor import Basis, Candidate, Limit, Question, best_single, evaluate, missed_by_milder_trial

SLO_SLACK = 1.1
"""A predicted latency may be this many times the SLO for the pair to be worth a trial."""
HOPE = 1.15
"""How many times its prediction a pair is granted before it is given up."""
_UTILIZATION_UNKNOWN = 0.5


@dataclass(frozen=True)
class PredictedPair:
    """What a pair is predicted to do: tokens per second of all replicas, and seconds for each objective."""

    batch: int
    replicas: int
    throughput: float
    latencies: tuple[float | None, ...]

    @property
    def pair(self) -> tuple[int, int]:
        """Batch and replicas."""
        return self.batch, self.replicas


@dataclass(frozen=True)
class TrialStep:
    """The next pair to try as (batch, replicas), with its prediction; both `None` when trying is over. `reason` says why."""

    pair: tuple[int, int] | None
    reason: str
    predicted: PredictedPair | None = None


def trial_order(question: Question) -> tuple[PredictedPair, ...]:
    """All pairs still worth a trial now, best predicted first; ties go to the smaller batch, then to fewer replicas.

    Before the first trial this may be empty although `next_trial` names a pair. Where memory is unknown nothing can be tried; pairs whose
    trial could not be made (`failed`) are never named again.
    """
    return tuple(_predicted(candidate) for candidate in _survey(question).worthwhile)


def next_trial(question: Question) -> TrialStep:
    """The pair to try next, or why there is none."""
    if question.ledger is None:
        return TrialStep(None, "memory per replica is unknown, so no packing can be tried")
    survey = _survey(question)
    if survey.worthwhile:
        best = survey.worthwhile[0]
        return TrialStep(
            best.pair, f"{_figures(best)}, {best.throughput / survey.bar:.2f} x {survey.owner}", _predicted(best)
        )
    if not survey.possible:
        return TrialStep(None, "no pair is left that memory, objectives and earlier trials allow")
    if not any(trial.replicas > 1 for trial in question.trials):
        first = min(survey.possible, key=lambda c: (max(_excess(question, c), SLO_SLACK), *_rank(c)))
        return TrialStep(
            first.pair,
            f"{_figures(first)}, which promises nothing; tried all the same, since nothing was yet",
            _predicted(first),
        )
    within = [candidate for candidate in survey.possible if _excess(question, candidate) <= SLO_SLACK]
    if not within:
        return TrialStep(None, f"every pair left is predicted to miss the SLO by more than {SLO_SLACK - 1:.0%}")
    best = min(within, key=_rank)
    return TrialStep(
        None, f"{_figures(best)}, and even {HOPE:g} x that can't beat {survey.owner} with {survey.bar:.0f} tokens/s"
    )


@dataclass(frozen=True)
class _Survey:
    """The untried pairs that only a prediction speaks against, those of them worth a trial, best first, and what to beat."""

    possible: tuple[Candidate, ...]
    worthwhile: tuple[Candidate, ...]
    bar: float
    owner: str


def _survey(question: Question) -> _Survey:
    singles, packed = evaluate(question, assumed_utilization=_UTILIZATION_UNKNOWN)
    bar, owner = _bar(question, singles, packed)
    possible = tuple(_possible(question, singles, packed))
    worthwhile = [
        candidate
        for candidate in possible
        if _excess(question, candidate) <= SLO_SLACK and candidate.throughput * HOPE > bar
    ]
    return _Survey(possible, tuple(sorted(worthwhile, key=_rank)), bar, owner)


def _possible(question: Question, singles: Sequence[Candidate], packed: Sequence[Candidate]) -> Iterator[Candidate]:
    alone = {single.batch for single in singles if single.eligible}
    done = {*(trial.pair for trial in question.trials), *question.failed}  # also where a trial left a statistic open
    for candidate in packed:
        if candidate.pair in done or candidate.batch not in alone:
            continue
        if Limit.MEMORY not in candidate.limits and missed_by_milder_trial(question, *candidate.pair) is None:
            yield candidate


def _bar(question: Question, singles: Sequence[Candidate], packed: Sequence[Candidate]) -> tuple[float, str]:
    """The total that a pair has to beat, and whose it is; 0 where no single replica meets the SLO."""
    passing = [c for c in packed if c.eligible and c.basis is Basis.MEASURED]
    if passing:
        best = min(passing, key=_rank)
        return best.throughput, f"batch {best.batch} with {best.replicas} replicas"
    alone = best_single(singles)
    if alone is None:
        return 0.0, "nothing"
    return alone.throughput * question.minimum_gain, f"the least gain over batch {alone.batch} alone"


def _excess(question: Question, candidate: Candidate) -> float:
    """The largest ratio of predicted latency to objective."""
    return max(
        (
            latency / objective.maximum
            for objective, latency in zip(question.objectives, candidate.latencies, strict=True)
            if latency is not None
        ),
        default=0.0,
    )


def _rank(candidate: Candidate) -> tuple[float, int, int]:
    return -candidate.throughput, candidate.batch, candidate.replicas


def _figures(candidate: Candidate) -> str:
    return (
        f"batch {candidate.batch} with {candidate.replicas} replicas is predicted {candidate.throughput:.0f} tokens/s"
    )


def _predicted(candidate: Candidate) -> PredictedPair:
    return PredictedPair(candidate.batch, candidate.replicas, candidate.throughput, candidate.latencies)

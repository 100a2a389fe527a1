"""What packing trials teach about the pairs that have not been tried.

The predictor (`colocation`) knows one share u of the GPU. What it leaves out (kernels that overlap, host cores, the driver's
way of sharing) is much the same for all batches at one number of replicas. So each prediction is multiplied by

    geometric mean of measured / predicted  over the trials of the same R, or over all trials where that R has none

once for the total throughput and once for each objective's statistic. What is known physically stays: a packed latency isn't below
the one alone, a total not above R times the throughput alone. The trials' stopping (`trials`) and the choice (`advisor`) use the
same corrected figures, so they agree on which pair could still win.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightship.core.colocation import Prediction, predict, utilization_at
from tightship.core.curve import Curve, Objective, Trial

_Ratios = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Ratios of measured to predicted, each with the replicas of its trial: of totals, and of each objective's latency."""

    objectives: tuple[Objective, ...]
    throughput: _Ratios = ()
    latencies: tuple[_Ratios, ...] = ()

    def figures(self, prediction: Prediction) -> tuple[float, tuple[float | None, ...]]:
        """The corrected total in tokens per second, and each objective's latency in seconds (`None`: not known alone)."""
        total = prediction.total_tokens_per_second * _correction(self.throughput, prediction.replicas)
        most = prediction.replicas * prediction.alone.throughput
        latencies = tuple(
            self._latency(prediction, objective, ratios)
            for objective, ratios in zip(self.objectives, self.latencies, strict=True)
        )
        return min(total, most), latencies

    def _latency(self, prediction: Prediction, objective: Objective, ratios: _Ratios) -> float | None:
        alone = prediction.alone.latency(objective.metric, objective.statistic)
        packed = prediction.latency(objective.metric, objective.statistic)
        if alone is None or packed is None:
            return None
        return max(packed * _correction(ratios, prediction.replicas), alone)


def calibrate(
    curve: Curve, objectives: Sequence[Objective], trials: Iterable[Trial], *, utilization: float | None = None
) -> Calibration:
    """What the trials say of the predictions that the curve gives; those of batches outside the curve say nothing.

    Args:
        utilization: u to predict with whatever the curve says, as `colocation.predict` takes it.
    """
    compared = [
        (trial, predict(curve, trial.batch, trial.replicas, utilization=utilization))
        for trial in sorted(trials, key=lambda trial: trial.pair)
        if trial.replicas > 1
        and curve.points[0].batch <= trial.batch <= curve.points[-1].batch
        and (utilization is not None or utilization_at(curve, trial.batch) is not None)
    ]
    totals = tuple((trial.replicas, trial.throughput / made.total_tokens_per_second) for trial, made in compared)
    latencies = tuple(
        tuple(
            (trial.replicas, measured / predicted)
            for trial, made in compared
            if (measured := trial.latency(objective.metric, objective.statistic)) is not None
            and (predicted := made.latency(objective.metric, objective.statistic)) is not None
        )
        for objective in objectives
    )
    return Calibration(tuple(objectives), totals, latencies)


def _correction(ratios: _Ratios, replicas: int) -> float:
    same = [ratio for tried, ratio in ratios if tried == replicas]
    used = same or [ratio for _, ratio in ratios]
    if not used:
        return 1.0
    return math.exp(sum(math.log(ratio) for ratio in used) / len(used))

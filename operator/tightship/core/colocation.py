"""How much several engines on one GPU slow each other down: prediction from what one engine alone showed.

Each engine alternates between work on the GPU and work of its own (host code, gaps between kernels). Alone, a step takes
t_1, of which the GPU is busy a share u: a demand D = u t_1 on the shared server and a think time Z = t_1 - D. R engines are
then a closed queueing network with one server, which exact mean value analysis solves (Reiser and Lavenberg, 1980):

    W_n = D (1 + Q_{n-1}),   Q_n = n W_n / (W_n + Z),   t_R = Z + W_R

Only the ratio t_R / t_1 matters to latency and throughput, and it depends on u and R alone. No parameter is fitted.

What the model is given where the curve has no point or no u:

- *A batch between two points.* A decode step reads the weights once and each request's KV cache, so t_1 is affine in B and is
  interpolated so. In a loop that keeps B requests in flight T t_1 / B moves little (Little's law); that product is
  interpolated and T follows from it. Statistics other than the mean are interpolated as the mean is. Beyond the curve nothing is
  predicted.
- *No u at a batch.* Linear in log B between the neighbours that have one, the nearest's value beyond them.
- *A KV cache too small for B.* It holds B_eff = KV / mean context requests; more of them wait or are preempted. Latency and
  throughput are those of B_eff requests. What recomputing preempted requests costs is not in it, so T errs upwards.

What must hold: exact at R = 1, 1 <= t_R / t_1 <= R, so T_1 <= R T_R <= R T_1; growing in R and in u; u = 1 predicts no gain.

Limits: host cores are taken to be enough for every engine (engines that fight for CPU are slower than this says); kernels that
each leave the GPU half idle may overlap under MPS better than one server allows; a prefill slows decoding by the same factor;
without MPS the driver's time slices cost more. A share u that is 1 because the sampling window never missed a kernel hides
gaps that packing would fill. That is what trials are for (`trials`), and what they show corrects the rest (`calibration`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tightship.core.curve import Curve, Latency, Metric, Point, Statistic


@dataclass(frozen=True)
class Prediction:
    """Steady state of `replicas` engines on one GPU, `batch` requests always in flight at each.

    Attributes:
        alone: one engine alone at `batch_effective`, measured or interpolated.
        inter_token_latency: mean in seconds, packed; `None` where the curve holds none.
        total_tokens_per_second: of all replicas together.
        slowdown: t_R / t_1.
        utilization: the u that was used.
        interpolated: whether `alone`, or u, lies between measured points.
        batch_effective: requests that really run in each engine: below `batch` where the KV cache is too small for it.
        notes: what the reader must know of it, in words.
    """

    batch: int
    replicas: int
    alone: Point
    inter_token_latency: float | None
    total_tokens_per_second: float
    slowdown: float
    utilization: float
    interpolated: bool
    batch_effective: float
    notes: tuple[str, ...] = ()

    def latency(self, metric: Metric, statistic: Statistic) -> float | None:
        """Seconds of one statistic of one metric, packed; `None` where it isn't known alone."""
        alone = self.alone.latency(metric, statistic)
        return None if alone is None else alone * self.slowdown


def predict(
    curve: Curve,
    batch: int,
    replicas: int,
    *,
    kv_tokens_per_replica: int | None = None,
    mean_context: float | None = None,
    utilization: float | None = None,
) -> Prediction:
    """What `replicas` engines on one GPU do, from the curve of one alone (formulas in the module docstring).

    Args:
        curve: what one engine did alone.
        batch: requests always in flight at each engine.
        replicas: engines on the GPU, at least 1.
        kv_tokens_per_replica, mean_context: size of each engine's KV cache, and mean context of a request in flight, both in
            tokens; with both given, a cache too small for the batch limits it.
        utilization: u to use whatever the curve says, 0 to 1: 0 for engines with cores of their own.

    Raises:
        ValueError: the batch lies outside the curve, the cache holds less than the smallest batch measured, no point of the curve
            tells u, or an argument is out of its range.
    """
    if batch < 1 or replicas < 1:
        raise ValueError(f"need a batch and replicas from 1, got batch {batch} and {replicas} replicas")
    notes = []
    effective = _effective_batch(batch, kv_tokens_per_replica, mean_context)
    if effective < batch:
        notes.append(
            f"a KV cache of {kv_tokens_per_replica} tokens holds {effective:.1f} requests of {mean_context:.0f} tokens, not {batch}"
        )
        if effective < curve.points[0].batch:
            raise ValueError(
                f"{notes[0]}, and fewer than the smallest batch that was measured, {curve.points[0].batch}"
            )
    alone = _alone(curve, effective)
    interpolated = curve.at(alone.batch) is not alone
    if interpolated:
        notes.append(f"batch {effective:.4g} was not measured: interpolated between its neighbours")
    if utilization is None:
        utilization = utilization_at(curve, effective)
        if utilization is None and replicas > 1:
            raise ValueError(
                "no point of the curve has gpuUtilization, so how replicas slow each other down can't be predicted: "
                "have the pair tried (profiling.extend)"
            )
        if not interpolated and alone.gpu_utilization is None and utilization is not None:
            notes.append(f"GPU utilization was not recorded at batch {batch}: {utilization:.3f} from its neighbours")
            interpolated = True
    # One engine alone is not slowed down, whatever its share.
    share = 0.0 if utilization is None else utilization
    factor = slowdown(share, replicas)
    mean = alone.inter_token_latency.mean
    return Prediction(
        batch=batch,
        replicas=replicas,
        alone=alone,
        inter_token_latency=None if mean is None else mean * factor,
        total_tokens_per_second=packed_throughput(alone.throughput, share, replicas),
        slowdown=factor,
        utilization=share,
        interpolated=interpolated,
        batch_effective=effective,
        notes=tuple(notes),
    )


def slowdown(gpu_utilization: float, replicas: int) -> float:
    """t_R / t_1: how many times longer a step takes when `replicas` equal engines share the GPU.

    Args:
        gpu_utilization: the share of time one engine alone keeps the GPU busy (NVML `utilization.gpu`), 0 to 1.
        replicas: engines on the GPU, at least 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= gpu_utilization <= 1:
        raise ValueError(f"GPU utilization {gpu_utilization} is not between 0 and 1")
    if replicas < 1:
        raise ValueError(f"{replicas} replicas are fewer than 1")
    think = 1 - gpu_utilization
    waiting, queued = gpu_utilization, 0.0
    for engines in range(1, replicas + 1):
        waiting = gpu_utilization * (1 + queued)
        queued = engines * waiting / (waiting + think)
    # Written as a difference, since think + waiting misses 1 by a rounding error at R = 1.
    return min(max(1 + (waiting - gpu_utilization), 1.0), float(replicas))


def packed_throughput(throughput: float, gpu_utilization: float, replicas: int) -> float:
    """Tokens per second of all `replicas` together, R T_1 t_1 / t_R, from one engine's `throughput` alone."""
    return replicas * throughput / slowdown(gpu_utilization, replicas)


def packed_latency(latency: float, gpu_utilization: float, replicas: int) -> float:
    """Seconds of a latency with `replicas` engines running, L_1 t_R / t_1, from its value alone."""
    return latency * slowdown(gpu_utilization, replicas)


def utilization_at(curve: Curve, batch: float) -> float | None:
    """u at a batch: measured, else between the neighbours that have one; `None` where no point has."""
    known = [(point.batch, point.gpu_utilization) for point in curve.points if point.gpu_utilization is not None]
    if not known:
        return None
    below = max((pair for pair in known if pair[0] <= batch), default=known[0])
    above = min((pair for pair in known if pair[0] >= batch), default=known[-1])
    if below[0] >= above[0]:
        return below[1]
    weight = math.log(batch / below[0]) / math.log(above[0] / below[0])
    return below[1] + weight * (above[1] - below[1])


def _effective_batch(batch: int, kv_tokens: int | None, mean_context: float | None) -> float:
    if kv_tokens is None or mean_context is None:
        return float(batch)
    if kv_tokens < 0 or not mean_context > 0:
        raise ValueError(f"a KV cache of {kv_tokens} tokens and a mean context of {mean_context} tokens are impossible")
    return min(float(batch), kv_tokens / mean_context)


def _alone(curve: Curve, batch: float) -> Point:
    """The point at a batch, or one made up between its neighbours."""
    smallest, largest = curve.points[0].batch, curve.points[-1].batch
    if not smallest <= batch <= largest:
        raise ValueError(
            f"batch {batch:.4g} lies outside the curve, which was measured from batch {smallest} to {largest}: measure it first"
        )
    measured = curve.at(int(batch)) if batch == int(batch) else None
    if measured is not None:
        return measured
    below, above = next((a, b) for a, b in itertools.pairwise(curve.points) if a.batch < batch < b.batch)
    return _between(below, above, batch)


def _between(below: Point, above: Point, batch: float) -> Point:
    weight = (batch - below.batch) / (above.batch - below.batch)
    itl = _mix(below.inter_token_latency, above.inter_token_latency, weight)
    times = [point.inter_token_latency.mean for point in (below, above)]
    if itl.mean is None or times[0] is None or times[1] is None:
        # Without latencies: the time per token of one request, B / T, is affine as the step's is.
        each = _line(below.batch / below.throughput, above.batch / above.throughput, weight)
        throughput = batch / each
    else:
        products = [
            point.throughput * time / point.batch for point, time in zip((below, above), times, strict=True) if time
        ]
        throughput = batch * _line(products[0], products[1], weight) / itl.mean
    return Point(
        # A fraction of a request is possible on average only.
        batch=max(round(batch), 1),
        throughput=throughput,
        inter_token_latency=itl,
        time_to_first_token=_mix(below.time_to_first_token, above.time_to_first_token, weight),
    )


def _mix(below: Latency, above: Latency, weight: float) -> Latency:
    def mixed(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else _line(one, other, weight)

    pairs: Sequence[tuple[str, float | None]] = [
        (field.name, mixed(getattr(below, field.name), getattr(above, field.name)))
        for field in dataclasses.fields(Latency)
    ]
    return Latency(**dict(pairs))


def _line(one: float, other: float, weight: float) -> float:
    return one + weight * (other - one)

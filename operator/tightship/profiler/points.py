"""From measurements to points of the API, and from points to the curve that decisions read.

A point leaves the profiler as text (the API has no floats) and comes back from there when a restarted profiler goes on, so both
directions live here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction

from tightship.api.units import format_duration, parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1.spec import Objective as ApiObjective
from tightship.api.v1alpha1.spec import Statistic as ApiStatistic
from tightship.core import curve as core
from tightship.core import memory
from tightship.profiler.histogram import Histogram

Asked = tuple[core.Metric, core.Statistic]
"""A statistic of a latency that an objective bounds."""

QUANTILES: dict[ApiStatistic, float] = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
STEPS_NEEDED: dict[ApiStatistic, int] = {"p95": 500, "p99": 2000}
"""Engine steps behind a statistic before it counts as resolved."""
FIRST_TOKENS_NEEDED: dict[ApiStatistic, int] = {"p95": 20, "p99": 100}
"""First tokens behind a statistic of their latency: of fewer, a percentile is their largest. Of the others one will do."""


def latency(histogram: Histogram) -> api.Latency | None:
    """The statistics of a histogram; None when it is empty."""
    return _latency(histogram, QUANTILES)


def first_token_latency(histogram: Histogram) -> api.Latency | None:
    """The same of a time to first token, without percentiles that too few first tokens stand behind: an engine step brings many tokens, but
    a first one only where a request begins."""
    count = histogram.count
    return _latency(
        histogram, {name: share for name, share in QUANTILES.items() if count >= FIRST_TOKENS_NEEDED.get(name, 1)}
    )


def _latency(histogram: Histogram, quantiles: Mapping[ApiStatistic, float]) -> api.Latency | None:
    if not histogram.count:
        return None
    mean = histogram.mean
    values = {name: histogram.quantile(share) for name, share in quantiles.items()}
    # Four digits: more than any window resolves.
    texts = {name: format_duration(float(f"{value:.4g}")) for name, value in {"mean": mean, **values}.items() if value}
    return api.Latency(**texts)


def unresolved(steps: float, *, blurred: bool = False) -> list[ApiStatistic]:
    """Statistics that so many engine steps do not settle, or, `blurred`, that the load's own lateness hides."""
    return [name for name, needed in STEPS_NEEDED.items() if steps < needed or blurred]


def blurred(hidden: bool) -> list[ApiStatistic]:
    """Statistics that the load's own lateness hides, if it does."""
    return list(STEPS_NEEDED) if hidden else []


def first_tokens_needed(asked: Iterable[Asked]) -> int:
    """First tokens that the statistics asked for want; 0 where none is of their latency."""
    return max(
        (
            FIRST_TOKENS_NEEDED.get(statistic.value, 1)
            for metric, statistic in asked
            if metric is core.Metric.TIME_TO_FIRST_TOKEN
        ),
        default=0,
    )


def why_open(given: api.Point | api.Trial, metric: core.Metric, statistic: core.Statistic) -> str | None:
    """Why a statistic of a latency is not known, and what settles it, in words; None where it is known."""
    name = statistic.value
    itl = metric is core.Metric.INTER_TOKEN_LATENCY
    shown = given.inter_token_latency if itl else given.time_to_first_token
    if name in given.blurred:
        return (
            "the load's own lateness hides it, and more time does not help: let nothing else run on the load's core, or give the profiler "
            "more cores, and measure again"
        )
    if name in given.unresolved:
        return f"it takes {STEPS_NEEDED.get(name, 'more')} engine steps: raise profiling.budget"
    if shown is not None and getattr(shown, name) is not None:
        return None
    if itl:
        return "no time between tokens was seen: raise profiling.budget"
    needed = first_tokens_needed([(metric, statistic)])
    return f"it takes {needed} first token{'s' * (needed > 1)} of requests that begin meanwhile: raise profiling.budget"


def decimal(value: float, digits: int = 4) -> str:
    """A decimal of the API: at least `digits` significant digits, never an exponent."""
    if not value:
        return "0"
    text = f"{value:.1f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e" in text else text


def throughput(point: api.Point) -> float | None:
    """T of the method in tokens per second: total tokens where present, else output tokens."""
    text = point.total_tokens_per_second or point.output_tokens_per_second
    return float(text) if text else None


def curve(points: Iterable[api.Point]) -> core.Curve | None:
    """The curve of a profile; None without a single usable point.

    Unresolved statistics, of either latency, count as not measured. It is the curve that `decide.curve_from_profile` reads.
    """
    usable = [point for point in points if throughput(point)]
    return core.Curve([_core_point(point) for point in usable]) if usable else None


def has_figures(given: api.Trial) -> bool:
    """Whether a trial was measured; one that could not be made has only words."""
    return bool(given.total_tokens_per_second or given.output_tokens_per_second)


def trial(given: api.Trial) -> core.Trial:
    """A packing trial as decisions read it. Raises ValueError for one without throughput."""
    total = given.total_tokens_per_second or given.output_tokens_per_second
    return core.Trial(
        batch=given.batch,
        replicas=given.replicas,
        throughput=float(total or 0),
        inter_token_latency=_core_latency(given.inter_token_latency, given.unresolved),
        time_to_first_token=_core_latency(given.time_to_first_token, given.unresolved),
        half_width=float(given.half_width) if given.half_width else None,
        preemptions=given.preemptions,
        requests=given.requests,
        gpu_utilization=_share(given.gpu_utilization),
        memory_utilization=_share(given.memory_utilization),
        running_mean=float(given.running_mean) if given.running_mean else None,
        memory=parse_quantity(given.memory) if given.memory else None,
        kv_cache=parse_quantity(given.kv_cache) if given.kv_cache else None,
    )


def confirmation(given: api.Confirmation | None) -> core.Confirmation | None:
    """A confirmation run as decisions read it; None where there was none."""
    if given is None:
        return None
    return core.Confirmation(
        batch=given.batch,
        throughput=_positive(given.total_tokens_per_second),
        inter_token_latency=_core_latency(given.inter_token_latency, ()),
        throughput_ratio=_positive(given.throughput_ratio),
        latency_ratio=_positive(given.latency_ratio),
        agrees=given.agrees,
    )


def resolved(given: api.Latency | None, missing: Collection[ApiStatistic]) -> api.Latency | None:
    """A latency without the statistics that are not resolved."""
    return given and given.model_copy(update=dict.fromkeys(missing))


def ledger(given: api.ProfileMemory | None, max_model_len: int | None) -> memory.Ledger | None:
    """A confirmation run's ledger as decisions read it; None where a part of it is not known."""
    if given is None:
        return None
    total, non_kv, mean, std = given.device_total, given.non_kv, given.context_mean, given.context_std
    if not (total and non_kv and mean and std and given.kv_bytes_per_token and given.block_size):
        return None
    return memory.Ledger(
        device_total=parse_quantity(total),
        non_kv=parse_quantity(non_kv),
        kv_bytes_per_token=given.kv_bytes_per_token,
        block_size=given.block_size,
        context=memory.Context(float(mean), float(std), assumed=given.basis == "Assumed"),
        max_model_len=max_model_len or 0,
        confirmed_batch=given.confirmed_batch,
        confirmed_kv_tokens=given.kv_cache_tokens,
    )


def reserve(text: str) -> memory.Reserve:
    """The memory reserve in `5%` or `4Gi`."""
    if text.endswith("%"):
        return memory.Reserve(share=Fraction(text[:-1]) / 100)
    return memory.Reserve(amount=parse_quantity(text))


def objectives(given: Iterable[ApiObjective]) -> list[core.Objective]:
    """A profile's objectives as decisions read them."""
    return [
        core.Objective(core.Metric(one.metric), core.Statistic(one.statistic), parse_duration(one.max)) for one in given
    ]


def _core_point(point: api.Point) -> core.Point:
    return core.Point(
        batch=point.batch,
        throughput=throughput(point) or 0.0,
        inter_token_latency=_core_latency(point.inter_token_latency, point.unresolved),
        time_to_first_token=_core_latency(point.time_to_first_token, point.unresolved),
        kv_tokens_peak=point.kv_cache_tokens_peak,
        requests=point.requests,
        preemptions=point.preemptions,
        gpu_utilization=_share(point.gpu_utilization),
        memory_utilization=_share(point.memory_utilization),
        requests_per_second=float(point.requests_per_second) if point.requests_per_second else None,
        running_mean=float(point.running_mean) if point.running_mean else None,
        half_width=float(point.half_width) if point.half_width else None,
    )


def _core_latency(given: api.Latency | None, missing: Collection[str]) -> core.Latency:
    if given is None:
        return core.Latency()
    values = {
        name: parse_duration(text)
        for name, text in given.to_dict().items()
        if name not in missing and parse_duration(text)
    }
    return core.Latency(**values)


def _positive(text: str | None) -> float | None:
    return float(text) if text and float(text) > 0 else None


def _share(text: str | None) -> float | None:
    return float(text) if text else None

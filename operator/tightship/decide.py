"""From a BatchProfile as it stands in the API to the advisor's answer.

The command `advise` and the operator both decide here, so a recommendation read from a file and one in an LLMService's
status cannot differ. Reading is lenient where people write by hand (numbers may go unquoted, unknown fields are ignored) and
strict where a guess would decide: whatever is wrong is a ProfileError that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from tightship.api.units import parse_duration, parse_quantity
from tightship.api.v1alpha1 import spec as api
from tightship.core.advisor import Recommendation, advise
from tightship.core.curve import Confirmation, Curve, Latency, Metric, Objective, Point, Statistic, Trial
from tightship.core.memory import Context, Ledger, Reserve, context_from_means

DEFAULT_EFFICIENCY_FLOOR = 0.1
DEFAULT_MINIMUM_GAIN = 1.05
DEFAULT_MEMORY_RESERVE = "5%"
DEFAULT_MAX_REPLICAS = 8
# vLLM's default, for a profile that has lengths but not the engine's word.
_BLOCK_SIZE = 16
_LARGEST = 1e15
_RATES = ("totalTokensPerSecond", "outputTokensPerSecond")

T = TypeVar("T")


class ProfileError(ValueError):
    """A profile that nothing can be decided from; the text names the field and what is wrong with it."""


def decision_from_profile(
    profile: Mapping[str, Any],
    objectives: Iterable[Objective] = (),
    *,
    efficiency_floor: float = DEFAULT_EFFICIENCY_FLOOR,
    minimum_gain: float = DEFAULT_MINIMUM_GAIN,
    memory_reserve: str = DEFAULT_MEMORY_RESERVE,
    max_replicas: int = DEFAULT_MAX_REPLICAS,
) -> Recommendation:
    """The advisor's answer for a BatchProfile object (a plain mapping) under these objectives.

    The measurement (curve, trials, baseline, memory) is taken from `status`, or from `spec.results` where the status has no
    points yet. With device `cpu` replicas have cores of their own, and a pack holds as many as it has cores for.

    Raises:
        ProfileError: the profile holds no points, or something in it can't be read.
        ValueError: a setting out of its range.
    """
    dedicated = has_dedicated_cores(profile)
    if dedicated:
        accelerator = _mapping(profile, "spec", "key", "accelerator")
        max_replicas = min(max_replicas, _replicas_by_cores(accelerator, max_replicas))
    return advise(
        curve_from_profile(profile),
        tuple(objectives),
        efficiency_floor=efficiency_floor,
        ledger=ledger_from_profile(profile),
        reserve=parse_reserve(memory_reserve),
        max_replicas=max_replicas,
        minimum_gain=minimum_gain,
        dedicated=dedicated,
        trials=trials_from_profile(profile),
        failed=failed_trials_from_profile(profile),
        baseline=baseline_from_profile(profile),
        confirmation=confirmation_from_profile(profile),
    )


def objectives_from_api(objectives: Iterable[api.Objective]) -> tuple[Objective, ...]:
    """The objectives of an `slo` as the advisor takes them."""
    return tuple(
        Objective(Metric(objective.metric), Statistic(objective.statistic), parse_duration(objective.max))
        for objective in objectives
    )


def parse_reserve(text: str) -> Reserve:
    """The memory reserve in `5%` or `4Gi`.

    Raises:
        ValueError: neither a percentage below 100 nor a quantity.
    """
    body = text.strip()
    if not body.endswith("%"):
        return Reserve(amount=parse_quantity(body))
    try:
        return Reserve(share=Fraction(body[:-1]) / 100)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"memory reserve {text!r} is neither a percentage below 100 nor a quantity") from error


def measurement(profile: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What was measured, and under which path of the profile it stands.

    Raises:
        ProfileError: there are no points.
    """
    for path in (("status",), ("spec", "results")):
        measured = _mapping(profile, *path)
        if measured.get("points"):
            return measured, ".".join(path)
    raise ProfileError(
        "the profile holds no points, neither in status.points nor in spec.results.points: wait until it is Complete"
    )


def curve_from_profile(profile: Mapping[str, Any]) -> Curve:
    """The curve that a BatchProfile holds.

    Raises:
        ProfileError: there is none, or it can't be read.
    """
    return _curve(*measurement(profile))


def ledger_from_profile(profile: Mapping[str, Any]) -> Ledger | None:
    """The memory ledger that a BatchProfile holds; `None` where memory was not measured.

    Raises:
        ProfileError: it can't be read.
    """
    measured, where = measurement(profile)
    return _ledger(profile, measured, where)


def trials_from_profile(profile: Mapping[str, Any]) -> tuple[Trial, ...]:
    """The packings that a BatchProfile holds measurements of, by batch and replicas.

    Raises:
        ProfileError: there is no curve, or a trial can't be read.
    """
    return tuple(trial for _, trial in _trials(profile) if trial is not None)


def failed_trials_from_profile(profile: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    """The pairs of batch and replicas that a BatchProfile lists among its trials without any rate: they could not be made.

    Raises:
        ProfileError: as `trials_from_profile`.
    """
    return frozenset(pair for pair, trial in _trials(profile) if trial is None)


def baseline_from_profile(profile: Mapping[str, Any]) -> Point | None:
    """The engine with its own default batch; `None` where it was not measured.

    Raises:
        ProfileError: there is no curve, or the baseline can't be read.
    """
    measured, where = measurement(profile)
    row = _mapping(measured, "baseline")
    if not row or not _has_rate(row):
        return None
    return _point(row, _throughput_field(_rows(measured, "points", where), where), f"{where}.baseline")


def confirmation_from_profile(profile: Mapping[str, Any]) -> Confirmation | None:
    """What a replica showed that ran alone; `None` where there was no confirmation run.

    Raises:
        ProfileError: there is no curve, or the confirmation can't be read.
    """
    measured, where = measurement(profile)
    row, at = _mapping(measured, "confirmation"), f"{where}.confirmation"
    batch = _read(row, "batch", _count, at)
    if batch is None:
        return None
    agrees = row.get("agrees")
    if not isinstance(agrees, (bool, type(None))):
        raise ProfileError(f"{at}.agrees: {_short(agrees)} is neither true nor false")
    try:
        return Confirmation(
            batch=batch,
            throughput=_read(row, "totalTokensPerSecond", _number, at),
            inter_token_latency=_latency(row, "interTokenLatency", [], at),
            throughput_ratio=_read(row, "throughputRatio", _number, at),
            latency_ratio=_read(row, "latencyRatio", _number, at),
            agrees=agrees,
        )
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"{at}: {error}") from error


def counts_prompt_tokens(profile: Mapping[str, Any]) -> bool:
    """Whether the rates of what `curve_from_profile` gives are of prompt and generated tokens, not of generated ones alone.

    Raises:
        ProfileError: there is no curve.
    """
    measured, where = measurement(profile)
    return _throughput_field(_rows(measured, "points", where), where) == _RATES[0]


def has_dedicated_cores(profile: Mapping[str, Any]) -> bool:
    """Whether replicas of what was measured have cores of their own (device `cpu`) instead of sharing a GPU."""
    return _mapping(profile, "spec", "key", "accelerator").get("device") == "cpu"


def _mapping(obj: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The mapping at a path; empty where something on the way is absent."""
    here: Any = obj
    for depth, name in enumerate(path):
        here = here.get(name)
        if here is None:
            return {}
        if not isinstance(here, Mapping):
            raise ProfileError(f"{'.'.join(path[: depth + 1])} is not a mapping")
    found: Mapping[str, Any] = here
    return found


def _replicas_by_cores(accelerator: Mapping[str, Any], otherwise: int) -> int:
    cores = _read(accelerator, "cores", _count, "spec.key.accelerator")
    each = _read(accelerator, "coresPerReplica", _count, "spec.key.accelerator") or 1
    return otherwise if cores is None else max(cores // each, 1)


def _curve(measured: Mapping[str, Any], where: str) -> Curve:
    rows = _rows(measured, "points", where)
    rate = _throughput_field(rows, where)
    points = [_point(row, rate, f"{where}.points[{index}]") for index, row in enumerate(rows)]
    try:
        return Curve(points)
    except ValueError as error:
        raise ProfileError(f"{where}.points: {error}") from error


def _rows(measured: Mapping[str, Any], name: str, where: str) -> Sequence[Mapping[str, Any]]:
    rows = measured.get(name) or []
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ProfileError(f"{where}.{name} is not a list of {name}")
    return rows


def _trials(profile: Mapping[str, Any]) -> list[tuple[tuple[int, int], Trial | None]]:
    """Every pair listed under trials, with what was measured or `None` where its trial could not be made."""
    measured, where = measurement(profile)
    rate = _throughput_field(_rows(measured, "points", where), where)
    found: dict[tuple[int, int], Trial | None] = {}
    for index, row in enumerate(_rows(measured, "trials", where)):
        at = f"{where}.trials[{index}]"
        pair, trial = _trial(row, rate, at)
        if pair in found:
            raise ProfileError(f"{at}: batch {pair[0]} with {pair[1]} replicas occurs more than once")
        found[pair] = trial
    return sorted(found.items(), key=lambda item: item[0])


def _trial(row: Mapping[str, Any], rate: str, where: str) -> tuple[tuple[int, int], Trial | None]:
    batch, replicas = _read(row, "batch", _count, where), _read(row, "replicas", _count, where)
    if batch is None or replicas is None:
        raise ProfileError(f"{where} needs batch and replicas")
    if not _has_rate(row):
        return (batch, replicas), None
    try:
        trial = Trial(
            replicas=replicas,
            **_figures(row, batch, rate, where),
            memory=_read(row, "memory", parse_quantity, where),
            kv_cache=_read(row, "kvCache", parse_quantity, where),
        )
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"{where}: {error}") from error
    return trial.pair, trial


def _has_rate(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in _RATES)


def _throughput_field(rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """The field that is T in all points: rates of different tokens can't be compared with each other."""
    for name in _RATES:
        if all(row.get(name) is not None for row in rows):
            return name
    raise ProfileError(f"{where}.points need totalTokensPerSecond, or else outputTokensPerSecond, in every point")


def _point(row: Mapping[str, Any], rate: str, where: str) -> Point:
    batch = _read(row, "batch", _count, where)
    if batch is None:
        raise ProfileError(f"{where} has no batch")
    try:
        return Point(
            **_figures(row, batch, rate, where),
            kv_tokens_peak=_read(row, "kvCacheTokensPeak", _count, where),
            requests_per_second=_read(row, "requestsPerSecond", _number, where),
        )
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"{where}: {error}") from error


def _figures(row: Mapping[str, Any], batch: int, rate: str, where: str) -> dict[str, Any]:
    """What a point of the curve and a trial have in common, as arguments of both."""
    throughput = _read(row, rate, _number, where)
    if throughput is None:
        raise ProfileError(f"{where} has no {rate}, which the curve is in")
    unresolved = row.get("unresolved") or []
    if not isinstance(unresolved, list):
        raise ProfileError(f"{where}.unresolved is not a list of statistics")
    return {
        "batch": batch,
        "throughput": throughput,
        "inter_token_latency": _latency(row, "interTokenLatency", unresolved, where),
        "time_to_first_token": _latency(row, "timeToFirstToken", unresolved, where),
        "requests": _read(row, "requests", _count, where),
        "preemptions": _read(row, "preemptions", _count, where),
        "gpu_utilization": _read(row, "gpuUtilization", _number, where),
        "memory_utilization": _read(row, "memoryUtilization", _number, where),
        "running_mean": _read(row, "runningMean", _number, where),
        "half_width": _read(row, "halfWidth", _number, where),
    }


def _latency(row: Mapping[str, Any], name: str, unresolved: Sequence[object], where: str) -> Latency:
    value = row.get(name)
    if value is None:
        return Latency()
    if not isinstance(value, Mapping):
        raise ProfileError(f"{where}.{name} is not a mapping of statistics, such as {{mean: 13.9ms}}")
    return Latency(
        **{
            statistic.value: _read(value, statistic.value, _duration, f"{where}.{name}")
            for statistic in Statistic
            if statistic.value not in unresolved
        }
    )


def _ledger(profile: Mapping[str, Any], measured: Mapping[str, Any], where: str) -> Ledger | None:
    """The ledger, from what `memory` says or implies; `None` unless all its parts are known."""
    memory, at = _mapping(measured, "memory"), f"{where}.memory"
    engine = _mapping(measured, "engine")
    kv_tokens = _read(memory, "kvCacheTokens", _count, at)
    non_kv, per_token = _non_kv(memory, at), _kv_bytes_per_token(memory, kv_tokens, at)
    block_size = (
        _read(memory, "blockSize", _count, at) or _read(engine, "blockSize", _count, f"{where}.engine") or _BLOCK_SIZE
    )
    total, context = _device_total(profile, measured, where), _context(profile, memory, block_size, at)
    if non_kv is None or per_token is None or total is None or context is None:
        return None
    longest = _read(engine, "maxModelLen", _count, f"{where}.engine") or _read(
        _mapping(profile, "spec", "key", "engine"), "maxModelLen", _count, "spec.key.engine"
    )
    try:
        return Ledger(
            device_total=total,
            non_kv=non_kv,
            kv_bytes_per_token=per_token,
            block_size=block_size,
            context=context,
            max_model_len=longest or 0,
            confirmed_batch=_read(memory, "confirmedBatch", _count, at),
            confirmed_kv_tokens=kv_tokens,
        )
    except ValueError as error:
        raise ProfileError(f"{at}: {error}") from error


def _non_kv(memory: Mapping[str, Any], where: str) -> int | None:
    stated = _read(memory, "nonKV", parse_quantity, where)
    replica, kv = _read(memory, "replica", parse_quantity, where), _read(memory, "kvCache", parse_quantity, where)
    if stated is not None or replica is None or kv is None:
        return stated
    return replica - kv


def _kv_bytes_per_token(memory: Mapping[str, Any], kv_tokens: int | None, where: str) -> int | None:
    stated = _read(memory, "kvBytesPerToken", _count, where)
    kv = _read(memory, "kvCache", parse_quantity, where)
    if stated is not None or not kv_tokens or kv is None:
        return stated
    return -(-kv // kv_tokens)


def _device_total(profile: Mapping[str, Any], measured: Mapping[str, Any], where: str) -> int | None:
    """A CPU pack's memory is what its manifest says; a GPU's is what was read."""
    accelerator = _mapping(profile, "spec", "key", "accelerator")
    if accelerator.get("device") == "cpu" and accelerator.get("memory") is not None:
        return _read(accelerator, "memory", parse_quantity, "spec.key.accelerator")
    stated = _read(_mapping(measured, "memory"), "deviceTotal", parse_quantity, f"{where}.memory")
    return stated or _read(_mapping(measured, "gpu"), "memory", parse_quantity, f"{where}.gpu")


def _context(profile: Mapping[str, Any], memory: Mapping[str, Any], block_size: int, where: str) -> Context | None:
    mean, std = _read(memory, "contextMean", _number, where), _read(memory, "contextStd", _number, where)
    try:
        if mean is not None and std is not None:
            return Context(mean, std, assumed=memory.get("basis") == "Assumed")
        workload, at = _mapping(profile, "spec", "key", "workload"), "spec.key.workload"
        prompt = _read(workload, "inputTokens", _number, at)
        output = _read(workload, "outputTokens", _number, at)
        return None if prompt is None or output is None else context_from_means(prompt, output, block_size)
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"{where}: {error}") from error


def _read(source: Mapping[str, Any], name: str, parse: Callable[[Any], T], where: str) -> T | None:
    value = source.get(name)
    if value is None:
        return None
    try:
        return parse(value)
    except (ValueError, TypeError) as error:
        raise ProfileError(f"{where}.{name}: {error}") from error


def _duration(value: object) -> float:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} has no unit: write a duration such as 15ms")
    return parse_duration(value)


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    # Nothing that is measured comes near the bound, and below it no arithmetic overflows.
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{_short(value)} is not a number")
    return number


def _count(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError(f"{_short(value)} is not a whole number")
    return int(number)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."

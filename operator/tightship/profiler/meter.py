"""One level: B requests in flight until their throughput is known to 3 %, or its time is over.

T is the rate of the engine's own generation-token counter times (1 + in/out): it moves with every engine step, while prompts arrive in
lumps. It is read over windows of at least 1 s (0.5 s up to B = 8) and 20 engine steps, at least five of them; the windows' spread gives the
half-width. Latencies are the client's. A level counts only if the engine ran at least 0.98 B requests on average: where it did not, and
did not queue either, a few more are put in flight to fill the gaps between requests.

A level counts as not driven when the load says so of itself, and its high percentiles as unresolved where the load's lateness blurs them
(`tightship.profiler.load` has the rule).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.errors import EngineError
from tightship.profiler.gpu import Device
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.metrics import GENERATION_TOKENS, EngineSample

log = logging.getLogger(__name__)

WINDOWS_LEAST: Final = 5
STEPS_PER_WINDOW: Final = 20
PRECISION: Final = 0.03
RUNNING_LEAST: Final = 0.98
WARMUP_SECONDS: Final = 0.5
WARMUP_STEPS: Final = 10
SETTLE_LEAST: Final = 5.0
SETTLE_MOST: Final = 60.0
FULL: Final = 0.95
"""Share of the KV cache from which on requests that wait may wait for it."""
POLL_SECONDS: Final = 0.05
SAMPLES_PER_WINDOW: Final = 4
LIVES_LEAST: Final = 1.0
"""Mean lives of a request that a level is measured for: the requests it starts with weigh on all windows alike, unseen by their spread."""
LIVES_WHOLE_UP_TO: Final = 256
"""Batch up to which that takes whole lives. So many requests at once are a fair sample by themselves: beyond, 256 / B of a life will do."""
TOP_UPS: Final = 2
TOP_UP_FROM: Final = 16  # below, one request more would be another batch
SILENCE_SECONDS: Final = 3.0

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT: Final = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


def half_width(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % interval of the values' mean, relative to the mean; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    if mean <= 0:
        return None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else 1.96 + 2.4 / (count - 1)
    return quantile * deviation / math.sqrt(count) / mean


def window_seconds(batch: int, itl: float) -> float:
    """Length of one window in seconds; `itl`: seconds of an engine step."""
    return max(0.5 if batch <= 8 else 1.0, STEPS_PER_WINDOW * itl)


def warmup_seconds(itl: float) -> float:
    """How long a load runs before it is measured; `itl`: seconds of an engine step."""
    return max(WARMUP_SECONDS, WARMUP_STEPS * itl)


def lives_seconds(requests: int, mean_output: float, itl: float) -> float:
    """How long a load is measured at the least, in seconds: the requests it starts with must have made room for others.

    Args:
        requests: those in flight at once, in all engines.
        mean_output: mean output tokens of a request.
        itl: mean time between its tokens, seconds.
    """
    return LIVES_LEAST * min(1.0, LIVES_WHOLE_UP_TO / requests) * mean_output * itl


def check_counter(rate: float) -> None:
    """Raise EngineError where an engine's tokens per second are 0 by its own count, though tokens came."""
    if rate <= 0:
        raise EngineError(
            f"tokens come, but the engine's counter {GENERATION_TOKENS} stands still, and throughput is read from it: use an engine "
            "version that has it, without --disable-log-stats"
        )


def missing(batch: int, running: float, waiting: float, *, preempted: bool) -> int:
    """Requests to put in flight besides, so that an engine runs `batch` of them; 0 when it does, queues or preempts.

    Args:
        batch: what it shall run.
        running: what it ran on average.
        waiting: what it let wait on average.
        preempted: whether it preempted requests.
    """
    full = preempted or waiting > 0.02 * batch
    if batch < TOP_UP_FROM or full or running >= RUNNING_LEAST * batch or running <= 0:
        return 0
    return max(1, min(math.ceil(batch - running), batch // 4))


@dataclass(frozen=True)
class Reading:
    """What a level showed."""

    point: api.Point
    throughput: float
    """T in tokens per second."""
    half_width: float
    itl: float
    """Mean inter-token latency, seconds."""
    undriven: str | None
    """Why the load could not be driven as asked: then nothing here may be reported as measured."""
    notes: tuple[str, ...]
    """What else a reader should know about it."""


@dataclass
class _Tally:
    """Samples of one level."""

    first: EngineSample
    last: EngineSample
    rates: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    kv_peak: float = 0.0
    compute: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.last.at - self.first.at


class Meter:
    """Measures levels on one engine with one load."""

    def __init__(
        self,
        engine: Engine,
        load: ClosedLoop,
        device: Device,
        clock: Clock,
        *,
        input_per_output: float,
        steps_needed: int = 0,
    ) -> None:
        """`input_per_output`: mean input over mean output tokens; `steps_needed`: engine steps behind the objective's statistic."""
        self._engine = engine
        self._load = load
        self._device = device
        self._clock = clock
        self._factor = 1.0 + input_per_output
        self._steps_needed = steps_needed
        self._itl = 0.02  # the last level's, to size the first windows of the next
        self._surplus = 0.0  # what the last level needed in flight beyond its batch, relative

    def least_seconds(self, batch: int) -> float:
        """The least time that a level can take, if tokens come as fast as at the last one."""
        return warmup_seconds(self._itl) + WINDOWS_LEAST * window_seconds(batch, self._itl)

    async def measure(self, batch: int, seconds: float, limit: float, mean_output: float) -> Reading | None:
        """Measure one level.

        Args:
            batch: requests the engine shall run at once.
            seconds: time the level gets, warm-up included; fewer when the precision is reached.
            limit: time after which it is given up, with None, if it has no five windows yet.
            mean_output: mean output tokens of a request.

        Raises:
            EngineError: the engine died, hangs or fails requests.
            LoadError: the engine refuses the load's requests.
        """
        began = self._clock.now()
        self._load.resize(batch + round(batch * self._surplus))
        self._load.drop_surplus()  # waiting until they end by themselves would cost a request's whole duration
        for top_up in range(TOP_UPS + 1):
            if not await self._settle(seconds, began + limit):
                return None
            recording = self._load.begin()
            tally = await self._windows(batch, mean_output, began, seconds, limit, may_top_up=top_up < TOP_UPS)
            self._load.begin()
            if tally is None:
                return None
            missing = self._missing(batch, tally) if top_up < TOP_UPS else 0
            if not missing:
                return self._reading(batch, tally, recording, mean_output)
            log.info("batch %d: %.1f ran on average; %d more in flight", batch, _mean(tally.running), missing)
            self._load.resize(self._load.size + missing)
            self._surplus = self._load.size / batch - 1
        raise AssertionError("the last round always ends the level")

    async def _settle(self, seconds: float, deadline: float) -> bool:
        """Wait until each request in flight has had a token, and then the warm-up; False at the deadline.

        A slow engine may compute on the first prompts for long. But one whose KV cache is full lets requests wait for ever: after half the
        level's time it is measured as it is.
        """
        since = self._clock.now()
        while not self._load.settled:
            waited = self._clock.now() - since
            if self._clock.now() >= deadline:
                return False
            if waited >= max(SETTLE_LEAST, seconds / 2) and (
                waited >= SETTLE_MOST or full(await self._engine.sample())
            ):
                break
            await self._pause(POLL_SECONDS)
        await self._pause(warmup_seconds(self._itl))
        return self._clock.now() < deadline

    async def _windows(
        self, batch: int, mean_output: float, began: float, seconds: float, limit: float, *, may_top_up: bool
    ) -> _Tally | None:
        """Windows until the level is precise or its time is over; None when the limit came before five of them."""
        self._device.utilization()
        sample = await self._engine.sample()
        tally = _Tally(sample, sample)
        while True:
            whole = await self._window(batch, tally, began + limit)
            recording = self._load.recording
            self._itl = recording.itl.mean or self._itl
            count, now = len(tally.rates), self._clock.now()
            if whole and may_top_up and count == 2 and self._missing(batch, tally):
                return tally
            alive = self._load.silent < max(SILENCE_SECONDS, STEPS_PER_WINDOW * self._itl)
            if count >= WINDOWS_LEAST and alive:
                width = half_width(tally.rates)
                if (
                    not whole
                    or now - began >= min(seconds, limit)
                    or (width is not None and width <= PRECISION and self._resolved(batch, tally, mean_output))
                ):
                    return tally
            elif not whole or now - began >= limit:
                return None

    def _resolved(self, batch: int, tally: _Tally, mean_output: float) -> bool:
        """Whether enough engine steps stand behind the objective's statistic, and enough of a request's life behind all of them."""
        return tally.seconds >= max(self._steps_needed * self._itl, lives_seconds(batch, mean_output, self._itl))

    async def _window(self, batch: int, tally: _Tally, deadline: float) -> bool:
        """Add a window; False when the deadline came within it, and then it doesn't count."""
        length = window_seconds(batch, self._itl)
        start = tally.last
        for part in range(1, SAMPLES_PER_WINDOW + 1):
            due = start.at + length * part / SAMPLES_PER_WINDOW
            await self._pause(max(0.0, min(due, deadline) - self._clock.now()))
            if due > deadline:
                return False
            sample = await self._engine.sample()
            tally.running.append(sample.running)
            tally.waiting.append(sample.waiting)
            tally.kv_peak = max(tally.kv_peak, sample.kv_usage)
            busy = self._device.utilization()
            tally.compute += [busy.compute] if busy.compute is not None else []
            tally.memory += [busy.memory] if busy.memory is not None else []
        tally.last = sample
        tally.rates.append((sample.generation_tokens - start.generation_tokens) / (sample.at - start.at))
        return True

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._engine.check()
        self._load.check()

    def _missing(self, batch: int, tally: _Tally) -> int:
        preempted = tally.last.preemptions > tally.first.preemptions
        return missing(batch, _mean(tally.running), _mean(tally.waiting), preempted=preempted)

    def _reading(self, batch: int, tally: _Tally, recording: Recording, mean_output: float) -> Reading:
        seconds = tally.seconds
        rate = (tally.last.generation_tokens - tally.first.generation_tokens) / seconds
        check_counter(rate)
        if batch == 1:  # the gaps between requests are the client's, not the engine's
            rate /= min(1.0, max(0.5, recording.busy / seconds))
        width = half_width(tally.rates)
        width = 1.0 if width is None else width
        itl = recording.itl.mean or self._itl
        point = api.Point(
            batch=batch,
            running_mean=points.decimal(_mean(tally.running)),
            requests_per_second=points.decimal(rate / mean_output),
            output_tokens_per_second=points.decimal(rate),
            total_tokens_per_second=points.decimal(rate * self._factor),
            inter_token_latency=points.latency(recording.itl),
            time_to_first_token=points.latency(recording.ttft),
            kv_cache_tokens_peak=round(tally.kv_peak * (self._engine.info.kv_tokens or 0)) or None,
            requests=recording.requests,
            preemptions=round(tally.last.preemptions - tally.first.preemptions),
            gpu_utilization=points.decimal(_mean(tally.compute)) if tally.compute else None,
            memory_utilization=points.decimal(_mean(tally.memory)) if tally.memory else None,
            window=format_duration(seconds),
            half_width=points.decimal(width),
            unresolved=points.unresolved(seconds / itl, blurred=recording.blurred(itl)),
        )
        return Reading(
            point=point,
            throughput=rate * self._factor,
            half_width=width,
            itl=itl,
            undriven=recording.overloaded(itl),
            notes=tuple(_notes(batch, tally, recording, itl)),
        )


def full(sample: EngineSample) -> bool:
    """Whether requests wait for KV cache."""
    return sample.waiting > 0 and sample.kv_usage >= FULL


def _notes(batch: int, tally: _Tally, recording: Recording, itl: float) -> list[str]:
    """What is doubtful about a level, in words."""
    notes = []
    running = _mean(tally.running)
    if running < RUNNING_LEAST * batch and batch >= TOP_UP_FROM:
        notes.append(f"batch {batch}: only {running:.1f} requests ran on average")
    counted = tally.last.itl_count - tally.first.itl_count
    if counted > 0:
        own = (tally.last.itl_sum - tally.first.itl_sum) / counted
        if own > 0 and abs(itl / own - 1) > 0.1:
            notes.append(
                f"batch {batch}: {itl * 1000:.1f} ms between tokens at the client, {own * 1000:.1f} ms by the engine"
            )
    if recording.failures:
        notes.append(f"batch {batch}: {recording.failures} requests failed and were sent again")
    return notes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

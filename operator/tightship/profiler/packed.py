"""One trial: B requests in flight in each of R engines on one device, all at once, until the total is known to 3 %.

The total is the sum of the engines' own generation counters' rates times (1 + in/out), over windows that all engines share; latencies are
pooled over the engines, by tokens. Warm-up, windows and stop rule are the sweep's (`tightship.profiler.meter`), so a trial and a
point of the sweep differ in nothing but the neighbours. A load that ran late has measured itself, not the engines: its trial is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tightship.api.units import format_duration, format_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.errors import LoadError
from tightship.profiler.gpu import Device
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.meter import (
    POLL_SECONDS,
    PRECISION,
    RUNNING_LEAST,
    SAMPLES_PER_WINDOW,
    SETTLE_LEAST,
    SETTLE_MOST,
    SILENCE_SECONDS,
    STEPS_PER_WINDOW,
    TOP_UP_FROM,
    TOP_UPS,
    WINDOWS_LEAST,
    check_counter,
    full,
    half_width,
    lives_seconds,
    missing,
    warmup_seconds,
    window_seconds,
)
from tightship.profiler.metrics import EngineSample

ROUGH: Final = 0.1
"""Half-width above which a trial's time isn't enough."""
ROUGH_FACTOR: Final = 3
"""What it gets then, times its time."""
UNFAIR: Final = 0.9
"""A slowest replica below this share of the mean is worth a word."""


class LateLoadError(LoadError):
    """The load could not keep up with all engines: what it saw is no measurement of them."""


@dataclass(frozen=True)
class PackedReading:
    """What a trial showed."""

    trial: api.Trial
    throughput: float
    """Total tokens per second of all engines."""
    half_width: float
    itl: float
    """Mean inter-token latency, seconds."""


@dataclass
class _Tally:
    """Samples of one trial; lists of samples hold one for each engine, in their order."""

    first: list[EngineSample]
    last: list[EngineSample]
    rates: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    used: int = 0

    @property
    def seconds(self) -> float:
        return _mean([last.at - first.at for first, last in zip(self.first, self.last, strict=True)])

    @property
    def each(self) -> list[float]:
        """Generated tokens per second of each engine."""
        return [_rate(first, last) for first, last in zip(self.first, self.last, strict=True)]

    @property
    def preemptions(self) -> float:
        return sum(last.preemptions - first.preemptions for first, last in zip(self.first, self.last, strict=True))


class PackedMeter:
    """Measures engines that share a device, each with a load of its own."""

    def __init__(
        self,
        engines: Sequence[Engine],
        loads: Sequence[ClosedLoop],
        device: Device,
        clock: Clock,
        *,
        input_per_output: float,
        mean_output: float,
        steps_needed: int = 0,
        itl: float = 0.02,
        idle: int = 0,
    ) -> None:
        """The meter of one trial.

        Args:
            engines: those that are loaded; others may be up, and idle.
            loads: one for each engine, in their order.
            device: what they share.
            clock: the time.
            input_per_output: mean input over mean output tokens.
            mean_output: mean output tokens of a request.
            steps_needed: engine steps behind the objective's statistic; 0 for means.
            itl: the inter-token latency that is expected, seconds, to size the first windows.
            idle: bytes of the device that were in use before the first engine.
        """
        self._engines = tuple(engines)
        self._loads = tuple(loads)
        self._device = device
        self._clock = clock
        self._factor = 1.0 + input_per_output
        self._mean_output = mean_output
        self._steps_needed = steps_needed
        self._itl = itl
        self._idle = idle

    async def measure(self, batch: int, seconds: float, limit: float) -> PackedReading | None:
        """Measure with `batch` requests in each engine.

        Args:
            batch: requests each engine shall run at once.
            seconds: time the trial gets, warm-up included; fewer when the precision is reached, more for the objective's statistic.
            limit: time after which it is given up, with None, if it has no five windows yet.

        Raises:
            EngineError: an engine died, hangs or fails requests.
            LateLoadError: the load ran late.
            LoadError: an engine refuses the load's requests.
        """
        began = self._clock.now()
        for load in self._loads:
            load.resize(batch)
        for top_up in range(TOP_UPS + 1):
            if not await self._settle(seconds, began + limit):
                return None
            recordings = [load.begin() for load in self._loads]
            now = self._clock.now()  # what the first prompts took is not the trial's time
            tally = await self._windows(batch, now, seconds, began + limit - now, may_top_up=top_up < TOP_UPS)
            for load in self._loads:
                load.begin()
            if tally is None:
                return None
            missing = self._missing(batch, tally) if top_up < TOP_UPS else 0
            if not missing:
                return self._reading(batch, tally, recordings)
            for load in self._loads:
                load.resize(load.size + missing)
        raise AssertionError("the last round always ends the trial")

    async def _settle(self, seconds: float, deadline: float) -> bool:
        """Wait until each request in flight anywhere has had a token, and then the warm-up; False at the deadline.

        As with one engine: the first prompts may take long, longer still where several engines compute on them at once, and only requests that
        wait for a full KV cache are not waited for.
        """
        since = self._clock.now()
        while not all(load.settled for load in self._loads):
            waited = self._clock.now() - since
            if self._clock.now() >= deadline:
                return False
            if waited >= max(SETTLE_LEAST, seconds / 2) and (
                waited >= SETTLE_MOST or any(full(sample) for sample in await self._samples())
            ):
                break
            await self._pause(POLL_SECONDS)
        await self._pause(warmup_seconds(self._itl))
        return self._clock.now() < deadline

    async def _windows(self, batch: int, began: float, seconds: float, limit: float, may_top_up: bool) -> _Tally | None:
        """Windows until the total is precise or the time is over; None when the limit came before five of them."""
        self._device.utilization()
        samples = await self._samples()
        tally = _Tally(samples, samples)
        while True:
            whole = await self._window(batch, tally, began + limit)
            self._itl = _pooled([load.recording for load in self._loads]).itl.mean or self._itl
            count, elapsed = len(tally.rates), self._clock.now() - began
            if whole and may_top_up and count == 2 and self._missing(batch, tally):
                return tally
            silence = max(SILENCE_SECONDS, STEPS_PER_WINDOW * self._itl)
            if count >= WINDOWS_LEAST and all(load.silent < silence for load in self._loads):
                resolved = tally.seconds >= self._steps_needed * self._itl
                width = half_width(tally.rates)
                lived = tally.seconds >= lives_seconds(batch * len(self._engines), self._mean_output, self._itl)
                precise = width is not None and width <= PRECISION and lived
                rough = width is None or width > ROUGH
                enough = elapsed >= (ROUGH_FACTOR if rough else 1) * seconds
                if not whole or elapsed >= limit or (resolved and (precise or enough)):
                    return tally
            elif not whole or elapsed >= limit:
                return None

    async def _window(self, batch: int, tally: _Tally, deadline: float) -> bool:
        """Add a window; False when the deadline came within it, and then it doesn't count."""
        length = window_seconds(batch, self._itl)
        start = tally.last
        for part in range(1, SAMPLES_PER_WINDOW + 1):
            due = start[0].at + length * part / SAMPLES_PER_WINDOW
            await self._pause(max(0.0, min(due, deadline) - self._clock.now()))
            if due > deadline:
                return False
            samples = await self._samples()
            tally.running.append(_mean([one.running for one in samples]))
            tally.waiting.append(_mean([one.waiting for one in samples]))
            tally.used = max(tally.used, self._device.used())
            busy = self._device.utilization()
            tally.compute += [busy.compute] if busy.compute is not None else []
            tally.memory += [busy.memory] if busy.memory is not None else []
        tally.last = samples
        tally.rates.append(sum(_rate(before, after) for before, after in zip(start, samples, strict=True)))
        return True

    async def _samples(self) -> list[EngineSample]:
        return list(await asyncio.gather(*(engine.sample() for engine in self._engines)))

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        for engine in self._engines:
            engine.check()
        for load in self._loads:
            load.check()

    def _missing(self, batch: int, tally: _Tally) -> int:
        """Requests to put in flight besides in each engine."""
        return missing(batch, _mean(tally.running), _mean(tally.waiting), preempted=tally.preemptions > 0)

    def _reading(self, batch: int, tally: _Tally, recordings: Sequence[Recording]) -> PackedReading:
        each = tally.each
        rate = sum(each)
        check_counter(min(each))
        width = half_width(tally.rates)
        width = 1.0 if width is None else width
        whole = _pooled(recordings)
        itl = whole.itl.mean or self._itl
        undriven = whole.overloaded(itl)
        if undriven is not None:
            raise LateLoadError(f"the load could not keep up with {len(each)} engines: {undriven}")
        slowest = min(each) / _mean(each)
        trial = api.Trial(
            batch=batch,
            replicas=len(self._engines),
            running_mean=points.decimal(_mean(tally.running)),
            requests_per_second=points.decimal(rate / self._mean_output),
            output_tokens_per_second=points.decimal(rate),
            total_tokens_per_second=points.decimal(rate * self._factor),
            inter_token_latency=points.latency(whole.itl),
            time_to_first_token=points.latency(whole.ttft),
            requests=whole.requests,
            preemptions=round(tally.preemptions),
            gpu_utilization=points.decimal(_mean(tally.compute)) if tally.compute else None,
            memory_utilization=points.decimal(_mean(tally.memory)) if tally.memory else None,
            memory=format_quantity(max(0, tally.used - self._idle)),
            window=format_duration(tally.seconds),
            half_width=points.decimal(width),
            unresolved=points.unresolved(tally.seconds / itl, blurred=whole.blurred(itl)),
            slowest=points.decimal(slowest),
            message="; ".join(self._doubts(batch, tally, whole.failures, slowest))[:1024] or None,
        )
        return PackedReading(trial, rate * self._factor, width, itl)

    def _doubts(self, batch: int, tally: _Tally, failures: int, slowest: float) -> list[str]:
        doubts = []
        running = _mean(tally.running)
        if running < RUNNING_LEAST * batch and batch >= TOP_UP_FROM:
            doubts.append(f"only {running:.1f} requests ran in a replica on average")
        if slowest < UNFAIR:
            doubts.append(f"the slowest replica did {slowest:.2f} of the mean")
        if failures:
            doubts.append(f"{failures} requests failed and were sent again")
        return doubts


def _rate(first: EngineSample, last: EngineSample) -> float:
    return (last.generation_tokens - first.generation_tokens) / (last.at - first.at)


def _pooled(recordings: Sequence[Recording]) -> Recording:
    """What all loads saw together. They run on one thread, so the share of its core that each noted is that of all."""
    whole = Recording(since=recordings[0].since)
    for one in recordings:
        whole.tokens += one.tokens
        whole.requests += one.requests
        whole.failures += one.failures
        whole.itl.merge(one.itl)
        whole.ttft.merge(one.ttft)
        whole.lateness.merge(one.lateness)
    whole.seconds = max(one.seconds for one in recordings)
    whole.cpu = max((one.cpu for one in recordings if one.cpu is not None), default=None)
    return whole


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

"""One trial: B requests in flight in each of R engines on one device, all at once, until the total is known to 3 %.

The total is the sum of the engines' own generation counters' rates times (1 + in/out), over windows that all engines share; latencies are
pooled over the engines, by tokens. Warm-up, windows and stop rule are the sweep's (`tightship.profiler.windows`), so a trial and a
point of the sweep differ in nothing but the neighbours. A load that ran late has measured itself, not the engines: its trial is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tightship.api.units import format_duration, format_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.errors import LoadError
from tightship.profiler.estimate import estimate
from tightship.profiler.gpu import Device
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.windows import (
    PRECISION,
    RUNNING_LEAST,
    TOP_UP_FROM,
    TOP_UPS,
    WINDOWS_LEAST,
    Tally,
    Windows,
    check_counter,
    mean,
    pooled,
)

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
        first_tokens_needed: int = 0,
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
            first_tokens_needed: first tokens behind it, where it is of the time to them.
            itl: the inter-token latency that is expected, seconds, to size the first windows.
            idle: bytes of the device that were in use before the first engine.
        """
        self._loads = tuple(loads)
        self._clock = clock
        self._windows = Windows(engines, loads, device, clock, itl=itl, watch_memory=True)
        self._input_per_output = input_per_output
        self._factor = 1.0 + input_per_output
        self._mean_output = mean_output
        self._steps_needed = steps_needed
        self._first_tokens_needed = first_tokens_needed
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
            if not await self._windows.settle(seconds, began + limit):
                return None
            recordings = [load.begin() for load in self._loads]
            now = self._clock.now()  # what the first prompts took is not the trial's time
            tally = await self._read(batch, now, seconds, began + limit - now, may_top_up=top_up < TOP_UPS)
            for load in self._loads:
                load.begin()
            if tally is None:
                return None
            missing = tally.missing(batch) if top_up < TOP_UPS else 0
            if not missing:
                return self._reading(batch, tally, recordings)
            for load in self._loads:
                load.resize(load.size + missing)
        raise AssertionError("the last round always ends the trial")

    async def _read(self, batch: int, began: float, seconds: float, limit: float, *, may_top_up: bool) -> Tally | None:
        """Windows until the total is precise or the time is over; None when the limit came before five of them."""
        windows = self._windows
        tally = await windows.begin()
        while True:
            whole = await windows.add(batch, tally, began + limit)
            count, elapsed = len(tally.windows), self._clock.now() - began
            if whole and may_top_up and count == 2 and tally.missing(batch):
                return tally
            if count >= WINDOWS_LEAST and windows.alive:
                resolved = windows.backs(tally, steps=self._steps_needed, first_tokens=self._first_tokens_needed)
                width = estimate(tally.windows, self._input_per_output).half_width
                old = windows.lived(tally, batch * len(self._loads), self._mean_output, by_lot=False)
                precise = width is not None and width <= PRECISION and old
                rough = width is None or width > ROUGH
                enough = elapsed >= (ROUGH_FACTOR if rough else 1) * seconds
                if not whole or elapsed >= limit or (resolved and (precise or enough)):
                    return tally
            elif not whole or elapsed >= limit:
                return None

    def _reading(self, batch: int, tally: Tally, recordings: Sequence[Recording]) -> PackedReading:
        each = tally.each
        check_counter(min(each))
        found = estimate(tally.windows, self._input_per_output)
        rate = found.rate / tally.filled(batch)
        width = 1.0 if found.half_width is None else found.half_width
        whole = pooled(recordings)
        itl = whole.itl.mean or self._windows.itl
        undriven = whole.overloaded(itl)
        if undriven is not None:
            raise LateLoadError(f"the load could not keep up with {len(each)} engines: {undriven}")
        slowest = min(each) / mean(each)
        trial = api.Trial(
            batch=batch,
            replicas=len(self._loads),
            running_mean=points.decimal(mean(tally.running)),
            requests_per_second=points.decimal(rate / self._mean_output),
            output_tokens_per_second=points.decimal(rate),
            total_tokens_per_second=points.decimal(rate * self._factor),
            inter_token_latency=points.latency(whole.itl),
            time_to_first_token=points.first_token_latency(whole.ttft),
            requests=whole.requests,
            preemptions=round(tally.preemptions),
            gpu_utilization=points.decimal(mean(tally.compute)) if tally.compute else None,
            memory_utilization=points.decimal(mean(tally.memory)) if tally.memory else None,
            memory=format_quantity(max(0, tally.used - self._idle)),
            window=format_duration(tally.seconds),
            half_width=points.decimal(width),
            unresolved=points.unresolved(tally.seconds / itl, blurred=whole.blurred(itl)),
            blurred=points.blurred(whole.blurred(itl)),
            slowest=points.decimal(slowest),
            message="; ".join(self._doubts(batch, tally, whole.failures, slowest))[:1024] or None,
        )
        return PackedReading(trial, rate * self._factor, width, itl)

    def _doubts(self, batch: int, tally: Tally, failures: int, slowest: float) -> list[str]:
        doubts = []
        running = mean(tally.running)
        if running < RUNNING_LEAST * batch and batch >= TOP_UP_FROM:
            doubts.append(f"only {running:.1f} requests ran in a replica on average")
        if slowest < UNFAIR:
            doubts.append(f"the slowest replica did {slowest:.2f} of the mean")
        if failures:
            doubts.append(f"{failures} requests failed and were sent again")
        return doubts

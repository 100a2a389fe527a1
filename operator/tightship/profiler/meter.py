"""One level: B requests in flight until their throughput is known to 3 %, or its time is over.

T is the rate of the engine's own generation-token counter times (1 + in/out): it moves with every engine step, while prompts arrive in
lumps. It is read over windows of at least 1 s (0.5 s up to B = 8) and 8 engine steps, at least five of them; the windows' spread gives the
half-width (`tightship.profiler.estimate`). Latencies are the client's. A level counts only if the engine ran at least 0.98 B requests on
average: where it did not, and did not queue either, a few more are put in flight to fill the gaps between requests. Below 16 one more would be
another batch, so there the rate is that of the time in which all ran, as T(1) is.

Where doubling the batch still brings a fifth or more, 6 % will do: no decision hangs on such a level, unless its latency is near an objective.

A level counts as not driven when the load says so of itself, and its high percentiles as unresolved where the load's lateness blurs them
(`tightship.profiler.load` has the rule).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.memory import Context, kv_tokens
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.estimate import Estimate, estimate
from tightship.profiler.gpu import Device
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.windows import (
    PRECISION,
    RUNNING_LEAST,
    SURPLUS_MOST,
    TOP_UP_FROM,
    TOP_UPS,
    WINDOWS_LEAST,
    Tally,
    Windows,
    check_counter,
    mean,
    warmup_seconds,
    window_seconds,
)

log = logging.getLogger(__name__)

COARSE: Final = 0.06
"""Precision of a level that is only on the way up."""
STEEP: Final = 1.2
"""Its throughput over that of a level with at most half its batch, from which on it is."""
NEAR: Final = 0.15
"""Relative distance of its time between tokens from an objective's within which it is not."""


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
        first_tokens_needed: int = 0,
        itl_most: float | None = None,
        context: Context | None = None,
    ) -> None:
        """The meter of one engine.

        Args:
            engine: what is measured.
            load: what is put on it.
            device: where it runs.
            clock: the time.
            input_per_output: mean input over mean output tokens.
            steps_needed: engine steps behind the objective's statistic.
            first_tokens_needed: first tokens behind it, where it is of the time to them.
            itl_most: what an objective allows between tokens, seconds; None without such an objective.
            context: of the requests in flight, by which a batch may fill the KV cache; None where none can.
        """
        self._context = context
        self._engine = engine
        self._load = load
        self._clock = clock
        # The first windows of a level are sized by the last level's time between tokens.
        self._windows = Windows((engine,), (load,), device, clock, itl=0.02)
        self._input_per_output = input_per_output
        self._factor = 1.0 + input_per_output
        self._steps_needed = steps_needed
        self._first_tokens_needed = first_tokens_needed
        self._itl_most = itl_most
        self._lower: float | None = None
        # What a level needed in flight beyond its batch, relative; smaller batches need less.
        self._surplus, self._surplus_from = 0.0, 0
        self._distorted = False  # whether the last level preempted requests, or let them wait

    def least_seconds(self, batch: int) -> float:
        """The least time that a level can take, if tokens come as fast as at the last one."""
        return warmup_seconds(self._windows.itl) + WINDOWS_LEAST * window_seconds(batch, self._windows.itl)

    async def measure(
        self, batch: int, seconds: float, limit: float, mean_output: float, *, lower: float | None = None
    ) -> Reading | None:
        """Measure one level.

        Args:
            batch: requests the engine shall run at once.
            seconds: time the level gets, warm-up included; fewer when the precision is reached.
            limit: time after which it is given up, with None, if it has no five windows yet.
            mean_output: mean output tokens of a request.
            lower: T of a level with at most half this batch, tokens per second; None where every level has to be precise.

        Raises:
            EngineError: the engine died, hangs or fails requests.
            LoadError: the engine refuses the load's requests.
        """
        began = self._clock.now()
        self._lower = lower
        if batch < self._surplus_from:
            self._surplus = 0.0
        by_lot = self._may_fill(batch)
        if self._distorted or by_lot != self._load.by_lot:
            # Who ran and who waited was not by lot, or what ran was drawn otherwise: no steady state of this batch, for a life long.
            self._load.by_lot = by_lot
            self._load.resize(0)
            self._load.drop_surplus()
        self._load.resize(batch + round(batch * self._surplus))
        self._load.drop_surplus()  # waiting until they end by themselves would cost a request's whole duration
        for top_up in range(TOP_UPS + 1):
            if not await self._windows.settle(seconds, began + limit):
                return None
            room = batch + int(SURPLUS_MOST * batch) - self._load.size if top_up < TOP_UPS else 0
            recording = self._load.begin()
            tally = await self._read(batch, mean_output, began, seconds, limit, may_top_up=room > 0)
            self._load.begin()
            if tally is None:
                return None
            self._distorted = tally.full(batch)
            missing = min(tally.missing(batch), room) if room > 0 else 0
            if not missing:
                return self._reading(batch, tally, recording, mean_output)
            log.info("batch %d: %.1f ran on average; %d more in flight", batch, mean(tally.running), missing)
            self._load.resize(self._load.size + missing)
            self._surplus, self._surplus_from = self._load.size / batch - 1, batch
        raise AssertionError("the last round always ends the level")

    @property
    def hung(self) -> str | None:
        """What to say of an engine from which no tokens come, with its last words; None while they come."""
        if self._windows.alive:
            return None
        words = self._engine.last_words() or "none"
        return f"no token had come for {self._windows.silent:.0f} s when the time was over; its last words: {words}"[
            :500
        ]

    def _may_fill(self, batch: int) -> bool:
        """Whether so many requests may fill the KV cache: then how far their contexts fluctuate decides whether they preempt each other."""
        held, context = self._engine.info.kv_tokens, self._context
        return held is not None and context is not None and kv_tokens(batch, context, block_size=1) > held

    async def _read(
        self, batch: int, mean_output: float, began: float, seconds: float, limit: float, *, may_top_up: bool
    ) -> Tally | None:
        """Windows until the level is precise or its time is over; None when the limit came before five of them."""
        windows = self._windows
        tally = await windows.begin()
        while True:
            whole = await windows.add(batch, tally, began + limit)
            count, now = len(tally.windows), self._clock.now()
            if whole and may_top_up and count == 2 and tally.missing(batch):
                return tally
            if count >= WINDOWS_LEAST and windows.alive:
                if (
                    not whole
                    or now - began >= min(seconds, limit)
                    or (self._precise(tally) and self._resolved(batch, tally, mean_output))
                ):
                    return tally
            elif not whole or now - began >= limit:
                return None

    def _estimate(self, tally: Tally) -> Estimate:
        return estimate(tally.windows, self._input_per_output)

    def _precise(self, tally: Tally) -> bool:
        """Whether the throughput is known as well as it has to be."""
        found = self._estimate(tally)
        asked = precision_asked(
            found.rate * self._factor, self._windows.itl, lower=self._lower, itl_most=self._itl_most
        )
        return found.half_width is not None and found.half_width <= asked

    def _resolved(self, batch: int, tally: Tally, mean_output: float) -> bool:
        """Whether enough engine steps, or first tokens, stand behind the objective's statistic, and enough of a request's life behind all."""
        windows = self._windows
        return windows.backs(tally, steps=self._steps_needed, first_tokens=self._first_tokens_needed) and windows.lived(
            tally, batch, mean_output, by_lot=self._load.by_lot
        )

    def _reading(self, batch: int, tally: Tally, recording: Recording, mean_output: float) -> Reading:
        seconds = tally.seconds
        found = self._estimate(tally)
        rate = found.rate
        check_counter(rate)
        if batch == 1:  # the gaps between requests are the client's, not the engine's
            rate /= min(1.0, max(0.5, recording.busy / seconds))
        else:
            rate /= tally.filled(batch)
        width = 1.0 if found.half_width is None else found.half_width
        itl = recording.itl.mean or self._windows.itl
        point = api.Point(
            batch=batch,
            running_mean=points.decimal(mean(tally.running)),
            requests_per_second=points.decimal(rate / mean_output),
            output_tokens_per_second=points.decimal(rate),
            total_tokens_per_second=points.decimal(rate * self._factor),
            inter_token_latency=points.latency(recording.itl),
            time_to_first_token=points.first_token_latency(recording.ttft),
            kv_cache_tokens_peak=round(tally.kv_peak * (self._engine.info.kv_tokens or 0)) or None,
            requests=recording.requests,
            preemptions=round(tally.preemptions),
            gpu_utilization=points.decimal(mean(tally.compute)) if tally.compute else None,
            memory_utilization=points.decimal(mean(tally.memory)) if tally.memory else None,
            window=format_duration(seconds),
            half_width=points.decimal(width),
            unresolved=points.unresolved(seconds / itl, blurred=recording.blurred(itl)),
            blurred=points.blurred(recording.blurred(itl)),
        )
        return Reading(
            point=point,
            throughput=rate * self._factor,
            half_width=width,
            itl=itl,
            undriven=recording.overloaded(itl),
            notes=tuple(_notes(batch, tally, recording, itl)),
        )


def precision_asked(throughput: float, itl: float, *, lower: float | None, itl_most: float | None) -> float:
    """The relative half-width to which a level's throughput has to be known.

    Args:
        throughput: T of the level, tokens per second.
        itl: its mean time between tokens, seconds.
        lower: T of a level with at most half its batch; None where every level has to be precise.
        itl_most: what an objective allows between tokens, seconds; None without such an objective.
    """
    near = itl_most is not None and abs(itl / itl_most - 1) < NEAR
    steep = lower is not None and throughput >= STEEP * lower
    return COARSE if steep and not near else PRECISION


def _notes(batch: int, tally: Tally, recording: Recording, itl: float) -> list[str]:
    """What is doubtful about a level, in words."""
    notes = []
    running = mean(tally.running)
    if running < RUNNING_LEAST * batch and batch >= TOP_UP_FROM:
        notes.append(f"batch {batch}: only {running:.1f} requests ran on average")
    (first,), (last,) = tally.first, tally.last
    counted = last.itl_count - first.itl_count
    if counted > 0:
        own = (last.itl_sum - first.itl_sum) / counted
        if own > 0 and abs(itl / own - 1) > 0.1:
            notes.append(
                f"batch {batch}: {itl * 1000:.1f} ms between tokens at the client, {own * 1000:.1f} ms by the engine"
            )
    if recording.failures:
        notes.append(f"batch {batch}: {recording.failures} requests failed and were sent again")
    return notes

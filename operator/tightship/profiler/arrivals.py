"""An open loop: requests arrive at random times (a Poisson process), as users' do, whether or not earlier ones are answered.

A closed loop can't show what queueing costs, since it sends a request only when another ends. The run begins in the steady state: with as
many aged requests in flight as the offered rate keeps busy by the curve, so the first arrivals don't find an idle engine; a warm-up
is left out.

What must hold: arrivals don't wait for the client, each is due at a time drawn beforehand; the time to the first token counts from when a request
was due; the load's own lateness and CPU share are measured as the closed loop's are.

Whether the engine keeps up shows in the requests that it has, running and waiting: one that falls back by d requests a second has 2/3 w d more in
the last third of a window w than in the first. By chance they differ, too. Of n requests that run some leave and others come: within s
seconds their number moves by sqrt(2 min(n, r s)) at a rate r, as independent requests' does (M/G/infinity: Poisson, and of two moments the more
independent, the longer they are apart). And at 80 % of the capacity of B servers the number waiting, while any wait, is geometric with mean
1 / (1 - 0.8) = 5 (M/M/c), whatever B is. So what has grown by more than twice both has grown. Where requests live so long, or are so few,
that even an engine which does half of what is offered would not be seen to fall back, nothing is said.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Curve
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.load import Loop, Recording
from tightship.profiler.metrics import EngineSample
from tightship.profiler.windows import SILENCE_SECONDS
from tightship.profiler.wire import Channel, Completion

UTILIZATION: Final = 0.8
"""Offered rate over capacity."""
WARMUP_SHARE: Final = 0.15
WARMUP_MOST: Final = 5.0
SAMPLE_SECONDS: Final = 0.25
GROWTH: Final = 2 / (1 - UTILIZATION)
"""Requests by which a queue may be longer by chance."""
APART: Final = 2 / 3
"""From the middle of a window's first third to that of its last, as a share of it."""
DEFICIT: Final = 0.5
"""Share of the offered rate that an engine which can't keep up would plausibly leave undone."""


@dataclass(frozen=True)
class Plan:
    """What is offered, and for how long."""

    rate: float
    """Requests per second."""
    in_flight: int
    """Aged requests that run when it begins."""
    seconds: float
    """In all, warm-up included."""

    @property
    def warmup(self) -> float:
        """Seconds that are left out."""
        return min(WARMUP_MOST, WARMUP_SHARE * self.seconds)


class OpenLoop(Loop):
    """Sends requests at random times."""

    def __init__(self, channel: Channel, lengths: Lengths, prompts: Prompts, clock: Clock, seed: int) -> None:
        super().__init__(channel, prompts, clock, seed)
        self._lengths = lengths
        self._timer: asyncio.TimerHandle | None = None
        self._rate = 0.0
        self.arrived = 0
        """Requests that arrived since `begin`."""

    def start(self, rate: float, in_flight: int) -> None:
        """Send `in_flight` aged requests now, and from now on `rate` fresh ones a second on average."""
        self._rate = rate
        self._progress = self._now()
        for _ in range(in_flight):
            self._submit(self._lengths.aged(self._rng), due=None)
        self._await_next(self._now())

    def begin(self) -> Recording:
        """Start a new recording, and return it; it fills until the next `begin`."""
        self.arrived = 0
        return super().begin()

    async def close(self) -> None:
        """Stop sending, and drop everything in flight."""
        if self._timer is not None:
            self._timer.cancel()
        await self._channel.close()

    def _await_next(self, before: float) -> None:
        due = before + self._rng.expovariate(self._rate)
        delay = max(0.0, due - self._now())
        self._timer = asyncio.get_running_loop().call_later(delay, self._arrive, due)

    def _arrive(self, due: float) -> None:
        self._late(due)
        self.arrived += 1
        self._submit(self._lengths.fresh(self._rng), due)
        self._await_next(due)

    def _submit(self, length: Length, due: float | None) -> None:
        if not self.in_flight:
            self._progress = self._now()  # an idle engine is no silent one
        self.in_flight += 1
        request = Completion(self._prompts.draw(length.input), length.output)
        self._channel.submit(request, _Arrival(self, due))

    def _tokens(self, arrival: _Arrival, count: int) -> None:
        now, recording = self._now(), self.recording
        self._progress, self._row = now, 0
        recording.tokens += count
        if arrival.last is not None:
            recording.itl.add((now - arrival.last) / count, count)
        elif arrival.due is not None and arrival.due >= recording.since:
            recording.ttft.add(now - arrival.due)
        arrival.last = now

    def _finished(self) -> None:
        self.in_flight -= 1
        self.recording.requests += 1

    def _failed(self, reason: str, final: bool) -> None:
        self.in_flight -= 1
        self._count_failure(reason, final=final)


class _Arrival:
    """One request; `due` is None for those that ran from the beginning."""

    __slots__ = ("_loop", "due", "last")

    def __init__(self, loop: OpenLoop, due: float | None) -> None:
        self._loop = loop
        self.due = due
        self.last: float | None = None

    def tokens(self, count: int) -> None:
        self._loop._tokens(self, count)

    def finished(self) -> None:
        self._loop._finished()

    def failed(self, reason: str, final: bool) -> None:
        self._loop._failed(reason, final)


@dataclass
class _Seen:
    """The engine's samples of a run."""

    samples: list[EngineSample] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.samples[-1].at - self.samples[0].at

    def kept_up(self, rate: float) -> bool | None:
        """Whether the engine kept up with `rate` requests a second; None where the window is too short to tell."""
        third = max(1, len(self.samples) // 3)
        present = [sample.running + sample.waiting for sample in self.samples]
        before, after = _mean(present[:third]), _mean(present[-third:])
        offered = rate * APART * self.seconds
        chance = GROWTH + 2 * math.sqrt(2 * min(before, offered))
        if after - before > chance:
            return False
        return True if DEFICIT * offered > chance else None


def busy(curve: Curve, batch: int, share: float) -> int:
    """Requests in flight at which the engine does `share` of what it does at `batch`, by linear interpolation of the curve.

    Only to begin near the steady state: nothing is decided from it.
    """
    here = curve.at(batch)
    if here is None:
        return max(1, round(share * batch))
    wanted = share * here.throughput
    low_batch, low = 0, 0.0
    for point in curve.points:
        if point.throughput >= wanted or point.batch == batch:
            rise = (wanted - low) / (point.throughput - low) if point.throughput > low else 1.0
            return max(1, round(low_batch + min(1.0, rise) * (point.batch - low_batch)))
        low_batch, low = point.batch, point.throughput
    return batch


async def offer(engine: Engine, load: OpenLoop, clock: Clock, plan: Plan) -> tuple[api.Arrivals, Recording]:
    """Let requests arrive at random for the plan's time, and say how the engine did, and what the load saw.

    Raises:
        EngineError: the engine died, hangs or fails requests.
        LoadError: the engine refuses the requests.
    """
    load.start(plan.rate, plan.in_flight)
    await _watch(engine, load, clock, plan.warmup)
    recording = load.begin()
    seen = await _watch(engine, load, clock, plan.seconds - plan.warmup)
    while load.in_flight and load.silent > SILENCE_SECONDS:  # it may hang: then `check` says so before long
        seen.samples += (await _watch(engine, load, clock, SAMPLE_SECONDS)).samples
    found = _result(plan, load, recording, seen)
    load.begin()
    return found, recording


async def _watch(engine: Engine, load: OpenLoop, clock: Clock, seconds: float) -> _Seen:
    until = clock.now() + seconds
    seen = _Seen([await engine.sample()])
    while clock.now() < until:
        await clock.sleep(min(SAMPLE_SECONDS, until - clock.now()))
        await engine.check()
        load.check()
        seen.samples.append(await engine.sample())
    return seen


def _result(plan: Plan, load: OpenLoop, recording: Recording, seen: _Seen) -> api.Arrivals:
    first, last = seen.samples[0], seen.samples[-1]
    return api.Arrivals(
        offered_requests_per_second=points.decimal(plan.rate),
        requests_per_second=points.decimal(recording.requests / seen.seconds),
        time_to_first_token=points.latency(recording.ttft),
        inter_token_latency=points.latency(recording.itl),
        requests=load.arrived,
        running_mean=points.decimal(_mean([sample.running for sample in seen.samples])),
        waiting_mean=points.decimal(_mean([sample.waiting for sample in seen.samples])),
        preemptions=round(last.preemptions - first.preemptions),
        window=format_duration(seen.seconds),
        sustained=seen.kept_up(plan.rate),
    )


def sustainable(arrivals: api.Arrivals) -> str | None:
    """Requests per second that a replica sustains: what was offered if it kept up, else what it finished; None where neither is known."""
    if arrivals.sustained is None:
        return None
    return arrivals.offered_requests_per_second if arrivals.sustained else arrivals.requests_per_second


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

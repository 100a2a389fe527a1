"""One or several engines under load, read in windows that they share: what a level of the sweep and a packing trial have in common.

The rate of a window is that of the engines' own generation-token counters, summed over the engines. Windows are at least 1 s long (0.5 s up
to B = 8) and 8 engine steps. Before the first one each request in flight has had a token. When enough of them have been read is for
those to say who measure: the level (`tightship.profiler.meter`) and the trial (`tightship.profiler.packed`).

Two things make windows differ though the engine does not, and both are taken out:

- A counter moves once a step, so a window that is cut anywhere is off by up to a step at either end: 5 % of 20 steps. A sample is therefore
  stamped with the arrival of the last token before it, the end of the step that it counts, wherever no token came while it was taken. On an engine
  so quick that tokens always come, a step is nothing beside a window.
- A window with more than its share of prompts has less time for tokens. What share the workload gives them is known, so prompts are a control
  variate (`tightship.profiler.estimate`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.errors import EngineError
from tightship.profiler.estimate import Window
from tightship.profiler.gpu import Device
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.metrics import GENERATION_TOKENS, EngineSample

WINDOWS_LEAST: Final = 5
STEPS_PER_WINDOW: Final = 8
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
SAMPLE_LEAST: Final = 0.25
"""Seconds between samples at the least: an API server takes 5 to 10 ms for one, on a small machine of a core that its engine needs as well."""
ALIGN_FROM: Final = 0.05
"""Seconds of an engine step from which on a sample that met tokens on their way is taken again, to have one between two steps."""
ALIGN_TRIES: Final = 3
LIVES_LEAST: Final = 1.0
"""Mean lives of a request that a load is measured for: the requests it starts with weigh on all windows alike, unseen by their spread."""
LIVES_EVENLY: Final = 0.5
"""The same where they are spread evenly (`tightship.profiler.lengths`): of eight and more that is more exact than a whole life by lot."""
LIVES_WHOLE_UP_TO: Final = 256
"""Batch up to which that holds. So many requests at once are a fair sample by themselves: beyond, 256 / B of it will do."""
TOP_UPS: Final = 2
SURPLUS_MOST: Final = 0.5
"""Requests put in flight beyond a batch to have it run, relative to it, at the most."""
TOP_UP_FROM: Final = 16  # below, one request more would be another batch
SILENCE_SECONDS: Final = 3.0
SILENCE_STEPS: Final = 20


def window_seconds(batch: int, itl: float) -> float:
    """Length of one window in seconds; `itl`: seconds of an engine step."""
    return max(0.5 if batch <= 8 else 1.0, STEPS_PER_WINDOW * itl)


def warmup_seconds(itl: float) -> float:
    """How long a load runs before it is measured; `itl`: seconds of an engine step."""
    return max(WARMUP_SECONDS, WARMUP_STEPS * itl)


def lived(seconds: float, requests: int, life: float, first_tokens: int, *, by_lot: bool) -> bool:
    """Whether a load was measured long enough for the requests it began with to have made room for others.

    That is a life of a request. Of requests that are spread evenly it is half a life, if as many statistics of the time to first token are there as
    a whole one would give: about each request in flight has its first token in it, and an objective that changes later finds them.

    Args:
        seconds: how long it was measured.
        requests: those in flight at once, in all engines.
        life: mean output tokens of a request times the mean time between them, seconds.
        first_tokens: requests that began in this time and have had a token.
        by_lot: whether the requests in flight are drawn by lot instead of evenly.
    """
    share = min(1.0, LIVES_WHOLE_UP_TO / requests)
    wanted = [1, *points.FIRST_TOKENS_NEEDED.values()]
    enough = first_tokens >= max(each for each in wanted if each <= requests)
    return seconds >= (LIVES_EVENLY if enough and not by_lot else LIVES_LEAST) * share * life


def check_counter(rate: float) -> None:
    """Raise EngineError where an engine's tokens per second are 0 by its own count, though tokens came."""
    if rate <= 0:
        raise EngineError(
            f"tokens come, but the engine's counter {GENERATION_TOKENS} stands still, and throughput is read from it: use an engine "
            "version that has it, without --disable-log-stats"
        )


def crowded(batch: int, waiting: float, *, preempted: bool) -> bool:
    """Whether an engine can't run a batch: it preempted requests, or `waiting` of them waited on average."""
    return preempted or waiting > 0.02 * batch


def missing(batch: int, running: float, waiting: float, *, preempted: bool) -> int:
    """Requests to put in flight besides, so that an engine runs `batch` of them; 0 when it does, queues or preempts.

    Args:
        batch: what it shall run.
        running: what it ran on average.
        waiting: what it let wait on average.
        preempted: whether it preempted requests.
    """
    if (
        batch < TOP_UP_FROM
        or crowded(batch, waiting, preempted=preempted)
        or running >= RUNNING_LEAST * batch
        or running <= 0
    ):
        return 0
    return max(1, min(math.ceil(batch - running), batch // 4))


def filled(batch: int, running: float, *, crowded: bool) -> float:
    """Share of a small batch that an engine ran, 0.5 to 1, by which its rate is divided: the rest are the gaps between requests.

    While one request's end travels to the client and the next one to the engine, one fewer runs. Larger batches get more in flight for that;
    in a batch below 16 one more would be another batch, and on the way up its rate is in proportion to what runs.

    Args:
        batch: what it shall run.
        running: what it ran on average.
        crowded: whether it could not run the batch.
    """
    if batch >= TOP_UP_FROM or crowded or running >= RUNNING_LEAST * batch:
        return 1.0
    return max(0.5, running / batch)


@dataclass
class Tally:
    """Samples of one measurement; lists of samples hold one for each engine, in their order."""

    first: list[EngineSample]
    last: list[EngineSample]
    windows: list[Window] = field(default_factory=list)
    """All engines together, window by window."""
    running: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    kv_peak: float = 0.0
    compute: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    used: int = 0
    """Most bytes of the device in use, where that was watched."""

    @property
    def seconds(self) -> float:
        """From the first sample to the last."""
        return mean([last.at - first.at for first, last in zip(self.first, self.last, strict=True)])

    @property
    def each(self) -> list[float]:
        """Generated tokens per second of each engine, over all windows."""
        return [_rate(first, last) for first, last in zip(self.first, self.last, strict=True)]

    @property
    def preemptions(self) -> float:
        """Requests preempted, in all engines."""
        return sum(last.preemptions - first.preemptions for first, last in zip(self.first, self.last, strict=True))

    def full(self, batch: int) -> bool:
        """Whether an engine could not run the batch (see `crowded`)."""
        return crowded(batch, mean(self.waiting), preempted=self.preemptions > 0)

    def filled(self, batch: int) -> float:
        """Share of a small batch that an engine ran (see `filled`)."""
        return filled(batch, mean(self.running), crowded=self.full(batch))

    def missing(self, batch: int) -> int:
        """Requests to put in flight besides in each engine (see `missing`)."""
        return missing(batch, mean(self.running), mean(self.waiting), preempted=self.preemptions > 0)


class Windows:
    """Reads engines that share a device, each under a load of its own."""

    def __init__(
        self,
        engines: Sequence[Engine],
        loads: Sequence[ClosedLoop],
        device: Device,
        clock: Clock,
        *,
        itl: float,
        watch_memory: bool = False,
    ) -> None:
        """`itl`: the time between tokens that is expected, seconds, to size the first windows; `watch_memory`: keep the device's used memory."""
        self._engines = tuple(engines)
        self._loads = tuple(loads)
        self._device = device
        self._clock = clock
        self._watch_memory = watch_memory
        self.itl = itl
        """Mean time between tokens, seconds: the last that was seen."""

    async def settle(self, seconds: float, deadline: float) -> bool:
        """Wait until each request in flight anywhere has had a token, and then the warm-up; False at the deadline.

        A slow engine may compute on the first prompts for long, longer still beside others that do the same. But one whose KV cache is full lets
        requests wait for ever: after half of `seconds`, the time of the measurement, it is measured as it is.
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
        await self._pause(warmup_seconds(self.itl))
        self.itl = self.recording.itl.mean or self.itl
        return self._clock.now() < deadline

    async def begin(self) -> Tally:
        """The tally of a measurement that begins now."""
        self._device.utilization()
        samples = await self._samples()
        return Tally(samples, samples)

    async def add(self, batch: int, tally: Tally, deadline: float) -> bool:
        """Add a window; False when the deadline came within it, and then it doesn't count."""
        length = window_seconds(batch, self.itl)
        start = tally.last
        whole = await self._window(length, tally, deadline)
        if whole:
            tally.windows.append(_together(start, tally.last))
        self.itl = self.recording.itl.mean or self.itl
        return whole

    @property
    def recording(self) -> Recording:
        """What all loads have seen together since they began to record."""
        return pooled([load.recording for load in self._loads])

    @property
    def alive(self) -> bool:
        """Whether tokens still come from every engine."""
        return self.silent < max(SILENCE_SECONDS, SILENCE_STEPS * self.itl)

    @property
    def silent(self) -> float:
        """Seconds since a token came, from the engine that has been silent for longest."""
        return max(load.silent for load in self._loads)

    def backs(self, tally: Tally, *, steps: int, first_tokens: int) -> bool:
        """Whether as many engine steps and first tokens were measured as an objective's statistic wants."""
        return tally.seconds >= steps * self.itl and self.recording.ttft.count >= first_tokens

    def lived(self, tally: Tally, requests: int, mean_output: float, *, by_lot: bool) -> bool:
        """Whether this was long enough for `requests` in flight, of `mean_output` tokens, to have made room for others (see `lived`)."""
        return lived(tally.seconds, requests, mean_output * self.itl, self.recording.ttft.count, by_lot=by_lot)

    async def _window(self, length: float, tally: Tally, deadline: float) -> bool:
        start = tally.last[0].at
        parts = max(1, min(SAMPLES_PER_WINDOW, int(length / SAMPLE_LEAST)))
        for part in range(1, parts + 1):
            due = start + length * part / parts
            await self._pause(max(0.0, min(due, deadline) - self._clock.now()))
            if due > deadline:
                return False
            samples = await self._samples()
            tally.running.append(mean([one.running for one in samples]))
            tally.waiting.append(mean([one.waiting for one in samples]))
            tally.kv_peak = max(tally.kv_peak, *(one.kv_usage for one in samples))
            if self._watch_memory:
                tally.used = max(tally.used, self._device.used())
            busy = self._device.utilization()
            tally.compute += [busy.compute] if busy.compute is not None else []
            tally.memory += [busy.memory] if busy.memory is not None else []
        tally.last = samples
        return True

    async def _samples(self) -> list[EngineSample]:
        pairs = zip(self._engines, self._loads, strict=True)
        return list(await asyncio.gather(*(self._sample(engine, load) for engine, load in pairs)))

    async def _sample(self, engine: Engine, load: ClosedLoop) -> EngineSample:
        """A sample, stamped with the end of the step it counts wherever that is known."""
        for _ in range(ALIGN_TRIES if self.itl >= ALIGN_FROM else 1):
            step_ended = load.last_token
            sample = await engine.sample()
            # An engine that is silent has no step that has just ended.
            if load.last_token == step_ended and sample.at - step_ended <= 2 * self.itl:
                return replace(sample, at=step_ended)
        return sample

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        for engine in self._engines:
            await engine.check()
        for load in self._loads:
            load.check()


def full(sample: EngineSample) -> bool:
    """Whether requests wait for KV cache."""
    return sample.waiting > 0 and sample.kv_usage >= FULL


def _together(first: Sequence[EngineSample], last: Sequence[EngineSample]) -> Window:
    """What all engines did between two samples; their windows differ by a step or so, hence the rates are summed and not the tokens."""
    pairs = list(zip(first, last, strict=True))
    seconds = mean([after.at - before.at for before, after in pairs])
    generated = sum(_rate(before, after) for before, after in pairs)
    prompts = sum((after.prompt_tokens - before.prompt_tokens) / (after.at - before.at) for before, after in pairs)
    return Window(seconds=seconds, generated=generated * seconds, prompts=prompts * seconds)


def _rate(first: EngineSample, last: EngineSample) -> float:
    return (last.generation_tokens - first.generation_tokens) / (last.at - first.at)


def pooled(recordings: Sequence[Recording]) -> Recording:
    """What all loads saw together. They run on one thread, so the share of its core that each noted is that of all."""
    if len(recordings) == 1:
        return recordings[0]
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


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0

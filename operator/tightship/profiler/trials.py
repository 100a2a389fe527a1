"""Packing trials: which pairs of batch and replicas are run together on the device, in which order, until when.

Engines are started once for as many pairs as they can serve, and only as many as the next pair needs, so that a small budget still
yields a first trial; pairs then differ in nothing but which engines are loaded and with how much. An engine that does not start
beside others is started once more before so many are ruled out. What must hold: a trial is kept as soon as it is measured, and never
made twice, unless that is asked for since it left a statistic open, and then the better measured one stays; no figure is kept that
was not measured with all its engines loaded and proven to share the device; whatever fails is kept as a trial without figures, so that
the pair isn't advised as an estimate later, costs one pair (or those with as many engines), and never the profile; at the end no
engine and no daemon is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from tightship.api.units import format_quantity, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.advisor import Question
from tightship.core.curve import Confirmation, Curve, Metric, Objective, Statistic
from tightship.core.trials import next_trial, trial_order
from tightship.profiler import confirm, points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings
from tightship.profiler.errors import BudgetSpentError, EngineError, LoadError, UnansweredError
from tightship.profiler.fleet import DoesNotFitError, Fleet, NotStartedError, Pair, Sizes, packed_settings
from tightship.profiler.gpu import Device, DeviceError
from tightship.profiler.lengths import Lengths
from tightship.profiler.load import ClosedLoop
from tightship.profiler.packed import LateLoadError, PackedMeter
from tightship.profiler.sharing import Sharing, SharingError
from tightship.profiler.windows import WINDOWS_LEAST, warmup_seconds, window_seconds

log = logging.getLogger(__name__)

TRIAL_SECONDS: Final = 30.0
"""Longer than a level of the sweep: starting the engines cost more, and neighbours in turn make the total less even."""
SETTLE_SECONDS: Final = 2.0
QUIET_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.1
MOST_REPLICAS: Final = 24
"""The API's most: a vLLM is two of the 48 clients that MPS takes before CUDA 13.1."""
RECOVERIES: Final = 1
"""How often engines and sharing are started anew after an engine died under load."""


@dataclass(frozen=True)
class Choice:
    """What to try next; None when nothing is worth it any more, and why."""

    pair: Pair | None
    reason: str


class Agenda(Protocol):
    """Which pairs to try."""

    def next(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Choice:
        """The next pair after those tried and those that could not be."""

    def wanted(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Sequence[Pair]:
        """All pairs that may still come, to start engines for."""


@dataclass(frozen=True)
class Predicted:
    """Pairs in predicted order, until none can beat the best (`tightship.core.trials`)."""

    curve: Curve
    objectives: tuple[Objective, ...]
    sizes: Sizes
    max_replicas: int
    minimum_gain: float
    efficiency_floor: float
    dedicated: bool
    confirmation: Confirmation | None = None

    def next(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Choice:
        """The pair that promises most."""
        step = next_trial(self._question(trials, failed))
        return Choice(step.pair, step.reason)

    def wanted(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Sequence[Pair]:
        """Those still worth a trial."""
        return [one.pair for one in trial_order(self._question(trials, failed))]

    def _question(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Question:
        return Question(
            self.curve,
            self.objectives,
            efficiency_floor=self.efficiency_floor,
            ledger=self.sizes.ledger,
            reserve=self.sizes.reserve,
            max_replicas=self.max_replicas,
            minimum_gain=self.minimum_gain,
            dedicated=self.dedicated,
            trials=tuple(points.trial(trial) for trial in trials.values()),
            failed=frozenset(failed),
            confirmation=self.confirmation,
        )


@dataclass(frozen=True)
class Given:
    """The pairs somebody asked for, in that order, and after them those of another agenda."""

    pairs: tuple[Pair, ...]
    then: Agenda | None = None

    def next(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Choice:
        """The first that is left."""
        left = self._left(trials, failed)
        if left:
            return Choice(left[0], "asked for")
        return Choice(None, "all that was asked for") if self.then is None else self.then.next(trials, failed)

    def wanted(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> Sequence[Pair]:
        """Those that are left, and the others."""
        return [*self._left(trials, failed), *(self.then.wanted(trials, failed) if self.then is not None else ())]

    def _left(self, trials: Mapping[Pair, api.Trial], failed: Collection[Pair]) -> list[Pair]:
        return [pair for pair in self.pairs if pair not in trials and pair not in failed]


@dataclass(frozen=True)
class Bench:
    """What trials are made with, and where they go."""

    settings: EngineSettings
    """The sweep's engine."""
    info: EngineInfo
    """What it decided for itself."""
    sizes: Sizes
    lengths: Lengths
    steps_needed: int
    """Engine steps behind the objective's statistic; 0 for means."""
    launch: Callable[[EngineSettings], Awaitable[Engine]]
    """Start an engine and return it healthy, or raise EngineError; asyncio.TimeoutError when the budget is spent first."""
    load: Callable[[Engine, int], ClosedLoop]
    """A load for an engine; each number gives another."""
    device: Device
    clock: Clock
    sharing: Sharing
    left: Callable[[], float]
    """Seconds left of the budget."""
    progress: Callable[[Pair, str], None]
    keep: Callable[[api.Trial], None]
    """Called with each trial, at once."""
    idle: int
    """Bytes of the device in use before the profile's first engine."""
    too_many: Callable[[int], str | None] = lambda requests: None
    """Why so many requests can't be in flight at once; None where they can."""
    start_cost: float = 0.0
    """Seconds an engine takes to start, as far as known."""
    first_tokens_needed: int = 0
    """First tokens behind the objective's statistic, where it is of the time to them; 0 where none is."""


@dataclass
class Verdict:
    """How the trials ended."""

    notes: list[str] = field(default_factory=list)
    exceeded: bool = False
    """Whether the budget cut them."""


class Trials:
    """Makes the trials of one profile."""

    def __init__(
        self,
        bench: Bench,
        agenda: Agenda,
        trials: MutableMapping[Pair, api.Trial],
        again: Collection[Pair] = (),
    ) -> None:
        """Trials beside those there are.

        Args:
            bench: what they are made with.
            agenda: which ones.
            trials: those there are, without figures where they could not be made; new ones are added to it.
            again: those of them that count as not made.
        """
        self._bench = bench
        self._agenda = agenda
        self._trials = trials
        self._again = set(again)
        self._failed: set[Pair] = {
            pair for pair, trial in trials.items() if not points.has_figures(trial)
        } - self._again
        self._late: set[Pair] = set()
        self._not_started: set[int] = set()
        """The engines, by their number, that once did not start."""
        self._fleet: Fleet | None = None
        self._open = False
        self._recoveries = 0
        self._start_cost = bench.start_cost
        self._itl = 0.02
        self._verdict = Verdict()

    async def run(self) -> Verdict:
        """Try pairs until the agenda is done or the budget spent; nothing of what fails is raised."""
        try:
            reason = await self._run()
        finally:
            await self._stop()
        self._verdict.notes.append(f"{self._summary()}: {reason}")
        return self._verdict

    async def _run(self) -> str:
        while True:
            choice = self._agenda.next(self._done, self._failed)
            if choice.pair is None:
                return choice.reason
            batch, replicas = choice.pair
            need = self._seconds_needed(choice.pair)
            if self._bench.left() < need:
                return self._cut(
                    f"{replicas} x {batch} takes {need:.0f} s, {max(0.0, self._bench.left()):.0f} s were left"
                )
            ended = await self._attempt(choice.pair)
            if ended is not None:
                return ended

    async def _attempt(self, pair: Pair) -> str | None:
        """Try one pair; returns why nothing else should be tried, if so."""
        batch, replicas = pair
        if not self._bench.sizes.fits(pair):
            self._fail(pair, self._bench.sizes.misfit(pair))
            return None
        why = self._bench.too_many(batch * replicas)
        if why is not None:
            self._fail(pair, why)
            return None
        try:
            engines = await self._prepare(pair)
            if not await self._measure(pair, engines):
                return self._cut(f"it was spent in the trial of {replicas} x {batch}")
        except BudgetSpentError as error:
            return self._cut(str(error))
        except SharingError as error:
            return str(error)
        except NotStartedError as error:
            await self._not_up(pair, error)
        except DoesNotFitError as error:
            self._give_up(pair, error)
        except LateLoadError as error:
            if pair in self._late:
                self._fail(pair, str(error))
            self._late.add(pair)  # once may be the machine's hiccup, as with a level of the sweep
        except LoadError as error:
            self._fail(pair, str(error))
        except DeviceError as error:
            self._fail(pair, str(error))
            return str(error)
        except EngineError as error:
            return await self._recover(pair, error)
        return None

    async def _prepare(self, pair: Pair) -> list[Engine]:
        """Engines for a pair: those that run if they can serve it, else a new group of them."""
        bench, (batch, replicas) = self._bench, pair
        bench.progress(pair, f"starting engines for {replicas} replicas of batch {batch}")
        if self._fleet is not None and not bench.sizes.serves(self._fleet.group, pair):
            fleet, self._fleet = self._fleet, None
            await fleet.stop()
        if not self._open:
            self._open = True
            await bench.sharing.open()
        if self._fleet is None:
            # What ran before, the confirmation run's engine at first, may have ended a moment before its memory is free.
            await confirm.released(bench.device, bench.clock, bench.idle)
            group = bench.sizes.group(pair, self._agenda.wanted(self._done, self._failed))
            settings = packed_settings(bench.settings, bench.info, group, bench.device)
            self._fleet = Fleet(group, settings, launch=self._launch, device=bench.device, sharing=bench.sharing)
        return await self._fleet.grow(replicas)

    async def _launch(self, settings: EngineSettings) -> Engine:
        began = self._bench.clock.now()
        try:
            engine = await self._bench.launch(settings)
        except asyncio.TimeoutError:
            raise BudgetSpentError(
                f"an engine was still starting after {self._bench.clock.now() - began:.0f} s"
            ) from None
        self._start_cost = max(self._start_cost, self._bench.clock.now() - began)
        return engine

    async def _measure(self, pair: Pair, engines: Sequence[Engine]) -> bool:
        """Measure a pair and keep it; False when the budget ended first."""
        assert self._fleet is not None
        bench, (batch, replicas) = self._bench, pair
        bench.progress(pair, f"measuring {replicas} replicas of batch {batch} together")
        await self._quiet(self._fleet.engines)
        loads = [bench.load(engine, number) for number, engine in enumerate(engines)]
        try:
            meter = PackedMeter(
                engines,
                loads,
                bench.device,
                bench.clock,
                input_per_output=bench.lengths.mean_input / bench.lengths.mean_output,
                mean_output=bench.lengths.mean_output,
                steps_needed=bench.steps_needed,
                first_tokens_needed=bench.first_tokens_needed,
                itl=self._itl,
                idle=self._fleet.idle,
            )
            reading = await meter.measure(batch, TRIAL_SECONDS, self._bench.left())
        except UnansweredError as error:
            raise error.with_words(_words(engines)) from error
        finally:
            for load in loads:
                await load.close()
        if reading is None:
            return False
        self._itl = reading.itl
        doubts = "; ".join(filter(None, (bench.sharing.doubt(replicas), reading.trial.message)))
        # Idle neighbours took their part of what was read: no more than a loaded engine, so this is no more than those loaded took.
        taken = parse_quantity(reading.trial.memory or "0") * replicas // len(self._fleet.engines)
        trial = reading.trial.model_copy(
            update={
                "memory": format_quantity(taken),
                "kv_cache": format_quantity(self._fleet.group.kv_bytes),
                "message": doubts[:1024] or None,
            }
        )
        self._trials[pair] = better(trial, self._trials.get(pair))
        self._again.discard(pair)
        bench.keep(trial)
        log.info(
            "%d x %d: %.1f tokens/s together +- %.1f %%, ITL %.2f ms",
            replicas,
            batch,
            reading.throughput,
            100 * reading.half_width,
            1000 * reading.itl,
        )
        return True

    async def _quiet(self, engines: Sequence[Engine]) -> None:
        """Wait, at most 10 s, until what an earlier load left in the engines is gone: idle neighbours must be idle."""
        deadline = self._bench.clock.now() + QUIET_SECONDS
        for engine in engines:
            while self._bench.clock.now() < deadline:
                sample = await engine.sample()
                if not sample.running and not sample.waiting:
                    break
                await self._bench.clock.sleep(POLL_SECONDS)

    async def _not_up(self, pair: Pair, error: NotStartedError) -> None:
        """An engine did not start: once more, if the budget has the time, then nothing with as many is tried."""
        if error.replicas in self._not_started:
            self._give_up(pair, error)
            return
        self._not_started.add(error.replicas)
        self._note(f"{error}, at the first try")
        running = 0 if self._fleet is None else len(self._fleet.engines) * self._fleet.group.need
        await confirm.released(self._bench.device, self._bench.clock, self._bench.idle + running)

    def _give_up(self, pair: Pair, error: DoesNotFitError) -> None:
        """Nothing with as many engines is tried again; those that run serve the rest."""
        wanted = {*self._agenda.wanted(self._done, self._failed), pair}
        text = f"no trial with {error.replicas} replicas or more: {error}"
        for batch, count in sorted(wanted):
            if count >= error.replicas > 1:  # an engine that doesn't start alone says nothing of packing
                self._record((batch, count), text)
        batches = {*self._bench.sizes.batches, *(batch for batch, _ in wanted)}
        self._failed |= {(batch, count) for batch in batches for count in range(error.replicas, MOST_REPLICAS + 1)}
        self._note(text)

    def _fail(self, pair: Pair, why: str) -> None:
        self._failed.add(pair)
        text = f"the trial of {pair[1]} x {pair[0]} failed: {why}"
        self._record(pair, text)
        self._note(text)

    def _record(self, pair: Pair, why: str) -> None:
        """Keep that a pair could not be tried; what was measured of it before stands."""
        if pair not in self._measured:
            self._trials[pair] = api.Trial(batch=pair[0], replicas=pair[1], message=why[:1024])
        self._again.discard(pair)
        self._bench.progress(pair, why)

    @property
    def _measured(self) -> Mapping[Pair, api.Trial]:
        """The trials that have figures."""
        return {pair: trial for pair, trial in self._trials.items() if points.has_figures(trial)}

    @property
    def _done(self) -> Mapping[Pair, api.Trial]:
        """Those of them that are not to be made again."""
        return {pair: trial for pair, trial in self._measured.items() if pair not in self._again}

    async def _recover(self, pair: Pair, error: EngineError) -> str | None:
        """An engine died under load, perhaps all of them: start anew, once."""
        condition = None
        with contextlib.suppress(SharingError):
            condition = await self._bench.sharing.condition()
        self._fail(pair, f"{condition}; {error}" if condition else str(error))
        await self._stop()
        if self._recoveries == RECOVERIES:
            return "engines died under load again"
        self._recoveries += 1
        return None

    async def _stop(self) -> None:
        """Engines first, then what they share the device by."""
        fleet, self._fleet = self._fleet, None
        opened, self._open = self._open, False
        try:
            if fleet is not None:
                await fleet.stop()
        finally:
            if opened:
                await self._bench.sharing.close()

    def _seconds_needed(self, pair: Pair) -> float:
        """The least time that a trial of a pair takes: engines it lacks, and five windows."""
        running = 0
        if self._fleet is not None and self._bench.sizes.serves(self._fleet.group, pair):
            running = len(self._fleet.engines)
        measuring = SETTLE_SECONDS + warmup_seconds(self._itl) + WINDOWS_LEAST * window_seconds(pair[0], self._itl)
        return max(0, pair[1] - running) * self._start_cost + measuring

    def _cut(self, why: str) -> str:
        self._verdict.exceeded = True
        return f"the budget ended the trials ({why})"

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self._verdict.notes.append(text[:500])

    def _summary(self) -> str:
        made = self._measured
        if not made:
            return "no packing was tried"
        best = max(made.values(), key=lambda trial: (_total(trial), -trial.batch))
        count = f"{len(made)} packing{'s were' if len(made) > 1 else ' was'} tried"
        return f"{count}, the fastest {best.replicas} x {best.batch} with {_total(best):.0f} tokens/s"


def _words(engines: Sequence[Engine]) -> str:
    """The last words of each engine that said something."""
    said = ((number, engine.last_words()) for number, engine in enumerate(engines, start=1))
    return " | ".join(f"engine {number}: {words[:500]}" for number, words in said if words)


def better(new: api.Trial, old: api.Trial | None) -> api.Trial:
    """Of two trials of one pair the one that knows more statistics, then the more precise one."""
    if old is None or not points.has_figures(old):
        return new
    return min(new, old, key=lambda trial: (_unknown(trial), float(trial.half_width or 1)))


def _unknown(trial: api.Trial) -> int:
    """Statistics of both latencies that a trial did not resolve, or has nothing of."""
    read = points.trial(trial)
    return sum(read.latency(metric, statistic) is None for metric in Metric for statistic in Statistic)


def _total(trial: api.Trial) -> float:
    """Tokens per second of all replicas."""
    return float(trial.total_tokens_per_second or trial.output_tokens_per_second or 0)

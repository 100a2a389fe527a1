"""The sweep: one engine start, the ladder and its bisection, and the engine's default batch as the baseline.

What must hold: no batch is measured twice, but for a level at which the load ran late or the engine failed: that one gets a second chance,
and when it comes to nothing again there is no point, only a word on why. Where the load was late, there is one more try once it has driven a
larger batch. A finished point is saved at once. An engine that fails is started once more. One that fails again at the same batch ends the ladder
below it (or leaves that batch out, where a larger one was measured), and the sweep has not failed: what was measured is worth a confirmation run,
and a last engine may refine it first. One that fails again elsewhere is a failing engine: what it leaves is a curve all the same where there are
points enough, and the outcome names the sweep as unfinished.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, replace
from typing import Final

from tightship.api.units import parse_duration
from tightship.core.curve import Metric, Statistic
from tightship.profiler import confirm
from tightship.profiler.budget import LEVEL_MOST
from tightship.profiler.engine import Engine
from tightship.profiler.errors import BudgetSpentError, EngineError, LoadError, UnansweredError
from tightship.profiler.ladder import Goals, Noise, Step, next_batch, rungs
from tightship.profiler.meter import Meter, Reading, precision_asked
from tightship.profiler.points import throughput
from tightship.profiler.session import RESTARTS, Session

log = logging.getLogger(__name__)

BISECTION_LEVELS: Final = 3
"""Levels of a bisection between two rungs, from 64 on: to an eighth of the lower."""
CHANCES: Final = 2
"""Measurements of a level at which the load runs late, before it counts as one that can't be driven."""
CURVE_LEAST: Final = 4
"""Points from which on a curve is worth keeping, though an engine that fails ended it: one, two, four and eight requests, say."""


@dataclass(frozen=True)
class Ended:
    """How the sweep ended."""

    reason: str
    exceeded: bool = False
    """Whether the budget ended it."""


class Sweep:
    """Measures the curve and the baseline."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._undriven: dict[int, str] = {}
        """What was said of the batches that have no point for want of a load, or of an engine, that took them."""
        self._late: set[int] = set()
        """Those of them for which the load ran late: what the machine does besides may be over by the next attempt."""
        self._forgiven: set[int] = set()
        """Batches that were undriven, and got another chance since a larger one could be driven."""
        self._top = session.job.settings.max_num_seqs
        self._ladder_top = self._top
        self._failed: str | None = None
        """Why the engine ended the ladder, where it did."""
        self._at: int | None = None
        """The batch that is being measured."""

    async def run(self) -> Ended:
        """Measure what is still missing.

        Raises:
            EngineError: the engine did not start, or failed twice and left too few points.
            LoadError: the engine refuses the load's requests.
        """
        ended = await self._run()
        if self._late.intersection(self._undriven):
            self._session.leave("Sweep")
        return ended

    async def _run(self) -> Ended:
        session = self._session
        step = self._next()
        if step.batch is None and session.report.baseline is not None and session.info.kv_bytes is not None:
            return Ended(step.reason)
        failed_at: list[int | None] = []
        while True:
            session.progress("Starting", None, "starting the sweep's engine")
            try:
                with session.cost.in_phase("sweep"):
                    return await self._on_an_engine()
            except EngineError as error:
                if session.budget.left <= 0:
                    return Ended(f"the budget of {session.budget.seconds:.0f} s was spent: {error}", exceeded=True)
                failed_at.append(self._at)
                if len(failed_at) <= RESTARTS:
                    session.note(f"the engine was restarted once: {error}"[:500])
                elif self._failed is not None:
                    session.note(f"the engine failed once more: {error}"[:500])
                    return Ended(self._failed)
                elif self._at is None or set(failed_at) != {self._at}:
                    if len(session.report.points) < CURVE_LEAST:
                        raise
                    session.leave("Sweep")
                    return Ended(f"the engine failed again after {len(session.report.points)} points: {error}")
                elif not session.report.points:
                    raise
                else:
                    self._leave_out(self._at, error)
                    step = self._next()
                    if step.batch is None:
                        return Ended(self._failed or step.reason)

    def _leave_out(self, batch: int, error: EngineError) -> None:
        """Leave out a batch that ended the engine twice, and those above it, unless one of them was measured."""
        self._undriven[batch] = f"at batch {batch}: {error}"[:1000]
        self._late.discard(batch)
        said = f"batch {batch} ended the engine twice"
        larger = [each for each in self._session.report.points if each > batch]
        if larger:
            self._session.note(f"{said} and has no point, though batch {min(larger)} has one")
        else:
            self._failed = f"{said}: neither it nor larger ones were measured"
            self._ladder_top = max((rung for rung in rungs(self._top) if rung < batch), default=1)
        self._session.note(self._undriven[batch])

    async def _on_an_engine(self) -> Ended:
        session = self._session
        engine = await self._launch()
        try:
            session.describe(engine.info)
            load = session.load(engine)
            try:
                return await self._loaded(engine, session.meter(engine, load))
            except UnansweredError as error:
                raise error.with_words(engine.last_words()) from error
            finally:
                await load.close()
        finally:
            await engine.stop()

    async def _launch(self) -> Engine:
        session, self._at = self._session, None
        await confirm.released(session.device, session.clock, session.idle)  # or it may find too little free to start
        try:
            return await session.launch(session.job.settings)
        except asyncio.TimeoutError:
            raise EngineError("the engine, which had to be started again, was still starting") from None

    async def _loaded(self, engine: Engine, meter: Meter) -> Ended:
        ended = await self._climb(meter)
        self._at = None
        if self._session.report.points and await self._baseline(engine, meter):
            return replace(ended, exceeded=True)
        return ended

    def _next(self) -> Step:
        curve = self._session.curve()
        widths = {batch: float(point.half_width or 0) for batch, point in self._session.report.points.items()}
        noise = Noise(widths, self._undriven)
        return next_batch(curve.points if curve else [], self._ladder_top, self._goals(), noise)

    def _goals(self) -> Goals:
        job, kv_tokens = self._session.job, self._session.info.kv_tokens
        return Goals(
            objectives=job.objectives,
            efficiency_floor=job.efficiency_floor,
            full_batch=int(kv_tokens / self._session.load_context.mean) if kv_tokens else None,
        )

    async def _climb(self, meter: Meter) -> Ended:
        budget = self._session.budget
        while True:
            step = self._next()
            if step.batch is None:
                return Ended(self._failed or step.reason)
            log.info("batch %d next: %s", step.batch, step.reason)
            if budget.for_sweep < meter.least_seconds(step.batch) or not await self._level(meter, step.batch):
                return Ended(self._spent(step.batch), exceeded=True)

    async def _level(self, meter: Meter, batch: int) -> bool:
        """Measure one level and report it, or find that it can't be driven; False when the budget ended it."""
        session, budget = self._session, self._session.budget
        refused = session.too_many(batch)
        if refused is not None:
            self._undriven[batch] = f"batch {batch} has no point: {refused}"
            session.note(self._undriven[batch])
            return True
        self._at = batch
        session.progress("Sweeping", batch, f"measuring batch {batch}")
        most = math.inf if session.steps_needed else LEVEL_MOST
        for _ in range(CHANCES):
            reading = await meter.measure(
                batch,
                budget.for_level(self._levels_left(batch), most),
                budget.for_sweep,
                session.lengths.mean_output,
                lower=self._lower(batch),
            )
            if reading is None:
                session.tell_silence(meter, f"batch {batch}")
                return False
            if reading.undriven is None:
                self._take(reading)
                return True
            why = undriven(reading)
        self._undriven[batch] = why
        self._late.add(batch)
        session.note(why)
        return True

    def _lower(self, batch: int) -> float | None:
        """T of half the batch, where this one is only on the way up; None where something may be decided by it.

        That is a batch between two rungs, the largest one (the baseline's), one that may fill the KV cache, and one near the efficiency
        floor. A bound on the mean time between tokens is the meter's to watch; of the tail of a latency, and of the time to first token, a
        throughput says too little.
        """
        points, job, full = self._session.report.points, self._session.job, self._goals().full_batch
        half = points.get(batch // 2)
        watched = all(
            one.metric is Metric.INTER_TOKEN_LATENCY and one.statistic is Statistic.MEAN for one in job.objectives
        )
        on_the_way = batch.bit_count() == 1 and batch < self._top and not (full and 2 * batch > full)
        if half is None or not watched or not on_the_way:
            return None
        below, single = throughput(half), throughput(points[1]) if 1 in points else None
        if below and single and 0.4 * below / (batch // 2 * single) <= job.efficiency_floor:
            return None
        return below

    def _levels_left(self, batch: int) -> int:
        """Levels still possible, this one included."""
        points = self._session.report.points
        above = sum(1 for rung in rungs(self._top) if rung >= batch and rung not in points)
        return BISECTION_LEVELS + above if above else BISECTION_LEVELS

    def _take(self, reading: Reading) -> None:
        session, point = self._session, reading.point
        session.report.points[point.batch] = point
        self._forgive(point.batch)
        for note in reading.notes:
            session.note(note)
        session.progress("Sweeping", point.batch, f"batch {point.batch}: {reading.throughput:.0f} tokens/s")
        log.info(
            "batch %d: T %.1f tokens/s +- %.1f %%, ITL %.2f ms, %s running, %s preemptions, window %s",
            point.batch,
            reading.throughput,
            100 * reading.half_width,
            1000 * reading.itl,
            point.running_mean,
            point.preemptions,
            point.window,
        )

    def _forgive(self, driven: int) -> None:
        """Let late batches below one that was driven be tried again, once: the machine was busy, and T(1) is what efficiency rests on."""
        late = self._late.intersection(self._undriven)
        for batch in sorted(each for each in late if each < driven and each not in self._forgiven):
            self._session.withdraw(self._undriven.pop(batch))
            self._forgiven.add(batch)

    def imprecise(self) -> str | None:
        """The batches whose throughput is known less well than was asked when their time was over, with the figures; None without any."""
        found = []
        for batch, point in sorted(self._session.report.points.items()):
            width, total, itl = float(point.half_width or 0), throughput(point), point.inter_token_latency
            step = parse_duration(itl.mean) if itl is not None and itl.mean else 0.0
            asked = precision_asked(total or 0.0, step, lower=self._lower(batch), itl_most=self._session.itl_most)
            if width > asked:
                found.append(f"{batch} to {width:.1%} (asked {asked:.0%})")
        if not found:
            return None
        return f"throughput is known less well than it should be at batch {', '.join(found)}: raise profiling.budget"

    def _spent(self, batch: int) -> str:
        return (
            f"the budget of {self._session.budget.seconds:.0f} s was spent before batch {batch}: "
            f"{len(self._session.report.points)} points measured"
        )

    # --- the baseline ---

    async def _baseline(self, engine: Engine, meter: Meter) -> bool:
        """The engine at its own default batch; what keeps it from being measured is said, and costs nothing else.

        Returns whether it was the budget.
        """
        session = self._session
        if session.report.baseline is None:
            session.report.baseline = session.report.points.get(self._top)
        if session.report.baseline is not None:
            session.report.save()
            return False
        with session.cost.in_phase("baseline"):
            try:
                await self._saturate(meter)
            except UnansweredError as error:
                session.note(f"no baseline: {error.with_words(engine.last_words())}"[:1000])
            except (EngineError, LoadError) as error:
                session.note(f"no baseline: {error}"[:1000])
            except BudgetSpentError as error:
                session.note(f"no baseline: {error}")
                return True
        return False

    async def _saturate(self, meter: Meter) -> None:
        """One level at the engine's largest batch.

        Raises:
            BudgetSpentError, EngineError, LoadError: why there is none.
        """
        session, budget = self._session, self._session.budget
        if self._ladder_top < self._top:
            raise EngineError(f"{self._failed}")
        refused = session.too_many(self._top)
        if refused is not None:
            raise LoadError(refused)
        if self._top in self._undriven:
            if self._top in self._late:
                session.leave("Baseline")
            raise LoadError(f"the load could not drive batch {self._top}")
        if budget.for_baseline < meter.least_seconds(self._top):
            raise BudgetSpentError(f"no time was left for batch {self._top} ({max(0.0, budget.for_baseline):.0f} s)")
        session.progress("Baseline", self._top, f"measuring batch {self._top}, the engine's own")
        for _ in range(CHANCES):
            reading = await meter.measure(
                self._top, min(LEVEL_MOST, budget.for_baseline), budget.for_baseline, session.lengths.mean_output
            )
            if reading is None:
                session.tell_silence(meter, f"batch {self._top}")
                raise BudgetSpentError(f"the budget ended it at batch {self._top}")
            if reading.undriven is None:
                session.report.baseline = reading.point
                session.progress("Baseline", self._top, f"batch {self._top}: {reading.throughput:.0f} tokens/s")
                return
            why = undriven(reading)
        session.leave("Baseline")
        raise LoadError(why)


def undriven(reading: Reading) -> str:
    """That a batch could not be driven, and by how much."""
    return f"the load could not drive batch {reading.point.batch}, which has no point: {reading.undriven}"

"""The confirmation run, in order: start a replica at the advised batch, its worst step, B requests at once, then random arrivals.

Each part is reported as soon as it is done, so that the end of the budget cuts only what comes after; an attempt that finds
memory and comparison done goes on with the arrivals.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from tightship.api.units import parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.advisor import advise
from tightship.core.curve import Curve
from tightship.profiler import arrivals, confirm
from tightship.profiler.budget import ARRIVALS_LEAST, CONFIRM_LEAST
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine
from tightship.profiler.errors import EngineError, OutOfMemory, UnansweredError
from tightship.profiler.gpu import GIB
from tightship.profiler.meter import Reading
from tightship.profiler.session import RESTARTS, Session
from tightship.profiler.sweep import CHANCES, CURVE_LEAST, undriven

log = logging.getLogger(__name__)

WORST_STEP_SECONDS: Final = 600.0
LEVEL_SECONDS: Final = 15.0
DEFAULT_TOKEN_BUDGET: Final = 2048
EMPTY_SECONDS: Final = 5.0
EMPTY_POLL: Final = 0.05
_ARRIVALS_SEED: Final = 1_000
_NO_ARRIVALS: Final = (
    f"arrivals at random were left out: less than {ARRIVALS_LEAST:.0f} s of the budget were left for them, so how "
    "many requests a second a replica sustains is not known"
)


def advised_batch(session: Session, curve: Curve) -> int:
    """The batch the objectives ask of one replica; where none meets them, the best without them."""
    for objectives in (session.job.objectives, ()):
        answer = advise(curve, objectives, efficiency_floor=session.job.efficiency_floor, max_replicas=1)
        if answer.batch is not None:
            return answer.batch
    return max(curve.points, key=lambda point: (point.throughput, -point.batch)).batch


class ConfirmationRun:
    """Runs the advised batch as a replica would."""

    def __init__(self, session: Session, curve: Curve) -> None:
        self._session = session
        self._curve = curve
        self._batch = advised_batch(session, curve)
        self._cut: str | None = None

    async def run(self) -> str | None:
        """Confirm within what is left of the budget; returns what was cut.

        Raises:
            EngineError: the engine failed twice, and what was measured before is too little to advise from, or the cause was memory.
        """
        if self._done and self._arrived:
            return None
        budget = self._session.budget
        if budget.left < budget.start_cost + CONFIRM_LEAST:
            return (
                _NO_ARRIVALS
                if self._done
                else f"no time was left for the confirmation run ({budget.left:.0f} s): the memory of a replica is unknown"
            )
        try:
            with self._session.cost.in_phase("confirmation"):
                await budget.bound(self._or_again())
        except asyncio.TimeoutError:
            return "the confirmation run was cut at the end of the budget"
        return self._cut

    @property
    def _done(self) -> bool:
        """Whether memory and comparison are there, for this batch."""
        memory = self._session.report.memory
        return memory is not None and memory.confirmed_batch == self._batch and self._compared

    @property
    def _compared(self) -> bool:
        confirmation = self._session.report.confirmation
        return confirmation is not None and confirmation.batch == self._batch

    @property
    def _arrived(self) -> bool:
        confirmation = self._session.report.confirmation
        return confirmation is not None and confirmation.arrivals is not None

    async def _or_again(self) -> None:
        """Confirm; an engine that fails is given one more chance, since without it all that was measured serves little."""
        for restart in range(RESTARTS + 1):
            try:
                return await self._confirm()
            except EngineError as error:
                if restart == RESTARTS and self._done:
                    # Memory and comparison are there, and packings can be tried: only how it queues is not known.
                    self._session.leave("Arrivals")
                    self._session.note(f"no random arrivals: {error}"[:1000])
                    return None
                if restart == RESTARTS:
                    measured = len(self._session.report.points)
                    text = f"{measured} batches were measured, but running as a replica would failed: {error}"
                    if measured < CURVE_LEAST or isinstance(
                        error, OutOfMemory
                    ):  # a replica that doesn't fit is no advice
                        raise type(error)(text) from error
                    self._session.leave("Confirmation")
                    self._session.note(text[:2000])
                    return None
                self._session.note(f"the confirmation run was repeated: {error}"[:500])

    async def _confirm(self) -> None:
        session = self._session
        peak = session.report.points[self._batch].kv_cache_tokens_peak
        plan = confirm.plan_replica(self._batch, session.context, session.info, peak)
        settings = confirm.replica_settings(session.job.settings, session.info, plan)
        session.progress(
            "Confirming",
            self._batch,
            f"running batch {self._batch} as a replica would, with {plan.kv_tokens} tokens of KV cache",
        )
        before = await confirm.released(session.device, session.clock, session.idle)
        if before <= session.idle + confirm.RELEASE_SLACK:
            before = min(
                before, session.idle
            )  # what may still go when the replica's memory is read must not hide any of it
        engine = await session.launch(settings)
        try:
            if not self._done:
                await self._alone(engine, plan, before)
            if self._compared and not self._arrived:
                await self._arrivals(engine)
        except UnansweredError as error:
            raise error.with_words(engine.last_words()) from error
        finally:
            await engine.stop()

    # --- memory, and the same load as in the sweep ---

    async def _alone(self, engine: Engine, plan: confirm.ReplicaPlan, before: int) -> None:
        session = self._session
        async with confirm.MemoryWatch(session.device, session.clock) as watch:
            tokens = engine.info.max_num_batched_tokens or session.info.max_num_batched_tokens or DEFAULT_TOKEN_BUDGET
            prompts = confirm.make_prompts(session.vocabulary(), session.job.seed)
            await confirm.worst_step(engine, plan, tokens, prompts, WORST_STEP_SECONDS)
            self._ledger(plan, before, watch.peak)  # at once: the budget may cut what follows
            reading = await self._level(engine)
        why = self._ledger(plan, before, watch.peak)
        if why is not None:
            session.note(f"the memory of a replica is unknown: {why}")
        if reading is None:
            return
        if reading.undriven is not None:
            session.leave("Confirmation")
            session.note(f"confirmation run: {undriven(reading)}")
            return
        compared = confirm.compare(reading, session.report.points[self._batch], plan)
        session.report.confirmation = compared
        session.progress(
            "Confirming", self._batch, f"batch {self._batch} as a replica: {reading.throughput:.0f} tokens/s"
        )
        if compared.message:
            session.note(f"confirmation run at batch {self._batch}: {compared.message}")

    def _ledger(self, plan: confirm.ReplicaPlan, before: int, peak: int) -> str | None:
        """Report what a replica takes; returns why that can't be said, where what was read is impossible."""
        session = self._session
        identity, replica = session.device.identity, max(0, peak - before)
        # On CPUs pages that were never written are not resident: there a replica may well take less.
        why = confirm.implausible(plan, before, peak) if identity.kind != "cpu" else None
        if why is not None:
            return why
        session.report.memory = confirm.ledger(plan, identity.memory, replica)
        session.progress("Confirming", plan.batch, f"a replica of batch {plan.batch} takes {replica / GIB:.2f} GiB")
        return None

    async def _level(self, engine: Engine) -> Reading | None:
        """B requests at once; measured once more if the load runs late."""
        session = self._session
        load = session.load(engine)
        try:
            meter = session.meter(engine, load)
            for _ in range(CHANCES):
                seconds = min(LEVEL_SECONDS, session.budget.left / 2)
                reading = await meter.measure(self._batch, seconds, session.budget.left, session.lengths.mean_output)
                if reading is None or reading.undriven is None:
                    break
            if reading is None:
                session.tell_silence(meter, f"confirmation run at batch {self._batch}")
            return reading
        finally:
            await load.close()

    # --- random arrivals ---

    async def _arrivals(self, engine: Engine) -> None:
        session, confirmation = self._session, self._session.report.confirmation
        assert confirmation is not None
        seconds = session.budget.for_arrivals
        if not seconds:
            self._cut = _NO_ARRIVALS
            return
        plan = self._plan(confirmation, seconds)
        session.progress(
            "Confirming", self._batch, f"{plan.rate:.2f} requests/s arriving at random for {seconds:.0f} s"
        )
        await _emptied(engine, session.clock)
        load = arrivals.OpenLoop(
            engine.channel(),
            session.lengths,
            session.prompts(_ARRIVALS_SEED),
            session.clock,
            session.job.seed + _ARRIVALS_SEED,
        )
        try:
            found, seen = await arrivals.offer(engine, load, session.clock, plan)
        finally:
            await load.close()
        overloaded = seen.overloaded(seen.itl.mean or math.inf)
        if overloaded is not None:
            session.leave("Arrivals")
            session.note(f"arrivals at random at batch {self._batch} could not be driven: {overloaded}")
            return
        self._report(confirmation, found)

    def _plan(self, confirmation: api.Confirmation, seconds: float) -> arrivals.Plan:
        """80 % of the capacity that the same engine has just shown."""
        lengths = self._session.lengths
        tokens = float(confirmation.total_tokens_per_second or 0)
        rate = arrivals.UTILIZATION * tokens / (lengths.mean_input + lengths.mean_output)
        in_flight = arrivals.busy(self._curve, self._batch, arrivals.UTILIZATION)
        return arrivals.Plan(rate=rate, in_flight=in_flight, seconds=seconds)

    def _report(self, confirmation: api.Confirmation, found: api.Arrivals) -> None:
        session = self._session
        doubts = [*([confirmation.message] if confirmation.message else []), *self._doubts(found)]
        session.report.confirmation = confirmation.model_copy(
            update={
                "arrivals": found,
                "sustainable_requests_per_second": arrivals.sustainable(found),
                "message": "; ".join(doubts)[:1024] or None,
            }
        )
        for doubt in self._doubts(found):
            session.note(f"confirmation run at batch {self._batch}: {doubt}")
        sustained = arrivals.sustainable(found)
        session.progress(
            "Confirming",
            self._batch,
            "random arrivals are done" if sustained is None else f"sustains {sustained} requests/s",
        )

    def _doubts(self, found: api.Arrivals) -> list[str]:
        """What random arrivals contradict or leave open: that the engine keeps up at 80 % of its capacity, and within the objectives."""
        doubts = []
        if found.sustained is None:
            doubts.append(
                f"whether {found.offered_requests_per_second} requests/s are sustained is not known: in {found.window} an engine that "
                "falls back would not be seen to, because requests are few or last long"
            )
        elif not found.sustained:
            doubts.append(
                f"the queue grew at {found.offered_requests_per_second} requests/s, 80 % of the capacity measured: "
                f"{found.requests_per_second} were finished"
            )
        for objective in self._session.job.objectives:
            shown = (
                found.inter_token_latency
                if objective.metric.value == "InterTokenLatency"
                else found.time_to_first_token
            )
            text = getattr(shown, objective.statistic.value, None)
            if text is not None and parse_duration(text) > objective.maximum:
                doubts.append(f"{objective} is {text} under random arrivals, above {1000 * objective.maximum:g}ms")
        return doubts


async def _emptied(engine: Engine, clock: Clock, timeout: float = EMPTY_SECONDS) -> None:
    """Wait until an engine whose clients have gone runs nothing, at most `timeout` seconds."""
    deadline = clock.now() + timeout
    while clock.now() < deadline:
        sample = await engine.sample()
        if sample.running + sample.waiting == 0:
            return
        await clock.sleep(EMPTY_POLL)
    log.warning("requests still run %.0f s after their clients have gone", timeout)

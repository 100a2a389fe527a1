"""One profile from beginning to end: sweep, baseline, confirmation run, packing trials, report.

What must hold: a point is reported as soon as it is measured and never measured twice; every engine is stopped; the budget is kept, but
for the seconds an engine takes to stop; the end is always an outcome, unless the profiler itself is stopped, and then what was measured
stays and the next attempt goes on from there. A profile that is finished and asked for more trials (`measurement.extend`) keeps
everything, its outcome too, until the trials are done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Literal, get_args

from tightship.api.units import format_quantity, parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Curve
from tightship.profiler import points
from tightship.profiler.budget import Budget
from tightship.profiler.clock import Clock
from tightship.profiler.confirmation import ConfirmationRun
from tightship.profiler.engine import Launcher
from tightship.profiler.errors import EngineError, LengthsError, LoadError, OutOfMemory
from tightship.profiler.gpu import Device
from tightship.profiler.job import Job, largest_batch, make_job
from tightship.profiler.packing import try_packings
from tightship.profiler.report import MESSAGE_MOST, Report, continued
from tightship.profiler.session import Session
from tightship.profiler.sharing import Sharing
from tightship.profiler.sweep import Ended, Sweep
from tightship.profiler.trials import Verdict

__all__ = ["Job", "Profiler", "largest_batch", "make_job"]

log = logging.getLogger(__name__)

State = Literal["Completed", "BudgetExceeded", "Failed"]


class Profiler:
    """Carries out one job; all that touches the world is handed in."""

    def __init__(
        self,
        job: Job,
        *,
        launcher: Launcher,
        device: Device,
        report: Report,
        clock: Clock,
        environ: Mapping[str, str],
        sharing: Sharing | None = None,
    ) -> None:
        """`sharing`: how engines of packing trials share the device; None where they can't, and then it is said."""
        self._job = job
        self._sharing = sharing
        self._report = report
        self._earlier = report.outcome
        self._session = Session(
            job,
            launcher=launcher,
            device=device,
            report=report,
            clock=clock,
            environ=environ,
            budget=self._make_budget(clock),
        )

    def _make_budget(self, clock: Clock) -> Budget:
        """The measurement's budget, or the extension's own; less what earlier attempts at the same spent."""
        job, told = self._job, self._report.progress
        if self._earlier is not None and job.extension is not None:
            begun = told is not None and told.extend == job.extension.request
            spent = parse_duration(told.elapsed or "0s") if told is not None and begun else 0.0
            packing = bool(self._earlier.unfinished) and job.max_replicas > 1
            return Budget(parse_duration(job.extension.budget), spent, clock, packing=packing)
        return Budget(job.budget, self._report.gpu_seconds, clock, packing=job.max_replicas > 1)

    async def run(self) -> api.Outcome:
        """Profile, or extend a profile that is finished, and report an outcome.

        Raises:
            ReportError: the API server refuses the reports.
        """
        beating = asyncio.get_running_loop().create_task(self._session.keep_account())
        try:
            outcome = await (self._measure() if self._earlier is None else self.extend(self._earlier))
        except asyncio.CancelledError:
            self._session.account()
            self._report.save()
            raise
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        self._report.outcome = outcome
        self._session.progress("Done", None, outcome.message or outcome.state)
        return outcome

    async def _measure(self) -> api.Outcome:
        self._describe()
        try:
            sweep = Sweep(self._session)
            ended = await sweep.run()
            curve = self._session.curve()
            if curve is None:
                return self._no_point(ended)
            return await self._conclude(ended, curve, sweep.imprecise())
        except OutOfMemory as error:
            return self._outcome("Failed", "InsufficientMemory", self._with_notes(str(error)))
        except (EngineError, LoadError, LengthsError) as error:
            return self._outcome("Failed", "EngineFailed", self._with_notes(str(error)))

    async def extend(self, earlier: api.Outcome) -> api.Outcome:
        """Do what was asked for after the measurement was done; what was measured stands, whatever becomes of that.

        What the measurement left unfinished is made up for first, and its outcome is a new one then, unless that fails.
        """
        if earlier.unfinished:
            made = await self._measure()
            if made.state != "Failed":
                return made
            said = [f"making up for what was not finished failed: {made.message}"]
        else:
            try:
                said = (await self._try_packings()).notes
            except (EngineError, LoadError) as error:
                said = [f"the trials asked for failed: {error}"]
        request = self._job.extension.request if self._job.extension is not None else None
        message = continued(earlier.message, "; ".join([*said, *self._session.notes]))
        return earlier.model_copy(update={"message": message or None, "extend": request})

    async def _conclude(self, ended: Ended, curve: Curve, imprecise: str | None) -> api.Outcome:
        """All that comes after the sweep."""
        cut = await ConfirmationRun(self._session, curve).run()
        packed = await self._try_packings()
        said = [ended.reason, *([cut] if cut else []), *packed.notes]
        said += [*([imprecise] if imprecise else []), *self._unresolved(), *self._go_on(), *self._session.lengths.notes]
        state: State = "BudgetExceeded" if ended.exceeded or cut or packed.exceeded else "Completed"
        return self._outcome(state, state, self._with_notes(*said))

    async def _try_packings(self) -> Verdict:
        """Try pairs of batch and replicas on the device, as far as the budget goes."""
        return await try_packings(self._session, self._sharing, asked_only=self._earlier is not None)

    # --- what is said ---

    def _describe(self) -> None:
        """Say what is measured on."""
        identity = self._session.device.identity
        self._report.gpu = api.ProfileGPU(
            product=identity.product,
            memory=format_quantity(identity.memory),
            uuid=identity.uuid,
            driver=identity.driver,
        )

    def _no_point(self, ended: Ended) -> api.Outcome:
        if not ended.exceeded:  # the load could drive no batch
            return self._outcome("Failed", "EngineFailed", self._with_notes(ended.reason))
        text = f"not one batch was measured within the budget of {self._job.budget:.0f} s ({ended.reason}): raise profiling.budget"
        return self._outcome("Failed", "NoPointInBudget", self._with_notes(text))

    def _unresolved(self) -> list[str]:
        """The objectives' statistics that are not known at some batches, each cause with what settles it."""
        said = []
        for objective in self._job.objectives:
            causes: dict[str, list[str]] = {}
            for batch, point in sorted(self._report.points.items()):
                why = points.why_open(point, objective.metric, objective.statistic)
                if why is not None:
                    causes.setdefault(why, []).append(str(batch))
            said += [
                f"{objective} is unresolved at batch {', '.join(batches)}: {why}" for why, batches in causes.items()
            ]
        return said

    def _go_on(self) -> list[str]:
        """What to do about parts that came to nothing for a cause that may be gone."""
        left = [part for part in get_args(api.Part) if part in self._session.unfinished]
        if not left:
            return []
        return [
            f"not finished, because the load ran late or the engine failed: {', '.join(left)}; once the cause is gone "
            "a new text in profiling.extend, or `tightship profile --resume`, makes up for it and keeps the rest"
        ]

    def _with_notes(self, *said: str) -> str:
        return "; ".join([*said, *self._session.notes, *self._job.remarks])

    def _outcome(self, state: State, reason: str, message: str) -> api.Outcome:
        extension = self._job.extension
        return api.Outcome(
            state=state,
            reason=reason,
            message=message[:MESSAGE_MOST],
            rerun=self._job.rerun,
            unfinished=sorted(self._session.unfinished) if state != "Failed" else [],
            extend=extension.request if extension is not None else None,
        )

"""One profile from beginning to end: start an engine, climb the ladder, confirm, report.

What must hold: a point is reported as soon as it is measured and never measured twice; every engine is stopped; the budget is kept, but
for the seconds an engine takes to stop; the end is always an outcome, unless the profiler itself is stopped, and then what was measured
stays and the next attempt goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final, Literal

from tightship.api.units import format_duration, format_quantity, parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.advisor import advise
from tightship.core.curve import Curve, Metric, Objective
from tightship.profiler import confirm, points
from tightship.profiler.budget import CONFIRM_LEAST, LEVEL_MOST, Budget
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings, Launcher
from tightship.profiler.errors import EngineError, LoadError, OutOfMemory
from tightship.profiler.gpu import GIB, Device
from tightship.profiler.ladder import next_batch
from tightship.profiler.lengths import Lengths, Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.meter import Meter, Reading
from tightship.profiler.model import read_model
from tightship.profiler.report import Report

log = logging.getLogger(__name__)

START_SECONDS: Final = 3600.0
RESTARTS: Final = 1
WORST_STEP_SECONDS: Final = 600.0
SEED: Final = 20250311
CPU_KV_SHARE: Final = 0.4
DEFAULT_TOKEN_BUDGET: Final = 2048


@dataclass(frozen=True)
class Job:
    """What to profile, and how."""

    settings: EngineSettings
    """The sweep's engine."""
    lengths: Lengths
    budget: float
    """Seconds from the first healthy engine."""
    objectives: tuple[Objective, ...]
    efficiency_floor: float
    rerun: str | None
    start_timeout: float = START_SECONDS


@dataclass(frozen=True)
class _Ended:
    """How the sweep ended."""

    reason: str
    exceeded: bool = False


def largest_batch(device: Device, args: tuple[str, ...]) -> int:
    """vLLM's own `max_num_seqs` on a device (EngineArgs.get_batch_defaults), bounded by the user's token budget."""
    identity = device.identity
    if identity.kind == "cpu":
        top = 128
    elif identity.memory >= 70 * GIB and "a100" not in (identity.product or "").lower():
        top = 1024
    else:
        top = 256
    budget = _option(args, "--max-num-batched-tokens")
    return min(top, int(budget)) if budget and budget.isdigit() else top


def make_job(profile: api.BatchProfile, model: str, device: Device, environ: Mapping[str, str]) -> Job:
    """What a BatchProfile asks for, on this device. `model`: the path or name that the engine gets as --model."""
    key, how = profile.spec.key, profile.spec.measurement
    explicit: int | None = None
    environment: dict[str, str | None] = {}
    if device.identity.kind == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = engine_cores(os.sched_getaffinity(0))
        if not environ.get("VLLM_CPU_KVCACHE_SPACE"):
            explicit = int(CPU_KV_SHARE * device.identity.memory)
    return Job(
        settings=EngineSettings(
            model=model,
            max_num_seqs=largest_batch(device, tuple(key.engine.args)),
            revision=key.model.revision if key.model.source.startswith("hf://") and not model.startswith("/") else None,
            args=tuple(key.engine.args),
            max_model_len=key.engine.max_model_len,
            kv_cache_bytes=explicit,
            environment=environment,
        ),
        lengths=Lengths.constant(key.workload.input_tokens or 1, key.workload.output_tokens or 1),
        budget=parse_duration(how.budget),
        objectives=tuple(points.objectives(how.objectives)),
        efficiency_floor=float(how.efficiency_floor),
        rerun=how.rerun,
        start_timeout=float(environ.get("TIGHTSHIP_START_TIMEOUT", START_SECONDS)),
    )


def engine_cores(cores: Set[int]) -> str:
    """The cores for the engine's threads, as VLLM_CPU_OMP_THREADS_BIND takes them: all but the lowest, where there are several.

    The lowest is left for the engine's API server and the load: an engine on all cores starves its own server, and then neither
    latency nor throughput means anything. Replicas are bound by the same rule (`tightship.replica`).
    """
    ordered = sorted(cores)
    return ",".join(map(str, ordered[1:] or ordered))


class Profiler:
    """Carries out one job; all that touches the world is handed in."""

    def __init__(
        self, job: Job, *, launcher: Launcher, device: Device, report: Report, clock: Clock, environ: Mapping[str, str]
    ) -> None:
        self._job = job
        self._launcher = launcher
        self._device = device
        self._report = report
        self._clock = clock
        self._environ = environ
        self._budget = Budget(job.budget, report.gpu_seconds, clock)
        self._info = EngineInfo()
        self._notes: list[str] = []
        self._late: list[int] = []

    async def run(self) -> api.Outcome:
        """Profile, and report an outcome.

        Raises:
            ReportError: the API server refuses the reports.
        """
        identity = self._device.identity
        self._report.gpu = api.ProfileGPU(
            product=identity.product,
            memory=format_quantity(identity.memory),
            uuid=identity.uuid,
            driver=identity.driver,
        )
        try:
            ended = await self._sweep()
            outcome = await self._conclude(ended)
        except asyncio.CancelledError:
            self._report.gpu_seconds = self._budget.spent
            self._report.save()
            raise
        except OutOfMemory as error:
            outcome = self._outcome("Failed", "InsufficientMemory", str(error))
        except (EngineError, LoadError) as error:
            outcome = self._outcome("Failed", "EngineFailed", str(error))
        self._report.outcome = outcome
        self._progress("Done", None, outcome.message or outcome.state)
        return outcome

    async def _conclude(self, ended: _Ended) -> api.Outcome:
        curve = self._curve()
        if curve is None:
            return self._outcome(
                "Failed",
                "NoPointInBudget",
                f"not one batch was measured within the budget of {self._job.budget:.0f} s ({ended.reason}): raise profiling.budget",
            )
        cut = await self._confirm_in_time(curve)
        late = f"the load ran late at batch {', '.join(map(str, self._late))}: latencies there are upper bounds"
        said = [ended.reason, *([cut] if cut else []), *self._notes, *([late] if self._late else [])]
        state: Literal["BudgetExceeded", "Completed"] = "BudgetExceeded" if ended.exceeded or cut else "Completed"
        return self._outcome(state, state, "; ".join(said))

    def _outcome(
        self, state: Literal["Completed", "BudgetExceeded", "Failed"], reason: str, message: str
    ) -> api.Outcome:
        return api.Outcome(state=state, reason=reason, message=message[:8000], rerun=self._job.rerun)

    # --- the sweep ---

    async def _sweep(self) -> _Ended:
        """Climb the ladder; an engine that dies is started once more."""
        for restart in range(RESTARTS + 1):
            self._progress("Starting", None, "starting the sweep's engine")
            engine = await self._launch(self._job.settings)
            try:
                self._describe(engine.info)
                return await self._climb(engine)
            except EngineError as error:
                if restart == RESTARTS:
                    raise
                log.warning("%s; starting it once more", error)
                self._notes.append(f"the engine was restarted once: {error}"[:500])
            finally:
                await engine.stop()
        raise AssertionError("the last round returns or raises")

    async def _climb(self, engine: Engine) -> _Ended:
        top = self._job.settings.max_num_seqs
        load = self._load(engine)
        meter = self._meter(engine, load)
        try:
            while True:
                curve = self._curve()
                step = next_batch(curve.points if curve else [], top, self._half_widths())
                if step.batch is None:
                    return _Ended(step.reason)
                if self._budget.for_sweep < meter.least_seconds(step.batch):
                    return _Ended(self._spent(step.batch), exceeded=True)
                reading = await self._level(meter, step.batch, top)
                if reading is None:
                    return _Ended(self._spent(step.batch), exceeded=True)
        finally:
            await load.close()

    async def _level(self, meter: Meter, batch: int, top: int) -> Reading | None:
        self._progress("Sweeping", batch, f"measuring batch {batch}")
        most = math.inf if self._steps_needed() else LEVEL_MOST
        seconds, limit = self._budget.for_level(batch, top, most), self._budget.for_sweep
        reading = await meter.measure(batch, seconds, limit, self._job.lengths.mean_output)
        if reading is not None:
            self._take(reading)
        return reading

    def _take(self, reading: Reading) -> None:
        point = reading.point
        self._report.points[point.batch] = point
        self._notes += reading.notes
        self._late += [point.batch] if reading.late else []
        self._progress("Sweeping", point.batch, f"batch {point.batch}: {reading.throughput:.0f} tokens/s")
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

    def _spent(self, batch: int) -> str:
        return (
            f"the budget of {self._job.budget:.0f} s was spent before batch {batch}: "
            f"{len(self._report.points)} points measured"
        )

    # --- the confirmation run ---

    async def _confirm_in_time(self, curve: Curve) -> str | None:
        """Confirm within what is left of the budget; say what was cut."""
        left = self._budget.left
        if left < CONFIRM_LEAST:
            return f"no time was left for the confirmation run ({left:.0f} s): the memory of a replica is unknown"
        try:
            await asyncio.wait_for(self._confirm_or_again(curve), left)
        except asyncio.TimeoutError:
            return "the confirmation run was cut at the end of the budget"
        return None

    async def _confirm_or_again(self, curve: Curve) -> None:
        """Confirm; an engine that fails is given one more chance, since without it all that was measured serves little."""
        for restart in range(RESTARTS + 1):
            try:
                return await self._confirm(curve)
            except EngineError as error:
                if restart == RESTARTS:
                    raise type(error)(
                        f"the sweep is complete, but running as a replica would failed: {error}"
                    ) from error
                log.warning("confirmation run: %s; trying once more", error)
                self._notes.append(f"the confirmation run was repeated: {error}"[:500])

    async def _confirm(self, curve: Curve) -> None:
        batch = self._advised(curve)
        sweep = self._report.points[batch]
        plan = confirm.plan_replica(batch, self._job.lengths, self._info, sweep.kv_cache_tokens_peak)
        settings = confirm.replica_settings(self._job.settings, self._info, plan)
        self._progress(
            "Confirming", batch, f"running batch {batch} as a replica would, with {plan.kv_tokens} tokens of KV cache"
        )
        before = await confirm.released(self._device, self._clock)
        engine = await self._launch(settings)
        try:
            async with confirm.MemoryWatch(self._device, self._clock) as watch:
                budget = engine.info.max_num_batched_tokens or self._info.max_num_batched_tokens
                prompts = confirm.make_prompts(self._vocabulary(), SEED)
                tokens = budget or DEFAULT_TOKEN_BUDGET
                await confirm.worst_step(engine, plan, tokens, prompts, WORST_STEP_SECONDS)
                self._ledger(plan, watch.peak - before)  # at once: the budget may cut what follows
                reading = await self._measure_alone(engine, batch)
            self._ledger(plan, watch.peak - before)
            if reading is not None:
                self._report.confirmation = confirm.compare(reading, sweep, plan)
        finally:
            await engine.stop()

    def _ledger(self, plan: confirm.ReplicaPlan, replica: int) -> None:
        self._report.memory = confirm.ledger(plan, self._device.identity.memory, replica)
        self._progress("Confirming", plan.batch, f"a replica of batch {plan.batch} takes {replica / GIB:.2f} GiB")

    async def _measure_alone(self, engine: Engine, batch: int) -> Reading | None:
        load = self._load(engine)
        try:
            seconds = max(CONFIRM_LEAST / 2, min(15.0, self._budget.left / 2))
            meter = self._meter(engine, load)
            return await meter.measure(batch, seconds, self._budget.left, self._job.lengths.mean_output)
        finally:
            await load.close()

    def _advised(self, curve: Curve) -> int:
        """The batch the objectives ask for; where none meets them, the best without them."""
        for objectives in (self._job.objectives, ()):
            answer = advise(curve, objectives, efficiency_floor=self._job.efficiency_floor, max_replicas=1)
            if answer.batch is not None:
                return answer.batch
        return max(curve.points, key=lambda point: (point.throughput, -point.batch)).batch

    # --- what both need ---

    async def _launch(self, settings: EngineSettings) -> Engine:
        began = self._clock.now()
        engine = await self._launcher.launch(settings, timeout=self._job.start_timeout)
        self._budget.engine_healthy(self._clock.now() - began)
        return engine

    def _load(self, engine: Engine) -> ClosedLoop:
        prompts = Prompts(self._vocabulary(), SEED)
        return ClosedLoop(engine.channel(), self._job.lengths, prompts, self._clock, SEED)

    def _meter(self, engine: Engine, load: ClosedLoop) -> Meter:
        ratio = self._job.lengths.mean_input / self._job.lengths.mean_output
        return Meter(engine, load, self._device, self._clock, input_per_output=ratio, steps_needed=self._steps_needed())

    def _steps_needed(self) -> int:
        """Engine steps that the objectives' statistics want; 0 for means."""
        statistics = {one.statistic.value for one in self._job.objectives if one.metric is Metric.INTER_TOKEN_LATENCY}
        return max((needed for name, needed in points.STEPS_NEEDED.items() if name in statistics), default=0)

    def _vocabulary(self) -> int:
        return read_model(self._job.settings.model, self._job.settings.revision, self._environ).vocabulary

    def _curve(self) -> Curve | None:
        return points.curve(self._report.points.values())

    def _half_widths(self) -> dict[int, float]:
        return {batch: float(point.half_width or 0) for batch, point in self._report.points.items()}

    def _describe(self, info: EngineInfo) -> None:
        self._info = info
        commit = read_model(self._job.settings.model, self._job.settings.revision, self._environ).commit
        self._report.engine = api.ProfileEngine(
            version=info.version,
            model_commit=commit,
            block_size=info.block_size,
            kv_cache_tokens=info.kv_tokens,
            max_num_seqs=self._job.settings.max_num_seqs,
            max_model_len=info.max_model_len,
            max_num_batched_tokens=info.max_num_batched_tokens,
            capture_sizes=list(info.capture_sizes),
        )

    def _progress(
        self, stage: Literal["Starting", "Sweeping", "Confirming", "Done"], batch: int | None, message: str
    ) -> None:
        self._report.gpu_seconds = self._budget.spent
        self._report.progress = api.Progress(
            stage=stage,
            batch=batch,
            points=len(self._report.points),
            elapsed=format_duration(round(self._budget.spent, 1)),
            message=message[:1024],
        )
        self._report.save()


def _option(args: tuple[str, ...], name: str) -> str | None:
    """The value of the last `--name value` or `--name=value`, in either spelling of the dashes."""
    value = None
    for index, arg in enumerate(args):
        flag, equals, rest = arg.replace("_", "-").partition("=")
        if flag == name:
            value = rest if equals else (args[index + 1] if index + 1 < len(args) else None)
    return value

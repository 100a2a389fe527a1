"""What the phases of one profile share: the job, the ports to the world, the budget, what is reported and what it cost.

A phase (sweep, confirmation run, packing trials) is handed a session and touches the world through nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Final, Literal

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Curve, Metric
from tightship.core.memory import Context, context_from_lengths, context_from_means
from tightship.profiler import points
from tightship.profiler.budget import Budget, Cost
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings, Launcher
from tightship.profiler.errors import LengthsError, ReportError
from tightship.profiler.gpu import Device
from tightship.profiler.job import Job
from tightship.profiler.lengths import Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.meter import Meter
from tightship.profiler.model import read_model
from tightship.profiler.report import Report

log = logging.getLogger(__name__)

RESTARTS: Final = 1
"""How often an engine that fails is started again, in each phase."""
DEFAULT_BLOCK: Final = 16
ACCOUNT_SECONDS: Final = 10.0
"""How much of the time spent may be lost with an attempt that is killed, at the most."""

Stage = Literal["Starting", "Sweeping", "Baseline", "Confirming", "Trying", "Done"]


class Session:
    """One attempt at one job."""

    def __init__(
        self,
        job: Job,
        *,
        launcher: Launcher,
        device: Device,
        report: Report,
        clock: Clock,
        environ: Mapping[str, str],
        budget: Budget,
    ) -> None:
        self.job = job
        self.launcher = launcher
        self.device = device
        self.report = report
        self.clock = clock
        self.environ = environ
        self.budget = budget
        self.cost = Cost(report.cost, clock)
        self.info = _remembered(report)
        """What the sweep's engine said of itself, in this attempt or in an earlier one."""
        self.lengths = job.lengths
        """The workload, without what the engine can't take once that is known."""
        self.load_context = Context(mean=1.0, std=0.0)
        """The context in flight of what is really put on the engine."""
        self.notes: list[str] = []
        """What the outcome must say besides."""
        self.unfinished: set[api.Part] = set()
        """What came to nothing for a cause that may be gone."""
        self.idle = device.used()
        """Bytes of the device in use before this attempt's first engine."""
        self._extends = job.extension.request if job.extension is not None and report.outcome is not None else None
        self._gpu_seconds = report.gpu_seconds
        self._settle_lengths()

    async def launch(self, settings: EngineSettings) -> Engine:
        """Start an engine; the time is accounted as a start. The attempt's first is free, others have what is left of the budget.

        Raises:
            EngineError: it did not become healthy.
            asyncio.TimeoutError: the budget was spent first.
        """
        began = self.clock.now()
        started: list[Engine] = []

        async def start() -> None:
            started.append(await self.launcher.launch(settings, timeout=self.job.start_timeout))

        try:
            with self.cost.in_phase("starts"):
                await self.budget.bound(start())
        except BaseException:
            for engine in started:  # healthy in the very moment in which it was given up
                await engine.stop()
            raise
        self.budget.engine_healthy(self.clock.now() - began)
        return started[0]

    def load(self, engine: Engine, seed: int = 0) -> ClosedLoop:
        """A closed loop on an engine; `seed` tells apart the loads of one profile."""
        return ClosedLoop(engine.channel(), self.lengths, self.prompts(seed), self.clock, self.job.seed + seed)

    def prompts(self, seed: int = 0) -> Prompts:
        """Prompts of the model's vocabulary."""
        return Prompts(self.vocabulary(), self.job.seed + seed)

    def meter(self, engine: Engine, load: ClosedLoop) -> Meter:
        """What measures levels on an engine."""
        lengths = self.lengths
        ratio = lengths.mean_input / lengths.mean_output
        return Meter(
            engine,
            load,
            self.device,
            self.clock,
            input_per_output=ratio,
            steps_needed=self.steps_needed,
            first_tokens_needed=self.first_tokens_needed,
            itl_most=self.itl_most,
            context=self.load_context,
        )

    @property
    def asked(self) -> frozenset[points.Asked]:
        """The statistics that the objectives are of, those of an extension included."""
        extension = self.job.extension
        more = points.objectives(extension.objectives) if extension is not None else []
        return frozenset((one.metric, one.statistic) for one in (*self.job.objectives, *more))

    @property
    def steps_needed(self) -> int:
        """Engine steps that the objectives' statistics want, of either latency; 0 for means."""
        return max((points.STEPS_NEEDED.get(statistic.value, 0) for _, statistic in self.asked), default=0)

    @property
    def first_tokens_needed(self) -> int:
        """First tokens that the objectives' statistics want; 0 where none is of the time to them."""
        return points.first_tokens_needed(self.asked)

    @property
    def itl_most(self) -> float | None:
        """What the objectives allow between tokens, seconds; None where none bounds it."""
        limits = [one.maximum for one in self.job.objectives if one.metric is Metric.INTER_TOKEN_LATENCY]
        return min(limits, default=None)

    @property
    def context(self) -> Context:
        """The context in flight that a replica is sized for: of the lengths where they are known, else assumed from their means."""
        if self.lengths.basis == "Lengths":
            return self.load_context
        block = self.info.block_size or DEFAULT_BLOCK
        return context_from_means(self.lengths.mean_input, self.lengths.mean_output, block)

    def vocabulary(self) -> int:
        """Token ids below this are valid."""
        return read_model(self.job.settings.model, self.job.settings.revision, self.environ).vocabulary

    def curve(self) -> Curve | None:
        """What was measured so far; None when nothing was."""
        return points.curve(self.report.points.values())

    def describe(self, info: EngineInfo) -> None:
        """Keep and report what the sweep's engine said of itself, and what is put on it.

        Raises:
            LengthsError: the engine is too short for every request.
        """
        self.info = info
        self._settle_lengths()
        settings = self.job.settings
        self.report.engine = api.ProfileEngine(
            version=info.version,
            model_commit=read_model(settings.model, settings.revision, self.environ).commit,
            block_size=info.block_size,
            kv_cache_tokens=info.kv_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=info.max_model_len,
            max_num_batched_tokens=info.max_num_batched_tokens,
            capture_sizes=list(info.capture_sizes),
        )

    def _settle_lengths(self) -> None:
        """Leave out what is longer than the engine takes, and report what remains."""
        if self.info.max_model_len:
            try:
                self.lengths = self.job.lengths.fitting(self.info.max_model_len)
            except ValueError as error:
                raise LengthsError(str(error)) from error
        lengths = self.lengths
        pairs = [(one.input, one.output) for one in lengths.pairs]
        self.load_context = context_from_lengths(pairs, self.info.block_size or DEFAULT_BLOCK)
        self.report.load = api.Load(
            basis=lengths.basis,
            requests=len(lengths.pairs),
            input_tokens=points.decimal(lengths.mean_input),
            output_tokens=points.decimal(lengths.mean_output),
            seed=self.job.seed,
        )

    def too_many(self, requests: int) -> str | None:
        """Why engines can't be made to run so many requests at once, in words; None where they can."""
        most = self.job.in_flight_most
        if most is None or requests <= most:
            return None
        return (
            f"{requests} requests at once need as many sockets, and this process may open files for {most}: "
            "raise its hard limit (ulimit -Hn)"
        )

    def note(self, text: str) -> None:
        """Have the outcome say something, once."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def tell_silence(self, meter: Meter, where: str) -> None:
        """An engine that hangs and a level that is slow end alike, when the time is over: have the outcome say which it was."""
        if meter.hung is not None:
            self.note(f"{where}: {meter.hung}")

    def leave(self, part: api.Part) -> None:
        """Have the outcome say that a part is to be made up for."""
        self.unfinished.add(part)

    def withdraw(self, note: str) -> None:
        """Take a note back that is no longer true."""
        self.notes.remove(note)

    def progress(self, stage: Stage, batch: int | None, message: str, *, replicas: int | None = None) -> None:
        """Say what is being done, and save all that was measured so far."""
        self.account()
        self.report.progress = api.Progress(
            stage=stage,
            batch=batch,
            replicas=replicas,
            points=len(self.report.points),
            elapsed=self._elapsed(),
            rerun=self.job.rerun,
            extend=self._extends,
            message=message[:1024],
        )
        self.report.save()

    def account(self) -> None:
        """Bring the reported time up to date."""
        self.report.gpu_seconds = self._gpu_seconds + self.budget.spent_now
        self.report.cost = self.cost.report()
        if self.report.progress is not None:
            self.report.progress = self.report.progress.model_copy(update={"elapsed": self._elapsed()})

    async def keep_account(self) -> None:
        """Save the time that was spent every 10 s, until this is cancelled: a level may take minutes, and an attempt that is killed in it must
        not leave that time to the next one's budget."""
        with contextlib.suppress(ReportError):  # whoever reports something next raises it
            while True:
                await self.clock.sleep(ACCOUNT_SECONDS)
                if self.budget.spent_now > 0:
                    self.account()
                    self.report.save()

    def _elapsed(self) -> str:
        return format_duration(round(self.budget.spent, 1))


def _remembered(report: Report) -> EngineInfo:
    """What an earlier attempt's engine said; bytes are known only once the ledger is."""
    engine, memory = report.engine, report.memory
    if engine is None:
        return EngineInfo()
    tokens = engine.kv_cache_tokens
    per_token = memory.kv_bytes_per_token if memory is not None else None
    return EngineInfo(
        version=engine.version,
        block_size=engine.block_size,
        blocks=tokens // engine.block_size if tokens and engine.block_size else None,
        kv_tokens=tokens,
        kv_bytes=tokens * per_token if tokens and per_token else None,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        capture_sizes=tuple(engine.capture_sizes),
    )

"""The phase of packing trials: whether any can be made, with what, and which pairs; `tightship.profiler.trials` makes them.

It never fails a profile: where no packing can be tried, or none any more, the outcome says why.
"""

from __future__ import annotations

from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler import points
from tightship.profiler.engine import Engine
from tightship.profiler.fleet import Pair, Sizes
from tightship.profiler.load import ClosedLoop
from tightship.profiler.session import Session
from tightship.profiler.sharing import Sharing
from tightship.profiler.trials import Agenda, Bench, Given, Predicted, Trials, Verdict

_SEED = 2_000
"""The trials' loads are drawn apart from those of the other phases."""


async def try_packings(session: Session, sharing: Sharing | None, *, asked_only: bool) -> Verdict:
    """Try pairs on the device as far as the budget goes; returns what the outcome must say of it, and whether the budget cut it.

    Args:
        session: the profile, with sweep and confirmation run behind it.
        sharing: how engines share the device; None where they can't.
        asked_only: whether to try nothing but the pairs that `measurement.extend` names.
    """
    found = prepare(session, sharing, asked_only)
    if isinstance(found, str):
        return Verdict([f"no packing was tried: {found}"])
    bench, agenda = found
    with session.cost.in_phase("trials"):
        verdict = await Trials(bench, agenda, session.report.trials, again=_again(session)).run()
    verdict.notes += _left_open(session)
    return verdict


def _asked(session: Session) -> tuple[Pair, ...]:
    extension = session.job.extension
    return tuple((pair.batch, pair.replicas) for pair in extension.pairs) if extension is not None else ()


def _again(session: Session) -> set[Pair]:
    """The pairs asked for whose trials could not be made, or left a statistic of the objectives open."""
    trials = session.report.trials
    return {
        pair
        for pair in _asked(session)
        if pair in trials and (not points.has_figures(trials[pair]) or _open(session, trials[pair]))
    }


def _open(session: Session, trial: api.Trial) -> list[str]:
    """The objectives' statistics that a trial left open: unresolved, or with nothing seen; each with what settles it."""
    asked = sorted(session.asked, key=lambda one: (one[0].value, one[1].value))
    found = ((one, points.why_open(trial, *one)) for one in asked)
    return [f"{statistic.value} {metric.value} unresolved ({why})" for (metric, statistic), why in found if why]


def _left_open(session: Session) -> list[str]:
    """What the outcome must say of trials that were asked for."""
    tried = [session.report.trials[pair] for pair in _asked(session) if pair in session.report.trials]
    return [
        f"the trial of {one.replicas} x {one.batch} leaves {' and '.join(left)}"
        for one in tried
        if points.has_figures(one) and (left := _open(session, one))
    ]


def prepare(session: Session, sharing: Sharing | None, asked_only: bool) -> tuple[Bench, Agenda] | str:
    """What trials are made with and which; or why there are none."""
    job, report, asked = session.job, session.report, _asked(session)
    if job.max_replicas < 2 and not asked:
        return f"at most {job.max_replicas} replica is allowed (maxReplicasPerGPU, or the cores of a pack)"
    if sharing is None:
        return "the device can't be shared here"
    curve = session.curve()
    longest = report.engine.max_model_len if report.engine is not None else None
    ledger = points.ledger(report.memory, longest)
    if curve is None or ledger is None:
        return "the memory of a replica is unknown"
    peaks = {point.batch: point.kv_tokens_peak for point in curve.points}
    sizes = Sizes(ledger, points.reserve(job.memory_reserve), peaks)
    if not asked and not any(sizes.fits((point.batch, 2)) for point in curve.points):
        return f"the device holds one replica: {sizes.misfit((curve.points[0].batch, 2))}"
    predicted = Predicted(
        curve,
        job.objectives,
        sizes,
        max_replicas=job.max_replicas,
        minimum_gain=job.minimum_gain,
        efficiency_floor=job.efficiency_floor,
        dedicated=session.device.identity.kind == "cpu",
        confirmation=points.confirmation(report.confirmation),
    )
    agenda: Agenda = Given(asked, None if asked_only else predicted) if asked else predicted
    return _bench(session, sharing, sizes), agenda


def _bench(session: Session, sharing: Sharing, sizes: Sizes) -> Bench:
    def load(engine: Engine, number: int) -> ClosedLoop:
        return session.load(engine, _SEED + number)

    def progress(pair: Pair, message: str) -> None:
        session.progress("Trying", pair[0], message, replicas=pair[1])

    def keep(trial: api.Trial) -> None:
        total = float(trial.total_tokens_per_second or 0)
        progress((trial.batch, trial.replicas), f"{trial.replicas} x {trial.batch}: {total:.0f} tokens/s together")

    return Bench(
        settings=session.job.settings,
        info=session.info,
        sizes=sizes,
        lengths=session.lengths,
        steps_needed=session.steps_needed,
        first_tokens_needed=session.first_tokens_needed,
        launch=session.launch,
        load=load,
        device=session.device,
        clock=session.clock,
        sharing=sharing,
        left=lambda: session.budget.for_trials,
        progress=progress,
        keep=keep,
        idle=session.idle,
        too_many=session.too_many,
        start_cost=session.budget.start_cost,
    )

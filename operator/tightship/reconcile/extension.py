"""`profiling.extend`: having done what a measurement left unfinished, and the recommended packing tried where it is only estimated. Pure.

A text asks once, whoever else has texts of their own: the profile remembers the last one of each service that was dealt with (an
annotation), so that two services of one key can't ask in turns for ever. A text that finds nothing to do is used up: what is decided
later, from a changed objective or reserve, never starts a Job by itself. One extension is made at a time, and none before a new
measurement that was asked for (`rerun`) has ended, since that may decide otherwise.
"""

from __future__ import annotations

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import Extension, Pair
from tightship.core.advisor import Basis
from tightship.kube.store import Object
from tightship.reconcile.reading import asked_again, is_imported, outcome_of, pending
from tightship.reconcile.verdict import Verdict


def untried(verdict: Verdict) -> Pair | None:
    """The recommended packing, where it is only estimated: untried, or tried without a statistic that an objective is of."""
    decision = verdict.decision
    if decision is None or decision.chosen is None or decision.basis is not Basis.ESTIMATED:
        return None
    chosen = decision.chosen
    return Pair(batch=chosen.batch, replicas=chosen.replicas) if chosen.replicas > 1 else None


def unfinished(verdict: Verdict) -> bool:
    """Whether the measurement left parts open, for a load that ran late or an engine that failed."""
    return bool(verdict.profile is not None and outcome_of(verdict.profile).get("unfinished"))


def is_due(verdict: Verdict) -> bool:
    """Whether the service's text is new, and can be dealt with now: with a request, or by using it up."""
    service, profile, decision = verdict.service, verdict.profile, verdict.decision
    if service is None or profile is None or is_imported(profile):
        return False
    if (decision is None or not decision.feasible) and not unfinished(verdict):
        return False
    wish = service.spec.profiling.extend
    if wish is None or _dealt_with(profile, service.metadata.name) == wish or asked_again(profile) is not None:
        return False
    return pending(profile) is None or not (untried(verdict) or unfinished(verdict))


def request(verdict: Verdict) -> Extension | None:
    """What to write into the profile for a text that is due; None where there is nothing to do."""
    service, pair = verdict.service, untried(verdict)
    if service is None or (pair is None and not unfinished(verdict)):
        return None
    name, profiling = service.metadata.name, service.spec.profiling
    return Extension(
        request=f"{name}/{profiling.extend}",
        pairs=[pair] if pair is not None else [],
        budget=profiling.budget,
        objectives=service.spec.slo.objectives,
    )


def words(verdict: Verdict) -> str | None:
    """How it stands with the trial of a packing that is only estimated; None where nobody asked for it."""
    service, profile, pair = verdict.service, verdict.profile, untried(verdict)
    if pair is None or service is None or profile is None:
        return None
    if is_imported(profile):
        return (
            f"BatchProfile {verdict.profile_name} was imported (spec.results), so profiling.extend can't have anything tried: import it "
            "with `trials`, or delete it to have this manifest measured here"
        )
    if asked := pending(profile):
        mine = asked.startswith(f"{service.metadata.name}/")
        return "its trial is under way" if mine else f"the trials that {asked} asked for are under way"
    wish = service.spec.profiling.extend
    if wish is None:
        return None
    if _dealt_with(profile, service.metadata.name) == wish:
        return f"profiling.extend {wish!r} was answered: another text has it tried"
    return "its trial waits for the new measurement (rerun)" if asked_again(profile) is not None else None


def _dealt_with(profile: Object, service: str) -> str | None:
    found: str | None = (profile["metadata"].get("annotations") or {}).get(labels.extend_annotation(service))
    return found

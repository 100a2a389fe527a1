"""BatchProfile: see to it that a profile gets measured once, and say how it goes.

The profiler owns what is measured and how the measurement ended (`status.outcome`); this reconciler owns the attempt (the Job)
and the conditions. What must always hold:

- a profile with `spec.results` never starts a Job; one with an outcome for its present `rerun` never starts another;
- at most one Job of a profile is active, and at most `max_concurrent_profiles` in the whole cluster;
- an attempt that was lost without an outcome (evicted, node gone) is made again under the next number, with growing waits and
  not for ever: `status.lost` counts those that found nothing new, however long their Jobs are there; an attempt that broke by itself
  is final, and is remembered in `status.outcome` with reason JobFailed, which nobody else writes, so that it stays final when its Job is
  cleaned away;
- a Job whose engine never ran is made anew when the profile would have it otherwise (a mended template, another budget);
- a complete profile stays complete while it is extended (`measurement.extend`: trials beside what was measured) or measured again
  (`measurement.rerun`), and also when that fails: services decide from what there is;
- a measurement that no service wants any more gives its GPU back, and goes on from its points when one does again; a profile
  that was written by hand is wanted by being there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import ValidationError

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, Extension, Lost, Measured, Outcome, ProfileKey
from tightship.api.v1alpha1.conditions import Reason
from tightship.core.conditions import Condition, find, merge
from tightship.kube.clock import parse_timestamp
from tightship.kube.cluster import check_ours
from tightship.kube.errors import AlreadyExists, Forbidden, Invalid, NameConflict, NamespaceTerminating, NotFound
from tightship.kube.kinds import Ref
from tightship.kube.store import Object, Store, labels_of
from tightship.manifests import claims
from tightship.manifests.podparts import ENGINE_CONTAINER, OperatorImage
from tightship.manifests.profile_job import (
    MAX_PROFILE_NAME,
    fingerprint,
    job_name,
    pod_deadline,
    profile_job,
    profiler_access,
    room_on,
)
from tightship.reconcile import dra, indexes, modes, podstate
from tightship.reconcile.context import Context
from tightship.reconcile.jobstate import belongs, end_of, has_begun
from tightship.reconcile.lengths import measurable
from tightship.reconcile.queue import Key, Result
from tightship.reconcile.verdict import wanted_by

MAX_ATTEMPTS: Final = 6
FIRST_RETRY_SECONDS: Final = 10.0
LAST_RETRY_SECONDS: Final = 300.0
CROWDED_SECONDS: Final = 15.0
"""How soon a profile that waits for its turn looks again: a Job that finds no node sends no word to those behind it."""
PODLESS_SECONDS: Final = 30.0

_DISRUPTED: Final = frozenset(
    {
        "Evicted",
        "NodeLost",
        "NodeShutdown",
        "Shutdown",
        "Terminated",
        "Preempting",
        "NodeAffinity",
        "UnexpectedAdmissionError",
    }
)
"""What the kubelet, or whoever ends pods in its name, calls an end that is not the pod's own doing."""

Stage = Literal["waiting", "running", "idle", "complete", "failed"]


@dataclass(frozen=True)
class Observed:
    """Everything one decision rests on.

    `profile` is None when the object can't be read; `problems` say why. `outcome` is the one for the present `rerun`, if any.
    `jobs` are this profile's Jobs for what is to be done now, oldest attempt first; `superseded` those that must go before: of
    another `rerun`, or active for another extension; `outdated` those that have yet to run an engine and would be made otherwise now.
    `attempts` is the highest number of any of its Jobs. `pods` are those of the latest Job. `busy` counts other profiles' active Jobs,
    but for those that found no node; `slots` is how many may run in all. `products` are the GPU products in the cluster. `lengths`
    says why the lengths to measure with can't be had.
    """

    obj: Object
    profile: BatchProfile | None
    problems: tuple[str, ...]
    now: datetime
    outcome: Outcome | None = None
    jobs: tuple[Object, ...] = ()
    superseded: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()
    wanted: bool = True
    busy: int = 0
    slots: int = 0
    products: tuple[str, ...] = ()
    attempts: int = 0
    lengths: str | None = None
    outdated: tuple[Object, ...] = ()

    @property
    def standing(self) -> Outcome | None:
        """The outcome of an earlier `rerun`, while a complete profile is measured again."""
        return self.profile.standing if self.profile is not None and self.outcome is None else None

    @property
    def extend(self) -> Extension | None:
        """The extension asked for; an imported profile has none."""
        if self.profile is None or self.problems or self.profile.spec.results is not None:
            return None
        return self.profile.spec.measurement.extend

    @property
    def extending(self) -> bool:
        """Whether all is measured but for an extension."""
        extend = self.extend
        if extend is None or self.standing is not None or _measured(self) is None:
            return False
        return self.outcome is None or self.outcome.extend != extend.request

    @property
    def beside(self) -> bool:
        """Whether what is to be done leaves the profile complete."""
        return self.extending or self.standing is not None

    @property
    def job(self) -> Object | None:
        """The Job of the latest attempt."""
        return self.jobs[-1] if self.jobs else None

    @property
    def attempt(self) -> int:
        """The number of the latest attempt, 0 before the first; known from status when its Job is gone."""
        told = ((self.obj.get("status") or {}).get("job") or {}).get("attempt") or 0
        return max([told, self.attempts, *(attempt_of(job) for job in (*self.jobs, *self.superseded))])


@dataclass(frozen=True)
class Decision:
    """What to say and to do: the stage with its reason and message, an attempt to start, Jobs to remove.

    `outcome` is one that the operator itself has to remember; `requeue_after` seconds until time alone changes something.
    `measured` says that the profile is complete, whatever becomes of the extension or new measurement that the rest speaks of.
    """

    stage: Stage
    reason: str
    message: str
    start: int | None = None
    remove: tuple[Object, ...] = ()
    outcome: Outcome | None = None
    requeue_after: float | None = None
    measured: Decision | None = None


async def reconcile(ctx: Context, key: Key) -> Result:
    """Look at one profile: gather, decide, apply, report."""
    obj = ctx.store.get("BatchProfile", key.namespace, key.name)
    if obj is None or obj["metadata"].get("deletionTimestamp"):
        return Result()
    observed = await gather(ctx, obj)
    decision = beside(observed, await apply(ctx, observed, decide(observed)))
    await ctx.report(
        observed.obj, status(observed, decision, ctx.store.list("Pod", key.namespace, (labels.PROFILE, key.name)))
    )
    return Result(decision.requeue_after)


# --- gather ---


async def gather(ctx: Context, obj: Object) -> Observed:
    """Look at everything that the decision about a profile rests on."""
    observed = _look(ctx, obj)
    unanswered = observed.outcome is None or observed.extending
    if unanswered and observed.job is not None and end_of(observed.job) is not None:
        # The profiler writes its outcome before it ends, but the two watches needn't tell in that order.
        try:
            observed = _look(ctx, await ctx.cluster.get(Ref.of(obj)))
        except NotFound:
            return observed
    return observed


def _look(ctx: Context, obj: Object) -> Observed:
    store, metadata = ctx.store, obj["metadata"]
    profile, problems = read(obj)
    labelled = (labels.PROFILE, metadata["name"])
    own = [job for job in store.list("Job", metadata["namespace"], labelled) if belongs(job, obj)]
    own.sort(key=attempt_of)
    jobs = tuple(job for job in own if _answers(profile, _rerun_of(job)))
    pods = store.list("Pod", metadata["namespace"], labelled)
    others = [job for job in store.by("Job", indexes.STATE, indexes.OPEN) if not belongs(job, obj)]
    outcome = profile.status.outcome if profile else None
    observed = Observed(
        obj=obj,
        profile=profile,
        problems=problems,
        outcome=outcome if outcome is not None and _answers(profile, outcome.rerun) else None,
        jobs=jobs,
        superseded=tuple(job for job in own if not _answers(profile, _rerun_of(job))),
        pods=tuple(pod for pod in pods if jobs and belongs(pod, jobs[-1])),
        wanted=_is_wanted(ctx, obj),
        busy=sum(not _is_stuck(ctx, job) for job in others),
        slots=ctx.settings.max_concurrent_profiles,
        products=tuple(sorted({*store.summarise("Node", _products), *dra.products(store)})),
        now=ctx.clock.now(),
        attempts=max((attempt_of(job) for job in own), default=0),
        lengths=measurable(profile, store) if profile else None,
    )
    observed = _for_extension(observed, pods) if observed.extending else observed
    return replace(observed, outdated=tuple(job for job in observed.jobs if _is_outdated(observed, job, pods)))


def _answers(profile: BatchProfile | None, rerun: str | None) -> bool:
    """Whether what was done for this `rerun` is what the profile asks for now."""
    return profile is None or profile.spec.measurement.is_answered_by(rerun)


def _for_extension(seen: Observed, pods: Sequence[Object]) -> Observed:
    """The same with the Jobs of the extension alone. What measured before is done, or what it still does is not wanted any more."""
    request = seen.extend.request if seen.extend else None
    jobs = tuple(job for job in seen.jobs if _extend_of(job) == request)
    others = tuple(job for job in seen.jobs if _extend_of(job) != request and end_of(job) is None)
    mine = tuple(pod for pod in pods if jobs and belongs(pod, jobs[-1]))
    return replace(seen, jobs=jobs, superseded=(*seen.superseded, *others), pods=mine)


def _is_outdated(seen: Observed, job: Object, pods: Sequence[Object]) -> bool:
    """Whether an active Job has yet to run an engine, and would be made otherwise now."""
    made = (job["metadata"].get("annotations") or {}).get(labels.ANNOTATION_TEMPLATE)
    if seen.profile is None or seen.problems or made is None or end_of(job) is not None or has_begun(job, pods):
        return False
    return bool(made != fingerprint(seen.profile))


def read(obj: Object) -> tuple[BatchProfile | None, tuple[str, ...]]:
    """The profile as a model, and what is wrong with it."""
    try:
        profile = BatchProfile.model_validate(obj)
    except ValidationError as error:
        return None, tuple(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    problems = []
    name = profile.metadata.name
    if len(name) > MAX_PROFILE_NAME:
        problems.append(f"metadata.name has {len(name)} characters, at most {MAX_PROFILE_NAME} fit into a label")
    problems += _key_problems(profile)
    return profile, tuple(problems)


def _key_problems(profile: BatchProfile) -> list[str]:
    """A key is immutable, which clusters before 1.25 don't enforce: what was measured for another key answers nothing."""
    key = profile.spec.key
    parts = {name: getattr(key, name) for name in ProfileKey.model_fields if name != "hash"}
    actual = ProfileKey.of(**parts).hash
    if actual != key.hash:
        return [
            f"spec.key.hash is {key.hash[:10]}..., the rest of the key gives {actual[:10]}...: a key can't be edited"
        ]
    labelled = profile.metadata.labels.get(labels.PROFILE_KEY)
    if labelled and not key.hash.startswith(labelled):
        return [
            f"spec.key was replaced: this profile was made for key {labelled[:10]}..., make another one for the new key"
        ]
    return []


def _is_wanted(ctx: Context, obj: Object) -> bool:
    by_hand = labels_of(obj).get(labels.MANAGED_BY) != labels.PRODUCT
    return by_hand or bool(wanted_by(obj, ctx.store))


def _products(nodes: list[Object]) -> tuple[str, ...]:
    return tuple(sorted({labels_of(node).get(labels.NODE_GPU_PRODUCT, "") for node in nodes} - {""}))


def _is_stuck(ctx: Context, job: Object) -> bool:
    """Whether the Job's pod can't be scheduled: it uses no GPU, and others must not wait for what may never come."""
    labelled = (labels.PROFILE, labels_of(job).get(labels.PROFILE, ""))
    pods = [pod for pod in ctx.store.list("Pod", job["metadata"]["namespace"], labelled) if belongs(pod, job)]
    troubles = [podstate.trouble(pod) for pod in pods]
    return bool(troubles) and all(each is not None and each.reason == Reason.UNSCHEDULABLE for each in troubles)


def _rerun_of(job: Object) -> str | None:
    found: str | None = (job["metadata"].get("annotations") or {}).get(labels.ANNOTATION_RERUN)
    return found


def _extend_of(job: Object) -> str | None:
    found: str | None = (job["metadata"].get("annotations") or {}).get(labels.ANNOTATION_EXTEND)
    return found


def attempt_of(job: Object) -> int:
    """The number at the end of a Job's name; 0 when there is none."""
    found = re.search(r"-(\d+)$", job["metadata"]["name"])
    return int(found[1]) if found else 0


# --- decide ---


def decide(observed: Observed) -> Decision:
    """What to do about a profile: the first check that has something to say. Pure."""
    return beside(observed, next(decision for check in CHECKS if (decision := check(observed)) is not None))


def beside(observed: Observed, decision: Decision) -> Decision:
    """A decision about an extension or a new measurement, with the complete profile beside it; any other as it is."""
    return (
        replace(decision, measured=_measured(observed))
        if observed.beside and decision.stage != "complete"
        else decision
    )


def _invalid(seen: Observed) -> Decision | None:
    if not seen.problems:
        return None
    message = "; ".join(seen.problems)
    return Decision("failed", Reason.INVALID_SPEC, f"the profile can't be used: {message}")


def _imported(seen: Observed) -> Decision | None:
    results = seen.profile.spec.results if seen.profile else None
    if results is None:
        return None
    return Decision(
        "complete",
        Reason.IMPORTED,
        f"{len(results.points)} points came with the profile (spec.results); nothing is measured{_in_vain(seen)}",
        remove=_active(seen.jobs + seen.superseded),
    )


def _in_vain(seen: Observed) -> str:
    """What is asked of an imported profile that no measurement will answer."""
    measurement = seen.profile.spec.measurement if seen.profile else None
    asked = [name for name in ("rerun", "extend") if measurement is not None and getattr(measurement, name) is not None]
    return f", whatever is in measurement.{' and measurement.'.join(asked)}" if asked else ""


def _superseded(seen: Observed) -> Decision | None:
    if not seen.superseded:
        return _outdated(seen)
    what = "trials were asked for (extend)" if seen.extending else "a new measurement was asked for (rerun)"
    message = f"{what}; the Job of the previous one is being removed"
    return Decision("waiting", Reason.WAITING, message, remove=seen.superseded)


def _outdated(seen: Observed) -> Decision | None:
    if not seen.outdated:
        return None
    message = "how to measure was changed before an engine ran; the Job that was made before is being removed"
    return Decision("waiting", Reason.WAITING, message, remove=seen.outdated)


def _ended(seen: Observed) -> Decision | None:
    if seen.beside:
        return None
    outcome, measured = seen.outcome, _measured(seen)
    if measured is not None or outcome is None:
        return measured
    own = outcome if outcome.reason == Reason.JOB_FAILED else None
    return Decision("failed", outcome.reason or Reason.JOB_FAILED, _final(outcome.message), outcome=own)


def _measured(seen: Observed) -> Decision | None:
    """That the measurement is done, whatever becomes of an extension or of a new measurement; None while it isn't.

    An extension's profiler takes the outcome back while it works, and may end with one that says Failed: the curve is there all the
    same, and that it was complete is remembered by the condition that said so.
    """
    outcome = seen.outcome or seen.standing
    # An outcome that the operator wrote stays only as long as it is written.
    own = outcome if outcome is not None and outcome.reason == Reason.JOB_FAILED else None
    points = len(seen.profile.status.points) if seen.profile else 0
    if outcome is not None and outcome.state != "Failed":
        said = f": {outcome.message}" if outcome.message else ""
        if outcome.state == "BudgetExceeded":
            return Decision("complete", Reason.BUDGET_EXCEEDED, f"{points} points within the budget{said}", outcome=own)
        return Decision("complete", Reason.COMPLETED, f"{points} points measured{said}", outcome=own)
    was = find((seen.obj.get("status") or {}).get("conditions") or (), names.COMPLETE)
    if was is None or was["status"] != "True" or _asked_again(seen):
        return None
    if outcome is None:
        return Decision("complete", was["reason"], was["message"])
    if outcome.extend is None:
        return None
    return Decision(
        "complete",
        was["reason"],
        f"{points} points measured; {_no_trials(outcome.extend, outcome.message)}",
        outcome=own,
    )


def _asked_again(seen: Observed) -> bool:
    """Whether what was complete is of an earlier `rerun`, and stands no more."""
    told = seen.profile.status.outcome if seen.profile else None
    if told is not None and not _answers(seen.profile, told.rerun):
        return True
    return any(not _answers(seen.profile, _rerun_of(job)) for job in seen.superseded)


def _no_trials(request: str, message: str | None) -> str:
    return f"the trials that {request} asked for failed: {message or 'no message'} (a new text in profiling.extend tries again)"


def _no_measurement(rerun: str | None, message: str) -> str:
    return (
        f"the measurement that rerun {rerun} asked for failed: {message}; what was measured before stands "
        "(a new text in profiling.rerun tries again)"
    )


def _unwanted(seen: Observed) -> Decision | None:
    if seen.wanted:
        return None
    message = "no LLMService needs this measurement; it goes on from what is measured when one does"
    return Decision("idle", Reason.WAITING, message, remove=_active(seen.jobs))


def _runs(seen: Observed) -> Decision | None:
    if seen.job is None or end_of(seen.job) is not None:
        return None
    name = seen.job["metadata"]["name"]
    if seen.job["metadata"].get("deletionTimestamp"):
        return Decision("waiting", Reason.WAITING, f"Job {name} is being removed")
    troubles = [trouble for pod in seen.pods if not podstate.is_over(pod) and (trouble := podstate.trouble(pod))]
    if troubles:
        return _troubled(seen, troubles[0])
    if not seen.pods:
        return _podless(seen, seen.job)
    if not any(podstate.is_running(pod, ENGINE_CONTAINER) for pod in seen.pods):
        return Decision("running", Reason.MEASURING, f"Job {name} is starting: {_starting(seen.pods)}")
    return Decision("running", Reason.MEASURING, f"Job {name} is measuring{_progress(seen)}")


def _podless(seen: Observed, job: Object) -> Decision:
    """A Job without a pod: for a moment that is normal; later on, admission or a quota keeps it from being made."""
    name, made = job["metadata"]["name"], job["metadata"].get("creationTimestamp")
    left = PODLESS_SECONDS - (seen.now - parse_timestamp(made)).total_seconds() if made else PODLESS_SECONDS
    if left > 0:
        return Decision(
            "running", Reason.MEASURING, f"Job {name} is starting: its pod isn't there yet", requeue_after=left
        )
    message = (
        f"Job {name} gets no pod: `kubectl describe job {name}` says why (a quota, or admission); it is tried again"
    )
    return Decision("waiting", Reason.WAITING, message)


def _troubled(seen: Observed, trouble: podstate.Trouble) -> Decision:
    message = f"Job {seen.job['metadata']['name'] if seen.job else ''}: {trouble.message}"
    if trouble.reason == Reason.UNSCHEDULABLE:
        return Decision("running", Reason.UNSCHEDULABLE, f"{message}{_room(seen)}")
    if trouble.reason == Reason.IMAGE_PULL_FAILED:
        advice = "check spec.engine.image and template.spec.imagePullSecrets"
        return Decision("running", Reason.IMAGE_PULL_FAILED, f"{message} ({advice}; it is tried again)")
    return Decision("running", Reason.MEASURING, f"{message} (it is tried again)")


def _room(seen: Observed) -> str:
    """What to do about a pod that finds no node."""
    wanted = seen.profile.spec.key.accelerator.product if seen.profile else None
    if wanted and wanted not in seen.products:
        there = f"this cluster's are {', '.join(seen.products)}" if seen.products else "no node has that label"
        return f"; no node has {labels.NODE_GPU_PRODUCT}={wanted}: {there}"
    return "; it starts when a node has room, which may need replicas of other services to be scaled down"


def _broke(seen: Observed) -> Decision | None:
    """The latest attempt ended without an outcome."""
    if seen.job is None or (end := end_of(seen.job)) is None:
        return None
    name, cause, so_far = seen.job["metadata"]["name"], _disruption(seen.pods), lost(seen)
    if end["type"] == "Complete":
        return _job_failed(seen, f"Job {name} ended well but reported no outcome")
    if cause is None or so_far is None:
        return _job_failed(seen, f"Job {name} failed: {_last_words(seen, end)}")
    if so_far.attempts >= MAX_ATTEMPTS:
        return _job_failed(seen, f"{so_far.attempts} attempts in a row were lost, the last one, Job {name}: {cause}")
    due = _moment(end) + _pause(so_far.attempts)
    if due <= seen.now.timestamp():
        return None
    wait = due - seen.now.timestamp()
    message = f"attempt {attempt_of(seen.job)} was lost, Job {name}: {cause}; the next one starts in {wait:.0f} s"
    return Decision("waiting", Reason.WAITING, message, requeue_after=wait)


def lost(seen: Observed) -> Lost | None:
    """The attempts at what is to be done now that were lost in a row, the latest one included; None where there are none.

    What the status says is carried on: a lost Job may be gone before the next attempt is.
    """
    if seen.profile is None:
        return None
    rerun, request = _asked_for(seen)
    found, told = _found(seen.profile), seen.profile.status.lost
    if told is not None and (told.rerun, told.extend, told.found) != (rerun, request, found):
        told = None
    end = end_of(seen.job) if seen.job is not None else None
    if seen.job is None or end is None or end["type"] != "Failed" or _disruption(seen.pods) is None:
        return told
    number = attempt_of(seen.job)
    if told is not None and told.last >= number:
        return told
    return Lost(attempts=told.attempts + 1 if told else 1, last=number, found=found, rerun=rerun, extend=request)


def _asked_for(seen: Observed) -> tuple[str | None, str | None]:
    """The `rerun` and the extension that are to be answered now."""
    rerun = seen.profile.spec.measurement.rerun if seen.profile else None
    return rerun, seen.extend.request if seen.extending and seen.extend is not None else None


def _found(profile: BatchProfile) -> int:
    """Points and trials that the present measurement has found so far."""
    status = profile.status
    found: Measured | None = status
    if profile.standing is not None:
        found = status.rerun if status.rerun and status.rerun.request == profile.spec.measurement.rerun else None
    return len(found.points) + len(found.trials) if found is not None else 0


def _job_failed(seen: Observed, message: str) -> Decision:
    rerun, request = _asked_for(seen)
    measured, standing = _measured(seen), seen.standing
    if measured is not None and (request is not None or standing is not None):
        said = _no_trials(request, message) if request is not None else _no_measurement(rerun, message)
        outcome = Outcome(
            state="BudgetExceeded" if measured.reason == Reason.BUDGET_EXCEEDED else "Completed",
            reason=Reason.JOB_FAILED,
            message=said[:8000],
            rerun=rerun,
            extend=standing.extend if standing is not None else request,
        )
        return _measured(replace(seen, outcome=outcome)) or measured
    outcome = Outcome(state="Failed", reason=Reason.JOB_FAILED, message=message[:8000], rerun=rerun)
    return Decision("failed", Reason.JOB_FAILED, _final(message), outcome=outcome)


def _unread(seen: Observed) -> Decision | None:
    """The lengths to measure with are not to be had: a pod that mounts them would never start, or measure something else."""
    return Decision("waiting", Reason.WAITING, seen.lengths) if seen.lengths else None


def _crowded(seen: Observed) -> Decision | None:
    if seen.busy < seen.slots:
        return None
    message = f"{seen.busy} of {seen.slots} profiling Jobs are running; this one starts when one of them ends"
    return Decision("waiting", Reason.WAITING, message, requeue_after=CROWDED_SECONDS)


def _starts(seen: Observed) -> Decision:
    attempt = seen.attempt + 1
    name = job_name(seen.obj["metadata"]["name"], attempt)
    return Decision("running", Reason.MEASURING, f"Job {name} is starting", start=attempt)


CHECKS: tuple[Callable[[Observed], Decision | None], ...] = (
    _invalid,
    _imported,
    _superseded,
    _ended,
    _unwanted,
    _runs,
    _broke,
    _unread,
    _crowded,
    _starts,
)
"""In the order in which they are asked; the last one always answers."""


def _final(message: str | None) -> str:
    return f"{message or 'no message'} (final until profiling.rerun gets a new text, or the manifest another key)"


def _active(jobs: Sequence[Object]) -> tuple[Object, ...]:
    return tuple(job for job in jobs if end_of(job) is None)


def _moment(end: Mapping[str, Any]) -> float:
    told = end.get("lastTransitionTime")
    return parse_timestamp(told).timestamp() if told else 0.0


def _pause(lost: int) -> float:
    return min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** (lost - 1))


def _disruption(pods: Sequence[Object]) -> str | None:
    """Why the latest pod's end wasn't its own doing; None when it was."""
    if not pods:
        return "its pod is gone, with its node perhaps"
    pod = _latest(pods)
    state = pod.get("status") or {}
    target = find(state.get("conditions") or (), "DisruptionTarget")
    if target is not None and target["status"] == "True":
        return f"pod {pod['metadata']['name']} was disrupted: {target.get('message') or target.get('reason')}"
    if state.get("reason") in _DISRUPTED:
        return f"pod {pod['metadata']['name']}: {state['reason']}: {state.get('message', '')}".rstrip(": ")
    return None


def _last_words(seen: Observed, end: Mapping[str, Any]) -> str:
    if not seen.pods:
        return f"{end.get('reason')}: {end.get('message')}"
    pod = _latest(seen.pods)
    if (pod.get("status") or {}).get("reason") == "DeadlineExceeded":
        limit = pod_deadline(seen.profile) if seen.profile else 0
        return f"pod {pod['metadata']['name']} was not done after {limit} s, its budget and what a setup may take"
    trouble = _own_trouble(pod) or podstate.trouble(pod)
    return trouble.message if trouble else f"{end.get('reason')}: {end.get('message')}"


def _own_trouble(pod: Object) -> podstate.Trouble | None:
    """What a container said at its end, rather than that the pod ended."""
    state = {key: value for key, value in (pod.get("status") or {}).items() if key != "phase"}
    return podstate.trouble({**pod, "status": state})


def _latest(pods: Sequence[Object]) -> Object:
    return max(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]))


def _starting(pods: Sequence[Object]) -> str:
    pod = _latest(pods)
    node = podstate.node_of(pod)
    return f"pod {pod['metadata']['name']} " + (
        f"is being set up on node {node}" if node else "waits for the scheduler"
    )


def _progress(seen: Observed) -> str:
    progress = seen.profile.status.progress if seen.profile else None
    if progress is None or not _answers(seen.profile, progress.rerun):
        return ""
    parts = [f"{progress.points} points so far", progress.message or progress.stage]
    if progress.elapsed:
        parts.append(f"{progress.elapsed} of GPU time")
    return ": " + ", ".join(parts)


# --- apply ---


async def apply(ctx: Context, seen: Observed, decision: Decision) -> Decision:
    """Remove and start Jobs as decided. Returns the decision, changed when the API refused the Job."""
    for job in decision.remove:
        await ctx.cluster.delete(Ref.of(job), uid=job["metadata"]["uid"])
    if decision.start is None or seen.profile is None:
        return decision
    async with ctx.starting:
        # Others may have started theirs while this one waited for its turn.
        if crowded := _crowded(_look(ctx, seen.obj)):
            return crowded
        return await _start(ctx, seen.profile, decision)


async def _start(ctx: Context, profile: BatchProfile, decision: Decision) -> Decision:
    image = OperatorImage(ctx.settings.operator_image, ctx.settings.image_pull_policy)
    job = profile_job(profile, decision.start or 1, image, _roomiest(ctx.store, profile))
    made_first = profiler_access(profile)
    if modes.only_claims(ctx.store, profile.spec.key.accelerator.product or ""):
        job, made_first = claims.with_claim(job, profile), [*made_first, claims.profiling_claim(job, profile)]
    later = ctx.settings.retry_seconds
    try:
        for obj in made_first:
            await ctx.cluster.apply(obj)
        try:
            await ctx.cluster.create(job)
        except AlreadyExists:
            check_ours(job, await ctx.cluster.get(Ref.of(job)))
    except NamespaceTerminating:
        raise
    except NameConflict as error:
        return Decision("waiting", Reason.NAME_CONFLICT, str(error), requeue_after=later)
    except Invalid as error:
        return Decision("failed", Reason.INVALID_SPEC, f"the API server refuses the profiling Job: {error.message}")
    except Forbidden as error:
        message = f"the profiling Job may not be made: {error.message}"
        return Decision("waiting", Reason.WAITING, message, requeue_after=later)
    return decision


def _roomiest(store: Store, profile: BatchProfile) -> int | None:
    """Replicas for which some node of the GPU's product has CPU and memory beside one GPU; None where nobody knows."""
    product = profile.spec.key.accelerator.product
    nodes = store.by("Node", labels.NODE_GPU_PRODUCT, product) if product else []
    rooms = [room_on(profile, (node.get("status") or {}).get("allocatable") or {}) for node in nodes]
    return max((room for room in rooms if room is not None), default=None)


# --- report ---

_PHASES: Mapping[str, str] = {
    "waiting": "Waiting",
    "running": "Measuring",
    "idle": "Idle",
    "complete": "Complete",
    "failed": "Failed",
}


def status(seen: Observed, decision: Decision, pods: Sequence[Object] = ()) -> dict[str, Any]:
    """All of the status that the operator owns."""
    metadata, old = seen.obj["metadata"], seen.obj.get("status") or {}
    generation = metadata.get("generation", 0)
    made: dict[str, Any] = {
        "observedGeneration": generation,
        "phase": _phase(seen, decision),
        "conditions": merge(old.get("conditions") or (), conditions(decision), generation=generation, now=seen.now),
    }
    attempt = decision.start or seen.attempt
    if attempt:
        made["job"] = {"name": job_name(metadata["name"], attempt), "attempt": attempt}
    if (so_far := lost(seen)) is not None and decision.stage not in ("complete", "failed"):
        made["lost"] = so_far.to_dict()
    image = next((found for pod in pods if (found := _image_id(pod))), None) or old.get("imageID")
    if image:
        made["imageID"] = image
    own = decision.outcome or (decision.measured.outcome if decision.measured else None)
    if own is not None:
        made["outcome"] = own.to_dict()
    if decision.reason == Reason.IMPORTED:
        results = seen.obj["spec"]["results"]
        made |= results | {"progress": {"stage": "Done", "points": len(results.get("points") or ())}}
    return made


def _phase(seen: Observed, decision: Decision) -> str:
    if decision.measured is not None and decision.stage == "running":
        return "Remeasuring" if seen.standing is not None else "Extending"
    return _PHASES[(decision.measured or decision).stage]


def conditions(decision: Decision) -> list[Condition]:
    """The four conditions of a profile, as a decision sees them."""
    busy = Condition(
        names.PROGRESSING,
        "True" if decision.stage in ("waiting", "running") else "False",
        decision.reason,
        decision.message,
    )
    told = decision.measured or decision
    reason, message = told.reason, told.message
    complete, failed = told.stage == "complete", told.stage == "failed"
    return [
        busy,
        Condition(names.COMPLETE, "True" if complete else "False", reason, message),
        Condition(names.FAILED, "True" if failed else "False", reason, message),
        Condition(names.READY, "True" if complete else "False" if failed else "Unknown", reason, message),
    ]


def _image_id(pod: Object) -> str | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        if container["name"] == ENGINE_CONTAINER and container.get("imageID"):
            found: str = container["imageID"]
            return found
    return None

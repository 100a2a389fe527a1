"""The reconciler of a GPUPack: hold one GPU (or one set of cores), and run on it what the placement pass assigned.

    gather   the pack, its holder, its StatefulSets and pods, the services on it
    decide   pure functions over that view (`packview`, `core.rollout`)
    apply    holder, StatefulSets (each once admission lets its pods pass), and the one pod that is to be replaced next
    report   one status write, from a fresh look; not at each change, but all is done as soon as it can be

A pack without a holder has a ResourceClaim in its place, or nothing: its replicas bring the GPU, and are made at once.

What must always hold: no GPU is taken for replicas that their namespace refuses; no replica is started before the holder has
said which GPU it holds; a pack never moves to another node or GPU; a holder that leaves gets its replicas drained first; one
that dies is made anew on the same node, and until its daemon is back the replicas stop by themselves (fencing is theirs); what is
done about faults of MPS (`packfaults`) is decided once a call, acted upon and remembered in the same status; of
all replicas of a service, whatever number of packs they are on, never more are being replaced or sent away than
`rollout.maxUnavailable` lets be missing, and on one pack at most one of all services is replaced at a time; no service gets memory
of a pack that pods of another still hold; nothing is deleted but pods and StatefulSets of this pack, and the pack itself once
nobody is on it, whoever opened it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import Any

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileEngine
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import Assignment
from tightship.core import rollout
from tightship.kube.cluster import controller_of
from tightship.kube.errors import Conflict, Forbidden, Invalid, KubeError, NameConflict, OutlivedOwner
from tightship.kube.kinds import Ref
from tightship.kube.store import Object, labels_of
from tightship.manifests import claims
from tightship.manifests import holder as holder_manifests
from tightship.manifests import replicas as replica_manifests
from tightship.manifests.podparts import OperatorImage
from tightship.manifests.replicas import Place
from tightship.reconcile import admission, fleet, packfaults, packstatus, podstate
from tightship.reconcile.context import Context
from tightship.reconcile.packfaults import Course
from tightship.reconcile.packview import (
    Mps,
    Problem,
    View,
    gather,
    holding,
    readable,
    refused,
    replica_pods,
    rollout_pods,
)
from tightship.reconcile.queue import Key, Result
from tightship.reconcile.verdict import Verdict, examine

log = logging.getLogger(__name__)

_PATIENCE = 3.0
"""How much longer than a service's a pack's progress may wait for being told: its services tell it too."""


async def reconcile(ctx: Context, key: Key) -> Result:
    """Bring one pack nearer to its spec."""
    obj = ctx.store.get("GPUPack", "", key.name)
    if obj is None:
        await _clear(ctx, key.name)
        return Result()
    if obj["metadata"].get("deletionTimestamp"):
        return Result()
    view = gather(ctx.store, obj, ctx.absent)
    if view.finished:
        await ctx.cluster.delete(Ref.of(obj), uid=view.pack.metadata.uid)
        return Result()
    course = packfaults.decide(view, holding(view), ctx.clock.now())
    problems = await _apply(ctx, view, course)
    view = gather(ctx.store, obj, ctx.absent)
    status = packstatus.status(view, problems, ctx.clock.now(), course)
    # What was done about a fault is written down at once: the next look goes by it.
    later = 0.0 if course.repair != view.pack.status.repair else ctx.report_later(obj, status, times=_PATIENCE)
    if not later:
        await ctx.report(obj, status)
    again = packstatus.next_look(view, problems, ctx.clock.now(), ctx.settings.retry_seconds)
    return Result(min(filter(None, (later, again)), default=None))


async def _clear(ctx: Context, name: str) -> None:
    """A pack that somebody deleted leaves StatefulSets of services behind, which nobody else would miss."""
    for found in ctx.store.list("StatefulSet", label=(labels.PACK, name)):
        await ctx.cluster.delete(Ref.of(found), uid=found["metadata"]["uid"])


async def _apply(ctx: Context, view: View, course: Course) -> list[Problem]:
    """Holder, StatefulSets, roll-out: each on its own, so that trouble with one does not hide the others."""
    problems: list[Problem] = []
    for step in (_hold, _run, _repair, _roll):
        gate = names.HELD if step is _hold else names.REPLICAS_READY
        try:
            problems += await step(ctx, view, course)
        except (NameConflict, OutlivedOwner, Invalid, Forbidden, Conflict) as error:
            problems.append(_problem(error, gate))
    return problems


def _problem(error: KubeError, gate: str = names.REPLICAS_READY) -> Problem:
    if isinstance(error, NameConflict):
        return Problem(Reason.NAME_CONFLICT, str(error), gate)
    if isinstance(error, Forbidden | Invalid):
        return Problem(Reason.SHARING_UNAVAILABLE, str(error), gate)
    return Problem(Reason.NOT_YET_KNOWN if gate == names.HELD else Reason.REPLICAS_STARTING, str(error), gate)


async def _hold(ctx: Context, view: View, course: Course) -> list[Problem]:
    """One holder for a pack that has somebody on it; one that has ended is cleared away and made anew."""
    pack = view.pack
    if not view.cpu and not pack.spec.has_holder:
        return await _claim(ctx, view)
    if view.cpu or (not pack.spec.assignments and view.holder is None):
        return []
    if view.holder is not None:
        if podstate.is_going(view.holder):
            return []
        if podstate.is_over(view.holder):
            await ctx.cluster.delete(Ref.of(view.holder), uid=view.holder["metadata"]["uid"])
        else:
            await _protect(ctx, view)
        return []
    if view.opener is None:
        text = "the service that opened this pack cannot be read: see its conditions"
        return [Problem(Reason.HOLDER_LOST, text, names.HELD)]
    namespace = ctx.settings.operator_namespace
    holder = holder_manifests.holder_pod(pack, view.opener.spec.template.spec, _image(ctx), namespace, pack.status.node)
    if (problem := await _unwelcome(ctx, view, holder)) is not None:
        return [problem]
    await asyncio.gather(*(ctx.cluster.apply(obj) for obj in holder_manifests.holder_access(pack, namespace)))
    await ctx.cluster.apply(holder)
    return []


async def _protect(ctx: Context, view: View) -> None:
    """Have evictions leave the holder alone while replicas of its GPU serve, unless they have nowhere else to go.

    A drain cordons first: the pack is moved, the next GPU's replicas serve, and then the holder goes by itself.
    """
    if "PodDisruptionBudget" in ctx.absent:
        return
    stays = view.pack.metadata.name not in ctx.placed.stranded and any(map(podstate.is_ready, replica_pods(view)))
    budget = holder_manifests.holder_budget(view.pack, ctx.settings.operator_namespace, protected=stays)
    if stays or (view.pack.spec.assignments and ctx.store.find(Ref.of(budget)) is not None):
        await ctx.cluster.apply(budget)


async def _claim(ctx: Context, view: View) -> list[Problem]:
    """The ResourceClaim of a pack that gets its GPU by one; it takes no GPU before a replica that names it is scheduled."""
    if view.pack.spec.claims and view.claim is None and view.pack.spec.assignments:
        await ctx.cluster.apply(claims.resource_claim(view.pack))
    return []


async def _unwelcome(ctx: Context, view: View, holder: dict[str, Any]) -> Problem | None:
    """What admission has against the pods of a pack without a holder: the holder, and the replicas that it would take a GPU for.

    Replicas are asked about once, before the first holder; later on their own pods would be in the way of a quota.
    """
    words = await admission.refusal(ctx.cluster, holder_manifests.without_account(holder))
    if words is not None:
        return Problem(Reason.SHARING_UNAVAILABLE, f"the pack's holder is refused: {words}", names.HELD)
    if view.pack.status.gpu is not None:
        return None
    against = []
    for assignment in view.pack.spec.assignments:
        made = _desired(ctx, view, assignment, Place(view.pack.status.node or "", None, None))
        words = await admission.refusal(ctx.cluster, replica_manifests.pod_of(made, 0)) if made is not None else None
        if made is not None and words is None:
            return None  # one of its services can use the GPU; what is against the others their own conditions say
        if words is not None:
            against.append(f"{refused(assignment.service)}: {words}")
    if not against:
        return None
    return Problem(Reason.SHARING_UNAVAILABLE, f"no GPU is taken, since {'; '.join(against)}", names.HELD)


def _desired(ctx: Context, view: View, assignment: Assignment, place: Place) -> dict[str, Any] | None:
    """The StatefulSet of an assignment at a place; None while replicas cannot be made from the manifest as it stands."""
    service = ctx.store.get("LLMService", view.pack.spec.namespace, assignment.service)
    if service is None:
        return None
    verdict = examine(service, ctx.store)
    if not verdict.matches(assignment, ctx.store):
        return None
    setup = _setup(ctx, view, assignment, verdict, place)
    return replica_manifests.statefulset(setup, assignment.replicas) if setup is not None else None


async def _run(ctx: Context, view: View, course: Course) -> list[Problem]:
    """One StatefulSet for each assignment; those of nobody go."""
    wanted = {each.service: each for each in view.pack.spec.assignments if each.replicas}
    problems = []
    for found in view.sets:
        if found["metadata"]["labels"].get(labels.SERVICE) not in wanted and not podstate.is_going(found):
            await _send_away(ctx, view, found, course)
    for assignment in wanted.values():
        try:
            problems += await _run_service(ctx, view, assignment, course)
        except (NameConflict, OutlivedOwner, Invalid, Forbidden) as error:
            problems.append(_problem(error))
    return problems


async def _send_away(ctx: Context, view: View, found: Object, course: Course) -> None:
    """A StatefulSet that has no place here any more goes as its replicas start to serve elsewhere, or with the holder, which ends them."""
    service = str(labels_of(found).get(labels.SERVICE))
    ends = course.stop or (view.holder is not None and podstate.is_going(view.holder))
    async with ctx.changing:
        count = 0 if ends else _may_shrink_to(ctx, view, service, found, 0)
        if count == 0:
            await ctx.cluster.delete(Ref.of(found), uid=found["metadata"]["uid"])
        else:
            await _scale_down(ctx, found, count)


def _may_shrink_to(ctx: Context, view: View, service: str, live: Object, target: int) -> int:
    """How far a StatefulSet may be scaled down towards `target` with enough replicas of its service serving."""
    namespace = view.pack.spec.namespace
    obj = ctx.store.get("LLMService", namespace, service)
    if obj is None or (owner := controller_of(live)) is None or owner["uid"] != obj["metadata"]["uid"]:
        return target
    legible = readable(ctx.store, obj) is not None
    return rollout.may_shrink_to(
        fleet.groups(ctx.store, namespace, service),
        view.pack.metadata.name,
        target,
        least=fleet.least_serving(ctx.store, namespace, service),
        placed=fleet.placed(ctx.store, namespace, service) if legible else fleet.ALL_OF_THEM,
        assigned=fleet.assigned(ctx.store, namespace, service) if legible else fleet.ALL_OF_THEM,
    )


async def _scale_down(ctx: Context, live: Object, count: int) -> None:
    if count < int(live["spec"].get("replicas", 1)):
        patch = {"metadata": {"uid": live["metadata"]["uid"]}, "spec": {"replicas": count}}
        await ctx.cluster.merge_patch(Ref.of(live), patch)


async def _run_service(ctx: Context, view: View, assignment: Assignment, course: Course) -> list[Problem]:
    namespace = view.pack.spec.namespace
    service = ctx.store.get("LLMService", namespace, assignment.service)
    if service is None or service["metadata"]["uid"] != assignment.uid:
        return []  # the placement pass is about to drop it
    live = ctx.store.get(
        "StatefulSet", namespace, replica_manifests.set_name(assignment.service, view.pack.metadata.name)
    )
    if course.stop or (view.holder is not None and podstate.is_going(view.holder)):
        # A holder that leaves waits for its clients: they drain now, instead of when it fences them. After a fatal fault the MPS
        # server takes nobody until the last one has left.
        if live is not None:
            await _scale_down(ctx, live, 0)
        return []
    shrinks = live is not None and int(live["spec"].get("replicas", 1)) > assignment.replicas
    async with ctx.changing if shrinks else nullcontext():
        return await _change(ctx, view, assignment, service, live)


async def _change(
    ctx: Context, view: View, assignment: Assignment, service: Object, live: Object | None
) -> list[Problem]:
    """Bring the StatefulSet of an assignment nearer to it: fewer first, then the template, then more."""
    target = assignment.replicas
    if live is not None and int(live["spec"].get("replicas", 1)) > target:
        target = _may_shrink_to(ctx, view, assignment.service, live, target)
    verdict = examine(service, ctx.store)
    if not verdict.matches(assignment, ctx.store):
        return await _scale_only(ctx, live, target)
    setup = _setup(ctx, view, assignment, verdict, holding(view).place)
    if setup is None:
        return await _scale_only(ctx, live, target) if live is not None else []
    desired = replica_manifests.statefulset(setup, assignment.replicas)
    kept = live if live is not None and _kept(desired, live) else None
    if kept is not None:
        desired["spec"]["template"] = kept["spec"]["template"]
    step = rollout.step(
        target,
        None if live is None else int(live["spec"].get("replicas", 1)),
        rollout_pods(view, assignment.service, live),
        replica_manifests.memory_of(desired["spec"]["template"]),
        fleet.capacity(ctx.store, view.pack, assignment.service),
    )
    if not step.template:
        return await _scale_only(ctx, live, step.replicas)
    desired["spec"]["replicas"] = step.replicas
    problem = await _refused(ctx, view, desired, live)
    if kept is not None:
        await _take_up(ctx, kept, desired)
    elif problem is None or (live is not None and _unchanged(desired, live)):
        await ctx.cluster.apply(desired)
    elif live is not None:
        await _scale_down(ctx, live, step.replicas)
    return [problem] if problem is not None else []


async def _refused(ctx: Context, view: View, desired: Object, live: Object | None) -> Problem | None:
    """What admission has against replicas that are to be made, are to change, or have been missing for a while."""
    ordinal, replaces = 0, live is not None
    if live is not None and _unchanged(desired, live):
        absent = admission.missing(view, live)
        if not absent or admission.patience(view, ctx.clock.now()) > 0:
            return None
        ordinal, replaces = absent[0], False
    words = await admission.refusal(ctx.cluster, replica_manifests.pod_of(desired, ordinal), replaces=replaces)
    if words is None:
        return None
    service = labels_of(desired)[labels.SERVICE]
    return Problem(Reason.SHARING_UNAVAILABLE, f"{refused(service)}: {words}")


async def _scale_only(ctx: Context, live: Object | None, count: int) -> list[Problem]:
    """Change nothing but the count: the manifest has changed since what runs was measured, or the template must wait."""
    if live is None:
        return [
            Problem(Reason.REPLICAS_STARTING, "the manifest changed before these replicas were made: measuring anew")
        ]
    await _scale_down(ctx, live, count)
    return []


def _setup(
    ctx: Context, view: View, assignment: Assignment, verdict: Verdict, place: Place | None
) -> replica_manifests.Setup | None:
    """What replicas are made from; None until the pack's device is known."""
    profile = ctx.store.get("BatchProfile", view.pack.spec.namespace, assignment.profile)
    if place is None or verdict.service is None or profile is None:
        return None
    engine = ctx.store.derive(profile, _engine_of)
    naming = ctx.settings.gpu_naming
    return replica_manifests.Setup(verdict.service, view.pack, assignment, place, engine, _image(ctx), naming)


def _engine_of(profile: Object) -> ProfileEngine:
    parsed = BatchProfile.model_validate(profile)
    return parsed.status.engine or (parsed.spec.results.engine if parsed.spec.results else None) or ProfileEngine()


def _kept(desired: Object, live: Object) -> bool:
    """Whether a StatefulSet's template stays as it is, though this operator would make another one: its replicas are made from the same.

    To write it would make all its pods outdated, and have those that come back differ from the others.
    """
    return _agree(labels.ANNOTATION_REVISION, desired, live) and not _agree(labels.ANNOTATION_TEMPLATE, desired, live)


def _unchanged(desired: Object, live: Object) -> bool:
    return any(_agree(name, desired, live) for name in (labels.ANNOTATION_REVISION, labels.ANNOTATION_TEMPLATE))


def _agree(name: str, desired: Object, live: Object) -> bool:
    return bool(desired["metadata"]["annotations"][name] == (live["metadata"].get("annotations") or {}).get(name))


async def _take_up(ctx: Context, live: Object, desired: Object) -> None:
    """Change nothing of a StatefulSet but how many it asks for, and which manifest it is of."""
    if live["spec"].get("replicas", 1) == desired["spec"]["replicas"] and _agree(
        labels.ANNOTATION_GENERATION, desired, live
    ):
        return
    told = {labels.ANNOTATION_GENERATION: desired["metadata"]["annotations"][labels.ANNOTATION_GENERATION]}
    patch = {
        "metadata": {"uid": live["metadata"]["uid"], "annotations": told},
        "spec": {"replicas": desired["spec"]["replicas"]},
    }
    await ctx.cluster.merge_patch(Ref.of(live), patch)


async def _repair(ctx: Context, view: View, course: Course) -> list[Problem]:
    """Start a replica anew that runs without MPS; have all leave a daemon that takes clients no more and that no holder watches."""
    pod = course.restart
    if pod is not None:
        log.info("repairing %s: %s runs without MPS", view.pack.metadata.name, pod["metadata"]["name"])
        await ctx.cluster.delete(Ref.of(pod), uid=pod["metadata"]["uid"])
    held = holding(view)
    if held.mps is not None and _refuses_all(view, held.mps):
        for client in replica_pods(view):
            if client["metadata"]["uid"] in held.mps.pods and not podstate.is_going(client):
                await ctx.cluster.delete(Ref.of(client), uid=client["metadata"]["uid"])
    return []


def _refuses_all(view: View, mps: Mps) -> bool:
    """Whether a daemon that nobody watches takes clients no more: none of those it had serves, and one was refused when it came back.

    Once all have left, their claim is released, and its driver ends the daemon.
    """
    if not view.pack.spec.claims or view.pack.spec.has_holder:
        return False
    pods = [pod for pod in replica_pods(view) if pod["metadata"]["uid"] in mps.pods]
    unserved = (Reason.MPS_NOT_ATTACHED, Reason.MPS_FAULT)
    refused = [found for pod in pods if (found := podstate.trouble(pod)) and found.reason in unserved]
    return bool(refused) and not any(podstate.is_ready(pod) for pod in pods)


async def _roll(ctx: Context, view: View, course: Course) -> list[Problem]:
    """Replace outdated pods: as many as the service can miss, and on this pack one at a time over all services."""
    if course.stop or course.restart is not None:
        return []
    namespace, pack = view.pack.spec.namespace, view.pack.metadata.name
    for assignment in view.pack.spec.assignments:
        live = ctx.store.get("StatefulSet", namespace, replica_manifests.set_name(assignment.service, pack))
        if not any(pod.outdated for pod in rollout_pods(view, assignment.service, live)):
            continue
        async with ctx.changing:
            chosen = rollout.replacements(
                fleet.groups(ctx.store, namespace, assignment.service),
                fleet.least_serving(ctx.store, namespace, assignment.service),
                fleet.fitting(ctx.store, namespace, assignment.service),
            )
            ordinal = next((ordinal for name, ordinal in chosen if name == pack), None)
            if ordinal is None:
                continue
            name = f"{replica_manifests.set_name(assignment.service, pack)}-{ordinal}"
            pod = ctx.store.get("Pod", namespace, name)
            if pod is not None:
                log.info("rolling %s: replacing %s", pack, name)
                await ctx.cluster.delete(Ref.of(pod), uid=pod["metadata"]["uid"])
                break
    return []


def _image(ctx: Context) -> OperatorImage:
    return OperatorImage(ctx.settings.operator_image, ctx.settings.image_pull_policy)

"""The reconciler of an LLMService: have it measured, give it a Service, and report how far it is.

    gather   the service, its verdict (validity, profile, decision), packs, pods, and what the last placement pass said of it
    decide   the chains of checks in `servicestatus`
    apply    the Service, its PodDisruptionBudget and InferencePool, then the BatchProfile: nothing is measured for what could
             not be served
    report   one status write, now or with what changes next

Placement is not done here. This only asks for a pass when the last one went by something else than what the service wants now, and says
with numbers what found no place. What must always hold: objects that aren't ours are never written; a profile that is complete for the
key is used, not measured again; replicas that run are left alone by everything that goes wrong with a newer manifest; somebody else's
budget under a service's name keeps it from nothing; a text in `profiling.rerun` or `profiling.extend` asks once, and is used up where
there is nothing to do, so that deciding again never starts a Job.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.core import placement
from tightship.core.backoff import avoid
from tightship.core.placement import Shortfall
from tightship.kube.cluster import controller_of
from tightship.kube.errors import AlreadyExists, Conflict, Forbidden, Invalid, NameConflict, NotFound, OutlivedOwner
from tightship.kube.kinds import Ref
from tightship.kube.store import Object, Store
from tightship.manifests import packs as pack_manifests
from tightship.manifests import service as service_manifests
from tightship.manifests.budget import disruption_budget
from tightship.manifests.pool import inference_pool
from tightship.reconcile import extension, fleet, indexes, modes, podstate, rerun, servicestatus, snapshot
from tightship.reconcile.context import Context
from tightship.reconcile.lengths import measurable
from tightship.reconcile.queue import PLACEMENT, Key, Result
from tightship.reconcile.reading import is_imported, key_hash, rerun_of
from tightship.reconcile.servicestatus import Refusal, View
from tightship.reconcile.verdict import Verdict, examine

log = logging.getLogger(__name__)

Refusals = tuple[Refusal, ...]


async def reconcile(ctx: Context, key: Key) -> Result:
    """Bring one service nearer to its manifest."""
    obj = ctx.store.get("LLMService", key.namespace, key.name)
    if obj is None or obj["metadata"].get("deletionTimestamp"):
        ctx.queue.add(PLACEMENT)
        _tell_profiles(ctx, key.namespace)
        return Result()
    refusals = await _apply(ctx, gather(ctx.store, obj))
    now = ctx.clock.now()
    demand = snapshot.demand(obj, ctx.store, now)
    seen = ctx.placed.knows(demand)
    shortfall = ctx.placed.shortfalls.get(demand.service) if seen else None
    unfit, serving, wait = snapshot.rooms(key.namespace, key.name, ctx.store, now)
    avoided = avoid(snapshot.remembered(obj), unfit, serving, now)
    view = replace(gather(ctx.store, obj, refusals, shortfall, absent=ctx.absent), avoided=avoided)
    status = servicestatus.status(view, now)
    # Placement waits for the first word: that the manifest is accepted.
    later = ctx.report_later(obj, status) if obj.get("status") else 0.0
    changed = not later and await ctx.report(obj, status)
    # What packs make depends on this manifest; and what one may replace or send away, on the replicas of the others.
    assigned = {each.metadata.name: servicestatus.assigned_to(each, view.uid) for each in view.packs}
    for pack in sorted(fleet.unfinished(view.sets, view.pods, assigned) | (set(assigned) if changed else set())):
        ctx.queue.add(Key("GPUPack", "", pack))
    before = ((obj.get("status") or {}).get("profile") or {}).get("name")
    if before != view.verdict.profile_name:
        _tell_profiles(ctx, key.namespace)
    if not seen:
        ctx.queue.add(PLACEMENT)
    waits = [each for each in (wait, later) if each]
    waits += [ctx.settings.retry_seconds] if any(not each.spared for each in refusals) else []
    waits += [left + 1 for each in avoided if (left := (each.until - now).total_seconds()) > 0]
    return Result(requeue_after=min(waits, default=None))


def _tell_profiles(ctx: Context, namespace: str) -> None:
    """A measurement that this service waited for may be wanted no more, or wanted again."""
    for profile in ctx.store.by("BatchProfile", indexes.STATE, indexes.OPEN, namespace):
        ctx.queue.add(Key("BatchProfile", namespace, profile["metadata"]["name"]))


def gather(
    store: Store,
    obj: Object,
    refusals: Refusals = (),
    shortfall: Shortfall | None = None,
    *,
    absent: frozenset[str] = frozenset(),
) -> View:
    """Collect what the service's status speaks of; `absent`: optional kinds that the cluster lacks."""
    uid = obj["metadata"]["uid"]
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    packs, nodes = snapshot.packs_with(uid, store), snapshot.facts(store)
    mine = [pack for pack in packs if servicestatus.assigned_to(pack, uid)]
    verdict = examine(obj, store)
    pods = store.list("Pod", namespace, (labels.SERVICE, name))
    return View(
        obj=obj,
        verdict=verdict,
        products=nodes.products,
        divided=nodes.divided,
        largest_cores=nodes.largest_cores,
        refusals=refusals,
        sets=tuple(store.list("StatefulSet", namespace, (labels.SERVICE, name))),
        packs=tuple(sorted(mine, key=lambda pack: (placement.ordinal_of(pack.metadata.name), pack.metadata.name))),
        pods=tuple(pod for pod in pods if podstate.is_replica(pod)),
        shortfall=shortfall,
        absent=absent,
        mode_problem=_mode_problem(verdict, store, absent),
        share_problem=_share_problem(verdict, store),
        approved=verdict.service is not None and snapshot.approved(verdict.service, verdict, packs),
    )


async def _apply(ctx: Context, view: View) -> Refusals:
    """The service's own objects, then the profile. Returns what stands in the way of serving at all."""
    verdict = view.verdict
    if servicestatus.first(view, servicestatus.ACCEPTED).status != "True" or verdict.service is None:
        return ()
    service = verdict.service
    pool = inference_pool(service)
    spared: Refusals = ()
    for made in (service_manifests.service_object(service), disruption_budget(service), *([pool] if pool else [])):
        refusal = await _write(ctx, made) if made["kind"] not in ctx.absent else None
        if refusal is not None and not refusal.spared:
            return (refusal,)
        spared += (refusal,) if refusal is not None else ()
    if pool is None:
        await _remove_pool(ctx, service)
    return spared + await _profile(ctx, verdict)


async def _remove_pool(ctx: Context, service: LLMService) -> None:
    """The pool that an earlier manifest asked for goes; one that isn't ours stays."""
    there = ctx.store.get("InferencePool", service.metadata.namespace or "", service.metadata.name)
    owner = controller_of(there) if there is not None else None
    if there is not None and owner is not None and owner["uid"] == service.metadata.uid:
        await ctx.cluster.delete(Ref.of(there), uid=there["metadata"]["uid"])


async def _write(ctx: Context, made: Object) -> Refusal | None:
    """Apply one object of a service; what came in the way, if anything did."""
    kind = made["kind"]
    try:
        await ctx.cluster.apply(made)
    except NameConflict as error:
        if kind == "PodDisruptionBudget":
            text = f"it serves without a budget of its own, so evictions may take any number of its replicas: {error}"
            return Refusal(Reason.NAME_CONFLICT, text, spared=True)
        return Refusal(Reason.NAME_CONFLICT, str(error))
    except (Invalid, Forbidden) as error:
        return Refusal(Reason.INVALID_SPEC, f"the {kind} was refused: {error}")
    except (OutlivedOwner, Conflict, NotFound) as error:
        log.info("%s: %s", made["metadata"]["name"], error)
        return Refusal(Reason.NOT_YET_KNOWN, f"the {kind} could not be written yet: {error}", passing=True)
    return None


async def _profile(ctx: Context, verdict: Verdict) -> Refusals:
    """Have the manifest measured, unless a profile of its key is there; pass on what is asked of it anew."""
    service, key = verdict.service, verdict.key
    if service is None or key is None or (verdict.profile is None and service.spec.profile_ref is not None):
        return ()
    if verdict.profile is None:
        try:
            await ctx.cluster.create(pack_manifests.batch_profile(service, key))
        except AlreadyExists:
            there = await ctx.cluster.get(
                Ref("BatchProfile", service.metadata.namespace or "", pack_manifests.profile_name(key))
            )
            if key_hash(there) != key.hash:
                text = f"BatchProfile {there['metadata']['name']} exists with another key: delete or rename it"
                return (Refusal(Reason.NAME_CONFLICT, text),)
        except (Invalid, Forbidden) as error:
            return (Refusal(Reason.INVALID_SPEC, f"the BatchProfile was refused: {error}"),)
        return ()
    if not is_imported(verdict.profile):
        await _ask(ctx, service, verdict, verdict.profile)
    return ()


async def _ask(ctx: Context, service: LLMService, verdict: Verdict, profile: Object) -> None:
    """Pass a new `rerun` or `extend` on to the profile, with how to measure; and where the lengths are, when it can't find them any more."""
    name, profiling = service.metadata.name, service.spec.profiling
    measurement: dict[str, Any] = {}
    annotations: dict[str, str] = {}
    if rerun.is_due(service, profile):
        annotations[labels.rerun_annotation(name)] = profiling.rerun or ""
        measurement |= {"rerun": profiling.rerun} if profiling.rerun != rerun_of(profile) else {}
    elif extension.is_due(verdict):
        annotations[labels.extend_annotation(name)] = profiling.extend or ""
        if (asked := extension.request(verdict)) is not None:
            measurement["extend"] = asked.to_dict()
    if measurement or rerun.follows(service, profile, ctx.store):
        measurement |= rerun.settings(service, profile)
        annotations |= {labels.ANNOTATION_ASKED_BY: name} if measurement else {}
    if service.spec.profile_ref is None and service.spec.workload.lengths_from and _lost_lengths(ctx.store, profile):
        measurement["lengthsFrom"] = service.spec.workload.lengths_from.to_dict()
    if measurement or annotations:
        metadata = {"uid": profile["metadata"]["uid"]} | ({"annotations": annotations} if annotations else {})
        patch = {"metadata": metadata} | ({"spec": {"measurement": measurement}} if measurement else {})
        await ctx.cluster.merge_patch(Ref.of(profile), patch)


def _lost_lengths(store: Store, profile: Object) -> bool:
    """Whether the ConfigMap that a profile names has its lengths no more: another service may have them under another name."""
    try:
        return measurable(BatchProfile.model_validate(profile), store) is not None
    except ValidationError:
        return False


def _mode_problem(verdict: Verdict, store: Store, absent: frozenset[str]) -> str | None:
    return modes.unavailable(verdict.service, store, absent) if verdict.service is not None else None


def _share_problem(verdict: Verdict, store: Store) -> str | None:
    if verdict.service is None or verdict.shape is None:
        return None
    return modes.too_small(verdict.service, verdict.shape.memory, store)

"""The placement pass: one at a time, over a snapshot of the whole cluster; the planner decides, this writes.

Every write carries what it was decided on: a new pack is POSTed under its deterministic name, a changed one is PUT with the
resourceVersion that was read. When either is refused the cluster was not as it looked: the pass is abandoned, and the next one
starts from a new look. What was written before stays, and is right, because each step of a plan stands alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1.validation import InvalidSpecError, parse_service
from tightship.core import placement
from tightship.core.conditions import find
from tightship.core.placement import Assignment, Pack, Plan
from tightship.kube.errors import AlreadyExists, Conflict, NotFound
from tightship.manifests import packs as manifests
from tightship.reconcile import snapshot
from tightship.reconcile.context import Context
from tightship.reconcile.queue import Key, Result

log = logging.getLogger(__name__)

_SOON = 0.5


async def reconcile(ctx: Context, key: Key) -> Result:
    """One pass: gather, decide, apply."""
    now = ctx.clock.now()
    gathered = snapshot.take(ctx.store, now)
    plan = placement.plan(gathered)
    try:
        await apply(ctx, plan)
    except (Conflict, AlreadyExists, NotFound) as error:
        log.info("placement: the cluster changed during the pass, looking again: %s", error)
        return Result(requeue_after=_SOON)
    _tell(ctx, plan)
    return Result(requeue_after=snapshot.next_look(ctx.store, now))


def _tell(ctx: Context, plan: Plan) -> None:
    """Their reconcilers say with numbers what a service lacks; nobody else tells them that a node has changed that."""
    for shortfall in plan.shortfalls:
        ctx.queue.add(Key("LLMService", shortfall.service.namespace, shortfall.service.name))
    for service in ctx.store.list("LLMService"):
        accepted = find((service.get("status") or {}).get("conditions") or (), names.ACCEPTED) or {}
        if accepted.get("reason") == names.Reason.UNSUPPORTED_ACCELERATOR:
            ctx.queue.add(Key("LLMService", service["metadata"]["namespace"], service["metadata"]["name"]))


async def apply(ctx: Context, plan: Plan) -> None:
    """Write a plan: first what gives replicas a place, then what takes one away.

    A pack lets replicas go by how many places the service has, so it must see those that a move leads to: it looks before or after
    (`Context.changing`), and a plan that is abandoned half-way has given more places than it should, never fewer. Raises Conflict,
    NotFound or AlreadyExists when the cluster is not what the plan was made for.
    """
    async with ctx.changing:
        for pack in plan.create:
            await _create(ctx, pack)
        for name, assignments in sorted(plan.update, key=lambda update: (_takes_away(ctx, *update), update[0])):
            await _update(ctx, name, assignments)


def _takes_away(ctx: Context, name: str, assignments: Sequence[Assignment]) -> bool:
    """Whether somebody has fewer replicas on a pack than before."""
    shown = ctx.store.get("GPUPack", "", name) or {}
    now = {each.uid: each.replicas for each in assignments}
    before = (shown.get("spec") or {}).get("assignments") or ()
    return any(now.get(each["uid"], 0) < int(each.get("replicas") or 0) for each in before)


async def _update(ctx: Context, name: str, assignments: Sequence[Assignment]) -> None:
    shown = ctx.store.get("GPUPack", "", name)
    if shown is None:
        return
    changed: Mapping[str, Any] = {**shown, "spec": {**shown["spec"], "assignments": manifests.assignments(assignments)}}
    await ctx.cluster.replace(changed)
    log.info("placement: %s now has %s", name, _in_words(assignments))


async def _create(ctx: Context, pack: Pack) -> None:
    shown = ctx.store.get("LLMService", pack.owner.namespace, pack.owner.name)
    if shown is None:
        return
    try:
        service = parse_service(shown)
    except InvalidSpecError:
        return
    await ctx.cluster.create(manifests.gpu_pack(pack, service))
    log.info("placement: opened %s with %s", pack.name, _in_words(pack.assignments))


def _in_words(assignments: Sequence[Assignment]) -> str:
    return ", ".join(f"{each.replicas} of {each.service}" for each in assignments) or "nothing"

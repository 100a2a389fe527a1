"""The placement pass: one at a time, over a snapshot of the whole cluster; the planner decides, this writes.

Every write carries what it was decided on: a new pack is POSTed under its deterministic name, a changed one is PUT with the
resourceVersion that was read. When either is refused the cluster was not as it looked: the pass is abandoned, and the next one
starts from a new look. What was written before stays, and is right, because each step of a plan stands alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1.validation import InvalidSpecError, parse_service
from tightship.core import placement
from tightship.core.conditions import find
from tightship.core.placement import Assignment, Pack, Plan, ServiceRef, Snapshot
from tightship.kube.errors import AlreadyExists, Conflict, NotFound
from tightship.manifests import packs as manifests
from tightship.reconcile import snapshot
from tightship.reconcile.context import Context, Pass
from tightship.reconcile.queue import Key, Result

log = logging.getLogger(__name__)

_SOON = 0.5
_AT_ONCE = 8
"""New packs that are being written at the same time."""
_RESTS = 4.0
"""How long no pass is made, in terms of how long the planning of the last one took: passes take a fifth of a core at most, however
large the cluster is, and what changes meanwhile is planned together."""


async def reconcile(ctx: Context, key: Key) -> Result:
    """One pass: gather, decide, apply, tell."""
    now, started = ctx.clock.now(), ctx.clock.monotonic()
    gathered = snapshot.take(ctx.store, now)
    plan = placement.plan(gathered)
    rest = _RESTS * (ctx.clock.monotonic() - started)
    try:
        await apply(ctx, plan)
    except (Conflict, AlreadyExists, NotFound) as error:
        log.info("placement: the cluster changed during the pass, looking again: %s", error)
        return Result(requeue_after=_SOON, rest=rest)
    _tell(ctx, gathered, plan)
    return Result(requeue_after=snapshot.next_look(ctx.store, now), rest=rest)


def _tell(ctx: Context, gathered: Snapshot, plan: Plan) -> None:
    """Leave word for the services, and have those look for which it is news: nobody else tells them what a node or another service changed."""
    before, nodes = ctx.placed, snapshot.facts(ctx.store)
    ctx.placed = Pass(
        {demand.service: demand for demand in gathered.demands},
        {shortfall.service: shortfall for shortfall in plan.shortfalls},
        (nodes.products, nodes.divided, nodes.shares, nodes.largest_cores),
        frozenset(plan.stranded),
    )
    for name in before.stranded ^ ctx.placed.stranded:
        ctx.queue.add(Key("GPUPack", "", name))
    for service in ctx.placed.shortfalls.keys() | before.shortfalls.keys():
        if _word(before, service) != _word(ctx.placed, service):
            ctx.queue.add(Key("LLMService", service.namespace, service.name))
    if before.offers == ctx.placed.offers:
        return
    for obj in ctx.store.list("LLMService"):
        accepted = find((obj.get("status") or {}).get("conditions") or (), names.ACCEPTED) or {}
        shared = (obj["spec"].get("packing") or {}).get("mode") == "DevicePlugin"
        if shared or accepted.get("reason") == names.Reason.UNSUPPORTED_ACCELERATOR:
            ctx.queue.add(Key("LLMService", obj["metadata"]["namespace"], obj["metadata"]["name"]))


def _word(said: Pass, service: ServiceRef) -> tuple[object, object]:
    return said.demands.get(service), said.shortfalls.get(service)


async def apply(ctx: Context, plan: Plan) -> None:
    """Write a plan: first what gives replicas a place, then what takes one away.

    A pack lets replicas go by how many places the service has, so it must see those that a move leads to: it looks before or after
    (`Context.changing`), and a plan that is abandoned half-way has given more places than it should, never fewer. Raises Conflict,
    NotFound or AlreadyExists when the cluster is not what the plan was made for.
    """
    async with ctx.changing:
        left = deque(plan.create)

        async def create() -> None:
            while left:
                try:
                    await _create(ctx, left.popleft())
                except BaseException:
                    left.clear()  # the others end what they have begun
                    raise

        for error in await asyncio.gather(*(create() for _ in range(_AT_ONCE)), return_exceptions=True):
            if error is not None:
                raise error
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

"""All replicas of one service, on whatever packs: what a change on one pack must know of the others. Pure over the objects.

A pack's reconciler replaces and takes away replicas as `core.rollout` lets it, and that goes by the whole service. Packs are reconciled
side by side, so whoever asks and acts on the answer holds `Context.changing`; the store then shows what was done to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.gpupack import Assignment, GPUPack
from tightship.core import rollout
from tightship.core.rollout import Group
from tightship.kube.store import Object, Store, labels_of
from tightship.reconcile import podstate, snapshot
from tightship.reconcile.packview import granted_to_others, readable, replicas_of

ALL_OF_THEM = 10**6
"""How many have to serve of a manifest that can't be read: one at a time may be missing then."""


def groups(store: Store, namespace: str, service: str) -> list[Group]:
    """The groups of a service, crowding by other services included."""
    owner = store.get("LLMService", namespace, service)
    sets = store.list("StatefulSet", namespace, (labels.SERVICE, service))
    pods = store.list("Pod", namespace, (labels.SERVICE, service))
    found = grouped(sets, pods, owner["metadata"].get("generation") if owner else None)
    return [replace(each, crowded=_crowded(store, each.pack, service)) for each in found]


def grouped(sets: Iterable[Object], pods: Iterable[Object], generation: int | None) -> list[Group]:
    """Replica pods of one service by pack, with what their StatefulSet asks for; `generation` is the service's."""
    by_pack = {labels_of(found).get(labels.PACK, ""): found for found in sets}
    of_pack: dict[str, list[Object]] = {pack: [] for pack in by_pack}
    for pod in pods:
        if podstate.is_replica(pod):
            of_pack.setdefault(labels_of(pod).get(labels.PACK, ""), []).append(pod)
    return [_group(pack, by_pack.get(pack), of_pack[pack], generation) for pack in sorted(of_pack)]


def _group(pack: str, found: Object | None, pods: Iterable[Object], generation: int | None) -> Group:
    if found is None or podstate.is_going(found):
        return Group(pack, 0, replicas_of(pods, found), taken_up=False)
    made_from = (found["metadata"].get("annotations") or {}).get(labels.ANNOTATION_GENERATION)
    asked = int(found["spec"].get("replicas", 1))
    return Group(pack, asked, replicas_of(pods, found), taken_up=made_from == str(generation))


def unfinished(sets: Iterable[Object], pods: Iterable[Object], assigned: Mapping[str, int]) -> set[str]:
    """The packs with replicas of a service that are still to be replaced, or more of them than are assigned to the pack."""
    return {
        each.pack
        for each in grouped(sets, pods, None)
        if len(each.pods) > assigned.get(each.pack, 0) or any(pod.outdated for pod in each.pods)
    }


def least_serving(store: Store, namespace: str, service: str) -> int:
    """How many replicas of a service have to serve, by its manifest; none once it is gone."""
    obj = store.get("LLMService", namespace, service)
    if obj is None or obj["metadata"].get("deletionTimestamp"):
        return 0
    read = readable(store, obj)
    return read.spec.rollout.least_serving(read.spec.replicas) if read is not None else ALL_OF_THEM


def assigned(store: Store, namespace: str, service: str) -> int:
    """Replicas that a service has a place for, by what is assigned to packs, whatever runs there now."""
    return sum(each.replicas for _, each, _, _ in _assigned(store, namespace, service))


def placed(store: Store, namespace: str, service: str) -> int:
    """Of these, those that don't wait for memory which replicas of others still hold: who may be missing doesn't wait for them."""
    found = _assigned(store, namespace, service)
    return sum(rollout.fitting(each.replicas, (), memory, room) for _, each, memory, room in found)


def fitting(store: Store, namespace: str, service: str) -> int:
    """Of these, those that don't wait for memory of the service's own replicas either, which are larger still.

    Two services that both shrink to make room for each other would otherwise wait for each other.
    """
    total = 0
    for pack, each, memory, room in _assigned(store, namespace, service):
        pods = [pod for pod in store.list("Pod", label=(labels.PACK, pack.metadata.name)) if podstate.is_replica(pod)]
        mine = replicas_of((pod for pod in pods if labels_of(pod).get(labels.SERVICE) == service), None)
        total += rollout.fitting(each.replicas, mine, memory, room)
    return total


def _assigned(store: Store, namespace: str, service: str) -> Iterator[tuple[GPUPack, Assignment, int, int | None]]:
    """What a service has on packs: each with the bytes of a replica, and those that the pack has for all of them."""
    obj = store.get("LLMService", namespace, service)
    uid = str(obj["metadata"]["uid"]) if obj is not None else ""
    for pack in snapshot.packs_with(uid, store):
        for each in pack.spec.assignments:
            if each.uid == uid:
                yield pack, each, units.parse_quantity(each.memory_per_replica), capacity(store, pack, each.service)


def capacity(store: Store, pack: GPUPack, service: str) -> int | None:
    """Bytes that the replicas of one service may use on a pack, beside what others have there now; None: not known."""
    found = [store.get("LLMService", pack.spec.namespace, each.service) for each in pack.spec.assignments]
    reserves = [read.spec.packing.memory_reserve for obj in found if (read := readable(store, obj))]
    total = snapshot.capacity_of(pack, reserves)
    return None if total is None else max(0, total - granted_to_others(store, pack, service))


def _crowded(store: Store, pack: str, service: str) -> bool:
    """Whether a replica of another service on the pack is leaving or starting.

    An engine that starts reads how much memory is free, so nobody beside it may release any. One that is in trouble holds nobody up.
    """
    others = [
        pod
        for pod in store.list("Pod", label=(labels.PACK, pack))
        if podstate.is_replica(pod) and labels_of(pod).get(labels.SERVICE) != service
    ]
    return any(podstate.moves(pod) for pod in others)

"""A cluster with many services at rest, in one operator's memory: what the bounds of a reconcile's work are measured on.

Each service comes out of a small world of its own, settled by the operator's own reconcilers; the objects of all of them are then put
together under names and UIDs of their own, with an API behind them that takes the operator's writes.
"""

from __future__ import annotations

from typing import Any

from pack_world import World, make_node
from story import make_profile, make_service
from tightship.kube.kinds import KINDS
from tightship.kube.store import Object, Store
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import PLACEMENT, Key, Result


class CountingStore(Store):
    """A store that counts the objects it hands out, in `handed`."""

    handed = 0

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        self.handed += 1
        return super().get(kind, namespace, name)

    def by(self, kind: str, index: str, value: str, namespace: str | None = None) -> list[Object]:
        found = super().by(kind, index, value, namespace)
        self.handed += 1 + len(found)
        return found

    def list(self, kind: str, namespace: str | None = None, label: tuple[str, str] | None = None) -> Any:
        found = super().list(kind, namespace, label)
        self.handed += 1 + len(found)
        return found


class Crowd(World):
    """A world whose store counts."""

    store: CountingStore

    def make_store(self) -> CountingStore:
        return CountingStore(self._changed, INDEXERS)


async def make_crowd(services: int, *, packs: int = 2, settled: bool = True) -> Crowd:
    """A world at rest with that many services, each with `packs` GPUs of nodes of its own, two replicas on each, and a profile of its own.

    Unless `settled`, its operator has just started: it has read everything and looked at nothing.
    """
    crowd = Crowd(gpus=(), profiling=True)
    for index in range(services):
        for obj in await _household(index, packs):
            crowd.api.objects[_place(obj)] = obj
    crowd.api._version += 10**6
    crowd.watch()
    # What a start does: all is looked at, one pass is made, and nothing of it writes.
    while settled and len(crowd.queue):
        key = await crowd.queue.get()
        await look(crowd, key)
        crowd.queue.done(key)
    return crowd


async def look(world: World, key: Key) -> Result:
    """One reconcile."""
    return await world.reconcilers[key.kind](world.ctx, key)


def keys(world: World, kind: str) -> list[Key]:
    """The keys of all objects of a kind, or of the placement pass."""
    if kind == "Placement":
        return [PLACEMENT]
    return [Key(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]) for obj in world.store.list(kind)]


async def _household(index: int, packs: int) -> list[dict[str, Any]]:
    """The objects of one settled service, under names and UIDs that no other service has."""
    world = World(gpus=(), profiling=True)
    world.api._uid = 1000 * (index + 1)
    for node in range(packs):
        world.put(make_node(f"n{index}-{node}", 1))
    lengths = {"inputTokens": 111, "outputTokens": 300 + index}
    service = make_service(f"svc-{index}", replicas=2 * packs, workload=lengths)
    world.put(make_profile(service, name=f"profile-{index}"))
    world.put(service)
    await world.run(rounds=20)
    assert world.condition("LLMService", "default", f"svc-{index}", "Ready")[0] == "True", world.all("LLMService")
    return [obj for obj in world.api.objects.values() if obj["kind"] != "Event"]


def _place(obj: Object) -> str:
    return KINDS[obj["kind"]].path(obj["metadata"].get("namespace", ""), obj["metadata"]["name"])

"""What stories of changes share: services that serve, what is done to them, and what was seen of their replicas in the meantime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pack_world import World, complete, trial
from tightship.api.v1alpha1 import labels
from tightship.reconcile import podstate

NS = "default"
SHARED = {"maxReplicasPerGPU": 3, "sharedWith": "SameNamespace"}
THREE = (trial(96, 2, 12313.9, 18.98), trial(96, 3, 13100.0, 25.5))
"""Packings that were tried, three replicas on a GPU among them (see `pack_world.TRIALS`)."""


async def make_serving(*services: dict[str, Any], gpus: tuple[int, ...] = (2, 2), **found: Any) -> World:
    """A world in which these services are measured, packed and serving."""
    world = World(gpus=gpus)
    for service in services:
        world.put(service)
    await world.settle()
    await measure(world, **found)
    return world


async def measure(world: World, **found: Any) -> None:
    """Complete every profile there is, and let what follows happen."""
    for profile in world.all("BatchProfile"):
        world.change("BatchProfile", NS, profile["metadata"]["name"], lambda obj: complete(obj, **found))
    await world.run(rounds=40)


def change(world: World, name: str = "opt", **spec: Any) -> None:
    world.change("LLMService", NS, name, lambda obj: obj["spec"].update(spec))


def pods(world: World, service: str = "opt") -> list[dict[str, Any]]:
    found = [pod for pod in world.all("Pod") if pod["metadata"]["labels"].get(labels.SERVICE) == service]
    return [pod for pod in found if pod["metadata"]["labels"][labels.COMPONENT] == labels.COMPONENT_REPLICA]


def serving(world: World, service: str = "opt") -> int:
    return sum(podstate.is_ready(pod) for pod in pods(world, service))


def placed(world: World) -> dict[str, dict[str, int]]:
    return {
        pack["metadata"]["name"]: {each["service"]: each["replicas"] for each in pack["spec"]["assignments"]}
        for pack in world.all("GPUPack")
    }


def ready(world: World, service: str = "opt") -> tuple[str, str, str]:
    return world.condition("LLMService", NS, service, "Ready")


async def watch_it(world: World, look: Callable[[], None], rounds: int = 60) -> None:
    """Let operator and nodes go on by turns until nothing happens any more, and look after each turn."""
    for _ in range(rounds):
        await world.settle()
        look()
        before = world.api._version, set(world.api.objects)
        world.nodes_act()
        look()
        if before == (world.api._version, set(world.api.objects)):
            return
    raise AssertionError("it never came to rest")


class Least:
    """The fewest replicas that served, and the most that were away at once on one GPU."""

    def __init__(self, world: World, service: str = "opt") -> None:
        self.world, self.service = world, service
        self.served, self.away = serving(world, service), 0
        self.away_at_all = 0

    def __call__(self) -> None:
        self.served = min(self.served, serving(self.world, self.service))
        missing: dict[str, int] = {}
        for pod in pods(self.world, self.service):
            pack = pod["metadata"]["labels"][labels.PACK]
            missing[pack] = missing.get(pack, 0) + (not podstate.is_ready(pod))
        self.away = max([self.away, *missing.values()])
        self.away_at_all = max(self.away_at_all, sum(missing.values()))

"""Moves between nodes: cordons, nodes that turn out not to fit, and how long they are left alone."""

from __future__ import annotations

import asyncio
from typing import Any

from change_world import SHARED, THREE, Least, change, make_serving, placed, pods, ready, serving, watch_it
from pack_world import World, complete
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.core.conditions import timestamp
from tightship.reconcile import gpupack, placement
from tightship.reconcile.queue import PLACEMENT, Key

NS, SYSTEM = "default", "tightship-system"


def node_of(world: World, pack: str) -> str:
    return str(world.get("GPUPack", "", pack)["status"]["node"])


def cordon(world: World, node: str, value: bool = True) -> None:
    world.change("Node", "", node, lambda obj: obj["spec"].update(unschedulable=value))


def without_room(world: World, pod: dict[str, Any]) -> None:
    """The scheduler finds no room for a pod on the one node that it may be on."""
    text = "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) didn't match Pod's node affinity/selector."
    short = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
    short["lastTransitionTime"] = timestamp(world.clock.now())
    status = {"phase": "Pending", "conditions": [short]}
    world.change("Pod", NS, pod["metadata"]["name"], lambda obj: obj.update(status=status))


async def test_a_cordoned_node_is_emptied_a_pack_at_a_time_and_nobody_is_away() -> None:
    world = await make_serving(make_service(replicas=4), gpus=(2, 2))
    assert [node_of(world, f"default-opt-{ordinal}") for ordinal in (0, 1)] == ["n0", "n0"]
    least, together = Least(world), 0

    def look() -> None:
        nonlocal together
        least()
        packs = world.all("GPUPack")
        together = max(together, len(packs))

    cordon(world, "n0")
    await watch_it(world, look)
    assert placed(world) == {"default-opt-2": {"opt": 2}, "default-opt-3": {"opt": 2}}
    assert {node_of(world, pack) for pack in placed(world)} == {"n1"}
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert (least.served, together) == (4, 3)
    on_the_node = [pod for pod in world.all("Pod") if pod["spec"].get("nodeName") == "n0"]
    assert on_the_node == []


async def test_what_a_cordoned_node_has_stays_until_its_next_gpu_is_held_and_where_there_is_none() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(1, 1))
    before = {pod["metadata"]["uid"] for pod in pods(world)}
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-1"
    cordon(world, "n0")
    await world.run(rounds=20)
    assert placed(world) == {"default-opt-0": {}, "default-opt-1": {"opt": 2}}
    assert {pod["metadata"]["uid"] for pod in pods(world)} == before
    full = await make_serving(make_service(replicas=2), gpus=(1,))
    cordon(full, "n0")
    await full.run(rounds=20)
    assert placed(full) == {"default-opt-0": {"opt": 2}}
    assert ready(full)[:2] == ("True", "FullyRealised")


def protected(world: World, pack: str) -> bool | None:
    """Whether evictions leave a pack's holder alone; None where nothing is said of it."""
    found = [each for each in world.all("PodDisruptionBudget") if each["metadata"]["name"] == f"holder-{pack}"]
    return bool(found[0]["spec"]["minAvailable"]) if found else None


async def test_a_drain_may_evict_a_holder_only_when_nothing_serves_by_it_or_it_has_nowhere_to_go() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(1, 1))
    said = set()
    (budget,) = [each for each in world.all("PodDisruptionBudget") if each["metadata"]["namespace"] != NS]
    (holder,) = [pod for pod in world.all("Pod") if pod["metadata"]["name"] == "holder-default-opt-0"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= holder["metadata"]["labels"].items()
    assert budget["metadata"]["ownerReferences"][0]["kind"] == "GPUPack"
    cordon(world, "n0")
    await watch_it(world, lambda: said.add(protected(world, "default-opt-0")))
    assert placed(world) == {"default-opt-1": {"opt": 2}}
    assert said <= {True, None}, "until it was gone its holder stayed"
    assert protected(world, "default-opt-1") is True
    cordon(world, "n1")
    await world.run(rounds=20)
    assert protected(world, "default-opt-1") is False, "n0 is cordoned still"
    cordon(world, "n1", False)
    await world.run(rounds=20)
    assert protected(world, "default-opt-1") is True
    world.change("Pod", NS, pods(world)[0]["metadata"]["name"], lambda pod: pod["status"].update(conditions=[]))
    await world.settle()
    assert protected(world, "default-opt-1") is True, "one still serves"


async def test_a_pack_that_looks_while_a_move_is_being_written_sees_where_it_leads() -> None:
    """The planner's writes take a while, and packs are looked at beside it."""
    world = await make_serving(make_service(replicas=2), gpus=(1, 1))
    cordon(world, "n0")
    answer = world.api.request

    async def slow(*request: Any) -> Any:
        found = await answer(*request)
        for _ in range(3):
            await asyncio.sleep(0)
        return found

    world.api.request = slow  # type: ignore[method-assign]
    pack = Key("GPUPack", "", "default-opt-0")
    writing = asyncio.create_task(placement.reconcile(world.ctx, PLACEMENT))
    for _ in range(30):
        await asyncio.sleep(0)
        await gpupack.reconcile(world.ctx, pack)
    await writing
    assert placed(world) == {"default-opt-0": {}, "default-opt-1": {"opt": 2}}
    assert [found["spec"]["replicas"] for found in world.all("StatefulSet")] == [2]


async def test_what_waits_on_a_cordoned_node_is_drained_when_its_holder_is_evicted() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(1, 1))
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-1"
    cordon(world, "n0")
    await world.run(rounds=20)
    assert serving(world) == 2
    going = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    world.change("Pod", SYSTEM, "holder-default-opt-0", lambda obj: obj["metadata"].update(going))
    await world.settle()
    assert world.all("StatefulSet") == []
    world.started = lambda pod: True
    await world.run(rounds=20)
    assert placed(world) == {"default-opt-1": {"opt": 2}}
    assert ready(world)[:2] == ("True", "FullyRealised")


async def test_a_tenant_without_room_on_two_shared_packs_stays_on_the_second_and_says_so() -> None:
    """The third time round it isn't before the first node's time is up."""
    services = (
        make_service("chat", replicas=1, model__source="hf://models/chat", packing=SHARED),
        make_service("gpt", replicas=1, model__source="hf://models/gpt", packing={**SHARED, "sharedWith": "None"}),
    )
    world = await make_serving(*services, gpus=(1, 1), replica="25Gi", trials=THREE)
    change(world, "gpt", packing=SHARED)
    world.put(make_service("opt", replicas=1, packing=SHARED))
    world.started = lambda pod: pod["metadata"]["labels"].get(labels.SERVICE) != "opt"
    await world.settle()
    name = world.get("LLMService", NS, "opt")["status"]["profile"]["name"]
    world.change("BatchProfile", NS, name, lambda obj: complete(obj, replica="25Gi", trials=THREE))
    await world.run(rounds=20)
    seen = []
    for _ in range(4):
        (pod,) = pods(world)
        (pack,) = [name for name, there in placed(world).items() if "opt" in there]
        seen.append(node_of(world, pack))
        without_room(world, pod)
        await world.settle()
        await world.clock.advance(70)
        await world.run(rounds=20)
    assert seen == ["n0", "n1", "n1", "n1"]
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    kept_off = world.get("LLMService", NS, "opt")["status"]["avoidedNodes"]
    assert [(each["node"], each["times"]) for each in kept_off] == [("n0", 1), ("n1", 1)]
    assert f"kept off for want of room: n0 until {kept_off[0]['until']}, n1 until {kept_off[1]['until']}" in message
    assert "1 replicas stay where they are" in message
    await world.clock.advance(602)
    await world.run(rounds=20)
    assert [name for name, there in placed(world).items() if "opt" in there] == ["default-chat-0"]
    without_room(world, pods(world)[0])
    await world.settle()
    await world.clock.advance(70)
    await world.run(rounds=20)
    times = {each["node"]: each["times"] for each in world.get("LLMService", NS, "opt")["status"]["avoidedNodes"]}
    assert times["n0"] == 2


async def test_a_pack_that_waits_is_opened_anew_once_a_node_may_be_tried_again() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(1, 1))
    for pod in pods(world):
        without_room(world, pod)
    await world.clock.advance(70)
    await world.settle()
    assert placed(world)["default-opt-1"] == {"opt": 2}
    assert world.get("GPUPack", "", "default-opt-1")["spec"]["excludedNodes"] == ["n0"]
    # Somebody else takes the GPU of the only other node.
    world.change("Node", "", "n1", lambda obj: obj["status"]["allocatable"].update({labels.GPU_RESOURCE: "0"}))
    await world.run(rounds=20)
    assert world.condition("GPUPack", "", "default-opt-1", "Held")[:2] == ("False", "Unschedulable")
    await world.clock.advance(602)
    await world.run(rounds=30)
    assert [(name, node_of(world, name)) for name in placed(world)] == [("default-opt-2", "n0")]
    assert ready(world)[:2] == ("True", "FullyRealised")


async def test_a_gpu_that_one_service_s_spread_leaves_free_goes_to_another() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(2,))
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-1"
    change(world, replicas=4)
    await world.run(rounds=10)
    text = "0/1 nodes are available: 1 node(s) didn't match pod topology spread constraints."
    apart = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
    apart["lastTransitionTime"] = timestamp(world.clock.now())
    status = {"phase": "Pending", "conditions": [apart]}
    world.change("Pod", SYSTEM, "holder-default-opt-1", lambda obj: obj.update(status=status))
    await world.run(rounds=10)
    world.put(make_service("late", replicas=1))
    await world.run(rounds=20)
    assert ready(world, "late")[:2] == ("True", "FullyRealised")
    assert serving(world) == 2
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "InsufficientGPUs")

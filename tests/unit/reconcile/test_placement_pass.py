"""The placement pass against a cluster: what it reads, what it writes, and what it does when the cluster moved meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from pack_world import World, complete, make_node
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.core.placement import Health
from tightship.reconcile import placement, snapshot
from tightship.reconcile.queue import PLACEMENT

NS = "default"


async def make_measured(world: World | None = None, **changes: Any) -> World:
    """A world whose service is measured, with packs made and serving."""
    world = world or World()
    world.put(make_service(**changes))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    return world


def take(world: World) -> snapshot.Snapshot:
    return snapshot.take(world.store, world.clock.now())


async def test_a_pack_changed_meanwhile_abandons_the_pass_and_the_next_one_finishes() -> None:
    world = await make_measured()
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=1))
    # Somebody writes to the pack, and the watch has not told of it yet.
    world.api._store(
        "/apis/tightship.dev/v1alpha1/gpupacks/default-opt-0",
        {**world.get("GPUPack", "", "default-opt-0"), "touched": True},
    )
    result = await placement.reconcile(world.ctx, PLACEMENT)
    assert result.requeue_after is not None
    assert world.get("GPUPack", "", "default-opt-0")["spec"]["assignments"][0]["replicas"] == 2
    await world.run()
    assert [pack["spec"]["assignments"][0]["replicas"] for pack in world.all("GPUPack")] == [1]


async def test_a_pack_of_the_wanted_name_that_the_watch_has_not_shown_abandons_the_pass() -> None:
    world = World()
    world.put(make_service(replicas=2))
    await world.settle()
    unseen = {
        "apiVersion": labels.API_VERSION,
        "kind": "GPUPack",
        "metadata": {"name": "default-opt-0"},
        "spec": {"namespace": "x"},
    }
    world.api.put(unseen)
    world.store.observe({**world.all("BatchProfile")[0]})
    profile = world.all("BatchProfile")[0]
    complete(profile)
    world.store.observe({**profile, "metadata": {**profile["metadata"], "resourceVersion": "9999"}})
    assert (await placement.reconcile(world.ctx, PLACEMENT)).requeue_after is not None
    world.watch()
    await placement.reconcile(world.ctx, PLACEMENT)
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == ["default-opt-0", "default-opt-1"]


async def test_a_second_pass_right_after_the_first_sees_what_it_wrote() -> None:
    world = World()
    world.put(make_service())
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await placement.reconcile(world.ctx, PLACEMENT)
    made = world.api.writes()
    await placement.reconcile(world.ctx, PLACEMENT)
    assert world.api.writes() == made
    assert len(world.all("GPUPack")) == 2


async def test_the_first_service_of_a_namespace_does_not_take_what_another_was_promised() -> None:
    world = await make_measured(World(gpus=(1,)), replicas=2)
    world.put(make_service("abc", replicas=2))
    await world.run()
    assert {pack["metadata"]["name"] for pack in world.all("GPUPack")} == {"default-opt-0"}
    assert world.condition("LLMService", NS, "abc", "Packed")[:2] == ("False", "InsufficientGPUs")
    world.remove("LLMService", NS, "opt")
    await world.run(rounds=20)
    assert {pack["metadata"]["name"] for pack in world.all("GPUPack")} == {"default-abc-0"}
    assert world.condition("LLMService", NS, "abc", "Ready")[:2] == ("True", "FullyRealised")


@pytest.mark.parametrize(
    ("template", "usable"),
    [
        ({}, {"n0", "n1"}),
        ({"nodeSelector": {"zone": "a"}}, {"n0", "zoned"}),
        ({"tolerations": [{"key": "gpu", "operator": "Exists"}]}, {"n0", "n1", "tainted"}),
        ({"tolerations": [{"key": "gpu", "value": "yes"}]}, {"n0", "n1", "tainted"}),
        ({"tolerations": [{"key": "gpu", "value": "no"}]}, {"n0", "n1"}),
        ({"tolerations": [{"operator": "Exists"}]}, {"n0", "n1", "tainted"}),
    ],
)
async def test_which_nodes_count(template: dict[str, Any], usable: set[str]) -> None:
    world = World(gpus=(1, 1))
    world.change("Node", "", "n0", lambda node: node["metadata"]["labels"].update(zone="a"))
    tainted = make_node("tainted", 1)
    tainted["spec"]["taints"] = [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]
    world.put(tainted)
    if "nodeSelector" in template:
        zoned = make_node("zoned", 1)
        zoned["metadata"]["labels"]["zone"] = "a"
        world.put(zoned)
    world.put(make_service(template={"spec": template}))
    await world.settle()
    assert take(world).demands[0].nodes == usable


async def test_a_node_that_stays_silent_counts_as_gone_after_five_minutes() -> None:
    world = await make_measured()
    silent = {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    world.change("Node", "", "n0", lambda node: node["status"].update(conditions=[silent]))
    assert {pack.health for pack in take(world).packs} == {Health.SOUND}
    wait = snapshot.next_look(world.store, world.clock.now())
    assert wait is not None
    assert 299 < wait < 302
    await world.clock.advance(wait)
    assert {pack.health for pack in take(world).packs} == {Health.LOST}


async def test_before_the_nodes_are_known_no_pack_is_given_up() -> None:
    world = await make_measured()
    for node in list(world.store.list("Node")):
        world.store.forget(node)
    assert {pack.health for pack in take(world).packs} == {Health.SOUND}


async def test_a_pack_s_ledger_is_its_gpu_less_the_reserve() -> None:
    world = await make_measured(packing={"memoryReserve": "10%"})
    (demand,), packs = take(world).demands, take(world).packs
    assert {pack.capacity - demand.reserve.of(pack.capacity) for pack in packs if pack.capacity} == {72 * 2**30}


async def test_a_service_that_cannot_be_read_loses_nothing() -> None:
    world = await make_measured()
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].pop("model"))
    await world.run()
    assert sum(each["replicas"] for pack in world.all("GPUPack") for each in pack["spec"]["assignments"]) == 4


async def test_core_sets_opened_in_one_pass_share_the_memory_of_their_node() -> None:
    world = World(gpus=(0,))
    cores = {"device": "cpu", "cores": 2, "coresPerReplica": 1, "memory": "140Gi"}
    for name in ("one", "two"):
        world.put(make_service(name, replicas=1, accelerator=cores))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run(rounds=20)
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == ["default-one-0"]
    status, reason, message = world.condition("LLMService", NS, "two", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    assert (
        "of 8 that this service may use 0 are free on nodes with the 140Gi that a pack takes (at most 116Gi is free on one)"
        in message
    )

"""Every reason that a GPUPack's conditions can give, reached through the API: a table of how.

The table is held against the conventions' list and against the code: a reason that the modules which make a pack's conditions name, and
that no row reaches, fails the test.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fault_world import (
    CPU,
    NS,
    PACK,
    SYSTEM,
    condition,
    container_ends,
    gpu_is_lost,
    holder,
    make_packed,
    make_placed,
    make_service,
    message,
    replicas,
)
from modes_world import SHARED, make_shared_world, make_world, pack
from pack_world import World, complete
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.kube.kinds import KINDS
from tightship.manifests.replicas import set_name
from tightship.reconcile import gpupack, packfaults, packstatus, packview, podstate

CONVENTIONS = {
    *(
        "GPUHeld",
        "MPSActive",
        "CPUSet",
        "DeviceLimitsForced",
        "MPSFault",
        "GPUMismatch",
        "MPSNotAttached",
        "GPUNotVisible",
        "HolderLost",
    ),
    *("WaitingForStartSlot", "OOMKilled", "CrashLoop", "ImagePullFailed", "Unschedulable"),
}

Story = Callable[[], Awaitable[World]]


def is_holder(pod: dict[str, Any]) -> bool:
    return bool(pod["metadata"]["labels"][labels.COMPONENT] == labels.COMPONENT_HOLDER)


async def well() -> World:
    return await make_packed()


async def on_cores() -> World:
    return await make_packed(accelerator=CPU, packing={"maxReplicasPerGPU": 2})


async def alone() -> World:
    return await pack(make_world(), packing={"mode": "Exclusive"})


async def by_shares() -> World:
    return await pack(make_shared_world(2), **SHARED)


async def just_made() -> World:
    return await make_placed()


async def starting() -> World:
    world = await make_placed(started=is_holder)
    await world.run()
    return world


async def one_starting() -> World:
    world = await make_packed()
    world.started = is_holder
    del world.api.objects[KINDS["Pod"].path("default", replicas(world)[0]["metadata"]["name"])]
    world.nodes_act()
    await world.settle()
    return world


async def nobody_assigned() -> World:
    world = await make_packed()
    world.remove("LLMService", "default", "opt")
    await world.settle()
    return world


async def no_gpu_free() -> World:
    world = await make_placed(gpus=(1,))
    world.change("Node", "", "n0", lambda node: node["status"]["allocatable"].update({labels.GPU_RESOURCE: "0"}))
    await world.run()
    return world


async def holder_evicted() -> World:
    world = await make_packed()
    world.change("Pod", SYSTEM, holder(), lambda pod: pod.update(status={"phase": "Failed", "message": "evicted"}))
    await world.settle()
    return world


async def another_gpu() -> World:
    world = await make_packed(gpus=(1,))
    world.uuids[PACK] = "GPU-exchanged"
    world._publish()
    world.watch()
    # Before the placement pass has replaced it.
    world.reconcilers = {kind: each for kind, each in world.reconcilers.items() if kind != "Placement"}
    await world.settle()
    return world


async def gpu_lost() -> World:
    world = await make_packed()
    gpu_is_lost(world)
    await world.settle()
    return world


async def refused() -> World:
    world = World()
    world.api.refuses = lambda pod: "violates PodSecurity" if is_holder(pod) else None
    return await place(world)


async def place(world: World) -> World:
    """A service comes to a world that was prepared for it."""
    world.put(make_service(replicas=2))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    return world


async def holders_name_taken() -> World:
    world = World()
    metadata = {"name": holder(), "namespace": SYSTEM, "labels": {labels.COMPONENT: "other"}}
    world.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}})
    return await place(world)


def mps_says(state: str) -> Story:
    async def tell() -> World:
        world = await make_packed()
        world.mps_state = state
        world._publish()
        world.watch()
        await world.settle()
        return world

    return tell


async def not_seen_yet() -> World:
    world = await make_packed()
    world.unattached = {replicas(world)[0]["metadata"]["name"]}
    world._publish()
    world.watch()
    await world.settle()
    return world


async def without_mps() -> World:
    world = await make_packed()
    world.unattached = {pod["metadata"]["name"] for pod in replicas(world)}
    world._publish()
    world.watch()
    for _ in range(3):  # the second one waits for its back-off
        await world.clock.advance(40)
        await world.look_at_everything()
        world.nodes_act()
    await world.settle()
    return world


def replica_ends(words: str, **more: Any) -> Story:
    async def tell() -> World:
        world = await make_packed()
        container_ends(world, replicas(world)[0], "engine", words=words, **more)
        await world.settle()
        return world

    return tell


async def no_such_image() -> World:
    world = await make_packed()

    def waiting(pod: dict[str, Any]) -> None:
        state = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
        pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "engine", "image": "img", "state": state}]}

    world.change("Pod", "default", replicas(world)[0]["metadata"]["name"], waiting)
    await world.settle()
    return world


async def no_room() -> World:
    world = await make_packed()

    def homeless(pod: dict[str, Any]) -> None:
        text = "0/2 nodes are available: 1 Insufficient cpu."
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        pod["status"] = {"phase": "Pending", "conditions": [scheduled]}

    world.change("Pod", "default", replicas(world)[0]["metadata"]["name"], homeless)
    await world.settle()
    return world


async def name_taken() -> World:
    world = World()
    theirs = {"replicas": 0, "template": {"metadata": {"labels": {}}, "spec": {}}}
    metadata = {"name": set_name("opt", PACK), "namespace": "default"}
    world.put({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": theirs})
    return await place(world)


REACHED: list[tuple[str, str, str, Story, str]] = [
    ("Held", "True", "GPUHeld", well, "GPU-default-opt-0"),
    ("Held", "True", "CPUSet", on_cores, "2 cores"),
    ("Held", "Unknown", "NotYetKnown", just_made, "holder"),
    ("Held", "False", "Unschedulable", no_gpu_free, "Insufficient nvidia.com/gpu"),
    ("Held", "False", "HolderLost", holder_evicted, "evicted"),
    ("Held", "False", "GPUMismatch", another_gpu, "GPU-exchanged"),
    ("Held", "False", "GPUNotVisible", gpu_lost, "restart 2"),
    ("Held", "False", "SharingUnavailable", refused, "violates PodSecurity"),
    ("Held", "False", "NameConflict", holders_name_taken, holder()),
    ("ReplicasReady", "False", "NotAssigned", nobody_assigned, "drained"),
    ("SharingReady", "True", "MPSActive", well, "2 clients"),
    ("SharingReady", "True", "CPUSet", on_cores, "cores"),
    ("SharingReady", "True", "Exclusive", alone, "without MPS"),
    ("SharingReady", "True", "DeviceLimitsForced", by_shares, "at most 40Gi of 80Gi"),
    ("SharingReady", "Unknown", "NotYetKnown", not_seen_yet, "not been seen"),
    ("SharingReady", "False", "MPSFault", mps_says("FAULT"), "2 clients left"),
    ("SharingReady", "False", "MPSFault", mps_says("DOWN"), "does not answer"),
    ("SharingReady", "False", "MPSNotAttached", without_mps, "among the daemon's 0 clients"),
    ("ReplicasReady", "True", "ReplicasReady", well, "2 of 2"),
    ("ReplicasReady", "Unknown", "NotYetKnown", just_made, "once the device is held"),
    ("ReplicasReady", "False", "WaitingForStartSlot", starting, "0 of 2"),
    ("ReplicasReady", "False", "ReplicasStarting", one_starting, "1 of 2"),
    ("ReplicasReady", "False", "NameConflict", name_taken, set_name("opt", PACK)),
    ("ReplicasReady", "False", "Unschedulable", no_room, "Insufficient cpu"),
    ("ReplicasReady", "False", "ImagePullFailed", no_such_image, "no such tag"),
    ("ReplicasReady", "False", "OOMKilled", replica_ends("", reason="OOMKilled", exit_code=137), "restart 1"),
    ("ReplicasReady", "False", "CrashLoop", replica_ends("ValueError: bad"), "ValueError: bad"),
    *(
        ("ReplicasReady", "False", reason, replica_ends(f"{reason}: 3 of 4"), "3 of 4 (restart 1)")
        for reason in (
            *("GPUNotVisible", "GPUMismatch", "MPSNotAttached", "MPSFault", "HolderLost"),
            *("InsufficientMemory", "EngineHung"),
        )
    ),
    ("Ready", "True", "FullyRealised", well, "2 of 2"),
]


@pytest.mark.parametrize(
    ("which", "value", "reason", "tell", "words"), REACHED, ids=[f"{row[0]}-{row[2]}-{row[4]}" for row in REACHED]
)
async def test_the_reason_is_reached(which: str, value: str, reason: str, tell: Story, words: str) -> None:
    world = await tell()
    assert condition(world, which) == (value, reason)
    assert words in message(world, which)
    if value != "True" and which != "Ready":
        assert condition(world, "Ready")[0] != "True"


def named_in_code() -> set[str]:
    """The reasons that the modules which make a pack's conditions name."""
    found = set()
    for module in (gpupack, packfaults, packstatus, packview, podstate):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason":
                found.add(str(getattr(Reason, node.attr)))
    return found


def test_every_reason_of_a_pack_is_reached() -> None:
    reached = {row[2] for row in REACHED}
    assert reached >= CONVENTIONS
    assert reached == named_in_code() | CONVENTIONS

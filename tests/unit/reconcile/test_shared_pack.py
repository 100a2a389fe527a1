"""Two services on one GPU: one pack, one holder, a StatefulSet of each, and neither is in the other's way."""

from __future__ import annotations

from typing import Any

import pytest

from pack_world import World, complete, trial
from story import make_service
from tightship.api.units import parse_quantity
from tightship.api.v1alpha1 import labels

NS, PACK, SYSTEM = "default", "default-chat-0", "tightship-system"
SHARED = {"maxReplicasPerGPU": 3, "sharedWith": "SameNamespace"}
TRIALS = (trial(96, 2, 12313.9, 18.98), trial(96, 3, 13100.0, 25.5))


async def make_shared(gpus: tuple[int, ...] = (1,), *, replica: str = "25Gi", **changes: Any) -> World:
    """`chat` opens a GPU of 76Gi for its replica, and the two of `opt` join it; three of 25Gi fit."""
    world = World(gpus=gpus)
    both = {"packing": SHARED, **changes}
    world.put(make_service("chat", **{"replicas": 1, "model__source": "hf://models/chat", **both}))
    world.put(make_service("opt", **{"replicas": 2, **both}))
    await world.settle()
    for profile in world.all("BatchProfile"):
        world.change(
            "BatchProfile", NS, profile["metadata"]["name"], lambda obj: complete(obj, replica=replica, trials=TRIALS)
        )
    await world.run(rounds=20)
    return world


async def measure(world: World) -> None:
    """Complete every profile there is, and let what follows happen."""
    for profile in world.all("BatchProfile"):
        world.change("BatchProfile", NS, profile["metadata"]["name"], lambda obj: complete(obj, trials=TRIALS))
    await world.run(rounds=20)


def placed(world: World) -> dict[str, dict[str, int]]:
    return {
        pack["metadata"]["name"]: {each["service"]: each["replicas"] for each in pack["spec"]["assignments"]}
        for pack in world.all("GPUPack")
    }


def pods(world: World, service: str) -> list[dict[str, Any]]:
    found = [pod for pod in world.all("Pod") if pod["metadata"]["labels"].get(labels.SERVICE) == service]
    return [pod for pod in found if pod["metadata"]["labels"][labels.COMPONENT] == labels.COMPONENT_REPLICA]


def set_of(world: World, service: str) -> dict[str, Any]:
    (found,) = [each for each in world.all("StatefulSet") if each["metadata"]["labels"][labels.SERVICE] == service]
    return found


def ready(world: World, service: str) -> tuple[str, str]:
    return world.condition("LLMService", NS, service, "Ready")[:2]


async def test_two_services_share_one_holder_and_each_has_its_own_set() -> None:
    world = await make_shared()
    assert placed(world) == {PACK: {"chat": 1, "opt": 2}}
    holders = [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "holder"]
    assert [pod["metadata"]["name"] for pod in holders] == [f"holder-{PACK}"]
    for service, replicas in (("chat", 1), ("opt", 2)):
        made = set_of(world, service)
        assert made["spec"]["replicas"] == replicas
        assert made["metadata"]["ownerReferences"][0]["name"] == service
        (directory,) = [v for v in made["spec"]["template"]["spec"]["volumes"] if v["name"] == "pack"]
        assert directory["hostPath"]["path"].endswith(world.get("GPUPack", "", PACK)["metadata"]["uid"])
        assert ready(world, service) == ("True", "FullyRealised")
    status = world.get("GPUPack", "", PACK)["status"]
    assert (status["replicaCount"], status["readyReplicas"], status["mps"]["attachedReplicas"]) == (3, 3, 3)
    each = world.get("GPUPack", "", PACK)["spec"]["assignments"][0]["memoryPerReplica"]
    assert parse_quantity(status["ledger"]["assigned"]) == 3 * parse_quantity(each)
    assert world.get("LLMService", NS, "opt")["status"]["packs"][0]["replicas"] == 2


async def test_packed_says_that_nobody_measured_the_mix() -> None:
    world = await make_shared()
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("True", "Placed")
    assert f"shared with chat (1 replica) on {PACK}: that mix was not measured" in message


@pytest.mark.parametrize(
    "changes", [{"packing": {"maxReplicasPerGPU": 3}}, {"packing": {**SHARED, "sharedWith": "None"}}]
)
async def test_by_default_nobody_shares(changes: dict[str, Any]) -> None:
    world = await make_shared((2,), **changes)
    assert placed(world) == {PACK: {"chat": 1}, "default-opt-0": {"opt": 2}}


async def make_pair(chat: dict[str, Any], opt: dict[str, Any]) -> World:
    """Two services that allow each other, with these templates, on a node with two GPUs."""
    world = World(gpus=(2,))
    for name, spec in (("chat", chat), ("opt", opt)):
        world.put(make_service(name, replicas=1, packing=SHARED, template={"spec": spec}))
    await world.settle()
    for profile in world.all("BatchProfile"):
        world.change("BatchProfile", NS, profile["metadata"]["name"], complete)
    await world.run(rounds=20)
    return world


ZONE = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]}
IN_ZONE = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [ZONE]}}}


@pytest.mark.parametrize(
    "template", [{"priorityClassName": "high"}, {"affinity": IN_ZONE}], ids=["another priority", "its own nodes"]
)
async def test_who_could_push_the_others_out_or_may_not_be_there_has_a_gpu_of_its_own(template: dict[str, Any]) -> None:
    apart = await make_pair({}, template)
    assert placed(apart) == {PACK: {"chat": 1}, "default-opt-0": {"opt": 1}}
    together = await make_pair({}, {})
    assert placed(together) == {PACK: {"chat": 1, "opt": 1}}


async def test_services_of_different_users_never_share() -> None:
    world = await make_pair(*({"securityContext": {"runAsUser": user}} for user in (1000, 2000)))
    assert placed(world) == {PACK: {"chat": 1}, "default-opt-0": {"opt": 1}}
    users = [pack["spec"]["runAsUser"] for pack in world.all("GPUPack")]
    assert users == [1000, 2000]


async def test_the_pack_stays_when_its_owner_goes_and_its_holder_is_made_from_who_is_left() -> None:
    world = await make_shared(template={"spec": {"priorityClassName": "high"}})
    kept = {pod["metadata"]["uid"] for pod in pods(world, "opt")}
    world.remove("LLMService", NS, "chat")
    await world.run(rounds=20)
    assert placed(world) == {PACK: {"opt": 2}}
    assert {pod["metadata"]["uid"] for pod in pods(world, "opt")} == kept
    assert not pods(world, "chat")
    assert ready(world, "opt") == ("True", "FullyRealised")
    world.remove("Pod", SYSTEM, f"holder-{PACK}")
    await world.run(rounds=20)
    assert world.get("Pod", SYSTEM, f"holder-{PACK}")["spec"]["priorityClassName"] == "high"
    assert ready(world, "opt") == ("True", "FullyRealised")
    world.remove("LLMService", NS, "opt")
    await world.run(rounds=20)
    assert placed(world) == {}


async def test_a_neighbour_that_crashes_makes_only_itself_unready() -> None:
    world = await make_shared()

    def crash(pod: dict[str, Any]) -> None:
        waiting = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}
        state = {"name": "engine", "image": "img", "restartCount": 5, "state": {"waiting": waiting}}
        state["lastState"] = {"terminated": {"exitCode": 1, "message": "no such model"}}
        pod["status"] = {"phase": "Running", "conditions": [], "containerStatuses": [state]}

    (broken,) = pods(world, "chat")
    world.change("Pod", NS, broken["metadata"]["name"], crash)
    await world.settle()
    assert world.condition("GPUPack", "", PACK, "Ready")[:2] == ("False", "CrashLoop")
    assert ready(world, "opt") == ("True", "FullyRealised")
    assert ready(world, "chat")[0] == "False"


async def test_a_neighbour_whose_pods_are_refused_makes_only_itself_unpacked() -> None:
    world = World(gpus=(1,))
    world.put(make_service("chat", replicas=1, model__source="hf://models/chat", packing=SHARED))
    await world.settle()
    world.change(
        "BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], lambda obj: complete(obj, trials=TRIALS)
    )
    await world.run(rounds=20)
    world.api.refuses = lambda pod: "a policy" if pod["metadata"]["labels"].get(labels.SERVICE) == "opt" else None
    world.put(make_service("opt", replicas=1, packing=SHARED))
    await world.settle()
    await measure(world)
    assert placed(world) == {PACK: {"chat": 1, "opt": 1}}
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "SharingUnavailable")
    assert ready(world, "chat") == ("True", "FullyRealised")


async def test_a_neighbour_that_is_refused_before_there_is_a_gpu_keeps_it_from_nobody() -> None:
    world = World(gpus=(1,))
    world.api.refuses = lambda pod: "a policy" if pod["metadata"]["labels"].get(labels.SERVICE) == "opt" else None
    world.put(make_service("chat", replicas=1, model__source="hf://models/chat", packing=SHARED))
    world.put(make_service("opt", replicas=1, packing=SHARED))
    await world.settle()
    await measure(world)
    assert placed(world) == {PACK: {"chat": 1, "opt": 1}}
    assert ready(world, "chat") == ("True", "FullyRealised")
    assert ready(world, "opt")[0] == "False"


async def test_memory_that_a_leaving_replica_still_holds_is_not_given_to_another_service() -> None:
    world = await make_shared()
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=1))
    world.change("LLMService", NS, "chat", lambda obj: obj["spec"].update(replicas=2))
    await world.settle()
    assert placed(world) == {PACK: {"chat": 2, "opt": 1}}
    assert set_of(world, "opt")["spec"]["replicas"] == 1
    assert len(pods(world, "opt")) == 2  # its pod has not left yet
    assert set_of(world, "chat")["spec"]["replicas"] == 1
    await world.run(rounds=20)
    assert (len(pods(world, "opt")), len(pods(world, "chat"))) == (1, 2)
    assert ready(world, "chat") == ready(world, "opt") == ("True", "FullyRealised")


async def test_a_roll_out_on_shared_packs_waits_for_its_own_replicas_only() -> None:
    world = await make_shared((2,), replicas=2, packing={**SHARED, "spread": True})
    assert placed(world) == {name: {"chat": 1, "opt": 1} for name in (PACK, "default-chat-1")}
    before = {pod["metadata"]["uid"] for pod in pods(world, "opt")}
    neighbours = {pod["metadata"]["uid"] for pod in pods(world, "chat")}
    changed = {"metadata": {"annotations": {"note": "new"}}}
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(template=changed))
    await world.run(rounds=40)
    assert ready(world, "opt") == ("True", "FullyRealised")
    assert not before & {pod["metadata"]["uid"] for pod in pods(world, "opt")}
    assert {pod["metadata"]["uid"] for pod in pods(world, "chat")} == neighbours


async def test_both_services_roll_and_on_a_gpu_one_replica_at_a_time() -> None:
    world = await make_shared()
    before = {pod["metadata"]["uid"] for name in ("chat", "opt") for pod in pods(world, name)}
    most = 0

    def look(_: object) -> None:
        nonlocal most
        going = [pod for pod in world.all("Pod") if pod["metadata"].get("deletionTimestamp")]
        most = max(most, len(going))

    world.watched = look
    for name in ("chat", "opt"):
        changed = {"metadata": {"annotations": {"note": "new"}}}
        world.change("LLMService", NS, name, lambda obj, changed=changed: obj["spec"].update(template=changed))
    await world.run(rounds=40)
    assert ready(world, "chat") == ready(world, "opt") == ("True", "FullyRealised")
    assert not before & {pod["metadata"]["uid"] for name in ("chat", "opt") for pod in pods(world, name)}
    assert most == 1


async def test_a_tenant_without_room_on_the_node_leaves_and_the_owner_stays() -> None:
    world = await make_shared((1, 1))
    assert placed(world) == {PACK: {"chat": 1, "opt": 2}}
    text = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node affinity/selector."
    pending = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
    pending["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    for pod in pods(world, "opt"):
        world.change(
            "Pod",
            NS,
            pod["metadata"]["name"],
            lambda obj: obj.update(status={"phase": "Pending", "conditions": [pending]}),
        )
    await world.clock.advance(120)
    await world.run(rounds=20)
    assert placed(world) == {PACK: {"chat": 1}, "default-opt-0": {"opt": 2}}
    assert world.get("GPUPack", "", "default-opt-0")["spec"]["excludedNodes"] == ["n0"]
    assert ready(world, "chat") == ready(world, "opt") == ("True", "FullyRealised")

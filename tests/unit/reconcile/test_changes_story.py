"""Changes without an outage: roll-outs, moves between GPUs and larger shapes, and how many replicas serve in the meantime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from change_world import SHARED, THREE, Least, change, make_serving, placed, pods, ready, serving, watch_it
from fault_world import node_falls_silent
from pack_world import TRIALS, World, complete, make_node, measured
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.reconcile import gpupack, podstate
from tightship.reconcile.queue import Key

NS = "default"


SPREAD = {"maxReplicasPerGPU": 2, "spread": True}
RENAMED = {"source": "hf://facebook/opt-1.3b", "servedName": "renamed"}


@pytest.mark.parametrize(("share", "most"), [(1, 1), (2, 2), ("50%", 3), (9, 3)])
async def test_a_roll_out_replaces_as_many_as_may_be_missing_and_one_at_a_time_on_a_gpu(share: Any, most: int) -> None:
    world = await make_serving(make_service(replicas=6, rollout={"maxUnavailable": share}), gpus=(2, 2))
    least = Least(world)
    change(world, model=RENAMED)
    await watch_it(world, least)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert {pod["spec"]["containers"][0]["args"][6] for pod in pods(world)} == {"renamed"}
    assert (6 - least.served, least.away, least.away_at_all) == (most, 1, most)


async def test_packs_that_look_at_the_same_moment_take_no_more_than_may_be_missing() -> None:
    world = await make_serving(make_service(replicas=6, rollout={"maxUnavailable": 2}))
    least = Least(world)
    change(world, model=RENAMED)
    await world.settle()
    for _ in range(8):
        world.nodes_act()
        packs = [pack["metadata"]["name"] for pack in world.all("GPUPack")]
        await asyncio.gather(*(gpupack.reconcile(world.ctx, Key("GPUPack", "", pack)) for pack in packs * 2))
        least()
    assert least.served == 4


async def test_the_first_replica_that_does_not_start_stops_the_roll_out_and_going_back_goes_on() -> None:
    world = await make_serving(make_service(rollout={"maxUnavailable": 3}))
    least = Least(world)
    world.started = lambda pod: pod["spec"]["containers"][0]["args"][6:7] != ["renamed"]
    change(world, model=RENAMED)
    await world.run(rounds=20)
    (first,) = [pod for pod in pods(world) if not podstate.is_ready(pod)]
    assert ready(world)[:2] == ("False", "Progressing")  # it may only be slow
    assert serving(world) == 3

    def crash(pod: dict[str, Any]) -> None:
        state = {
            "name": "engine",
            "image": "img",
            "restartCount": 2,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        }
        state["lastState"] = {"terminated": {"exitCode": 1, "message": "ValueError: no such thing"}}
        pod["status"] = {"phase": "Running", "conditions": [], "containerStatuses": [state]}

    world.change("Pod", NS, first["metadata"]["name"], crash)
    await watch_it(world, least)
    status, reason, message = ready(world)
    assert (status, reason) == ("False", "RolloutStopped")
    assert (
        f"{first['metadata']['name']} on pack default-opt-0 is of the new revision and doesn't become ready (CrashLoop: "
        in message
    )
    assert "ValueError: no such thing" in message
    assert "3 of 4 replicas still run the earlier one, 3 of them serve. Mend the manifest" in message
    assert world.condition("LLMService", NS, "opt", "Stalled")[:2] == ("True", "RolloutStopped")
    assert world.condition("LLMService", NS, "opt", "Available")[:2] == ("True", "MinimumReplicasReady")
    change(world, model={"source": "hf://facebook/opt-1.3b", "servedName": "opt-1.3b"})
    await watch_it(world, least)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert least.served == 3


@pytest.mark.parametrize(("replicas", "others"), [(2, 1), (4, 2)])
async def test_a_roll_out_takes_nothing_away_while_a_fault_has_stopped_a_gpu(replicas: int, others: int) -> None:
    """Of the replicas all but one have to serve; those of the GPU in FAULT are away already."""
    world = await make_serving(make_service(replicas=replicas, packing=SPREAD))
    world.mps_states["default-opt-0"] = "FAULT"
    await world.run()
    assert serving(world) == others
    before, least = {pod["metadata"]["uid"] for pod in pods(world)}, Least(world)
    change(world, model=RENAMED)
    await watch_it(world, least)
    assert least.served == others
    assert {pod["metadata"]["uid"] for pod in pods(world)} == before
    world.mps_states.clear()
    await watch_it(world, least)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert least.served == others
    assert {pod["spec"]["containers"][0]["args"][6] for pod in pods(world)} == {"renamed"}


async def test_a_roll_out_waits_for_a_pack_that_has_no_set_yet() -> None:
    world = await make_serving(make_service(replicas=1, packing=SPREAD))
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-1"
    change(world, replicas=2)
    await world.run()
    assert [found["metadata"]["labels"][labels.PACK] for found in world.all("StatefulSet")] == ["default-opt-0"]
    least = Least(world)
    change(world, model=RENAMED)
    await watch_it(world, least)
    assert least.served == 1
    world.started = lambda pod: True
    await watch_it(world, least)
    assert least.served == 1
    assert ready(world)[:2] == ("True", "FullyRealised")


async def test_a_node_that_is_gone_takes_a_place_away_only_once_it_is_given_up() -> None:
    """Silent, it may come back, and then nobody else goes; given up with no GPU free, the one that is left is all there is."""
    world = await make_serving(make_service(replicas=2, packing=SPREAD), gpus=(1, 1))
    node_falls_silent(world, "n0")
    for pod in pods(world):
        if pod["spec"]["nodeName"] == "n0":  # the node controller says so of each
            world.change("Pod", NS, pod["metadata"]["name"], lambda obj: obj["status"]["conditions"].clear())
    await world.run()
    least = Least(world)
    change(world, model=RENAMED)
    await world.run(rounds=20)
    least()
    assert least.served == 1
    await world.clock.advance(400)
    await world.look_at_everything()
    await world.run(rounds=40)
    assert placed(world) == {"default-opt-1": {"opt": 1}}
    assert {pod["spec"]["containers"][0]["args"][6] for pod in pods(world) if podstate.is_ready(pod)} == {"renamed"}


async def test_replicas_that_all_fail_are_all_replaced_by_an_image_that_mends_them() -> None:
    """Also while one GPU is under repair: what doesn't serve is nobody's loss."""
    world = await make_serving(make_service(replicas=4))

    def crash(pod: dict[str, Any]) -> None:
        waiting = {"reason": "CrashLoopBackOff"}
        state = {"name": "engine", "image": "img", "restartCount": 2, "state": {"waiting": waiting}}
        pod["status"] = {"phase": "Running", "conditions": [], "containerStatuses": [state]}

    for pod in pods(world):
        world.change("Pod", NS, pod["metadata"]["name"], crash)
    world.mps_states["default-opt-1"] = "FAULT"
    await world.run()
    change(world, model=RENAMED)
    await world.run(rounds=40)
    assert serving(world) == 2
    world.mps_states.clear()
    await world.run(rounds=40)
    assert ready(world)[:2] == ("True", "FullyRealised")


async def test_a_larger_shape_shrinks_first_and_what_no_longer_fits_stays_until_another_gpu_serves() -> None:
    """Four replicas of 25Gi, three to a GPU; measured anew they need 60Gi, so that each wants a GPU of its own."""
    service = make_service(packing={"maxReplicasPerGPU": 3}, replicas=3)
    world = await make_serving(service, gpus=(2, 2), replica="25Gi", trials=THREE)
    assert placed(world) == {"default-opt-0": {"opt": 3}}
    least = Least(world)
    change(world, workload={"inputTokens": 111, "outputTokens": 200})
    await watch_it(world, least)
    for profile in world.all("BatchProfile"):
        if not profile.get("status", {}).get("points"):
            world.change(
                "BatchProfile", NS, profile["metadata"]["name"], lambda obj: complete(obj, replica="60Gi", trials=THREE)
            )
    await watch_it(world, least)
    assert placed(world) == {f"default-opt-{ordinal}": {"opt": 1} for ordinal in range(3)}
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert least.served == 2  # maxUnavailable is 1
    ledgers = [pack["status"]["ledger"]["assigned"] for pack in world.all("GPUPack")]
    assert len(set(ledgers)) == 1


async def test_a_larger_shape_waits_where_too_few_would_serve_until_there_is_a_gpu() -> None:
    service = make_service(packing={"maxReplicasPerGPU": 3}, replicas=3)
    world = await make_serving(service, gpus=(1,), replica="25Gi", trials=THREE)
    before, least = {pod["metadata"]["uid"] for pod in pods(world)}, Least(world)
    change(world, workload={"inputTokens": 111, "outputTokens": 200})
    await world.run(rounds=20)
    name = world.get("LLMService", NS, "opt")["status"]["profile"]["name"]
    world.change("BatchProfile", NS, name, lambda obj: complete(obj, replica="60Gi", trials=THREE))
    await watch_it(world, least)
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    assert "2 of 3 replicas have no place: they need 2 more" in message
    assert "3 replicas stay where they are until then" in message
    assert {pod["metadata"]["uid"] for pod in pods(world)} == before
    assert world.condition("LLMService", NS, "opt", "Available")[:2] == ("True", "MinimumReplicasReady")
    world.put(make_node("n1", 1))  # two of three have to serve, so two GPUs will do
    await watch_it(world, least)
    assert placed(world) == {"default-opt-0": {"opt": 1}, "default-opt-1": {"opt": 1}}
    assert least.served == 1  # there is no place for the third, and of two places one may be empty while it is replaced
    world.put(make_node("n2", 1))
    await watch_it(world, least)
    assert ready(world)[:2] == ("True", "FullyRealised")


async def make_shared(gpus: tuple[int, ...], **opt: Any) -> World:
    """`chat` opens a GPU, and `opt` joins it."""
    chat = make_service("chat", replicas=1, model__source="hf://models/chat", packing=SHARED)
    return await make_serving(
        chat, make_service(**{"packing": SHARED, "replicas": 2, **opt}), gpus=gpus, replica="25Gi", trials=THREE
    )


async def test_a_neighbour_that_needs_more_waits_where_too_few_others_would_serve_until_there_is_a_gpu() -> None:
    """`chat` has the GPU of 76Gi, 25Gi each for its own replica and two of `opt`; with 60Gi it would be alone there."""
    world = await make_shared((1,), replicas=2)
    assert placed(world) == {"default-chat-0": {"chat": 1, "opt": 2}}
    least, chat = Least(world), Least(world, "chat")
    before = {pod["metadata"]["uid"] for name in ("chat", "opt") for pod in pods(world, name)}

    def look() -> None:
        least()
        chat()

    change(world, "chat", workload={"inputTokens": 111, "outputTokens": 200})
    await world.run(rounds=20)
    name = world.get("LLMService", NS, "chat")["status"]["profile"]["name"]
    world.change("BatchProfile", NS, name, lambda obj: complete(obj, replica="60Gi", trials=THREE))
    await watch_it(world, look)
    status, reason, message = world.condition("LLMService", NS, "chat", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    assert "0 of opt would have a place, which shares what they run on, and 1 of those have to serve" in message
    assert "of 1 that this service may use 0 are free; 1 replicas stay where they are until then" in message
    assert {pod["metadata"]["uid"] for name in ("chat", "opt") for pod in pods(world, name)} == before
    assert ready(world)[:2] == ("True", "FullyRealised")
    world.put(make_node("n1", 1))
    await watch_it(world, look)
    assert placed(world) == {"default-chat-0": {"chat": 1}, "default-opt-0": {"opt": 2}}
    assert ready(world)[:2] == ready(world, "chat")[:2] == ("True", "FullyRealised")
    assert (least.served, chat.served) == (2, 0)  # one replica can't be replaced without being away


@pytest.mark.parametrize("replicas", [1, 2])
async def test_who_stops_sharing_stays_until_its_own_gpu_is_held_and_its_replicas_serve(replicas: int) -> None:
    world = await make_shared((2,), replicas=replicas)
    assert placed(world) == {"default-chat-0": {"chat": 1, "opt": replicas}}
    least, before = Least(world), {pod["metadata"]["uid"] for pod in pods(world)}
    neighbours = {pod["metadata"]["uid"] for pod in pods(world, "chat")}
    slow: list[str] = ["holder-default-opt-0"]
    world.started = lambda pod: pod["metadata"]["name"] not in slow
    change(world, packing={"maxReplicasPerGPU": 3})
    await world.run(rounds=20)
    assert placed(world) == {"default-chat-0": {"chat": 1}, "default-opt-0": {"opt": replicas}}
    assert {pod["metadata"]["uid"] for pod in pods(world)} == before
    assert serving(world) == replicas
    assert (
        "no longer wanted here leave as enough others serve"
        in world.condition("GPUPack", "", "default-chat-0", "ReplicasReady")[2]
    )
    slow.clear()
    await watch_it(world, least)
    assert least.served == replicas
    assert not before & {pod["metadata"]["uid"] for pod in pods(world)}
    assert ready(world)[:2] == ready(world, "chat")[:2] == ("True", "FullyRealised")
    assert {pod["metadata"]["uid"] for pod in pods(world, "chat")} == neighbours


async def test_who_spreads_keeps_what_serves_until_the_second_gpu_does() -> None:
    world = await make_serving(make_service(replicas=2), gpus=(2,))
    assert placed(world) == {"default-opt-0": {"opt": 2}}
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-1"
    change(world, packing={"maxReplicasPerGPU": 2, "spread": True})
    least = Least(world)
    await world.run(rounds=20)
    assert placed(world) == {"default-opt-0": {"opt": 1}, "default-opt-1": {"opt": 1}}
    assert serving(world) == 2
    world.started = lambda pod: True
    await watch_it(world, least)
    assert least.served == 2
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert {pod["metadata"]["labels"][labels.PACK] for pod in pods(world)} == {"default-opt-0", "default-opt-1"}


async def test_who_is_to_move_to_memory_that_others_still_hold_serves_until_it_is_there() -> None:
    """`chat` grows and pushes `opt` off its GPU; the place that `gpt` is scaled down for is taken until its replica has left."""
    packing = {"maxReplicasPerGPU": 3, "sharedWith": "SameNamespace"}
    services = (
        make_service("chat", replicas=1, model__source="hf://models/chat", packing=packing),
        make_service("gpt", replicas=3, model__source="hf://models/gpt", packing=packing),
    )
    world = await make_serving(*services, gpus=(1, 1), replica="25Gi", trials=THREE)
    world.put(make_service(replicas=1, packing=packing))
    await world.settle()
    name = world.get("LLMService", NS, "opt")["status"]["profile"]["name"]
    world.change("BatchProfile", NS, name, lambda obj: complete(obj, replica="25Gi", trials=THREE))
    await world.run(rounds=20)
    assert placed(world) == {"default-chat-0": {"chat": 1, "opt": 1}, "default-gpt-0": {"gpt": 3}}
    change(world, "chat", workload={"inputTokens": 111, "outputTokens": 200})
    await world.run(rounds=20)
    name, least = world.get("LLMService", NS, "chat")["status"]["profile"]["name"], Least(world)
    world.change("BatchProfile", NS, name, lambda obj: complete(obj, replica="60Gi", trials=THREE))
    change(world, "gpt", replicas=2)
    await watch_it(world, least)
    assert placed(world) == {"default-chat-0": {"chat": 1}, "default-gpt-0": {"gpt": 2, "opt": 1}}
    assert ready(world)[:2] == ready(world, "chat")[:2] == ("True", "FullyRealised")
    assert least.served == 1


async def test_a_new_recommendation_waits_for_approval_in_status_and_what_serves_goes_on() -> None:
    world = await make_serving(make_service())
    before = {pod["metadata"]["uid"] for pod in pods(world)}
    change(world, autoApply=False)
    await world.run(rounds=20)
    assert ready(world)[:2] == ("True", "FullyRealised")
    objective = {"metric": "InterTokenLatency", "statistic": "mean", "max": "10ms"}
    change(world, slo={"objectives": [objective]})
    await world.run(rounds=20)
    assert ready(world)[:2] == ("False", "AwaitingApproval")
    assert "batch 32 with" in ready(world)[2]
    assert world.get("LLMService", NS, "opt")["status"]["recommendation"]["batch"] == 32
    assert {each["batch"] for pack in world.all("GPUPack") for each in pack["spec"]["assignments"]} == {96}
    assert {pod["metadata"]["uid"] for pod in pods(world)} == before
    least = Least(world)
    change(world, autoApply=True)
    await watch_it(world, least)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert not before & {pod["metadata"]["uid"] for pod in pods(world)}
    assert least.served >= 3


def lose_the_node(world: World) -> None:
    node = world.get("GPUPack", "", "default-opt-0")["status"]["node"]
    world.remove("Node", "", node)
    for pod in world.all("Pod"):
        if pod["spec"]["nodeName"] == node:
            world.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])


def delete_the_pack(world: World) -> None:
    world.remove("GPUPack", "", "default-opt-0")


def scale_to_nothing(world: World) -> None:
    change(world, replicas=0)


@pytest.mark.parametrize("lose", [lose_the_node, delete_the_pack, scale_to_nothing])
async def test_what_was_approved_comes_back_by_itself_when_nothing_of_it_is_left(lose: Callable[[World], None]) -> None:
    world = await make_serving(make_service(replicas=2), make_service("chat", replicas=1), gpus=(1, 1))
    change(world, autoApply=False)
    await world.run()
    applied = world.get("LLMService", NS, "opt")["status"]["lastApplied"]
    assert applied["batch"] == 96
    assert applied["profile"] in {each["metadata"]["name"] for each in world.all("BatchProfile")}
    lose(world)
    await world.run(rounds=20)
    assert world.get("LLMService", NS, "opt")["status"]["lastApplied"] == applied
    if lose is lose_the_node:
        assert placed(world) == {"default-chat-0": {"chat": 1}}
        assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "InsufficientGPUs")
    change(world, replicas=2)
    world.put(make_node("n2", 1))
    await world.run(rounds=20)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert serving(world) == 2


async def test_what_was_not_approved_still_waits_when_nothing_is_left_of_what_was() -> None:
    world = await make_serving(make_service(replicas=2))
    change(world, autoApply=False)
    change(world, slo={"objectives": [{"metric": "InterTokenLatency", "statistic": "mean", "max": "10ms"}]})
    await world.run(rounds=20)
    delete_the_pack(world)
    await world.run(rounds=20)
    assert placed(world) == {}
    assert ready(world)[:2] == ("False", "AwaitingApproval")
    assert world.get("LLMService", NS, "opt")["status"]["lastApplied"]["batch"] == 96
    change(world, slo={"objectives": [{"metric": "InterTokenLatency", "statistic": "mean", "max": "30ms"}]})
    await world.run(rounds=20)
    assert ready(world)[:2] == ("True", "FullyRealised")


async def test_scaled_to_nothing_every_gpu_is_free_and_back_up_nothing_is_measured_again() -> None:
    world = World(profiling=True)
    world.put(make_service())
    await world.settle()
    (profile,) = world.all("BatchProfile")
    world.report(profile["metadata"]["name"], measured(profile, trials=TRIALS))
    await world.run(rounds=20)
    assert ready(world)[:2] == ("True", "FullyRealised")
    jobs = [job["metadata"]["uid"] for job in world.all("Job")]
    change(world, replicas=0)
    await world.run(rounds=20)
    assert (world.all("GPUPack"), pods(world)) == ([], [])
    assert not [pod for pod in world.all("Pod") if pod["metadata"]["labels"].get(labels.COMPONENT) == "holder"]
    change(world, replicas=4)
    await world.run(rounds=20)
    assert ready(world)[:2] == ("True", "FullyRealised")
    assert [job["metadata"]["uid"] for job in world.all("Job")] == jobs
    assert len(world.all("BatchProfile")) == 1


async def test_a_service_that_is_deleted_waits_for_nobody() -> None:
    world = await make_shared((2,), replicas=1)
    world.started = lambda pod: pod["metadata"]["name"] != "holder-default-opt-0"
    change(world, packing={"maxReplicasPerGPU": 3})
    await world.run(rounds=20)
    assert len(pods(world)) == 1
    world.remove("LLMService", NS, "opt")
    await world.run(rounds=20)
    assert pods(world) == []
    assert placed(world) == {"default-chat-0": {"chat": 1}}

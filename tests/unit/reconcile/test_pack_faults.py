"""Everything that goes wrong under a pack that serves: what the pack says, what is stopped and started, and who is left alone."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from fault_world import (
    NS,
    OTHER,
    PACK,
    SYSTEM,
    change_holder,
    condition,
    container_ends,
    gpu_is_lost,
    gpu_is_taken,
    holder,
    make_packed,
    message,
    node_falls_silent,
    replicas,
    restart_operator,
    runs_again,
    saw,
    status,
    time_passes,
    uids,
)
from pack_world import World
from tightship.api.v1alpha1 import labels
from tightship.kube.kinds import KINDS

WELL = ("True", "FullyRealised")


def asked(world: World, pack: str = PACK) -> int:
    """Replicas that the pack's StatefulSet is to have."""
    (found,) = [each for each in world.all("StatefulSet") if each["metadata"]["labels"][labels.PACK] == pack]
    return int(found["spec"]["replicas"])


def tell(world: World) -> None:
    """The watchers publish, and nothing else happens."""
    world._publish()
    world.watch()


# A fatal fault of MPS


async def test_a_fatal_fault_stops_all_of_that_gpu_and_nobody_else_and_starts_them_again() -> None:
    world = await make_packed(replicas=4)
    before, others = uids(world), uids(world, OTHER)
    world.mps_states[PACK] = "FAULT"
    world.unattached = {replicas(world)[0]["metadata"]["name"]}  # not listed, and stopped all the same
    tell(world)
    await world.settle()
    assert (asked(world), asked(world, OTHER)) == (0, 2)
    assert condition(world, "SharingReady") == ("False", "MPSFault")
    words = message(world, "Ready")
    assert "MPS server 7 is FAULT, 1 clients left" in words
    assert "2 left" in words
    assert "fault 1" in words
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "SharingUnavailable")

    await world.run()
    assert asked(world) == 0, "the replicas are gone, but the server is in FAULT still"
    world.mps_states.clear()
    world.unattached.clear()
    await world.run()
    assert condition(world, "Ready") == WELL
    assert before.isdisjoint(uids(world))
    assert len(uids(world)) == 2
    assert uids(world, OTHER) == others, "the other GPU was left alone"
    assert status(world)["repair"]["reason"] == "MPSFault"
    assert status(world)["repair"]["ended"]


async def test_a_server_that_is_well_again_before_its_clients_left_still_gets_them_all_stopped() -> None:
    world = await make_packed()
    before = uids(world)
    world.mps_state = "FAULT"
    tell(world)
    await world.settle()
    world.mps_state = "ACTIVE"
    tell(world)
    await world.settle()
    assert asked(world) == 0
    await world.run()
    assert condition(world, "Ready") == WELL
    assert before.isdisjoint(uids(world))


async def fail(world: World) -> None:
    """A fatal fault that is over as soon as the clients have gone."""
    world.mps_state = "FAULT"
    tell(world)
    await world.settle()
    world.mps_state = "ACTIVE"
    await world.run()


async def test_faults_in_a_row_wait_ever_longer_and_an_hour_forgives() -> None:
    world = await make_packed()
    await fail(world)
    assert len(uids(world)) == 2, "the first one doesn't wait"
    await world.clock.advance(60)
    await fail(world)
    assert not uids(world)
    assert status(world)["repair"]["count"] == 2
    assert "fault 2" in message(world, "SharingReady")
    assert "back-off 30 s, not before 2026" in message(world, "SharingReady")
    await time_passes(world, 20)
    await world.run()
    assert not uids(world)
    await time_passes(world, 12)
    await world.run()
    assert condition(world, "Ready") == WELL, "the wait ends by itself"
    await world.clock.advance(3700)
    await fail(world)
    assert len(uids(world)) == 2
    assert status(world)["repair"]["count"] == 1


async def test_a_fault_outlasts_the_operator() -> None:
    world = await make_packed()
    world.mps_state = "FAULT"
    tell(world)
    await world.settle()
    restart_operator(world)
    await world.look_at_everything()
    assert asked(world) == 0
    assert "fault 1" in message(world, "SharingReady"), "one fault is counted once"
    await world.run()
    world.mps_state = "ACTIVE"
    restart_operator(world)
    await world.run()
    assert condition(world, "Ready") == WELL


async def test_a_daemon_that_does_not_answer_is_said_and_left_to_its_holder() -> None:
    world = await make_packed()
    before = uids(world)
    world.mps_state = "DOWN"
    tell(world)
    await world.settle()
    assert condition(world, "SharingReady") == ("False", "MPSFault")
    assert "within a minute or two" in message(world, "Ready")
    assert uids(world) == before


# A replica without MPS


async def test_a_replica_without_mps_is_started_anew_and_its_neighbour_is_not() -> None:
    world = await make_packed()
    first, second = replicas(world)
    world.unattached = {first["metadata"]["name"]}
    tell(world)
    await world.settle()
    assert condition(world, "SharingReady") == ("Unknown", "NotYetKnown")
    await time_passes(world, 32)
    assert condition(world, "SharingReady") == ("False", "MPSNotAttached")
    assert "restart 1 at 2026" in message(world, "Ready")
    assert [bool(pod["metadata"].get("deletionTimestamp")) for pod in replicas(world)] == [True, False]
    world.unattached.clear()
    await world.run()
    assert condition(world, "Ready") == WELL
    assert second["metadata"]["uid"] in uids(world)
    assert first["metadata"]["uid"] not in uids(world)
    repair = status(world)["repair"]
    assert (repair["reason"], repair["count"], "ended" in repair) == ("MPSNotAttached", 1, True)


async def test_a_replica_that_comes_back_without_mps_is_restarted_ever_more_seldom() -> None:
    world = await make_packed()
    world.unattached = {replicas(world)[0]["metadata"]["name"]}
    restarted, seen = [], uids(world)
    for second in range(0, 400, 10):
        await world.clock.advance(10)
        await world.look_at_everything()
        await world.run()
        if not uids(world) <= seen:
            restarted.append(second)
            seen |= uids(world)
    gaps = [later - earlier for earlier, later in itertools.pairwise(restarted)]
    assert len(restarted) >= 4
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 100
    assert condition(world, "SharingReady") == ("False", "MPSNotAttached")
    assert f"restart {len(restarted)}" in message(world, "Ready")


async def test_a_neighbour_that_loops_holds_the_repair_of_a_replica_without_mps_up_no_longer_than_it_starts() -> None:
    """The same rule as in a roll-out: who starts is waited for, who is in trouble isn't."""
    world = await make_packed()
    first, second = replicas(world)
    world.unattached = {first["metadata"]["name"]}
    world.started = lambda pod: pod["metadata"]["name"] != second["metadata"]["name"]
    world.change("Pod", NS, second["metadata"]["name"], lambda pod: pod["status"].update(conditions=[]))
    tell(world)
    await world.settle()
    await time_passes(world, 60)
    assert not any(pod["metadata"].get("deletionTimestamp") for pod in replicas(world)), "the neighbour starts"
    container_ends(world, second, "engine", restarts=7, words="out of pages")
    await time_passes(world, 5)
    assert [bool(pod["metadata"].get("deletionTimestamp")) for pod in replicas(world)] == [True, False]


async def test_without_its_watcher_nothing_stops_and_nothing_is_claimed() -> None:
    world = await make_packed()
    before = uids(world)
    world.unattached = {replicas(world)[0]["metadata"]["name"]}
    tell(world)
    container_ends(world, world.get("Pod", SYSTEM, holder()), "watch", restarts=3, exit_code=137)
    await world.clock.advance(600)
    await world.look_at_everything()
    await world.run()
    assert condition(world, "Held") == ("True", "GPUHeld")
    assert condition(world, "SharingReady") == ("Unknown", "NotYetKnown")
    assert "container watch does not run" in message(world, "SharingReady")
    assert condition(world, "ReplicasReady") == ("True", "ReplicasReady")
    assert uids(world) == before
    world.unattached.clear()
    runs_again(world, world.get("Pod", SYSTEM, holder()))
    tell(world)
    await world.settle()
    assert condition(world, "Ready") == WELL
    assert uids(world) == before


async def test_a_watcher_that_has_just_come_back_gets_time_to_look() -> None:
    world = await make_packed()
    before = uids(world)
    await world.clock.advance(600)
    runs_again(world, world.get("Pod", SYSTEM, holder()))
    world.unattached = {replicas(world)[0]["metadata"]["name"]}
    tell(world)
    await world.settle()
    assert condition(world, "SharingReady") == ("Unknown", "NotYetKnown")
    assert uids(world) == before


async def test_clients_of_unknown_pods_prove_nothing() -> None:
    world = await make_packed()
    before = uids(world)
    unknown = json.dumps({"state": "ACTIVE", "server": 7, "clients": [{"pid": 8, "podUID": None}] * 2})
    change_holder(world, lambda pod: pod["metadata"]["annotations"].update({labels.ANNOTATION_MPS: unknown}))
    await world.clock.advance(100)
    await world.look_at_everything()
    assert condition(world, "SharingReady") == ("Unknown", "NotYetKnown")
    assert "2 clients that can't be assigned to pods" in message(world, "Ready")
    assert uids(world) == before
    assert not any(pod["metadata"].get("deletionTimestamp") for pod in replicas(world))


async def test_what_replicas_saw_before_their_engines_started_is_in_the_packs_status() -> None:
    world = await make_packed()
    first, second = replicas(world)
    world.preflights = saw(first, 79) | saw(second, 41) | {"gone": {"uuid": "GPU-x", "total": 1, "free": 1}}
    tell(world)
    await world.settle()
    told = [each["preflight"] for each in status(world)["replicas"]]
    assert told == [{"uuid": f"GPU-{PACK}", "total": "80Gi", "free": free} for free in ("79Gi", "41Gi")]
    name = second["metadata"]["name"]
    assert f"before its engine started {name} saw GPU-{PACK} with 41Gi of 80Gi free" in message(world, "SharingReady")


# The holder


async def test_a_killed_daemon_is_said_and_its_replicas_come_back_by_themselves() -> None:
    world = await make_packed()
    before = uids(world)
    words = "nvidia-cuda-mps-control ended by itself with signal 9; its log is in CUDA_MPS_LOG_DIRECTORY"
    container_ends(world, world.get("Pod", SYSTEM, holder()), "mps", words=words)
    for pod in replicas(world):
        container_ends(world, pod, "engine", exit_code=70, words="HolderLost: nobody holds holder.lock")
    await world.settle()
    assert condition(world, "Held") == ("False", "CrashLoop")
    assert "container mps ended with exit status 1 (restart 1): nvidia-cuda-mps-control" in message(world, "Ready")
    assert condition(world, "ReplicasReady") == ("False", "HolderLost")
    runs_again(world, world.get("Pod", SYSTEM, holder()))
    for pod in replicas(world):
        runs_again(world, pod)
    await world.run()
    assert condition(world, "Ready") == WELL
    assert uids(world) == before, "the pods stayed"
    assert [each["restarts"] for each in status(world)["replicas"]] == [1, 1]


@pytest.mark.parametrize("how", ["evicted", "preempted", "deleted"])
async def test_a_holder_that_goes_while_the_operator_is_down_is_made_once_on_its_node(how: str) -> None:
    world = await make_packed()
    pack = world.get("GPUPack", "", PACK)["metadata"]["uid"]
    if how == "evicted":
        change_holder(world, lambda pod: pod.update(status={"phase": "Failed", "reason": "Evicted", "message": "disk"}))
    else:
        del world.api.objects[KINDS["Pod"].path(SYSTEM, holder())]
    for pod in replicas(world):  # their supervisors see that nobody holds the lock
        container_ends(world, pod, "engine", exit_code=70, words="HolderLost: nobody holds holder.lock")
    world.nodes_act()
    restart_operator(world)
    await world.look_at_everything()
    assert condition(world, "Held") == ("False", "HolderLost")
    if how == "evicted":
        assert "disk" in message(world, "Ready")
    await world.run()
    holders = [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "holder"]
    assert [(pod["metadata"]["name"], pod["spec"]["nodeName"]) for pod in holders] == [(holder(), "n0")]
    assert condition(world, "Held") == ("True", "GPUHeld")
    for pod in replicas(world):
        runs_again(world, pod)
    await world.run()
    assert condition(world, "Ready") == WELL
    assert world.get("GPUPack", "", PACK)["metadata"]["uid"] == pack


async def test_a_silent_node_is_said_at_once_and_given_up_in_time() -> None:
    world = await make_packed(gpus=(1, 2))
    before = uids(world)
    node_falls_silent(world)
    await world.settle()
    assert condition(world, "Held") == ("False", "HolderLost")
    assert "node n0 has not been ready since 2026" in message(world, "Ready")
    assert "after 300 s it counts as gone" in message(world, "Ready")
    await world.clock.advance(200)
    await world.look_at_everything()
    assert uids(world) == before
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [PACK]
    await time_passes(world, 102)
    await world.run(rounds=20)
    assert condition(world, "Ready", OTHER) == WELL
    assert status(world, OTHER)["node"] == "n1"


async def test_a_node_that_comes_back_in_time_keeps_its_pack() -> None:
    world = await make_packed()
    before = uids(world)
    node_falls_silent(world)
    await world.settle()
    await world.clock.advance(120)
    ready = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:02:00Z"}]
    world.change("Node", "", "n0", lambda node: node["status"].update(conditions=ready))
    await world.run()
    assert condition(world, "Ready") == WELL
    assert uids(world) == before


async def test_a_rebooted_node_that_refuses_the_old_holder_gets_a_new_one() -> None:
    world = await make_packed()
    refused = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no healthy devices present"}
    change_holder(world, lambda pod: pod.update(status=refused))
    for pod in replicas(world):
        container_ends(world, pod, "engine", exit_code=70, words="HolderLost: nobody holds holder.lock")
    await world.settle()
    assert condition(world, "Held") == ("False", "HolderLost")
    assert "no healthy devices present" in message(world, "Ready")
    for pod in replicas(world):
        runs_again(world, pod)
    await world.run()
    assert condition(world, "Ready") == WELL


# The GPU


async def test_a_lost_gpu_is_said_and_after_a_minute_the_pack_is_replaced() -> None:
    world = await make_packed(replicas=4)
    others = uids(world, OTHER)
    gpu_is_lost(world)
    for pod in replicas(world):
        container_ends(world, pod, "engine", exit_code=70, words="HolderLost: nobody holds holder.lock")
    await world.settle()
    assert condition(world, "Held") == ("False", "GPUNotVisible")
    assert "Unable to determine the device handle: GPU is lost (restart 2)" in message(world, "Ready")
    await world.clock.advance(30)
    await world.look_at_everything()
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [PACK, OTHER]
    await time_passes(world, 32)
    await world.run(rounds=20)
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [OTHER, "default-opt-2"]
    assert condition(world, "Ready", "default-opt-2") == WELL
    assert uids(world, OTHER) == others


async def test_a_holder_whose_gpu_was_taken_while_it_was_away_gives_its_pack_up_after_a_minute() -> None:
    world = await make_packed(replicas=4)
    others = uids(world, OTHER)
    gpu_is_taken(world)
    await world.run()
    assert condition(world, "Held") == ("False", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in message(world, "Ready")
    await world.clock.advance(50)
    await world.look_at_everything()
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [PACK, OTHER]
    await time_passes(world, 12)
    await world.run(rounds=20)
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [OTHER, "default-opt-2"]
    assert condition(world, "Ready", "default-opt-2") == WELL
    assert uids(world, OTHER) == others


async def test_a_gpu_that_is_seen_again_in_time_keeps_its_pack() -> None:
    world = await make_packed()
    gpu_is_lost(world)
    await world.settle()
    await world.clock.advance(30)
    runs_again(world, world.get("Pod", SYSTEM, holder()), restarts=3)
    await world.run()
    assert condition(world, "Ready") == WELL
    await world.clock.advance(120)
    await world.look_at_everything()
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == [PACK]


# One replica


@pytest.mark.parametrize(
    ("ended", "reason", "words"),
    [
        ({"reason": "OOMKilled", "exit_code": 137}, "OOMKilled", "was killed for want of memory (restart 4)"),
        (
            {"exit_code": 1, "words": "EngineFailed: the engine ended with status 1"},
            "CrashLoop",
            "exit status 1 (restart 4)",
        ),
        (
            {"exit_code": 76, "words": "EngineHung: 3 requests run, and for 121 s (limit 120 s) no step ended"},
            "EngineHung",
            "3 requests run, and for 121 s (limit 120 s) no step ended (restart 4)",
        ),
    ],
)
async def test_one_replica_in_trouble_is_told_and_the_others_are_left_alone(
    ended: dict[str, Any], reason: str, words: str
) -> None:
    world = await make_packed(replicas=4)
    before = uids(world) | uids(world, OTHER)
    broken = replicas(world)[0]
    container_ends(world, broken, "engine", restarts=4, **ended)
    await world.settle()
    await world.clock.advance(400)
    await world.look_at_everything()
    await world.run()
    assert condition(world, "ReplicasReady") == ("False", reason)
    assert "1 of 2 assigned replicas ready" in message(world, "Ready")
    assert words in message(world, "Ready")
    assert status(world)["replicas"][0]["restarts"] == 4
    assert uids(world) | uids(world, OTHER) == before
    assert condition(world, "Ready", OTHER) == WELL
    assert world.condition("LLMService", NS, "opt", "Available")[:2] == ("True", "MinimumReplicasReady")

"""What happens on one GPU or one set of cores: holding it, sharing it, and everything that goes wrong there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pack_world import PRODUCT, World, complete
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.kube.kinds import KINDS
from tightship.manifests.replicas import set_name

NS, PACK = "default", "default-opt-0"
HOLDER = "holder-default-opt-0"
SYSTEM = "tightship-system"
CPU = {"device": "cpu", "cores": 2, "coresPerReplica": 1, "memory": "60Gi"}


async def make_packed(gpus: tuple[int, ...] = (2, 2), replicas: int = 2, **changes: Any) -> World:
    world = World(gpus=gpus)
    world.put(make_service(replicas=replicas, **changes))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    return world


def condition(world: World, which: str, pack: str = PACK) -> tuple[str, str]:
    return world.condition("GPUPack", "", pack, which)[:2]


def message(world: World, which: str, pack: str = PACK) -> str:
    return world.condition("GPUPack", "", pack, which)[2]


def replicas(world: World) -> list[dict[str, Any]]:
    return [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "replica"]


def set_status(world: World, pod: dict[str, Any], how: Callable[[dict[str, Any]], None]) -> None:
    world.change("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"], how)


def break_pod(**state: Any) -> Callable[[dict[str, Any]], None]:
    def change(pod: dict[str, Any]) -> None:
        statuses = [{"name": "engine", "image": "img", "restartCount": 3, **state}]
        pod["status"] = {"phase": "Running", "conditions": [], "containerStatuses": statuses}

    return change


async def test_replicas_name_their_gpu_as_the_operator_is_told() -> None:
    world = World(gpus=(2,))
    world.ctx.settings = replace(world.ctx.settings, gpu_naming="nri")
    world.put(make_service(replicas=2))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    for pod in replicas(world):
        name = f"k8s.device-plugin.nvidia.com/gpu=GPU-{PACK}"
        assert pod["metadata"]["annotations"]["nvidia.cdi.k8s.io/container.engine"] == name


async def test_a_held_gpu_and_its_replicas_are_described() -> None:
    world = await make_packed()
    status = world.get("GPUPack", "", PACK)["status"]
    assert status["gpu"] == {"uuid": "GPU-default-opt-0", "product": PRODUCT, "memory": "80Gi", "driver": "580.1"}
    assert status["mps"] == {"state": "ACTIVE", "clients": 2, "attachedReplicas": 2}
    assert (status["replicaCount"], status["readyReplicas"], status["holder"]) == (2, 2, HOLDER)
    assert all(each["attached"] for each in status["replicas"])
    assert status["ledger"]["assigned"]
    for which, reason in (
        ("Held", "GPUHeld"),
        ("SharingReady", "MPSActive"),
        ("ReplicasReady", "ReplicasReady"),
        ("Ready", "FullyRealised"),
    ):
        assert condition(world, which) == ("True", reason)


async def test_replicas_are_pinned_fenced_and_request_no_gpu() -> None:
    world = await make_packed()
    spec = world.all("StatefulSet")[0]["spec"]
    assert (spec["podManagementPolicy"], spec["updateStrategy"]) == ("Parallel", {"type": "OnDelete"})
    pod = spec["template"]["spec"]
    term = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "In", "values": ["n0"]}]
    assert labels.GPU_RESOURCE not in str(pod["containers"][0]["resources"])
    assert {v["hostPath"]["type"] for v in pod["volumes"] if "hostPath" in v} == {"Directory"}


async def test_a_holder_that_is_evicted_is_made_anew_on_its_node_and_the_pack_stays() -> None:
    world = await make_packed()
    before = world.get("GPUPack", "", PACK)["metadata"]["uid"]
    world.change("Pod", SYSTEM, HOLDER, lambda pod: pod.update(status={"phase": "Failed", "message": "evicted"}))
    await world.settle()
    assert condition(world, "Held") == ("False", "HolderLost")
    assert condition(world, "Ready") == ("False", "HolderLost")
    await world.run()
    assert condition(world, "Ready") == ("True", "FullyRealised")
    holder = world.get("Pod", SYSTEM, HOLDER)
    term = holder["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ][0]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "In", "values": ["n0"]}]
    assert world.get("GPUPack", "", PACK)["metadata"]["uid"] == before


async def test_a_holder_that_leaves_gets_its_replicas_drained_and_they_come_back_with_the_next() -> None:
    world = await make_packed()
    world.change("Pod", SYSTEM, HOLDER, lambda pod: pod["metadata"].update(deletionTimestamp="2026-01-01T00:00:00Z"))
    await world.settle()
    assert world.all("StatefulSet")[0]["spec"]["replicas"] == 0
    assert condition(world, "Held") == ("False", "HolderLost")
    await world.run()
    assert condition(world, "Ready") == ("True", "FullyRealised")
    assert len(replicas(world)) == 2


async def test_a_node_drained_at_once_gives_its_pack_up_when_there_is_another() -> None:
    """Before the next GPU is held: what is evicted doesn't serve, so nothing waits for it."""
    world = await make_packed()
    world.change("Node", "", "n0", lambda node: node["spec"].update(unschedulable=True))
    for pod in world.all("Pod"):
        world.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
    await world.run(rounds=20)
    assert [pack["status"]["node"] for pack in world.all("GPUPack")] == ["n1"]
    assert condition(world, "Ready", "default-opt-1") == ("True", "FullyRealised")


async def test_a_drain_that_took_one_replica_and_is_held_up_by_the_budget_moves_the_pack() -> None:
    world = await make_packed()
    world.change("Node", "", "n0", lambda node: node["spec"].update(unschedulable=True))

    def refused(pod: dict[str, Any]) -> None:
        text = "0/2 nodes are available: 1 node(s) were unschedulable, 1 node(s) didn't match Pod's node affinity."
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        pod["status"] = {"phase": "Pending", "conditions": [scheduled]}

    set_status(world, replicas(world)[0], refused)
    await world.run(rounds=20)
    assert [pack["status"]["node"] for pack in world.all("GPUPack")] == ["n1"]
    assert condition(world, "Ready", "default-opt-1") == ("True", "FullyRealised")


async def test_a_holder_that_comes_back_with_another_gpu_gets_the_pack_replaced() -> None:
    world = await make_packed()
    del world.api.objects[KINDS["Pod"].path(SYSTEM, HOLDER)]
    world.uuids[PACK] = "GPU-exchanged"
    await world.settle()
    world.nodes_act()
    await world.run(rounds=20)
    assert [pack["metadata"]["name"] for pack in world.all("GPUPack")] == ["default-opt-1"]
    assert condition(world, "Ready", "default-opt-1") == ("True", "FullyRealised")
    assert len(replicas(world)) == 2


async def test_a_pack_whose_node_is_gone_is_replaced_on_another() -> None:
    world = await make_packed()
    for pod in world.all("Pod"):
        world.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
    world.remove("Node", "", "n0")
    await world.run(rounds=20)
    assert [pack["status"]["node"] for pack in world.all("GPUPack")] == ["n1"]
    assert condition(world, "Ready", "default-opt-1") == ("True", "FullyRealised")


async def test_a_holder_without_a_gpu_says_what_the_scheduler_said() -> None:
    world = await make_packed(gpus=(1,))
    world.put(make_service("late", replicas=2))
    world.change("Node", "", "n0", lambda node: node["status"]["allocatable"].update({labels.GPU_RESOURCE: "2"}))
    await world.settle()
    world.change("Node", "", "n0", lambda node: node["status"]["allocatable"].update({labels.GPU_RESOURCE: "1"}))
    await world.run()
    assert condition(world, "Held", "default-late-0") == ("False", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in message(world, "Ready", "default-late-0")
    assert world.condition("LLMService", NS, "late", "Packed")[:2] == ("False", "InsufficientGPUs")


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            },
            "OOMKilled",
            "want of memory",
        ),
        (
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}},
            "ImagePullFailed",
            "no such tag",
        ),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 1, "message": "ValueError: bad"}},
            },
            "CrashLoop",
            "ValueError: bad",
        ),
        (
            {"state": {"terminated": {"exitCode": 71, "message": "GPUNotVisible: the container sees no GPU"}}},
            "GPUNotVisible",
            "sees no GPU",
        ),
    ],
)
async def test_a_broken_replica_is_reported_in_its_own_words(state: dict[str, Any], reason: str, words: str) -> None:
    world = await make_packed()
    set_status(world, replicas(world)[0], break_pod(**state))
    await world.settle()
    assert condition(world, "ReplicasReady") == ("False", reason)
    assert "1 of 2 assigned replicas ready" in message(world, "Ready")
    assert words in message(world, "Ready")
    ready = world.condition("LLMService", NS, "opt", "Ready")
    assert ready[0] == "False"
    assert words in ready[2]


async def test_several_starting_replicas_wait_for_the_start_slot() -> None:
    world = World()
    world.started = lambda pod: pod["metadata"]["labels"][labels.COMPONENT] == "holder"
    world.put(make_service(replicas=2))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    assert condition(world, "ReplicasReady") == ("False", "WaitingForStartSlot")
    assert world.condition("LLMService", NS, "opt", "Available")[:2] == ("False", "TooFewReplicas")


async def test_replicas_that_do_not_fit_their_node_move_and_the_node_is_excluded() -> None:
    world = await make_packed()

    def homeless(pod: dict[str, Any]) -> None:
        text = "0/2 nodes are available: 1 Insufficient cpu."
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        pod["status"] = {
            "phase": "Pending",
            "conditions": [{**scheduled, "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        }

    set_status(world, replicas(world)[0], homeless)
    await world.settle()
    assert condition(world, "ReplicasReady") == ("False", "Unschedulable")
    assert len(world.all("GPUPack")) == 1
    await world.clock.advance(120)
    await world.look_at_everything()
    assert [pack["spec"].get("excludedNodes") for pack in world.all("GPUPack") if pack["spec"]["assignments"]] == [
        ["n0"]
    ]


async def test_an_empty_pack_goes_only_when_its_replicas_are_gone() -> None:
    world = await make_packed()
    world.remove("LLMService", NS, "opt")
    await world.settle()
    assert world.get("GPUPack", "", PACK)["spec"]["assignments"] == []
    assert all(
        pod["metadata"].get("deletionTimestamp") is None
        for pod in world.all("Pod")
        if pod["metadata"]["name"] == HOLDER
    )
    await world.run()
    assert world.all("GPUPack") == world.all("Pod") == []


async def test_a_pack_that_somebody_deletes_is_made_anew() -> None:
    world = await make_packed()
    world.remove("GPUPack", "", PACK)
    await world.run(rounds=20)
    assert len(world.all("GPUPack")) == 1
    assert len(replicas(world)) == 2
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_set_of_cores_needs_no_holder_and_no_mps() -> None:
    world = await make_packed(accelerator=CPU, packing={"maxReplicasPerGPU": 2})
    pack = world.get("GPUPack", "", PACK)
    assert (pack["spec"]["mode"], pack["spec"]["node"], pack["spec"]["cores"]) == ("CPUSet", "n0", 2)
    assert condition(world, "Held") == condition(world, "SharingReady") == ("True", "CPUSet")
    assert condition(world, "Ready") == ("True", "FullyRealised")
    assert len(replicas(world)) == len(world.all("Pod")) == 2
    container = replicas(world)[0]["spec"]["containers"][0]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["resources"]["limits"]["cpu"] == "1"
    init = replicas(world)[0]["spec"]["initContainers"][0]["resources"]
    assert init["requests"] == init["limits"]
    volumes = [v for v in replicas(world)[0]["spec"]["volumes"] if "hostPath" in v]
    assert [v["hostPath"] for v in volumes] == [
        {"path": f"/run/tightship/{pack['metadata']['uid']}", "type": "DirectoryOrCreate"}
    ]
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_statefulset_of_that_name_that_is_not_ours_is_left_alone() -> None:
    world = World()
    world.put(make_service(replicas=2))
    await world.settle()
    theirs = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": set_name("opt", PACK), "namespace": NS},
        "spec": {"replicas": 0, "template": {"metadata": {"labels": {}}, "spec": {}}},
    }
    kept = copy.deepcopy(world.put(theirs)["spec"])
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    assert condition(world, "ReplicasReady") == ("False", "NameConflict")
    assert world.all("StatefulSet")[0]["spec"] == kept

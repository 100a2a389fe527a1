"""The sharing modes without a holder, told by the API: who gets which, what is said of it, and what holds the GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from modes_world import SHARED, make_shared_world, make_world, pack
from pack_world import PRODUCT, World, complete, make_class, make_node, make_slice
from story import make_service
from tightship.api.v1alpha1 import labels

NS, PACK = "default", "default-opt-0"


def replica_pods(world: World) -> list[dict[str, Any]]:
    return [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "replica"]


def told(world: World, which: str, name: str = PACK) -> tuple[str, str, str]:
    return world.condition("GPUPack", "", name, which)


def modes(world: World) -> set[str]:
    return {each["spec"]["mode"] for each in world.all("GPUPack")}


async def test_auto_says_that_the_cluster_has_no_dra() -> None:
    world = await pack(make_world())
    assert modes(world) == {"Reservation"}
    status, reason, message = told(world, "SharingReady")
    assert (status, reason) == ("True", "MPSActive")
    assert "mode Reservation, chosen by Auto: this cluster doesn't serve resource.k8s.io/v1" in message


async def test_auto_says_that_the_driver_has_no_such_gpu() -> None:
    world = make_world(dra=(0,))
    world.put(make_slice("n0", 1, "NVIDIA-L4"))
    await pack(world)
    assert modes(world) == {"Reservation"}
    assert (
        "no ResourceSlice of driver gpu.nvidia.com offers NVIDIA-H100-80GB-HBM3 (offered: 1 of NVIDIA-L4 on 1 nodes)"
        in (told(world, "SharingReady")[2])
    )


async def test_auto_takes_dra_where_there_is_one() -> None:
    world = await pack(make_world(dra=(2, 2), gpus=(0, 0)))
    (found,) = world.all("GPUPack")
    assert (found["spec"]["mode"], found["spec"]["allocator"]) == ("DRA", "DRA")
    assert not [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "holder"]
    claim = world.get("ResourceClaim", NS, PACK)
    (request,) = claim["spec"]["devices"]["requests"]
    assert f"== '{PRODUCT}'" in request["exactly"]["selectors"][0]["cel"]["expression"]
    assert claim["spec"]["devices"]["config"][0]["opaque"]["parameters"]["sharing"] == {"strategy": "MPS"}
    status = found["status"]
    assert status["gpu"] == {"uuid": "GPU-n0-0", "product": PRODUCT, "memory": "80Gi", "driver": "580.105.8"}
    assert (status["node"], status["mps"]["attachedReplicas"], status["readyReplicas"]) == ("n0", 2, 2)
    for which, reason in (
        ("Held", "GPUHeld"),
        ("SharingReady", "MPSActive"),
        ("ReplicasReady", "ReplicasReady"),
        ("Ready", "FullyRealised"),
    ):
        assert told(world, which)[:2] == ("True", reason)
    assert "mode DRA, chosen by Auto: driver gpu.nvidia.com offers 4 such GPUs" in told(world, "SharingReady")[2]
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_replicas_name_the_claim_and_meet_at_the_start_lock() -> None:
    world = await pack(make_world(dra=(1,), gpus=(0,)), template={"spec": {"securityContext": {"runAsUser": 1000}}})
    pod = world.all("StatefulSet")[0]["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimName": PACK}]
    containers = {each["name"]: each for each in [*pod["initContainers"], *pod["containers"]]}
    assert list(containers) == ["prepare", "inject", "report", "engine"]
    for name in ("report", "engine"):
        assert containers[name]["resources"]["claims"] == [{"name": "gpu"}]
        env = {each["name"]: each.get("value") for each in containers[name]["env"]}
        assert env["TIGHTSHIP_SHARING"] == "DRA"
        assert not {"CUDA_MPS_PIPE_DIRECTORY", "TIGHTSHIP_GPU_UUID", "NVIDIA_VISIBLE_DEVICES"} & set(env)
        mounts = {each["mountPath"] for each in containers[name]["volumeMounts"]}
        assert mounts >= {"/run/tightship/pack"}
        assert not mounts & {"/mps", "/dev/shm"}
    hosts = [each["hostPath"] for each in pod["volumes"] if "hostPath" in each]
    assert [each["type"] for each in hosts] == ["DirectoryOrCreate"]
    assert "matchFields" not in str(pod["affinity"]), "the claim says where"


async def test_dra_by_name_without_it_is_a_condition_and_measures_nothing() -> None:
    world = make_world()
    world.put(make_service(packing={"mode": "DRA"}))
    await world.settle()
    status, reason, message = world.condition("LLMService", NS, "opt", "Accepted")
    assert (status, reason) == ("False", "UnsupportedAccelerator")
    assert "packing.mode DRA can't be had: this cluster doesn't serve resource.k8s.io/v1" in message
    assert "or set Auto" in message
    assert not world.all("BatchProfile")


async def test_a_driver_that_goes_away_for_a_while_costs_nobody_anything() -> None:
    world = await pack(make_world(dra=(2,), gpus=(0,)), packing={"mode": "DRA"})
    before = {pod["metadata"]["uid"] for pod in replica_pods(world)}
    world.remove("ResourceSlice", "", "n0-gpu.nvidia.com-1")
    await world.run()
    assert world.condition("LLMService", NS, "opt", "Accepted")[:2] == ("False", "UnsupportedAccelerator")
    world.put(make_slice("n0", 2, generation=2))
    await world.run()
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")
    assert {pod["metadata"]["uid"] for pod in replica_pods(world)} == before


async def test_gpus_of_others_claims_are_not_counted() -> None:
    world = make_world(dra=(2,), gpus=(0,))
    taken = {"request": "x", "driver": labels.DRA_DRIVER, "pool": "n0", "device": "gpu-0"}
    somebodys = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": "training", "namespace": NS},
        "spec": {},
        "status": {"allocation": {"devices": {"results": [taken]}}},
    }
    world.put(somebodys)
    await pack(world, replicas=4)
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    assert "need 1 more" in message
    assert "of 1 that this service may use 0 are free" in message
    world.remove("ResourceClaim", NS, "training")
    await world.run(rounds=12)
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"
    assert {each["status"]["gpu"]["uuid"] for each in world.all("GPUPack")} == {"GPU-n0-0", "GPU-n0-1"}


async def test_scaling_to_zero_gives_the_claim_back_and_the_next_may_have_another_gpu() -> None:
    world = await pack(make_world(dra=(1,), gpus=(0,)))
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=0))
    await world.run(rounds=12)
    assert not world.all("GPUPack")
    assert not world.all("ResourceClaim")
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=2))
    await world.run(rounds=12)
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"


async def test_a_gpu_that_changed_while_nobody_used_it_is_no_mismatch() -> None:
    world = await pack(make_world(dra=(1,), gpus=(0,)))
    for pod in replica_pods(world):
        world.remove("Pod", NS, pod["metadata"]["name"])
    before = {each["metadata"]["uid"] for each in world.all("GPUPack")}
    exchanged = make_slice("n0", 1, generation=2)
    exchanged["spec"]["devices"][0]["attributes"]["uuid"]["string"] = "GPU-new"
    world.put(exchanged)
    await world.run(rounds=12)
    (found,) = world.all("GPUPack")
    assert found["metadata"]["uid"] in before
    assert found["status"]["gpu"]["uuid"] == "GPU-new"
    assert told(world, "Ready")[:2] == ("True", "FullyRealised")


async def test_a_replica_that_sees_another_gpu_makes_the_pack_unusable() -> None:
    world = make_world(dra=(2, 2), gpus=(0, 0))
    strayed: list[tuple[str, str, str]] = []
    world.reports = lambda pod: (
        world.seen_by(pod)
        | (
            {"uuid": "GPU-else"}
            if pod["metadata"]["name"].endswith("-1") and pod["metadata"]["labels"][labels.PACK] == PACK
            else {}
        )
    )
    world.watched = lambda key: strayed.append(told(world, "Held")) if world.api.find("GPUPack", "", PACK) else None
    await pack(world)
    mismatches = [each for each in strayed if each[1] == "GPUMismatch"]
    assert mismatches
    assert "-1 sees GPU-else, the pack has GPU-n0-0" in mismatches[0][2]
    await world.run(rounds=12)
    (found,) = world.all("GPUPack")
    assert (found["metadata"]["name"], found["status"]["node"]) == ("default-opt-1", "n1"), "replaced, on another node"
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"


async def test_gpus_that_go_on_being_others_than_the_claims_are_tried_ever_more_seldom() -> None:
    """The driver of the only node shows the second replica a GPU that isn't the claim's, whichever that is."""
    world = make_world(dra=(2,), gpus=(0,))
    world.reports = lambda pod: (
        world.seen_by(pod) | ({"uuid": "GPU-else"} if pod["metadata"]["name"][-2:] == "-1" else {})
    )
    made: list[float] = []
    world.watched = lambda key: made.append(world.clock.monotonic()) if replica_pods(world) else None
    await pack(world)
    for _ in range(80):
        await world.clock.advance(60)
        world.queue._promote()
        await world.run(rounds=6)
    tries = sorted({round(second / 60) for second in made})
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries) if later - earlier > 1]
    assert [gap // 10 * 10 for gap in gaps] == [10, 20, 40], "minutes, and what it takes to see them"
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "InsufficientGPUs")
    assert (
        "kept off for want of room, or of their claim's GPU: n0 until"
        in world.condition("LLMService", NS, "opt", "Packed")[2]
    )


async def test_a_replica_without_mps_is_found_out() -> None:
    world = make_world(dra=(1,), gpus=(0,))
    world.reports = lambda pod: world.seen_by(pod) | {"mps": False}
    await pack(world)
    assert told(world, "SharingReady")[0] == "Unknown"
    await world.clock.advance(40)
    await world.look_at_everything()
    assert told(world, "SharingReady")[:2] == ("False", "MPSNotAttached")
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "SharingUnavailable")


@pytest.mark.parametrize("mode", ["DRA", "DevicePlugin"])
async def test_a_driver_that_does_not_say_whether_mps_is_there_gets_nobody_restarted(mode: str) -> None:
    """Drivers before CUDA 12 don't know the attribute: that is no proof of anything."""
    world = make_world(dra=(1,), gpus=(0,)) if mode == "DRA" else make_shared_world(2)
    tells = world.reports
    world.reports = lambda pod: tells(pod) | {"mps": None}
    await pack(world, packing={"mode": mode, "maxReplicasPerGPU": 2})
    before = {pod["metadata"]["uid"] for pod in replica_pods(world)}
    for _ in range(3):
        await world.clock.advance(60)
        await world.look_at_everything()
        await world.run()
    assert {pod["metadata"]["uid"] for pod in replica_pods(world)} == before
    status, reason, message = told(world, "SharingReady")
    assert (status, reason) == ("Unknown", "NotYetKnown")
    assert "could not tell whether through MPS" in message
    assert "update the driver of node n0" in message
    assert all("attached" not in each for each in world.get("GPUPack", "", PACK)["status"]["replicas"])


async def test_a_refusal_for_want_of_mps_reaches_the_service() -> None:
    world = await pack(make_world(dra=(1,), gpus=(0,)))
    words = "MPSNotAttached: the claim's driver has set no CUDA_MPS_PIPE_DIRECTORY"

    def refuse(pod: dict[str, Any]) -> None:
        ended = {"exitCode": 73, "message": words}
        init = [{"name": "report", "restartCount": 2, "state": {"terminated": ended}}]
        pod["status"] = {"phase": "Pending", "conditions": [], "initContainerStatuses": init}

    for pod in replica_pods(world):
        world.change("Pod", NS, pod["metadata"]["name"], refuse)
    await world.settle()
    assert told(world, "SharingReady")[:2] == ("False", "MPSNotAttached")
    assert "CUDA_MPS_PIPE_DIRECTORY" in world.condition("LLMService", NS, "opt", "Packed")[2]


async def test_a_daemon_that_takes_nobody_back_is_ended_by_releasing_the_claim() -> None:
    world = await pack(make_world(dra=(1,), gpus=(0,)))
    before = {pod["metadata"]["uid"] for pod in replica_pods(world)}

    def lose(pod: dict[str, Any]) -> None:
        ended = {"exitCode": 73, "message": "MPSNotAttached: CUDA did not answer within 120 s"}
        pod["status"]["conditions"] = []
        pod["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 1, "state": {"terminated": ended}}]

    first, second = replica_pods(world)
    world.change("Pod", NS, first["metadata"]["name"], lose)
    await world.settle()
    assert not [pod for pod in replica_pods(world) if "deletionTimestamp" in pod["metadata"]], (
        "while one serves, nobody stops"
    )
    world.change("Pod", NS, second["metadata"]["name"], lose)
    await world.run(rounds=12)
    assert before.isdisjoint(pod["metadata"]["uid"] for pod in replica_pods(world))
    assert told(world, "Ready")[:2] == ("True", "FullyRealised")


async def test_a_claim_that_finds_no_gpu_says_what_the_scheduler_said() -> None:
    world = make_world(dra=(1,), gpus=(0,))
    world.change("Node", "", "n0", lambda node: node["spec"].update(unschedulable=False))
    world.put(make_service(replicas=2))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.settle()
    world.change("Node", "", "n0", lambda node: node["spec"].update(unschedulable=True))
    await world.run()
    assert told(world, "Held")[:2] == ("False", "Unschedulable")
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "InsufficientGPUs")


async def test_a_node_that_offers_its_gpus_twice_is_warned_of() -> None:
    world = await pack(make_world(dra=(2,), gpus=(2,)))
    assert modes(world) == {"DRA"}
    message = told(world, "SharingReady")[2]
    assert "warning: node n0 offers its GPUs twice, 2 by DRA and 2 as nvidia.com/gpu" in message


ZONES = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}


async def test_auto_keeps_a_service_with_topology_spread_where_it_can_be_followed() -> None:
    """Holders follow the constraints; pods of one claim go where its GPU is, and nothing spreads claims."""
    world = await pack(make_world(dra=(2, 2)), template__spec={"topologySpreadConstraints": [ZONES]})
    assert modes(world) == {"Reservation"}
    assert (
        "mode Reservation, chosen by Auto: its topologySpreadConstraints can't be followed in mode DRA"
        in (told(world, "SharingReady")[2])
    )
    (holder,) = [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "holder"]
    assert [each["topologyKey"] for each in holder["spec"]["topologySpreadConstraints"]] == [ZONES["topologyKey"]]


@pytest.mark.parametrize("mode", ["DRA", "DevicePlugin"])
async def test_topology_spread_that_counts_for_nothing_is_warned_of(mode: str) -> None:
    world = make_world(dra=(2,), gpus=(0,)) if mode == "DRA" else make_shared_world(2)
    packing = SHARED["packing"] if mode == "DevicePlugin" else {"mode": "Auto", "maxReplicasPerGPU": 2}
    await pack(world, packing=packing, template__spec={"topologySpreadConstraints": [ZONES]})
    assert modes(world) == {mode}
    words = f"warning: template.spec.topologySpreadConstraints are not followed in mode {mode}"
    status, _, message = told(world, "SharingReady")
    assert status == "True"
    assert words in message


async def test_a_driver_that_is_installed_later_moves_nobody() -> None:
    world = await pack(make_world())
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    world.ctx.absent = frozenset()
    world.put(make_class())
    world.put(make_slice("n1", 2))
    await world.look_at_everything()
    await world.run()
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == before
    assert "it was made before DRA offered such GPUs" in told(world, "SharingReady")[2]


@pytest.mark.parametrize(
    ("changes", "trials", "why"),
    [
        ({"packing": {"mode": "Exclusive"}}, None, "mode Exclusive: as packing.mode asks"),
        ({"packing": {"minimumGain": "3"}}, [], "mode Exclusive, chosen by Auto: one replica on each GPU is the best"),
        (
            {"packing": {"mode": "Reservation", "maxReplicasPerGPU": 1}},
            None,
            "mode Exclusive: one replica on each GPU is the best",
        ),
    ],
)
async def test_one_replica_on_a_gpu_requests_it_itself(changes: dict[str, Any], trials: Any, why: str) -> None:
    world = await pack(make_world(), trials=trials, **changes)
    assert modes(world) == {"Exclusive"}
    assert len(world.all("GPUPack")) == 2
    assert not world.all("ResourceClaim")
    pods = replica_pods(world)
    assert pods == world.all("Pod"), "nobody holds a GPU for them"
    for pod in pods:
        spec = pod["spec"]
        assert spec["containers"][0]["resources"]["limits"][labels.GPU_RESOURCE] == "1"
        assert not [each for each in spec["volumes"] if "hostPath" in each]
        assert "MPS" not in str(spec["containers"][0]["env"])
        assert spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ] == [{"matchExpressions": [{"key": labels.NODE_GPU_PRODUCT, "operator": "In", "values": [PRODUCT]}]}]
    status, reason, message = told(world, "SharingReady")
    assert (status, reason) == ("True", "Exclusive")
    assert why in message
    assert told(world, "Held")[:2] == ("True", "GPUHeld")
    assert world.get("GPUPack", "", PACK)["status"]["gpu"]["uuid"].startswith("GPU-of-")
    assert "mps" not in world.get("GPUPack", "", PACK)["status"]
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_where_only_dra_has_gpus_an_exclusive_one_is_claimed_without_mps() -> None:
    world = await pack(make_world(dra=(2,), gpus=(0,)), replicas=1, packing={"mode": "Exclusive"})
    (found,) = world.all("GPUPack")
    assert (found["spec"]["mode"], found["spec"]["allocator"]) == ("Exclusive", "DRA")
    assert "config" not in world.get("ResourceClaim", NS, PACK)["spec"]["devices"]
    assert told(world, "Ready")[:2] == ("True", "FullyRealised")


async def test_where_only_dra_has_gpus_measurements_claim_one_too() -> None:
    world = World(gpus=(0,), profiling=True)
    world.put(make_class())
    world.put(make_slice("n0", 2))
    world.put(make_service())
    await world.settle()
    (job,) = world.all("Job")
    (claim,) = world.all("ResourceClaim")
    pod = job["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimName": claim["metadata"]["name"]}]
    assert pod["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]
    assert labels.GPU_RESOURCE not in str(job["spec"])
    assert "config" not in claim["spec"]["devices"], "the profiler runs its own MPS"
    assert claim["metadata"]["ownerReferences"][0]["kind"] == "BatchProfile"


async def test_what_was_packed_and_no_longer_pays_is_not_moved_for_it() -> None:
    world = await pack(make_world(), replicas=2)
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    assert modes(world) == {"Reservation"}
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"]["packing"].update(maxReplicasPerGPU=1))
    await world.run(rounds=12)
    assert modes(world) == {"Reservation"}
    kept = before & {pod["metadata"]["uid"] for pod in world.all("Pod")}
    assert kept, "of the two that shared a GPU one stays there"


async def test_nodes_that_give_no_whole_gpus_are_named_where_gpus_are_missing() -> None:
    world = make_world(gpus=(1,))
    sliced = make_node("n1", 0)
    sliced["metadata"]["labels"] = {
        labels.NODE_GPU_PRODUCT: f"{PRODUCT}-SHARED",
        labels.NODE_GPU_SHARING: "time-slicing",
        labels.NODE_GPU_REPLICAS: "4",
        labels.NODE_GPU_COUNT: "8",
    }
    world.put(sliced)
    await pack(world, replicas=4)
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "InsufficientGPUs")
    assert "node n1 has 8 GPUs handed to 4 pods each by the device plugin (time-slicing)" in message


async def test_shares_of_the_device_plugin_come_with_a_warning_in_numbers() -> None:
    world = await pack(make_shared_world(2), **SHARED)
    (found,) = world.all("GPUPack")
    assert (found["spec"]["mode"], found["spec"]["resource"]) == ("DevicePlugin", labels.SHARED_GPU_RESOURCE)
    assert (found["status"]["gpu"]["uuid"], found["status"]["mps"]["attachedReplicas"]) == ("GPU-n0-0", 2)
    assert "memory" not in found["status"]["gpu"], "what a client sees may be its share"
    status, reason, message = told(world, "SharingReady")
    assert (status, reason) == ("True", "DeviceLimitsForced")
    assert "each of 2 clients of a GPU has at most 40Gi of 80Gi and 50 % of its threads" in message
    assert "mode DevicePlugin: as packing.mode asks" in message
    pod = world.all("StatefulSet")[0]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {labels.SHARED_GPU_RESOURCE: "1"}
    (near,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near["labelSelector"]["matchLabels"][labels.PACK] == PACK
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_replicas_that_got_different_gpus_are_told_and_go_on() -> None:
    world = make_shared_world(2, gpus=2)
    world.reports = lambda pod: world.seen_by(pod) | {"mps": True}
    await pack(world, **SHARED)
    before = {pod["metadata"]["uid"] for pod in replica_pods(world)}
    status, reason, message = told(world, "SharingReady")
    assert (status, reason) == ("False", "GPUMismatch")
    assert message.count("on GPU-of-") == 2
    assert world.condition("LLMService", NS, "opt", "Packed")[:2] == ("False", "SharingUnavailable")
    await world.run()
    assert {pod["metadata"]["uid"] for pod in replica_pods(world)} == before


async def test_a_share_that_is_too_small_takes_no_gpu() -> None:
    world = await pack(make_shared_world(10), **SHARED)
    assert not world.all("GPUPack")
    status, reason, message = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "SharingUnavailable")
    assert "lets each of 10 clients have 8Gi of 80Gi: at most" in message


async def test_shares_by_name_where_no_node_has_any_are_a_condition() -> None:
    world = make_world()
    world.put(make_service(**SHARED))
    await world.settle()
    status, reason, message = world.condition("LLMService", NS, "opt", "Accepted")
    assert (status, reason) == ("False", "UnsupportedAccelerator")
    assert "needs nodes whose device plugin shares NVIDIA-H100-80GB-HBM3 by MPS" in message


async def test_a_replica_that_serves_has_its_gpu_even_if_it_has_not_told_which() -> None:
    world = make_world()
    world.reports = lambda pod: {}
    await pack(world, replicas=1, packing={"mode": "Exclusive"})
    status, reason, message = told(world, "Held")
    assert (status, reason) == ("True", "GPUHeld")
    assert "which one is not known" in message
    assert told(world, "Ready")[:2] == ("True", "FullyRealised")


async def test_what_keeps_a_replica_that_holds_its_own_gpu_from_starting_is_what_ready_says() -> None:
    world = make_world()
    world.reports = lambda pod: {}
    await pack(world, replicas=1, packing={"mode": "Exclusive"})

    def waiting(pod: Any) -> None:
        state = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
        pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "engine", "image": "img", "state": state}]}

    (pod,) = world.all("Pod")
    world.change("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"], waiting)
    await world.settle()
    for found in (told(world, "Held"), told(world, "Ready")):
        assert found[1] == "ImagePullFailed"
        assert "no such tag" in found[2]
    assert "no such tag" in world.condition("LLMService", NS, "opt", "Ready")[2]

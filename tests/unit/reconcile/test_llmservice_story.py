"""From a manifest to packed replicas and back, with the reconcilers of services, packs and placement together."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pack_world import PRODUCT, World, complete, make_node
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.manifests import replicas
from tightship.reconcile import gpupack
from tightship.reconcile.queue import Key

NS, NAME = "default", "opt"


async def make_ready(**changes: Any) -> World:
    """A world in which the sample service is measured, packed and serving."""
    world = World()
    world.put(make_service(**changes))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    return world


def service(world: World) -> dict[str, Any]:
    return world.get("LLMService", NS, NAME)


def condition(world: World, which: str) -> tuple[str, str]:
    return world.condition("LLMService", NS, NAME, which)[:2]


def message(world: World, which: str) -> str:
    return world.condition("LLMService", NS, NAME, which)[2]


def replica_pods(world: World) -> list[dict[str, Any]]:
    return [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == labels.COMPONENT_REPLICA]


def spread(world: World) -> dict[str, int]:
    return {
        pack["metadata"]["name"]: sum(each["replicas"] for each in pack["spec"]["assignments"])
        for pack in world.all("GPUPack")
    }


async def test_a_new_manifest_gets_a_service_and_a_profile_and_waits_for_the_measurement() -> None:
    world = World()
    world.put(make_service())
    await world.settle()
    profile = world.all("BatchProfile")[0]
    assert profile["metadata"]["name"].startswith("opt-1-3b-")
    assert "ownerReferences" not in profile["metadata"]
    assert world.get("Service", NS, NAME)["spec"]["selector"][labels.COMPONENT] == "replica"
    assert condition(world, "Accepted") == ("True", "Valid")
    assert condition(world, "Profiled") == ("False", "Measuring")
    assert condition(world, "Ready")[0] == "False"
    assert condition(world, "Reconciling")[0] == "True"
    assert world.all("GPUPack") == []


async def test_once_measured_replicas_are_packed_and_everything_is_said() -> None:
    world = await make_ready()
    assert spread(world) == {"default-opt-0": 2, "default-opt-1": 2}
    for which, reason in (
        ("Accepted", "Valid"),
        ("Profiled", "Completed"),
        ("Recommended", "Measured"),
        ("Packed", "Placed"),
        ("Available", "MinimumReplicasReady"),
        ("Ready", "FullyRealised"),
    ):
        assert condition(world, which) == ("True", reason), message(world, which)
    status = service(world)["status"]
    assert (status["replicas"], status["readyReplicas"], status["phase"]) == (4, 4, "Ready")
    assert status["gpus"] == {"used": 2, "saved": 2}
    assert status["url"] == "http://opt.default.svc/v1"
    assert [(pack["replicas"], pack["ready"]) for pack in status["packs"]] == [(2, 2), (2, 2)]
    assert status["recommendation"]["replicasPerGPU"] == 2
    assert condition(world, "Reconciling") == condition(world, "Stalled") == ("absent", "")


async def test_no_replica_is_made_before_the_holder_has_said_which_gpu_it_holds() -> None:
    world = World()
    world.put(make_service())
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.settle()
    assert [pod["metadata"]["name"] for pod in world.all("Pod")] == ["holder-default-opt-0", "holder-default-opt-1"]
    assert world.all("StatefulSet") == []
    world.nodes_act()
    await world.settle()
    for made in world.all("StatefulSet"):
        variables = {
            each["name"]: each.get("value") for each in made["spec"]["template"]["spec"]["containers"][0]["env"]
        }
        gpu = "GPU-" + made["metadata"]["labels"][labels.PACK]
        assert variables["NVIDIA_VISIBLE_DEVICES"] == variables["TIGHTSHIP_GPU_UUID"] == gpu


async def test_looking_at_everything_again_writes_nothing() -> None:
    world = await make_ready()
    before = world.api.writes()
    await world.look_at_everything()
    assert world.api.writes() == before


async def test_a_restarted_operator_changes_nothing() -> None:
    world = await make_ready()
    before = copy.deepcopy(world.api.objects)
    fresh = World(gpus=())
    fresh.api.objects, fresh.api._version, fresh.uuids = world.api.objects, world.api._version, world.uuids
    await fresh.look_at_everything()
    assert fresh.api.objects == before


async def test_a_second_service_of_the_same_key_uses_the_measurement() -> None:
    world = await make_ready(replicas=1)
    world.put(make_service("other", replicas=1))
    await world.run()
    assert len(world.all("BatchProfile")) == 1
    assert world.condition("LLMService", NS, "other", "Profiled")[:2] == ("True", "CacheHit")
    assert world.condition("LLMService", NS, "other", "Ready")[:2] == ("True", "FullyRealised")


async def test_scaling_up_fills_the_partly_used_pack_and_restarts_nobody() -> None:
    world = await make_ready(replicas=3)
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=4))
    await world.run()
    assert spread(world) == {"default-opt-0": 2, "default-opt-1": 2}
    assert before < {pod["metadata"]["uid"] for pod in world.all("Pod")}
    assert condition(world, "Ready") == ("True", "FullyRealised")


async def test_scaling_down_empties_the_newest_pack_and_gives_its_gpu_back() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=1))
    await world.run()
    assert spread(world) == {"default-opt-0": 1}
    assert [pod["metadata"]["name"] for pod in world.all("Pod") if "holder" in pod["metadata"]["name"]] == [
        "holder-default-opt-0"
    ]
    assert service(world)["status"]["gpus"] == {"used": 1, "saved": 0}


async def test_scaling_to_nothing_and_back() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=0))
    await world.run()
    assert spread(world) == {}
    assert service(world)["status"]["phase"] == "Idle"
    assert condition(world, "Ready") == ("True", "FullyRealised")
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=2))
    await world.run()
    assert spread(world) == {"default-opt-0": 2}
    assert condition(world, "Ready") == ("True", "FullyRealised")


async def test_deleting_the_service_leaves_only_the_profile() -> None:
    world = await make_ready()
    world.remove("LLMService", NS, NAME)
    await world.run()
    left = {obj["kind"] for obj in world.api.objects.values()} - {"Event", "Node"}
    assert left == {"BatchProfile"}


async def test_old_replicas_keep_serving_while_a_changed_manifest_is_measured() -> None:
    world = await make_ready()
    before = copy.deepcopy(world.all("StatefulSet"))
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["workload"].update(outputTokens=100))
    await world.run()
    assert len(world.all("BatchProfile")) == 2
    assert world.all("StatefulSet") == before
    assert condition(world, "Available") == ("True", "MinimumReplicasReady")
    assert condition(world, "Ready") == ("False", "Measuring")
    assert service(world)["status"]["recommendation"]["profile"] != service(world)["status"]["profile"]["name"]
    new = service(world)["status"]["profile"]["name"]
    world.change("BatchProfile", NS, new, complete)
    await world.run(rounds=20)
    assert condition(world, "Ready") == ("True", "FullyRealised")
    assert {each["profile"] for pack in world.all("GPUPack") for each in pack["spec"]["assignments"]} == {new}


async def test_a_changed_objective_costs_no_measurement() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["slo"]["objectives"][0].update(max="10ms"))
    await world.run(rounds=20)
    assert len(world.all("BatchProfile")) == 1
    assert service(world)["status"]["recommendation"]["batch"] == 32
    assert condition(world, "Ready") == ("True", "FullyRealised")


async def test_replicas_are_rolled_one_at_a_time() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["model"].update(servedName="renamed"))
    smallest = 4
    for _ in range(20):
        await world.settle()
        smallest = min(smallest, sum(pod["metadata"].get("deletionTimestamp") is None for pod in world.all("Pod")) - 2)
        version = world.api._version
        world.nodes_act()
        if world.api._version == version:
            break
    await world.settle()
    assert smallest == 3
    assert condition(world, "Ready") == ("True", "FullyRealised")
    names = {
        pod["spec"]["containers"][0]["args"][6] for pod in world.all("Pod") if "holder" not in pod["metadata"]["name"]
    }
    assert names == {"renamed"}


async def test_two_packs_that_look_at_once_do_not_both_replace_a_replica() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["model"].update(servedName="renamed"))
    await world.settle()
    world.nodes_act()
    for pack, replaced in (("default-opt-1", 0), ("default-opt-0", 1), ("default-opt-1", 1)):
        await gpupack.reconcile(world.ctx, Key("GPUPack", "", pack))
        assert sum("deletionTimestamp" in pod["metadata"] for pod in world.all("Pod")) == replaced


async def test_an_upgraded_operator_restarts_nobody() -> None:
    world = await make_ready()
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    object.__setattr__(world.ctx.settings, "operator_image", "tightship:next")
    object.__setattr__(world.ctx.settings, "image_pull_policy", "Always")
    await world.look_at_everything()
    await world.run()
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == before


async def test_an_operator_that_makes_other_pods_restarts_nobody_until_something_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it touch what pods that are lost come back from; scaling and a manifest that means the same are taken up all the same."""
    world = await make_ready()
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    templates = {found["metadata"]["name"]: found["spec"]["template"] for found in world.all("StatefulSet")}
    environment = replicas._environment
    new = {"name": "TIGHTSHIP_NEXT", "value": "1"}
    monkeypatch.setattr(replicas, "_environment", lambda setup: [*environment(setup), new])

    await world.look_at_everything()
    await world.run()
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == before
    assert condition(world, "Ready") == ("True", "FullyRealised")

    lost = replica_pods(world)[0]
    world.remove("Pod", NS, lost["metadata"]["name"])
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=3, rollout={"maxUnavailable": 2}))
    await world.run(rounds=20)
    assert condition(world, "Ready") == ("True", "FullyRealised")
    assert len(replica_pods(world)) == 3
    assert {found["metadata"]["name"]: found["spec"]["template"] for found in world.all("StatefulSet")} == templates
    assert len({pod["metadata"]["uid"] for pod in world.all("Pod")} - before) == 1, "the one that was lost"

    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["model"].update(servedName="renamed"))
    await world.run(rounds=40)
    assert condition(world, "Ready") == ("True", "FullyRealised")
    assert all(new in pod["spec"]["containers"][0]["env"] for pod in replica_pods(world))


async def test_with_auto_apply_off_nothing_is_packed_until_it_is_on() -> None:
    world = await make_ready(autoApply=False)
    assert world.all("GPUPack") == []
    assert condition(world, "Packed") == ("False", "AwaitingApproval")
    assert condition(world, "Ready") == ("False", "AwaitingApproval")
    assert condition(world, "Stalled") == ("True", "AwaitingApproval")
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(autoApply=True))
    await world.run()
    assert condition(world, "Ready") == ("True", "FullyRealised")
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(autoApply=False, replicas=3))
    await world.run()
    assert condition(world, "Ready") == ("True", "FullyRealised")


async def test_too_few_gpus_are_reported_with_numbers_and_what_fits_is_packed() -> None:
    world = World(gpus=(1,))
    world.put(make_service())
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    assert spread(world) == {"default-opt-0": 2}
    assert condition(world, "Packed") == ("False", "InsufficientGPUs")
    assert "2 of 4 replicas have no place: they need 1 more" in message(world, "Packed")
    world.put({**world.all("Node")[0], "metadata": {**world.all("Node")[0]["metadata"], "name": "n9", "uid": "n9"}})
    await world.run()
    assert condition(world, "Ready") == ("True", "FullyRealised")


async def test_what_evictions_may_take_is_what_may_be_missing() -> None:
    world = await make_ready(rollout={"maxUnavailable": "50%"})
    budget = world.get("PodDisruptionBudget", NS, NAME)
    assert budget["spec"]["maxUnavailable"] == "50%"
    assert budget["spec"]["selector"] == {"matchLabels": world.get("Service", NS, NAME)["spec"]["selector"]}
    assert budget["metadata"]["ownerReferences"][0]["uid"] == service(world)["metadata"]["uid"]
    assert condition(world, "Available") == ("True", "MinimumReplicasReady")

    replicas = [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "replica"]
    for lost, status in zip(replicas, ("True", "True", "False", "False"), strict=True):
        world.change("Pod", NS, lost["metadata"]["name"], lambda pod: pod["status"].update(conditions=[]))
        await world.settle()
        assert condition(world, "Available")[0] == status
    assert "0 of 4 replicas serve, 2 have to (spec.rollout.maxUnavailable)" in message(world, "Available")


async def test_a_service_of_one_replica_is_not_available_without_it() -> None:
    world = await make_ready(replicas=1)
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"]["maxUnavailable"] == 1
    (replica,) = [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "replica"]
    world.change("Pod", NS, replica["metadata"]["name"], lambda pod: pod["status"].update(conditions=[]))
    await world.settle()
    assert condition(world, "Available") == ("False", "TooFewReplicas")


async def test_a_changed_or_deleted_budget_is_put_right_and_stays_at_no_replicas() -> None:
    world = await make_ready()
    world.change("PodDisruptionBudget", NS, NAME, lambda budget: budget["spec"].update(maxUnavailable=4))
    await world.run()
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"]["maxUnavailable"] == 1
    world.remove("PodDisruptionBudget", NS, NAME)
    await world.run()
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"]["maxUnavailable"] == 1
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(replicas=0))
    await world.run()
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"]["maxUnavailable"] == 1
    assert condition(world, "Ready")[0] == "True"


async def test_without_policy_v1_no_budget_is_made_and_accepted_says_so() -> None:
    world = World()
    world.ctx.absent = frozenset({"PodDisruptionBudget"})
    world.api.lacks.add("policy/v1")
    world.put(make_service())
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    assert condition(world, "Ready")[0] == "True"
    assert not world.all("PodDisruptionBudget")
    assert "doesn't serve policy/v1 (PodDisruptionBudget)" in message(world, "Accepted")
    assert ("PATCH", "PodDisruptionBudget") not in world.api.requests


POOLED = {"mode": "InferencePool", "endpointPicker": {"name": "opt-epp"}}


async def test_a_pool_comes_and_goes_with_the_mode_and_the_service_stays() -> None:
    world = await make_ready(routing=POOLED)
    pool, front = world.get("InferencePool", NS, NAME), world.get("Service", NS, NAME)
    assert pool["spec"] == {
        "selector": {"matchLabels": front["spec"]["selector"]},
        "targetPorts": [{"number": 8000}],
        "endpointPickerRef": {"name": "opt-epp", "port": {"number": 9002}, "failureMode": "FailClose"},
    }
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(routing={"mode": "Service"}))
    await world.run()
    assert not world.all("InferencePool")
    assert world.get("Service", NS, NAME)["spec"] == front["spec"]
    assert condition(world, "Ready")[0] == "True"


async def test_a_pool_that_is_not_ours_is_never_taken_nor_removed() -> None:
    world = World()
    theirs = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "spec": {"targetPorts": []}}
    world.put(theirs | {"metadata": {"name": NAME, "namespace": NS, "labels": {labels.PART_OF: labels.PRODUCT}}})
    world.put(make_service())
    await world.settle()
    assert condition(world, "Accepted") == ("True", "Valid")
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"].update(routing=POOLED))
    await world.settle()
    assert condition(world, "Accepted") == ("False", "NameConflict")
    assert world.get("InferencePool", NS, NAME)["spec"] == theirs["spec"]


@pytest.mark.parametrize(("routing", "told"), [(POOLED, True), ({"mode": "Service"}, False)])
async def test_where_the_cluster_has_no_pools_those_who_asked_for_one_are_told(routing: Any, told: bool) -> None:
    world = World()
    world.ctx.absent = frozenset({"InferencePool"})
    world.put(make_service(routing=routing))
    await world.settle()
    assert condition(world, "Accepted") == ("True", "Valid")
    assert ("by the Service alone" in message(world, "Accepted")) == told
    assert world.get("Service", NS, NAME)
    assert not world.all("InferencePool")


async def test_a_budget_that_is_not_ours_is_left_alone_and_keeps_the_service_from_nothing() -> None:
    world = World()
    theirs = {"minAvailable": 1, "selector": {"matchLabels": {labels.SERVICE: NAME}}}
    metadata = {"name": NAME, "namespace": NS}
    world.put({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": theirs})
    world.put(make_service())
    await world.settle()
    assert condition(world, "Accepted") == ("True", "Valid")
    assert "without a budget of its own" in message(world, "Accepted")
    assert "PodDisruptionBudget 'opt'" in message(world, "Accepted")
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    before = world.get("LLMService", NS, NAME)["status"]["readyReplicas"]
    world.change("LLMService", NS, NAME, lambda service: service["spec"].update(replicas=before + 1))
    await world.run(rounds=10)
    assert world.get("LLMService", NS, NAME)["status"]["readyReplicas"] == before + 1
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"] == theirs
    world.remove("PodDisruptionBudget", NS, NAME)
    await world.look_at_everything()
    assert world.get("PodDisruptionBudget", NS, NAME)["spec"] != theirs
    assert "budget" not in message(world, "Accepted")


async def test_a_service_that_is_not_ours_is_left_alone_and_nothing_is_half_made() -> None:
    world = World()
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": NS}, "spec": {"ports": []}}
    world.put(theirs)
    world.put(make_service())
    await world.settle()
    assert condition(world, "Accepted") == ("False", "NameConflict")
    assert condition(world, "Ready") == ("False", "NameConflict")
    assert condition(world, "Stalled") == ("True", "NameConflict")
    assert world.all("BatchProfile") == []
    assert world.get("Service", NS, NAME)["spec"] == {"ports": []}


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"accelerator__product": "H900"}, "UnsupportedAccelerator", f"{PRODUCT} (4 GPUs on 2 nodes)"),
        ({"engine__args": ["--port=1"]}, "InvalidSpec", "--port=1"),
        ({"replicas": -1}, "InvalidSpec", "replicas"),
        ({"model__source": "s3://bucket"}, "InvalidSpec", "hf://"),
        (
            {"accelerator": {"device": "cpu", "cores": 99, "memory": "4Gi"}},
            "UnsupportedAccelerator",
            "99 cores; the largest has 8",
        ),
    ],
)
async def test_bad_manifests_are_refused_in_words_and_nothing_is_half_made(
    changes: dict[str, Any], reason: str, words: str
) -> None:
    world = World()
    world.put(make_service(**changes))
    await world.settle()
    assert condition(world, "Accepted") == ("False", reason)
    assert words in message(world, "Ready")
    assert condition(world, "Stalled") == ("True", reason)
    assert {obj["kind"] for obj in world.api.objects.values()} - {"Event", "Node"} == {"LLMService"}


async def test_a_node_with_the_missing_product_is_noticed() -> None:
    world = World(product="L40S")
    world.put(make_service())
    await world.settle()
    assert condition(world, "Accepted") == ("False", "UnsupportedAccelerator")
    world.put(make_node("n9", 2))
    await world.settle()
    assert condition(world, "Accepted") == ("True", "Valid")


async def test_a_measurement_that_nobody_wants_any_more_is_looked_at() -> None:
    world = World()
    world.put(make_service())
    await world.settle()
    old = world.all("BatchProfile")[0]["metadata"]["name"]
    looked = []
    world.watched = looked.append
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["workload"].update(outputTokens=50))
    await world.settle()
    assert ("BatchProfile", old) in looked
    looked.clear()
    world.remove("LLMService", NS, NAME)
    await world.settle()
    assert ("BatchProfile", old) in looked


async def test_a_manifest_made_invalid_leaves_its_replicas_alone() -> None:
    world = await make_ready()
    before = copy.deepcopy(world.all("StatefulSet"))
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["engine"].update(args=["--port=1"]))
    await world.run()
    assert world.all("StatefulSet") == before
    assert condition(world, "Ready") == ("False", "InvalidSpec")
    assert condition(world, "Available") == ("True", "MinimumReplicasReady")


async def test_a_profile_of_another_key_is_refused_with_both_keys() -> None:
    world = await make_ready()
    other = world.all("BatchProfile")[0]
    world.put(make_service("two", profileRef={"name": other["metadata"]["name"]}, workload__outputTokens=77))
    await world.settle()
    status, reason, text = world.condition("LLMService", NS, "two", "Accepted")
    assert (status, reason) == ("False", "InvalidSpec")
    assert other["spec"]["key"]["hash"][:10] in text
    assert len(world.all("BatchProfile")) == 1


async def test_a_failed_measurement_is_told_in_the_engine_s_words() -> None:
    world = World()
    world.put(make_service())
    await world.settle()

    def fail(profile: dict[str, Any]) -> None:
        failed = {"type": "Failed", "status": "True", "reason": "EngineFailed", "message": "no such model"}
        profile["status"] = {"conditions": [failed]}

    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], fail)
    await world.settle()
    assert condition(world, "Ready") == ("False", "EngineFailed")
    assert "no such model" in message(world, "Ready")
    assert service(world)["status"]["phase"] == "Failed"


@pytest.mark.parametrize(
    ("changes", "replica", "reason", "words"),
    [
        ({"slo__objectives": [{"metric": "InterTokenLatency", "max": "1ms"}]}, "20Gi", "SLOInfeasible", "batch 1 with"),
        ({}, "90Gi", "InsufficientMemory", "80.3Gi per replica > 76.0Gi"),
    ],
)
async def test_what_cannot_be_had_is_said_with_the_best_that_can(
    changes: dict[str, Any], replica: str, reason: str, words: str
) -> None:
    world = World()
    world.put(make_service(**changes))
    await world.settle()
    name = world.all("BatchProfile")[0]["metadata"]["name"]
    world.change("BatchProfile", NS, name, lambda profile: complete(profile, replica=replica))
    await world.run()
    assert condition(world, "Recommended") == ("False", reason)
    assert words in message(world, "Ready")
    assert world.all("GPUPack") == []


async def test_a_gpu_too_small_for_the_weights_is_said_without_a_curve() -> None:
    world = World()
    world.put(make_service())
    await world.settle()

    def fail(profile: dict[str, Any]) -> None:
        text = "the weights need 140Gi, the GPU has 80Gi"
        failed = {"type": "Failed", "status": "True", "reason": "InsufficientMemory", "message": text}
        profile["status"] = {"conditions": [failed]}

    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], fail)
    await world.settle()
    for gate in ("Profiled", "Recommended", "Ready"):
        assert condition(world, gate) == ("False", "InsufficientMemory")
        assert "140Gi" in message(world, gate)


async def test_a_profile_without_memory_gives_a_batch_and_no_packing() -> None:
    world = World()
    world.put(make_service())
    await world.settle()

    def forget(profile: dict[str, Any]) -> None:
        complete(profile)
        del profile["status"]["memory"]

    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], forget)
    await world.run()
    assert service(world)["status"]["recommendation"]["batch"] > 1
    assert condition(world, "Packed") == ("False", "SharingUnavailable")

    assert "import a profile with `memory`" in message(world, "Packed")
    imported = copy.deepcopy(world.all("BatchProfile")[0])
    imported["metadata"] = {"name": "from-git", "namespace": NS}
    complete(imported)
    world.put(imported)
    await world.run()
    assert service(world)["status"]["profile"]["name"] == "from-git"
    assert condition(world, "Packed") == ("True", "Placed")


async def test_a_new_rerun_text_is_passed_on_to_the_profile() -> None:
    world = await make_ready()
    world.change("LLMService", NS, NAME, lambda obj: obj["spec"]["profiling"].update(rerun="new driver"))
    await world.settle()
    profile = world.all("BatchProfile")[0]
    assert profile["spec"]["measurement"]["rerun"] == "new driver"
    assert profile["metadata"]["annotations"][labels.rerun_annotation(NAME)] == "new driver"


@pytest.mark.parametrize(
    ("product", "carried", "resources", "words"),
    [
        (
            PRODUCT,
            {labels.NODE_MIG_STRATEGY: "mixed"},
            {"nvidia.com/mig-1g.10gb": "4"},
            "node n0 has 2 GPUs cut into MIG slices: 4 nvidia.com/mig-1g.10gb (strategy mixed)",
        ),
        (
            f"{PRODUCT}-MIG-1g.10gb",
            {labels.NODE_MIG_STRATEGY: "single"},
            {labels.GPU_RESOURCE: "14"},
            "node n0 has 2 GPUs cut into 14 MIG slices 1g.10gb (strategy single)",
        ),
        (
            f"{PRODUCT}-SHARED",
            {labels.NODE_GPU_SHARING: "time-slicing", labels.NODE_GPU_REPLICAS: "4"},
            {labels.GPU_RESOURCE: "8"},
            "node n0 has 2 GPUs handed to 4 pods each by the device plugin (time-slicing)",
        ),
        (
            PRODUCT,
            {labels.NODE_GPU_SHARING: "mps", labels.NODE_GPU_REPLICAS: "10"},
            {labels.GPU_RESOURCE: "0", "nvidia.com/gpu.shared": "20"},
            "node n0 has 2 GPUs handed to 10 pods each by the device plugin (mps)",
        ),
        (
            PRODUCT,
            {labels.NODE_GPU_SHARING: "none", labels.NODE_MIG_STRATEGY: "mixed"},
            {"nvidia.com/mig-1g.10gb": "0"},
            "",
        ),
    ],
)
async def test_gpus_that_are_divided_already_are_refused(
    product: str, carried: dict[str, str], resources: dict[str, str], words: str
) -> None:
    world = World(gpus=(2,), product=product)

    def divide(node: dict[str, Any]) -> None:
        node["metadata"]["labels"].update(carried | {labels.NODE_GPU_COUNT: "2"})
        node["status"]["allocatable"].update(resources)

    world.change("Node", "", "n0", divide)
    for asked in dict.fromkeys((PRODUCT, product)):
        world.put(make_service(accelerator={"device": "cuda", "product": asked}))
        await world.settle()
        status, reason, message = world.condition("LLMService", NS, "opt", "Accepted")
        assert (status, reason) == (("False", "UnsupportedAccelerator") if words else ("True", "Valid"))
        assert words in message
        assert not words or "turn that off on a node" in message
        world.remove("LLMService", NS, "opt")

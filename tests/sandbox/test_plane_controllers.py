"""Stories of the plane's controllers, with a stand-in for kubelets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from plane_world import Client, Kubelets, eventually, make_job, make_pod, make_set, make_template
from tightship.sandbox.plane import Plane, Timing
from tightship.sandbox.plane.values import condition, dig, micro_stamp

PODS = "/api/v1/namespaces/default/pods"
SETS = "/apis/apps/v1/namespaces/default/statefulsets"
JOBS = "/apis/batch/v1/namespaces/default/jobs"


class World:
    """A plane with two nodes of two GPUs each."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.client, self.kubelets = plane, Client(plane.url), Kubelets(plane)
        for name in ("node-0", "node-1"):
            self.kubelets.add_node(name)

    def get(self, group: str, plural: str, name: str, namespace: str = "default"):
        return self.plane.store.get((group, plural), namespace, name)

    def pods(self, app: str):
        pods = self.plane.store.all(("", "pods"), "default")
        return [pod for pod in pods if (pod["metadata"].get("labels") or {}).get("app") == app]

    def events(self, reason: str):
        return [event["message"] for event in self.plane.store.all(("", "events")) if event["reason"] == reason]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with Plane(timing=Timing(node_grace=0.6, eviction=0.3, job_backoff=0.05)) as plane:
        made = World(plane)
        yield made
        made.kubelets.stop()
        await made.client.close()


async def test_scheduler_counts_gpus_and_says_what_is_missing(world: World) -> None:
    for index in range(5):
        await world.client.good("POST", PODS, make_pod(f"p{index}", gpus=1))
    bound = await eventually(
        lambda: (
            [pod for pod in world.plane.store.all(("", "pods")) if pod["spec"].get("nodeName")][3:]
            and [pod["spec"]["nodeName"] for pod in world.plane.store.all(("", "pods")) if pod["spec"].get("nodeName")]
        )
    )
    assert sorted(bound) == ["node-0", "node-0", "node-1", "node-1"]
    left = next(pod for pod in world.plane.store.all(("", "pods")) if not pod["spec"].get("nodeName"))
    refused = await eventually(lambda: condition(world.get("", "pods", left["metadata"]["name"]), "PodScheduled"))
    assert refused["reason"] == "Unschedulable"
    assert refused["message"] == "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    assert world.events("FailedScheduling") == [refused["message"]]
    await world.client.good("DELETE", f"{PODS}/{'p0' if left['metadata']['name'] != 'p0' else 'p1'}")
    await eventually(lambda: world.get("", "pods", left["metadata"]["name"])["spec"].get("nodeName"))


@pytest.mark.parametrize(
    ("spec", "node"),
    [
        ({"nodeSelector": {"kubernetes.io/hostname": "node-1"}}, "node-1"),
        (
            {
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {
                            "nodeSelectorTerms": [
                                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]}
                            ]
                        }
                    }
                }
            },
            "node-1",
        ),
        ({"nodeSelector": {"kubernetes.io/hostname": "nowhere"}}, None),
        ({"tolerations": [{"key": "gpu", "operator": "Exists"}]}, "node-0"),
    ],
)
async def test_scheduler_keeps_to_the_nodes_a_pod_may_use(world: World, spec: dict, node: str | None) -> None:
    taint = {"spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}}
    if node != "node-0":
        taint = {"spec": {}}
    await world.client.good("PATCH", "/api/v1/nodes/node-0", taint, "application/merge-patch+json")
    await world.client.good("POST", PODS, make_pod("p", **spec))
    if node:
        bound = await eventually(lambda: world.get("", "pods", "p")["spec"].get("nodeName"))
        assert bound == node
    else:
        found = await eventually(lambda: condition(world.get("", "pods", "p"), "PodScheduled"))
        assert found["message"] == "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."


async def test_important_pods_come_first(world: World) -> None:
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    await world.client.good("POST", classes, {"metadata": {"name": "high"}, "value": 1000})
    world.plane.store.get(("", "nodes"), "", "node-0")
    for name in ("node-0", "node-1"):
        await world.client.good(
            "PATCH", f"/api/v1/nodes/{name}", {"spec": {"unschedulable": True}}, "application/merge-patch+json"
        )
    for index in range(4):
        await world.client.good("POST", PODS, make_pod(f"low-{index}", gpus=1))
    await world.client.good("POST", PODS, make_pod("vip", gpus=1, priorityClassName="high"))
    assert world.get("", "pods", "vip")["spec"]["priority"] == 1000
    for name in ("node-0", "node-1"):
        await world.client.good(
            "PATCH", f"/api/v1/nodes/{name}", {"spec": {"unschedulable": None}}, "application/merge-patch+json"
        )
    await eventually(lambda: world.get("", "pods", "vip")["spec"].get("nodeName"))


async def test_parallel_set_starts_at_once_and_updates_only_on_delete(world: World) -> None:
    await world.client.good("POST", SETS, make_set("s", 3))
    await eventually(lambda: dig(world.get("apps", "statefulsets", "s"), "status", "readyReplicas") == 3)
    first = world.get("apps", "statefulsets", "s")["status"]
    assert first["updateRevision"] == first["currentRevision"]
    assert first["availableReplicas"] == first["updatedReplicas"] == 3
    assert first["observedGeneration"] == 1
    pod = world.get("", "pods", "s-0")
    assert pod["metadata"]["labels"]["controller-revision-hash"] == first["updateRevision"]
    assert pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] == "s-0"
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("s-0", "s")

    change = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "engine:2"}]
    await world.client.good("PATCH", f"{SETS}/s", change, "application/json-patch+json")
    await eventually(lambda: world.get("apps", "statefulsets", "s")["status"].get("observedGeneration") == 2)
    second = world.get("apps", "statefulsets", "s")["status"]
    assert second["updateRevision"] != second["currentRevision"]
    assert second.get("updatedReplicas", 0) == 0
    assert world.get("", "pods", "s-1")["metadata"]["uid"] is not None
    before = world.get("", "pods", "s-1")["metadata"]["uid"]
    await world.client.good("DELETE", f"{PODS}/s-1")
    await eventually(lambda: dig(world.get("", "pods", "s-1"), "metadata", "uid") not in (None, before))
    assert world.get("", "pods", "s-1")["spec"]["containers"][0]["image"] == "engine:2"
    assert world.get("", "pods", "s-0")["spec"]["containers"][0]["image"] == "engine:1"
    await eventually(lambda: world.get("apps", "statefulsets", "s")["status"].get("updatedReplicas") == 1)


async def test_ordered_set_waits_for_each_pod(world: World) -> None:
    world.kubelets.hold.add("s-0")
    await world.client.good("POST", SETS, make_set("s", 2, "OrderedReady", "RollingUpdate"))
    await eventually(lambda: dig(world.get("", "pods", "s-0"), "spec", "nodeName"))
    assert world.get("", "pods", "s-1") is None
    world.kubelets.hold.clear()
    world.kubelets.set_phase(("default", "s-0"), "Running")
    await eventually(lambda: dig(world.get("apps", "statefulsets", "s"), "status", "readyReplicas") == 2)
    change = {"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "engine:2"}]}}}}
    await world.client.good("PATCH", f"{SETS}/s", change, "application/strategic-merge-patch+json")
    await eventually(
        lambda: [pod["spec"]["containers"][0]["image"] for pod in world.pods("s")] == ["engine:2", "engine:2"]
    )
    await eventually(
        lambda: (
            world.get("apps", "statefulsets", "s")["status"]["currentRevision"]
            == world.get("apps", "statefulsets", "s")["status"]["updateRevision"]
        )
    )


async def test_set_shrinks_from_the_top_and_replaces_ended_pods(world: World) -> None:
    await world.client.good("POST", SETS, make_set("s", 3))
    await eventually(lambda: len(world.pods("s")) == 3)
    scale = {"spec": {"replicas": 2}}
    await world.client.good("PATCH", f"{SETS}/s/scale", scale, "application/merge-patch+json")
    await eventually(lambda: [pod["metadata"]["name"] for pod in world.pods("s")] == ["s-0", "s-1"])
    before = world.get("", "pods", "s-0")["metadata"]["uid"]
    world.kubelets.set_phase(("default", "s-0"), "Failed", 1)
    await eventually(lambda: dig(world.get("", "pods", "s-0"), "metadata", "uid") not in (None, before))


async def test_service_follows_ready_pods(world: World) -> None:
    service = {
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "s"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }
    made = await world.client.good("POST", "/api/v1/namespaces/default/services", service)
    assert made["spec"]["clusterIP"].startswith("10.96.")
    await world.client.good("POST", SETS, make_set("s", 2))
    subset = await eventually(
        lambda: next(
            (s for s in world.get("", "endpoints", "web").get("subsets") or [] if len(s.get("addresses") or []) == 2),
            None,
        )
    )
    assert subset["ports"] == [{"port": 8000, "protocol": "TCP", "name": "http"}]
    slices = world.plane.store.all(("discovery.k8s.io", "endpointslices"), "default")
    mine = next(s for s in slices if s["metadata"].get("labels", {}).get("kubernetes.io/service-name") == "web")
    assert [entry["conditions"]["ready"] for entry in mine["endpoints"]] == [True, True]
    await world.client.good("DELETE", "/api/v1/namespaces/default/services/web")
    await eventually(lambda: world.get("", "endpoints", "web") is None)
    await eventually(lambda: world.get("discovery.k8s.io", "endpointslices", mine["metadata"]["name"]) is None)


@pytest.mark.parametrize(
    ("codes", "outcome", "reason", "counts"),
    [
        ([0], "Complete", "CompletionsReached", (1, 0)),
        ([1, 0], "Complete", "CompletionsReached", (1, 1)),
        ([1, 1], "Failed", "BackoffLimitExceeded", (0, 2)),
    ],
)
async def test_job_retries_and_ends(world: World, codes: list[int], outcome: str, reason: str, counts: tuple) -> None:
    await world.client.good("POST", JOBS, make_job("j", backoff=1))
    seen: set[str] = set()
    for code in codes:
        pod = await eventually(
            lambda: next(
                (p for p in world.pods("j") if p["metadata"]["name"] not in seen and p["status"]["phase"] == "Running"),
                None,
            )
        )
        seen.add(pod["metadata"]["name"])
        assert pod["metadata"]["labels"]["job-name"] == "j"
        world.kubelets.set_phase(("default", pod["metadata"]["name"]), "Failed" if code else "Succeeded", code)
    ended = await eventually(lambda: condition(world.get("batch", "jobs", "j"), outcome))
    assert (ended["status"], ended["reason"]) == ("True", reason)
    status = world.get("batch", "jobs", "j")["status"]
    assert (status.get("succeeded", 0), status.get("failed", 0)) == counts
    assert len(world.pods("j")) == len(codes)


async def test_job_deadline(world: World) -> None:
    await world.client.good("POST", JOBS, make_job("j", activeDeadlineSeconds=1))
    failed = await eventually(lambda: condition(world.get("batch", "jobs", "j"), "Failed"))
    assert failed["reason"] == "DeadlineExceeded"
    await eventually(lambda: world.pods("j") == [])


async def test_deployment_rolls_to_the_new_template(world: World) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    spec = {"replicas": 2, "selector": {"matchLabels": {"app": "d"}}, "template": make_template("d")}
    await world.client.good("POST", path, {"metadata": {"name": "d"}, "spec": spec})
    await eventually(lambda: dig(world.get("apps", "deployments", "d"), "status", "availableReplicas") == 2)
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "engine:2"}]}}}}
    await world.client.good("PATCH", f"{path}/d", patch, "application/strategic-merge-patch+json")
    await eventually(lambda: [p["spec"]["containers"][0]["image"] for p in world.pods("d")] == ["engine:2"] * 2)
    await eventually(
        lambda: (
            (condition(world.get("apps", "deployments", "d"), "Progressing") or {}).get("reason")
            == "NewReplicaSetAvailable"
        )
    )
    await world.client.good("DELETE", f"{path}/d")
    await eventually(lambda: world.pods("d") == [] and not world.plane.store.all(("apps", "replicasets")))


@pytest.mark.parametrize("policy", ["Background", "Foreground", "Orphan"])
async def test_deleting_an_owner(world: World, policy: str) -> None:
    await world.client.good("POST", SETS, make_set("s", 2))
    await eventually(lambda: len(world.pods("s")) == 2)
    await world.client.good("DELETE", f"{SETS}/s", {"propagationPolicy": policy})
    await eventually(lambda: world.get("apps", "statefulsets", "s") is None)
    if policy == "Orphan":
        await eventually(lambda: all("ownerReferences" not in pod["metadata"] for pod in world.pods("s")))
        assert len(world.pods("s")) == 2
    else:
        await eventually(lambda: world.pods("s") == [])


async def test_cluster_scoped_owner_of_a_namespaced_object(world: World) -> None:
    owner = await world.client.good(
        "POST", "/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": "o"}, "value": 1}
    )
    reference = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "name": "o",
        "uid": owner["metadata"]["uid"],
    }
    body = {"metadata": {"name": "c", "ownerReferences": [reference]}}
    await world.client.good("POST", "/api/v1/namespaces/default/configmaps", body)
    await asyncio.sleep(0)
    assert world.get("", "configmaps", "c")
    await world.client.good("DELETE", "/apis/scheduling.k8s.io/v1/priorityclasses/o")
    await eventually(lambda: world.get("", "configmaps", "c") is None)


async def test_namespace_takes_everything_with_it(world: World) -> None:
    await world.client.good("POST", "/api/v1/namespaces", {"metadata": {"name": "team"}})
    assert world.get("", "serviceaccounts", "default", "team")
    assert world.get("", "configmaps", "kube-root-ca.crt", "team")
    await world.client.good("POST", "/apis/apps/v1/namespaces/team/statefulsets", make_set("s", 2))
    await eventually(lambda: len(world.plane.store.all(("", "pods"), "team")) == 2)
    await world.client.good("DELETE", "/api/v1/namespaces/team")
    await eventually(lambda: world.plane.store.get(("", "namespaces"), "", "team") is None)
    left = [obj for kind in world.plane.store.storages() for obj in world.plane.store.all(kind, "team")]
    assert left == []


async def test_claim_binds_to_a_volume_and_releases_it(world: World) -> None:
    volume = {
        "metadata": {"name": "models"},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": "/models"},
        },
    }
    claim = {
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "5Gi"}},
        },
    }
    claims = "/api/v1/namespaces/default/persistentvolumeclaims"
    await world.client.good(
        "POST", PODS, make_pod("p", volumes=[{"name": "m", "persistentVolumeClaim": {"claimName": "models"}}])
    )
    await eventually(lambda: condition(world.get("", "pods", "p"), "PodScheduled"))
    await world.client.good("POST", claims, claim)
    await world.client.good("POST", "/api/v1/persistentvolumes", volume)
    await eventually(lambda: dig(world.get("", "persistentvolumeclaims", "models"), "status", "phase") == "Bound")
    await eventually(lambda: world.get("", "pods", "p")["spec"].get("nodeName"))
    await world.client.good("DELETE", f"{claims}/models")
    await eventually(
        lambda: world.plane.store.get(("", "persistentvolumes"), "", "models")["status"]["phase"] == "Released"
    )


async def test_silent_node_loses_its_pods_and_a_deleted_one_its_rest(world: World) -> None:
    leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
    await world.client.good("POST", leases, {"metadata": {"name": "node-0"}, "spec": {"renewTime": micro_stamp()}})
    await world.client.good("POST", PODS, make_pod("p", nodeSelector={"kubernetes.io/hostname": "node-0"}))
    await eventually(lambda: (condition(world.get("", "pods", "p"), "Ready") or {}).get("status") == "True")
    world.kubelets.hold.add("p")
    await eventually(
        lambda: condition(world.plane.store.get(("", "nodes"), "", "node-0"), "Ready")["status"] == "Unknown"
    )
    assert condition(world.get("", "pods", "p"), "Ready")["status"] == "False"
    taints = world.plane.store.get(("", "nodes"), "", "node-0")["spec"]["taints"]
    assert {taint["key"] for taint in taints} == {"node.kubernetes.io/unreachable"}
    await eventually(lambda: world.get("", "pods", "p")["metadata"].get("deletionTimestamp"))
    await world.client.good("DELETE", "/api/v1/nodes/node-0")
    await eventually(lambda: world.get("", "pods", "p") is None)


async def test_a_node_that_speaks_again_is_good_again(world: World) -> None:
    leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
    await world.client.good("POST", leases, {"metadata": {"name": "node-0"}, "spec": {"renewTime": micro_stamp()}})
    await eventually(
        lambda: condition(world.plane.store.get(("", "nodes"), "", "node-0"), "Ready")["status"] == "Unknown"
    )
    ready = [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": micro_stamp()}]
    body = {"status": {"conditions": ready}}
    await world.client.good("PATCH", "/api/v1/nodes/node-0/status", body, "application/strategic-merge-patch+json")
    await eventually(lambda: not world.plane.store.get(("", "nodes"), "", "node-0")["spec"].get("taints"))


async def test_eviction_respects_a_budget(world: World) -> None:
    budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
    spec = {"minAvailable": 2, "selector": {"matchLabels": {"app": "s"}}}
    await world.client.good("POST", budgets, {"metadata": {"name": "b"}, "spec": spec})
    await world.client.good("POST", SETS, make_set("s", 2))
    await eventually(lambda: dig(world.get("policy", "poddisruptionbudgets", "b"), "status", "currentHealthy") == 2)
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "s-0"}}
    code, answer = await world.client("POST", f"{PODS}/s-0/eviction", eviction)
    assert (code, answer["reason"]) == (429, "TooManyRequests")
    await world.client.good("DELETE", f"{budgets}/b")
    code, _ = await world.client("POST", f"{PODS}/s-0/eviction", eviction)
    assert code == 201


async def test_max_unavailable_counts_what_controllers_ask_for(world: World) -> None:
    """Of 3 replicas that are asked for one may go; two evictions at the same moment don't both pass."""
    budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
    spec = {"maxUnavailable": "20%", "selector": {"matchLabels": {"app": "s"}}}
    await world.client.good("POST", budgets, {"metadata": {"name": "b"}, "spec": spec})
    await world.client.good("POST", SETS, make_set("s", 3))

    def counted() -> tuple[Any, ...]:
        names = ("expectedPods", "desiredHealthy", "currentHealthy", "disruptionsAllowed")
        status = world.get("policy", "poddisruptionbudgets", "b").get("status", {})
        return tuple(status.get(name) for name in names)

    await eventually(lambda: counted() == (3, 2, 3, 1))
    world.kubelets.hold |= {"s-0", "s-1"}  # who goes takes its time
    evictions = [
        world.client("POST", f"{PODS}/{name}/eviction", {"metadata": {"name": name}}) for name in ("s-0", "s-1")
    ]
    assert sorted(code for code, _ in await asyncio.gather(*evictions)) == [201, 429]
    await eventually(lambda: counted() == (3, 2, 2, 0))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"minAvailable": 1, "maxUnavailable": 1}, "spec"),
        ({"maxUnavailable": -1}, "spec.maxUnavailable"),
        ({"maxUnavailable": "1"}, "spec.maxUnavailable"),
        ({"minAvailable": "101%"}, "spec.minAvailable"),
    ],
)
async def test_a_budget_that_says_nothing_is_refused(world: World, spec: dict[str, Any], field: str) -> None:
    budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
    body = {"metadata": {"name": "b"}, "spec": {**spec, "selector": {"matchLabels": {"app": "s"}}}}
    code, answer = await world.client("POST", budgets, body)
    assert (code, answer["details"]["causes"][0]["field"]) == (422, field)


CLAIMS = "/apis/resource.k8s.io/v1/namespaces/default/resourceclaims"


def make_claim(name: str, product: str = "NVIDIA H100") -> dict[str, Any]:
    rule = f"device.attributes['gpu.example.com'].productName.replace(' ', '-') == '{product.replace(' ', '-')}'"
    exactly = {"deviceClassName": "gpu.example.com", "selectors": [{"cel": {"expression": rule}}]}
    spec = {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": name}, "spec": spec}


def make_slice(node: str, generation: int, *products: str) -> dict[str, Any]:
    devices = [
        {
            "name": f"gpu-{index}",
            "attributes": {"productName": {"string": product}},
            "capacity": {"memory": {"value": "80Gi"}},
        }
        for index, product in enumerate(products)
    ]
    pool = {"name": node, "generation": generation, "resourceSliceCount": 1}
    spec = {"driver": "gpu.example.com", "nodeName": node, "pool": pool, "devices": devices}
    metadata = {"name": f"{node}-{generation}"}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": metadata, "spec": spec}


async def test_claims_get_devices_that_fit_and_lose_them_with_their_last_pod(world: World) -> None:
    pytest.importorskip("celpy")
    rule = {"cel": {"expression": "device.driver == 'gpu.example.com'"}}
    classes = {"metadata": {"name": "gpu.example.com"}, "spec": {"selectors": [rule]}}
    await world.client.good("POST", "/apis/resource.k8s.io/v1/deviceclasses", classes)
    for made in (
        make_slice("node-0", 1, "NVIDIA H100"),
        make_slice("node-0", 2, "NVIDIA L4"),
        make_slice("node-1", 1, "NVIDIA H100"),
    ):
        await world.client.good("POST", "/apis/resource.k8s.io/v1/resourceslices", made)
    for name in ("one", "two"):
        await world.client.good("POST", CLAIMS, make_claim(name))
    for pod, claim in (("a", "one"), ("b", "one"), ("c", "two")):
        named = {"resourceClaims": [{"name": "gpu", "resourceClaimName": claim}]}
        made = make_pod(pod)
        made["spec"] |= named
        await world.client.good("POST", PODS, made)

    def claim_of(name: str) -> Any:
        return world.get("resource.k8s.io", "resourceclaims", name).get("status") or {}

    # The pool of node-0 has nothing but an L4 any more, and what one claim has on node-1 no other one gets.
    await eventually(lambda: len(claim_of("one").get("reservedFor") or []) == 2)
    (result,) = claim_of("one")["allocation"]["devices"]["results"]
    assert (result["pool"], result["device"]) == ("node-1", "gpu-0")
    assert {world.get("", "pods", name)["spec"]["nodeName"] for name in "ab"} == {"node-1"}
    refused = await eventually(lambda: condition(world.get("", "pods", "c"), "PodScheduled"))
    assert refused["message"] == "0/2 nodes are available: 2 cannot allocate all claims."
    await world.client.good("DELETE", f"{PODS}/a")
    await eventually(lambda: len(claim_of("one").get("reservedFor") or []) == 1)
    assert not claim_of("two"), "the other pod still uses it"
    await world.client.good("DELETE", f"{PODS}/b")
    await eventually(lambda: claim_of("two").get("allocation"))
    assert not claim_of("one").get("allocation")


async def test_a_pod_waits_for_a_claim_that_is_not_there(world: World) -> None:
    made = make_pod("p")
    made["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimName": "missing"}]
    await world.client.good("POST", PODS, made)
    refused = await eventually(lambda: condition(world.get("", "pods", "p"), "PodScheduled"))
    assert refused["message"] == '0/2 nodes are available: resourceclaim "missing" not found.'

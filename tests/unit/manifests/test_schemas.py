"""Every object that the operator makes is valid, strictly, in current Kubernetes and in the oldest that it is made for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

import schemas
from fake_api import FakeApi, FakeClock
from pack_world import World, measured
from story import make_service
from tightship.api import crds
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileEngine
from tightship.api.v1alpha1.gpupack import Assignment, GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import parse_service, profile_key
from tightship.core import placement
from tightship.kube.cluster import Cluster
from tightship.kube.kinds import DRA_KINDS, KINDS, Ref
from tightship.kube.lease import Lease, LeaseTimes
from tightship.kube.store import Store
from tightship.manifests import budget, claims, holder, packs, pool, profile_job, replicas, service
from tightship.manifests.podparts import OperatorImage
from tightship.reconcile.queue import Key

IMAGE = OperatorImage("registry.example/tightship:1", "IfNotPresent")
EVERYTHING: dict[str, Any] = {
    "metadata": {"labels": {"team": "a"}, "annotations": {"example.com/note": "x"}},
    "spec": {
        "nodeSelector": {"zone": "z1"},
        "tolerations": [
            {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 60}
        ],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["z1"]}]}]
                }
            }
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"},
            {"maxSkew": 2, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"},
        ],
        "imagePullSecrets": [{"name": "pull"}],
        "serviceAccountName": "serving",
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
        "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "1Gi"}}],
        "engine": {
            "env": [
                {"name": "HF_HUB_OFFLINE", "value": "1"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            ],
            "envFrom": [{"secretRef": {"name": "hub"}}],
            "volumeMounts": [{"name": "data", "mountPath": "/data", "subPath": "a", "readOnly": True}],
            "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "16Gi"}},
        },
    },
}
CPU = {"device": "cpu", "cores": 4, "coresPerReplica": 2, "memory": "64Gi"}
VARIANTS: dict[str, dict[str, Any]] = {
    "as little as possible": {},
    "everything given": {
        "template": EVERYTHING,
        "rollout": {"maxUnavailable": "25%"},
        "routing": {
            "mode": "InferencePool",
            "endpointPicker": {"name": "epp", "port": 9003, "failureMode": "FailOpen"},
        },
        "model": {"source": "hf://facebook/opt-1.3b", "revision": "main", "cache": {"pvc": "models"}},
        "workload": {"lengthsFrom": {"configMap": {"name": "chat", "key": "lengths.csv"}}},
        "profiling": {"budget": "10m", "rerun": "again"},
    },
    "GPUs by DRA": {"packing": {"mode": "DRA"}, "template": EVERYTHING},
    "shares of the device plugin": {"packing": {"mode": "DevicePlugin"}, "template": EVERYTHING},
    "a GPU each": {"packing": {"mode": "Exclusive"}, "template": EVERYTHING},
    "a GPU each, by DRA": {"packing": {"mode": "Exclusive"}, "accelerator": {"device": "cuda", "product": "by DRA"}},
    "a model on a claim": {"model": {"source": "pvc://models/opt"}},
    "cores in place of a GPU": {"accelerator": CPU},
    "cores, as a user": {"accelerator": CPU, "template": {"spec": {"securityContext": {"runAsUser": 1000}}}},
}


def made_from(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object that the builders make for one service."""
    obj = make_service(**copy.deepcopy(spec))
    obj["metadata"] |= {"uid": "service-uid", "generation": 3}
    llm = parse_service(obj)
    yield service.service_object(llm)
    yield budget.disruption_budget(llm)
    pooled = pool.inference_pool(llm)
    if pooled is not None:
        yield pooled
    key = profile_key(llm.spec, "111,292\n")
    made = packs.batch_profile(llm, key)
    yield made
    made["metadata"]["uid"] = "profile-uid"
    made["spec"]["measurement"]["extend"] = {"request": "a", "budget": "5m", "pairs": [{"batch": 96, "replicas": 2}]}
    profile = BatchProfile.model_validate(made)
    yield from profile_job.profiler_access(profile)
    job = profile_job.profile_job(profile, 1, IMAGE, 3)
    yield job
    if llm.spec.packing.mode == "DRA":
        yield claims.with_claim(job, profile)
        yield claims.profiling_claim(job, profile)
    yield from _packed(llm, profile)


def _packed(llm: LLMService, profile: BatchProfile) -> Iterator[dict[str, Any]]:
    cpu = llm.spec.accelerator.device == "cpu"
    asked = llm.spec.packing.mode
    claimed = asked == "DRA" or llm.spec.accelerator.product == "by DRA"
    ref, shape = placement.ServiceRef("default", "opt"), placement.Shape(profile.metadata.name, 96, 12 << 30, 20 << 30)
    planned = placement.Pack(
        name="default-opt-0",
        owner=ref,
        ordinal=0,
        device="cpu" if cpu else "dra" if claimed else "cuda",
        product="" if cpu else llm.spec.accelerator.product or "",
        mode=f"{'CPUSet' if cpu else 'Reservation' if asked == 'Auto' else asked} as 0",
        units=4 if cpu else 1,
        node="n0" if cpu else None,
        capacity=None,
        assignments=(placement.Assignment(ref, "service-uid", 2, shape),),
        excluded=frozenset({"bad"}),
    )
    opened = packs.gpu_pack(planned, llm)
    yield opened
    opened["metadata"]["uid"] = "pack-uid"
    pack = GPUPack.model_validate(opened)
    if pack.spec.claims:
        yield claims.resource_claim(pack)
    if pack.spec.has_holder and not cpu:
        yield from holder.holder_access(pack, "tightship-system")
        for node in (None, "n0"):
            yield holder.holder_pod(pack, llm.spec.template.spec, IMAGE, "tightship-system", node)
    engine = ProfileEngine.model_validate({"maxNumBatchedTokens": 8192, "captureSizes": [1, 2], "modelCommit": "abc"})
    place = replicas.Place("n0", None if cpu else "GPU-1", 80 << 30)
    if not (cpu or pack.spec.has_holder):
        place = replicas.Place(None, None, None)
    assignment = Assignment.model_validate(packs.assignments(planned.assignments)[0])
    setup = replicas.Setup(llm, pack, assignment, place, engine, IMAGE)
    yield replicas.statefulset(setup, 2)
    yield replicas.statefulset(replace(setup, image=OperatorImage("tightship:1")), 0)


@pytest.mark.parametrize(
    ("variant", "version"),
    [
        (variant, version)
        for variant in VARIANTS
        for version in (schemas.DRA_VERSIONS if variant.endswith("by DRA") else schemas.VERSIONS)
    ],
)
def test_what_the_builders_make_is_valid(variant: str, version: str) -> None:
    objects = list(made_from(VARIANTS[variant]))
    for obj in objects:
        schemas.check(obj, version)
    pods = [obj for obj in objects if obj["kind"] == "StatefulSet"]
    for made in pods:
        schemas.check(replicas.pod_of(made, 0), version)


def test_no_kind_that_the_operator_writes_is_left_out() -> None:
    """What is in the table of kinds is made by a builder, or named here with where it comes from."""
    elsewhere = {
        "LLMService",
        "Node",
        "ConfigMap",
        "ResourceSlice",
        "DeviceClass",
    }  # users' and the cluster's: read, never made
    elsewhere |= {"Event", "Lease"}  # below
    made = {obj["kind"] for spec in VARIANTS.values() for obj in made_from(spec)}
    assert made == set(KINDS) - elsewhere


@pytest.mark.parametrize("version", schemas.VERSIONS)
async def test_what_a_whole_story_leaves_in_the_cluster_is_valid(version: str) -> None:
    """From the manifest to packed replicas: events, statuses and conditions too."""
    world = World(profiling=True)
    world.put(make_service(routing={"mode": "InferencePool", "endpointPicker": {"name": "epp"}}))
    await world.settle()
    (profile,) = world.all("BatchProfile")
    world.report(profile["metadata"]["name"], measured(profile))
    world.queue.add(Key("BatchProfile", "default", profile["metadata"]["name"]))
    await world.run()
    assert world.condition("LLMService", "default", "opt", "Ready")[0] == "True"
    checked = set()
    for obj in world.api.objects.values():
        ours = obj["apiVersion"] == labels.API_VERSION
        if obj["kind"] != "Node":
            # What kubelets and controllers say in statuses is this test's own invention.
            schemas.check(obj if ours else {key: value for key, value in obj.items() if key != "status"}, version)
            checked.add(obj["kind"])
    assert checked == set(KINDS) - {"Node", "ConfigMap", "Lease", *DRA_KINDS}


@pytest.mark.parametrize("version", schemas.VERSIONS)
async def test_the_lease_is_valid(version: str) -> None:
    api, clock = FakeApi(), FakeClock()
    ref = Ref("Lease", "tightship-system", "tightship-operator")
    await Lease(Cluster(api, Store(), clock=clock), clock, ref, "me", LeaseTimes()).acquire()
    found = api.find(ref.kind, ref.namespace, ref.name)
    assert found is not None
    schemas.check(found, version)


def test_the_definitions_of_our_kinds_are_valid() -> None:
    for definition in crds.definitions().values():
        schemas.check(definition)


def spoil(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    obj = next(each for each in made_from({}) if each["kind"] == "PodDisruptionBudget")
    change(obj)
    return obj


@pytest.mark.parametrize(
    "change",
    [
        lambda obj: obj["spec"].update(maxUnavailble=1),
        lambda obj: obj["spec"].update(maxUnavailable=1.5),
        lambda obj: obj["spec"]["selector"].update(matchLabels=["a"]),
        lambda obj: obj["metadata"].update(label={}),
    ],
)
def test_the_validation_sees_what_is_wrong(change: Callable[[dict[str, Any]], Any]) -> None:
    schemas.check(spoil(lambda obj: None))
    with pytest.raises(jsonschema.ValidationError):
        schemas.check(spoil(change))


def test_a_field_that_came_later_is_seen_on_the_oldest() -> None:
    later = spoil(lambda obj: obj["spec"].update(unhealthyPodEvictionPolicy="AlwaysAllow"))
    schemas.check(later, schemas.CURRENT)
    with pytest.raises(jsonschema.ValidationError):
        schemas.check(later, "1.25")

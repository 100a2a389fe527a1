"""Which keys a change leads to."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.api.v1alpha1 import labels
from tightship.kube.store import Store
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import PLACEMENT, Key
from tightship.reconcile.routing import keys_for

SERVICE = Key("LLMService", "team", "opt")
PROFILE = Key("BatchProfile", "team", "opt-123")
PACK = Key("GPUPack", "", "team-opt-0")


def make(kind: str, name: str, *, namespace: str = "team", carried: dict[str, str] | None = None, **rest: Any) -> Any:
    metadata = {"name": name, "namespace": namespace, "uid": f"{kind}-{name}", "generation": 1, "labels": carried or {}}
    return {"kind": kind, "metadata": metadata, "spec": {}, **rest}


def make_service(name: str = "opt", **status: Any) -> Any:
    return make("LLMService", name, status=status)


def make_profile(name: str = "opt-123", **conditions: str) -> Any:
    found = [{"type": kind, "status": "True", "reason": reason} for kind, reason in conditions.items()]
    return make("BatchProfile", name, spec={"key": {"hash": "abc"}}, status={"conditions": found})


def make_pack(*services: str) -> Any:
    assigned = [{"service": service} for service in services]
    pack = make("GPUPack", "team-opt-0", spec={"namespace": "team", "assignments": assigned}, status={"node": "n1"})
    del pack["metadata"]["namespace"]
    return pack


def make_node(heartbeat: str = "1", ready: str = "True", **spec: Any) -> Any:
    node = make("Node", "n1", spec=spec)
    del node["metadata"]["namespace"]
    node["status"] = {"conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": heartbeat}]}
    return node


def make_claiming() -> Any:
    pack = make("GPUPack", "team-dra-0", spec={"namespace": "team", "assignments": [], "allocator": "DRA"})
    del pack["metadata"]["namespace"]
    return pack


@pytest.fixture
def store() -> Store:
    filled = Store(indexers=INDEXERS)
    for obj in (
        make_service(profile={"name": "opt-123", "key": "abc"}),
        make_service("other", profile={"name": "other-9", "key": "xyz"}),
        make_profile(),
        make_profile("waits", Progressing="Waiting"),
        make_profile("done", Complete="Completed"),
        make_pack("opt"),
        make_claiming(),
    ):
        filled.observe(obj)
    return filled


POD = make("Pod", "p", carried={labels.SERVICE: "opt", labels.PACK: "team-opt-0"})
HOLDER = make(
    "Pod",
    "holder-x",
    namespace="tightship-system",
    carried={
        labels.SERVICE: "opt",
        labels.SERVICE_NAMESPACE: "team",
        labels.PACK: "team-opt-0",
        labels.COMPONENT: labels.COMPONENT_HOLDER,
    },
)
BUDGET = make("PodDisruptionBudget", "opt", carried={labels.SERVICE: "opt"})
JOB = make("Job", "opt-123-1", carried={labels.PROFILE: "opt-123"})
JOB_DONE = {**JOB, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
CLAIM = make("ResourceClaim", "c")
OUR_CLAIM = make("ResourceClaim", "c", carried={labels.PACK: "team-opt-0"})
CLAIMING = Key("GPUPack", "", "team-dra-0")
SLICE = make("ResourceSlice", "s", spec={"driver": labels.DRA_DRIVER, "pool": {"name": "n1"}})


def restarted(pod: Any) -> Any:
    return {**pod, "status": {"containerStatuses": [{"name": "mps", "restartCount": 1}]}}


def reserved(claim: Any) -> Any:
    return {**claim, "status": {"reservedFor": [{"name": "p"}]}}


def allocated(claim: Any) -> Any:
    result = {"driver": labels.DRA_DRIVER, "pool": "n1", "device": "gpu-0"}
    return {**claim, "status": {"allocation": {"devices": {"results": [result]}}}}


UNFINISHED = {PROFILE, Key("BatchProfile", "team", "waits")}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param(None, make_service(), {SERVICE, PLACEMENT} | UNFINISHED, id="a new service"),
        pytest.param(make_service(), None, {SERVICE, PLACEMENT} | UNFINISHED, id="a service gone"),
        pytest.param(make_service(), make_service(phase="x"), {SERVICE}, id="a service's words"),
        pytest.param(
            make_service(), make_service(recommendation={"batch": 8}), {SERVICE, PLACEMENT}, id="a recommendation"
        ),
        pytest.param(None, make_profile(), {PROFILE, SERVICE}, id="a profile of the service's key"),
        pytest.param(
            make_pack("opt"),
            make_pack("other"),
            {PACK, PLACEMENT, SERVICE, Key("LLMService", "team", "other")},
            id="a pack's assignments",
        ),
        pytest.param(None, POD, {SERVICE, PACK}, id="a replica"),
        pytest.param(None, HOLDER, {PACK}, id="a holder, of which services hear by the pack"),
        pytest.param(None, BUDGET, {SERVICE}, id="a budget"),
        pytest.param(BUDGET, None, {SERVICE}, id="a budget gone"),
        pytest.param(BUDGET, BUDGET | {"spec": {"maxUnavailable": 9}}, {SERVICE}, id="a budget that somebody changed"),
        pytest.param(BUDGET, BUDGET | {"status": {"currentHealthy": 1}}, set(), id="a budget's arithmetic"),
        pytest.param(make_node("1"), make_node("2"), set(), id="a heartbeat"),
        pytest.param(make_node(), make_node(ready="Unknown"), {PLACEMENT, PACK}, id="a node not ready"),
        pytest.param(make_node(), make_node(unschedulable=True), {PLACEMENT, PACK}, id="a node cordoned"),
        pytest.param(make_node(), None, {PLACEMENT, PACK} | UNFINISHED, id="a node gone"),
        pytest.param(None, JOB, {PROFILE}, id="a Job"),
        pytest.param(JOB, JOB_DONE, UNFINISHED, id="a Job that ends frees a slot"),
        pytest.param(JOB, None, UNFINISHED, id="a Job gone frees a slot"),
        pytest.param(None, make("Service", "foreign"), set(), id="nothing of ours"),
        pytest.param(HOLDER, restarted(HOLDER), {PACK, PLACEMENT}, id="a holder's daemon that began anew"),
        pytest.param(POD, restarted(POD), {SERVICE, PACK}, id="a replica that began anew"),
        pytest.param(CLAIM, reserved(CLAIM), set(), id="who uses somebody's claim"),
        pytest.param(CLAIM, allocated(CLAIM), {PLACEMENT}, id="a GPU that somebody's claim gets"),
        pytest.param(OUR_CLAIM, allocated(OUR_CLAIM), {PACK, PLACEMENT}, id="a GPU that a pack's claim gets"),
        pytest.param(
            None, SLICE, {PLACEMENT, CLAIMING, SERVICE, Key("LLMService", "team", "other")}, id="GPUs for claims"
        ),
        pytest.param(SLICE, SLICE | {"status": {}}, set(), id="a slice that says the same"),
    ],
)
def test_keys_of_a_change(store: Store, before: Any, after: Any, expected: set[Key]) -> None:
    kind = (after or before)["kind"]
    assert keys_for(store, kind, before, after) == expected

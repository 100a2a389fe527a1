"""What a reconcile costs doesn't grow with the cluster, and a cluster at rest is left alone.

Work is counted in objects that the store hands out, which no busy machine blurs; `benchmarks/reconcile_cost.py` has the seconds.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from crowd import Crowd, keys, look, make_crowd
from tightship.api.v1alpha1 import labels
from tightship.reconcile import snapshot
from tightship.reconcile.queue import PLACEMENT, Key
from tightship.reconcile.routing import keys_for

FEW, MANY = 2, 8
KEYS = {
    "LLMService": Key("LLMService", "default", "svc-1"),
    "GPUPack": Key("GPUPack", "", "default-svc-1-1"),
    "BatchProfile": Key("BatchProfile", "default", "profile-1"),
}


@pytest.fixture(scope="module")
def crowds() -> tuple[Crowd, Crowd]:
    return asyncio.run(make_crowd(FEW)), asyncio.run(make_crowd(MANY))


async def work(crowd: Crowd, key: Key) -> int:
    """Objects that one reconcile was handed."""
    before = crowd.store.handed
    await look(crowd, key)
    return crowd.store.handed - before


@pytest.mark.parametrize("kind", KEYS)
async def test_a_reconcile_looks_at_no_more_objects_in_a_larger_cluster(crowds: tuple[Crowd, Crowd], kind: str) -> None:
    few, many = [await work(crowd, KEYS[kind]) for crowd in crowds]
    assert 0 < many <= few


@pytest.mark.parametrize("kind", ["LLMService", "GPUPack", "BatchProfile", "Pod", "StatefulSet", "Service", "Node"])
def test_what_a_change_leads_to_is_found_without_going_through_a_kind(crowds: tuple[Crowd, Crowd], kind: str) -> None:
    cost = []
    for crowd in crowds:
        obj = crowd.store.list(kind)[0]
        before = crowd.store.handed
        found = keys_for(crowd.store, kind, None, obj)
        cost.append((crowd.store.handed - before, len(found)))
    assert cost[0] == cost[1]


async def test_the_pass_goes_through_services_and_packs_once_and_works_nothing_out_again(
    crowds: tuple[Crowd, Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = [await work(crowd, PLACEMENT) / len(crowd.store.list("LLMService")) for crowd in crowds]
    assert many <= few

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked out again, though nothing has changed")

    monkeypatch.setattr("tightship.reconcile.snapshot.demand_of", never)
    monkeypatch.setattr("tightship.reconcile.snapshot.written", never)
    monkeypatch.setattr("tightship.reconcile.verdict.decision_from_profile", never)
    await look(crowds[1], PLACEMENT)


async def test_a_look_at_everything_asks_nothing_and_writes_nothing_at_rest() -> None:
    crowd = await make_crowd(2)
    before = sum(crowd.api.requests.values())
    for kind in (*KEYS, "Placement"):
        for key in keys(crowd, kind):
            await look(crowd, key)
    assert sum(crowd.api.requests.values()) == before
    assert len(crowd.queue) == 0


async def test_a_new_operator_finds_everything_as_it_should_be_and_changes_nothing() -> None:
    crowd = await make_crowd(1)
    version = {path: obj["metadata"]["resourceVersion"] for path, obj in crowd.api.objects.items()}
    crowd.cluster._applied.clear()
    for kind in (*KEYS, "Placement"):
        for key in keys(crowd, kind):
            await look(crowd, key)
    assert {path: obj["metadata"]["resourceVersion"] for path, obj in crowd.api.objects.items()} == version


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        pytest.param(lambda pack: pack["status"]["replicas"][0].update(ready=False), False, id="a replica not ready"),
        pytest.param(lambda pack: pack["status"].update(readyReplicas=1), False, id="one ready less"),
        pytest.param(lambda pack: pack["status"].update(readyReplicas=0), True, id="none ready"),
        pytest.param(lambda pack: pack["status"].update(node="n9"), True, id="its node"),
        pytest.param(lambda pack: pack["spec"]["assignments"].clear(), True, id="who is on it"),
        pytest.param(lambda pack: pack["status"]["gpu"].update(memory="40Gi"), True, id="its memory"),
        pytest.param(lambda pack: pack["status"].pop("gpu"), True, id="its GPU"),
        pytest.param(lambda pack: pack["status"].update(repair={"reason": "MPSFault"}), False, id="its repair"),
        pytest.param(
            lambda pack: pack["status"]["replicas"][0].update(message="Unschedulable: 0/2 nodes"),
            True,
            id="a replica without a place",
        ),
        pytest.param(lambda pack: pack["status"]["mps"].update(clients=1), False, id="MPS's clients"),
    ],
)
def test_a_pass_is_made_for_what_a_pass_looks_at(crowds: tuple[Crowd, Crowd], change: Any, passes: bool) -> None:
    before = crowds[0].store.list("GPUPack")[0]
    after = copy.deepcopy(dict(before))
    change(after)
    assert (PLACEMENT in keys_for(crowds[0].store, "GPUPack", before, after)) is passes


def test_a_node_s_heartbeat_has_nothing_counted_again(crowds: tuple[Crowd, Crowd]) -> None:
    store = crowds[0].store
    facts = snapshot.facts(store)
    node = copy.deepcopy(dict(store.list("Node")[0]))
    node["metadata"]["resourceVersion"] = "7000000"
    node["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:05:00Z"
    assert store.observe(node)
    assert snapshot.facts(store) is facts
    node = copy.deepcopy(node)
    node["metadata"]["resourceVersion"] = "7000001"
    node["status"]["allocatable"][labels.GPU_RESOURCE] = "3"
    assert store.observe(node)
    assert snapshot.facts(store).products[0][2] == facts.products[0][2] + 2

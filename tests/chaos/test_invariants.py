"""The invariants themselves: a cluster in order violates none, and each planted fault is found and named."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chaos import invariants
from chaos.events import EVENTS
from chaos.invariants import Seen, Tracker
from chaos.news import LogNews, starts
from chaos.runner import plan
from chaos.world import INFEASIBLE, MISSING_IMAGE
from story import make_service
from tightship.sandbox.agent.hollow.journal import AGENT, DOWN, END, HEALTHY, HOLD, RELEASE, START, Entry

Object = dict[str, Any]


def entry(what: str, pod: str = "", gpu: str = "g", pack: str = "", node: str = "n") -> Entry:
    """An entry of a pod `<pack><number>`: its UID is its name, its pack the first letter."""
    return Entry(what, 0.0, node, gpu, pack or pod[:1], pod, pod)


JOURNALS: dict[str, tuple[list[Entry], str]] = {
    "one start after the other": (
        [entry(HOLD, "ah"), entry(START, "a1"), entry(HEALTHY, "a1"), entry(START, "a2"), entry(END, "a2")],
        "",
    ),
    "two starts at once": ([entry(START, "a1"), entry(START, "a2")], "a2 starts on g while a1 is starting there"),
    "two starts on two GPUs": ([entry(START, "a1"), entry(START, "b1", gpu="h")], ""),
    "two holders": ([entry(HOLD, "ah"), entry(HOLD, "bh")], "g is taken by bh while ah still has it"),
    "one holder after the other": ([entry(HOLD, "ah"), entry(RELEASE, "ah"), entry(HOLD, "bh")], ""),
    "an engine outlives its holder": (
        [entry(HOLD, "ah"), entry(START, "a1"), entry(HEALTHY, "a1"), entry(RELEASE, "ah"), entry(HOLD, "bh")],
        "g is taken by bh while a1 of another pack still runs on it",
    ),
    "an engine on another's GPU": ([entry(HOLD, "ah"), entry(START, "b1")], "b1 starts on g, which ah holds"),
    "an engine beside another pack's": (
        [entry(START, "a1"), entry(HEALTHY, "a1"), entry(START, "b1")],
        "b1 starts on g, where a1 of another pack still runs",
    ),
    "a node that went down has nothing open": ([entry(START, "a1"), entry(DOWN), entry(START, "a2")], ""),
    "another node's reboot closes nothing": (
        [entry(START, "a1"), entry(DOWN, node="m"), entry(START, "a2")],
        "a2 starts on g while a1",
    ),
    "a new agent has nothing open": ([entry(HOLD, "ah"), entry(AGENT, node=""), entry(HOLD, "bh")], ""),
}


@pytest.mark.parametrize("case", JOURNALS)
def test_the_journal_tells(case: str) -> None:
    entries, words = JOURNALS[case]
    found = list(Tracker().follow(entries))
    assert len(found) == bool(words), found
    assert not words or words in found[0]


def make(kind: str, name: str, namespace: str = "default", owner: str = "", **labels: str) -> Object:
    marks = {f"tightship.dev/{key}": value for key, value in labels.items() if key != "component"}
    if "component" in labels:
        marks["app.kubernetes.io/component"] = labels["component"]
    metadata: Object = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": marks}
    if owner:
        metadata["ownerReferences"] = [{"uid": owner}]
    return {"kind": kind, "metadata": metadata, "spec": {}, "status": {}}


READY = {"type": "Ready", "status": "True"}


def make_cluster() -> dict[str, list[Object]]:
    """One service with one replica on one of a node's two GPUs."""
    node = make("Node", "n0", "")
    node["status"] = {"allocatable": {"nvidia.com/gpu": "2"}, "conditions": [READY]}
    service = make("LLMService", "opt")
    service["metadata"]["generation"] = 1
    service["status"] = {"observedGeneration": 1, "readyReplicas": 1, "conditions": [READY]}
    pack = make("GPUPack", "p0", "")
    each = {"service": "opt", "uid": "uid-opt", "replicas": 1, "memoryPerReplica": "20Gi"}
    pack["spec"] = {"namespace": "default", "assignments": [each]}
    pack["status"] = {"gpu": {"uuid": "GPU-0", "memory": "80Gi"}}
    holder = make("Pod", "holder-p0", "tightship-system", "uid-p0", component="holder", pack="p0")
    holder["spec"] = {"nodeName": "n0", "containers": [{"resources": {"limits": {"nvidia.com/gpu": 1}}}]}
    holder["metadata"]["annotations"] = {
        "tightship.dev/gpu": json.dumps({"uuid": "GPU-0"}),
        "tightship.dev/mps": json.dumps({"clients": [{"pid": 1, "podUID": "uid-opt-0"}]}),
    }
    replica = make("Pod", "opt-0", owner="uid-sts", component="replica", pack="p0", service="opt")
    memory = {"name": "TIGHTSHIP_MEMORY_BYTES", "value": str(20 * 2**30)}
    replica["spec"] = {"nodeName": "n0", "containers": [{"env": [memory]}]}
    replica["status"] = {"phase": "Running", "conditions": [READY]}
    statefulset = make("StatefulSet", "opt-x", owner="uid-opt", pack="p0", service="opt")
    return {
        "Node": [node],
        "LLMService": [service],
        "GPUPack": [pack],
        "Pod": [holder, replica],
        "StatefulSet": [statefulset],
        "Service": [make("Service", "opt", owner="uid-opt", service="opt")],
    }


def check(change: Callable[[dict[str, list[Object]]], object] = lambda _: None, **asked: Any) -> list[str]:
    objects = copy.deepcopy(make_cluster())
    change(objects)
    return invariants.settled(Seen(objects, {("default", "opt"): make_service(**{"replicas": 1} | asked)}))


def not_ready(reason: str, message: str = "") -> Callable[[dict[str, list[Object]]], object]:
    condition = {"type": "Ready", "status": "False", "reason": reason, "message": message}
    return lambda c: c["LLMService"][0]["status"].update(conditions=[condition])


def alone(cluster: dict[str, list[Object]]) -> None:
    """The pack's replica has its GPU to itself, without a holder."""
    cluster["GPUPack"][0]["spec"]["mode"] = "Exclusive"
    holder = cluster["Pod"].pop(0)
    cluster["Pod"][0]["spec"]["containers"] += holder["spec"]["containers"]


def crowded(cluster: dict[str, list[Object]]) -> None:
    alone(cluster)
    twin = copy.deepcopy(cluster["Pod"][0])
    twin["metadata"].update(name="opt-1", uid="uid-opt-1")
    cluster["Pod"].append(twin)


def full(cluster: dict[str, list[Object]]) -> None:
    not_ready("InsufficientGPUs")(cluster)
    cluster["Node"][0]["status"]["allocatable"]["nvidia.com/gpu"] = "1"


def test_a_cluster_in_order_violates_nothing() -> None:
    assert check() == []
    assert check(alone) == []


PLANTED: dict[str, tuple[Callable[[dict[str, list[Object]]], object], str]] = {
    "a GPU in two packs": (
        lambda c: c["GPUPack"].append({**c["GPUPack"][0], "metadata": {"name": "p1", "uid": "uid-p1"}}),
        "GPU-0 is in the status of 2 packs",
    ),
    "a pack for nobody": (lambda c: c["GPUPack"][0]["spec"].update(assignments=[]), "holds a GPU for nothing"),
    "a holder of no pack": (
        lambda c: c["Pod"][0]["metadata"].update(ownerReferences=[{"uid": "other"}]),
        "holds a GPU for a pack that is gone",
    ),
    "another GPU than the pack's": (
        lambda c: c["GPUPack"][0]["status"]["gpu"].update(uuid="GPU-1"),
        "has GPU-0, its pack was made for GPU-1",
    ),
    "too much assigned": (
        lambda c: c["GPUPack"][0]["spec"]["assignments"][0].update(memoryPerReplica="77Gi"),
        "bytes are assigned",
    ),
    "too much granted": (
        lambda c: c["Pod"][1]["spec"]["containers"][0]["env"][0].update(value=str(77 * 2**30)),
        "its pods may use",
    ),
    "an orphaned StatefulSet": (
        lambda c: c["StatefulSet"][0]["metadata"].update(ownerReferences=[{"uid": "older"}]),
        "StatefulSet opt-x is of a service opt that is gone",
    ),
    "a role of a pack that is gone": (
        lambda c: c.update(Role=[make("Role", "holder-p9", "tightship-system", pack="p9")]),
        "Role holder-p9 is of the pack p9, which is gone",
    ),
    "a measurement": (lambda c: c.update(Job=[make("Job", "j")]), "Job j measures what is measured already"),
    "a pod that is over": (lambda c: c["Pod"][1]["status"].update(phase="Failed"), "is over"),
    "a pod that is going": (lambda c: c["Pod"][1]["metadata"].update(deletionTimestamp="now"), "is still going"),
    "a replica without MPS": (
        lambda c: c["Pod"][0]["metadata"]["annotations"].update({"tightship.dev/mps": "{}"}),
        "is ready and no client of its pack's daemon",
    ),
    "two replicas on a GPU without MPS": (crowded, "pack p0 has 2 replicas in mode Exclusive"),
    "an older status": (
        lambda c: c["LLMService"][0]["metadata"].update(generation=2),
        "status is of generation 1, not 2",
    ),
    "a status that lies": (lambda c: c["LLMService"][0]["status"].update(readyReplicas=2), "tells of 2 ready replicas"),
    "no reason": (not_ready("Progressing", "soon"), "has no good reason"),
    "an objective that could be met": (not_ready("SLOInfeasible"), "has no good reason"),
    "free GPUs": (not_ready("InsufficientGPUs"), "has no good reason"),
    "a service that is gone": (lambda c: c["LLMService"].clear(), "service opt is gone"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case: str) -> None:
    change, words = PLANTED[case]
    assert any(words in found for found in check(change)), check(change)


def test_too_few_replicas_are_found() -> None:
    assert any("asked for 2" in found for found in check(replicas=2))


def spread(cluster: dict[str, list[Object]], replicas: int, packs: int) -> Seen:
    """The service with replicas on several packs, all of which serve."""
    replica = cluster["Pod"].pop()
    for index in range(replicas):
        twin = copy.deepcopy(replica)
        twin["metadata"].update(name=f"opt-{index}", uid=f"uid-opt-{index}")
        twin["metadata"]["labels"]["tightship.dev/pack"] = f"p{index % packs}"
        cluster["Pod"].append(twin)
    return Seen(cluster, {("default", "opt"): make_service(replicas=replicas)})


@pytest.mark.parametrize(
    ("replicas", "packs", "lowest", "happened", "floor"),
    [
        (4, 2, 4, (0, 1), 3),  # a roll-out takes one at a time
        (4, 2, 2, (0, 2), 1),  # and may begin from a smaller number
        (1, 1, 1, (0, 1), None),
        (4, 2, 0, (0, 1), None),
        (4, 2, 4, (1, 0), 1),  # a fault leaves the other GPU's
        (4, 1, 4, (1, 0), None),
        (4, 2, 4, (1, 1), None),  # what else was under way may have had the other one
        (4, 2, 4, (2, 0), None),
    ],
)
def test_who_must_serve_throughout(
    replicas: int, packs: int, lowest: int, happened: tuple[int, int], floor: int | None
) -> None:
    """`happened`: faults and changes."""
    seen = spread(make_cluster(), replicas, packs)
    found = invariants.floors(seen, {("default", "opt"): lowest}, *happened)
    assert found == ({} if floor is None else {("default", "opt"): floor})


def test_an_outage_is_found() -> None:
    seen = spread(make_cluster(), 2, 2)
    assert list(invariants.served(seen, {("default", "opt"): 2})) == []
    seen.of("Pod")[-1]["status"]["conditions"].clear()
    assert list(invariants.served(seen, {("default", "opt"): 2})) == [
        "1 replicas of opt serve, and it must be 2 throughout"
    ]


def test_good_reasons_count() -> None:
    assert check(full) == []
    assert check(lambda cluster: (alone(cluster), full(cluster))) == []
    unmet = {"objectives": [{"metric": "InterTokenLatency", "statistic": "mean", "max": INFEASIBLE}]}
    assert check(not_ready("SLOInfeasible"), slo=unmet) == []
    assert check(not_ready("Progressing", f"image {MISSING_IMAGE}: ..."), engine__image=MISSING_IMAGE) == []


LOG = """\
2026-01-01T00:00:00.1Z F 2026-01-01T00:00:00.000+00:00 tightship: NVIDIA-H100 GPU-0: 80 of 80 bytes free
2026-01-01T00:00:00.1Z F 2026-01-01T00:00:01.000+00:00 tightship: starting python3 -m vllm
2026-01-01T00:00:00.1Z F an engine's own words
2026-01-01T00:00:00.1Z F 2026-01-01T00:00:03.500+00:00 tightship: the engine is healthy; the next replica may start
2026-01-01T00:00:00.1Z F 2026-01-01T00:00:09.000+00:00 tightship: starting python3 -m vllm
"""


def test_a_replicas_log_tells_of_its_starts(tmp_path: Path) -> None:
    """Those that ended; and two pods' that overlap on one GPU are found, whichever log is read first."""
    ((began, ended),) = starts(LOG, "u1")
    assert (began.what, began.gpu, ended.what) == (START, "GPU-0", HEALTHY)
    assert ended.at - began.at == 2.5
    for uid, log in (("u1", LOG), ("u2", LOG.replace(":01.000", ":02.000"))):
        path = tmp_path / "pods" / uid / "containers" / "engine" / "0.log"
        path.parent.mkdir(parents=True)
        path.write_text(log)
    assert list(Tracker().follow(LogNews([tmp_path]).read())) == ["u2 starts on GPU-0 while u1 is starting there"]


def test_the_seed_decides_the_events() -> None:
    def events(seed: int, count: int) -> list[Any]:
        return list(itertools.islice(itertools.chain.from_iterable(plan(seed)), count))

    assert len(events(7, 300)) == 300
    assert events(7, 300) == events(7, 300)
    assert events(7, 300) != events(8, 300)
    assert [each.name for each in events(7, 20)] == [each.name for each in events(7, 300)[:20]]
    assert {each.name for each in events(7, 300)} == set(EVENTS), "300 events have all kinds among them"

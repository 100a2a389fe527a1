"""A cluster in a dictionary for the reconcilers' stories: an API, the operator's store and queue, and a scripted node side.

`World.settle` runs the reconcilers until nothing is due, as the operator's workers would; `World.nodes_act` plays scheduler, StatefulSet
controller, garbage collector, kubelet and holder for one round. Both are deterministic, so a story reads as a list of turns.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from fake_api import FakeApi, FakeClock
from tightship.api.v1alpha1 import labels
from tightship.core.conditions import timestamp
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events
from tightship.kube.kinds import KINDS, WATCHED, WATCHED_BY_LABEL, Ref
from tightship.kube.store import Store
from tightship.reconcile import batchprofile, dra, gpupack, llmservice, placement
from tightship.reconcile.context import Context, Settings
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import PLACEMENT, Key, Queue, Result
from tightship.reconcile.routing import keys_for
from tightship.telemetry.metrics import Metrics

PRODUCT = "NVIDIA-H100-80GB-HBM3"
GIB = 2**30
RECONCILERS = {
    "LLMService": llmservice.reconcile,
    "GPUPack": gpupack.reconcile,
    "Placement": placement.reconcile,
}


class Api(FakeApi):
    """The dictionary server with generations, server-side apply that removes what is left out, and deletion in two steps for pods."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.refuses: Callable[[dict[str, Any]], str | None] = lambda pod: None

    def _post(self, path: str, query: Any, body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        return self._refused(body) or super()._post(path, query, body, content_type)

    def _refused(self, body: Any) -> tuple[int, dict[str, Any]] | None:
        """The answer of admission to a pod that it doesn't take."""
        words = self.refuses(body) if body.get("kind") == "Pod" else None
        if words is None:
            return None
        text = f'pods "{body["metadata"]["name"]}" is forbidden: {words}'
        return 403, {"kind": "Status", "code": 403, "reason": "Forbidden", "message": text}

    def _patch(self, path: str, query: Any, body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        if path not in self.objects and (refused := self._refused(body)):
            return refused
        if content_type.startswith("application/apply-patch") and not path.endswith("/status") and path in self.objects:
            live = self.objects[path]
            spec = body.get("spec")
            if spec is not None and live.get("kind") in ("StatefulSet",):
                # One manager owns the whole spec: what it leaves out goes.
                live = copy.deepcopy(live)
                live["spec"] = spec
                live["metadata"] = {**live["metadata"], **{k: v for k, v in body["metadata"].items() if k != "uid"}}
                return 200, self.objects[path] if live == self.objects[path] else self._store(path, live)
        if (
            content_type.startswith("application/apply-patch")
            and "/batchprofiles/" in path
            and path.endswith("/status")
        ):
            return 200, self.apply_part(path.removesuffix("/status"), 0, body["status"])
        return super()._patch(path, query, body, content_type)

    def apply_part(self, place: str, who: int, part: dict[str, Any]) -> dict[str, Any]:
        """A profile's status has two managers, the operator (0) and the profiler (1): what one leaves out and the other has stays."""
        parts = list(self.parts.get(place, ({}, {})))
        parts[who] = part
        self.parts[place] = (parts[0], parts[1])
        status, live = parts[1 - who] | parts[who], self.objects[place]
        return live if live.get("status") == status else self._store(place, copy.deepcopy(live) | {"status": status})

    def _store(self, path: str, obj: dict[str, Any]) -> dict[str, Any]:
        old = self.objects.get(path)
        if old is not None and old.get("spec") != obj.get("spec"):
            obj["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
        if old is None:
            obj["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        return super()._store(path, obj)

    def _delete(self, path: str, query: Any, body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        obj = self.objects.get(path)
        uid = (body.get("preconditions") or {}).get("uid")
        if obj is None or obj["kind"] != "Pod" or (uid and uid != obj["metadata"]["uid"]):
            return super()._delete(path, query, body, content_type)
        going = copy.deepcopy(obj)
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        return 200, self._store(path, going)


class TickingClock(FakeClock):
    """A clock on which no two readings are the same, so that no two events are of one instant."""

    def now(self) -> datetime:
        self.elapsed += 1e-6
        return super().now()


class World:
    """One cluster and one operator. `gpus` are GPUs per node; `started` decides which pods become ready.

    With `profiling` measurements are reconciled too: Jobs are made, and `report` plays their profiler. Without, a story writes what
    a profile says itself (`complete`).

    `mps_states` are what single packs' MPS says otherwise than `mps_state`, `unattached` the replica pods (by name) that run without it,
    `preflights` what replicas saw, by pod UID.

    `api.refuses` is admission: a function of a pod that says why it is not taken, or None.
    """

    def __init__(
        self, gpus: tuple[int, ...] = (2, 2), cores: int = 8, product: str = PRODUCT, *, profiling: bool = False
    ) -> None:
        self.reconcilers = RECONCILERS | ({"BatchProfile": batchprofile.reconcile} if profiling else {})
        self.api, self.clock = Api(), TickingClock()
        self.queue = Queue(self.clock)
        self.store = self.make_store()
        self.cluster = Cluster(self.api, self.store, clock=self.clock)
        self.ctx = Context(
            self.cluster,
            self.store,
            self.queue,
            self.clock,
            Settings(status_interval=0),
            Metrics(),
            Events(self.cluster, self.clock),
        )
        self.started: Callable[[dict[str, Any]], bool] = lambda pod: True
        self.watched: Callable[[tuple[str, str]], object] = lambda key: None
        self.mps_state = "ACTIVE"
        self.mps_states: dict[str, str] = {}
        self.unattached: set[str] = set()
        self.preflights: dict[str, dict[str, Any]] = {}
        self.uuids: dict[str, str] = {}
        self.reports: Callable[[dict[str, Any]], dict[str, Any]] = self.seen_by
        for index, count in enumerate(gpus):
            self.put(make_node(f"n{index}", count, cores, product))

    def make_store(self) -> Store:
        return Store(self._changed, INDEXERS)

    def _changed(self, kind: str, before: Any, after: Any) -> None:
        for key in keys_for(self.store, kind, before, after):
            self.queue.add(key)

    # what users and other parts do

    def put(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        made = self.api.put(obj)
        self.watch()
        return made

    def change(self, kind: str, namespace: str, name: str, how: Callable[[dict[str, Any]], None]) -> None:
        """Somebody else changes an object; a changed spec bumps its generation."""
        path = KINDS[kind].path(namespace, name)
        obj = copy.deepcopy(self.api.objects[path])
        how(obj)
        self.api._store(path, obj)
        self.watch()

    def report(self, name: str, told: dict[str, Any]) -> None:
        """The profiler writes its part of a profile's status."""
        self.api.apply_part(KINDS["BatchProfile"].path("default", name), 1, told)
        self.watch()

    def remove(self, kind: str, namespace: str, name: str) -> None:
        del self.api.objects[KINDS[kind].path(namespace, name)]
        self.watch()

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        found = self.api.find(kind, namespace, name)
        assert found is not None, f"no {kind} {namespace}/{name}"
        return found

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [obj for _, obj in sorted(self.api.objects.items()) if obj.get("kind") == kind]

    def condition(self, kind: str, namespace: str, name: str, which: str) -> tuple[str, str, str]:
        for each in self.get(kind, namespace, name).get("status", {}).get("conditions", []):
            if each["type"] == which:
                return each["status"], each["reason"], each["message"]
        return "absent", "", ""

    # the operator

    def watch(self) -> None:
        """Deliver every change to the store, as the watches would."""
        for kind in WATCHED:
            everything = {obj["metadata"]["uid"]: obj for obj in self.all(kind)}
            here = {uid: obj for uid, obj in everything.items() if _carries(obj, WATCHED_BY_LABEL.get(kind))}
            for shown in self.store.list(kind):
                uid = shown["metadata"]["uid"]
                if uid not in here:
                    # Of what only lost its label the watch says DELETED too, with the version in which it did.
                    self.store.forget(shown, everything.get(uid, {}).get("metadata", {}).get("resourceVersion"))
            for obj in here.values():
                self.store.observe(copy.deepcopy(obj))

    async def settle(self) -> None:
        """Run reconcilers until nothing is due; a loop that never ends is an error."""
        for _ in range(200):
            self.watch()
            self.queue._promote()  # what has become due meanwhile
            if not len(self.queue):
                return
            key = await self.queue.get()
            self.watched((key.kind, key.name))
            result = await self.reconcilers[key.kind](self.ctx, key) if key.kind in self.reconcilers else Result()
            self.queue.done(key, requeue_after=result.requeue_after)
        raise AssertionError("the reconcilers never came to rest")

    async def run(self, rounds: int = 6) -> None:
        """Operator and nodes in turn, until neither has anything to do."""
        for _ in range(rounds):
            await self.settle()
            before = self.api._version, set(self.api.objects)
            self.nodes_act()
            if before == (self.api._version, set(self.api.objects)):
                return
        await self.settle()

    async def look_at_everything(self) -> None:
        """A resync: every object is looked at once more."""
        for kind in sorted(set(self.reconcilers) - {"Placement"}):
            for each in self.all(kind):
                self.queue.add(Key(kind, each["metadata"].get("namespace", ""), each["metadata"]["name"]))
        self.queue.add(PLACEMENT)
        await self.settle()

    # the nodes

    def nodes_act(self) -> None:
        """One round of garbage collector, StatefulSet controller, scheduler and kubelets."""
        self._collect()
        self._release()
        for found in self.all("StatefulSet"):
            self._run_set(found)
        for pod in self.all("Pod"):
            self._run_pod(pod)
        self._publish()
        self.watch()

    def _collect(self) -> None:
        alive = {obj["metadata"]["uid"] for obj in self.api.objects.values()}
        for path, obj in list(self.api.objects.items()):
            owners = obj["metadata"].get("ownerReferences") or []
            if (owners and not any(owner["uid"] in alive for owner in owners)) or (
                obj["kind"] == "Pod" and obj["metadata"].get("deletionTimestamp")
            ):
                del self.api.objects[path]

    def _run_set(self, found: dict[str, Any]) -> None:
        metadata, spec = found["metadata"], found["spec"]
        revision = f"rev-{abs(hash(json.dumps(spec['template'], sort_keys=True))) % 10**8}"
        pods = {p["metadata"]["name"]: p for p in self.all("Pod") if _controller(p) == metadata["uid"]}
        names = [f"{metadata['name']}-{ordinal}" for ordinal in range(spec["replicas"])]
        for name in names:
            made = _pod_of(found, name, revision)
            if name in pods:
                continue
            if self.api.refuses(made) is not None:
                return  # as the real controller: no status until every pod could be made
            self.api.put(made)
        for name in set(pods) - set(names):
            del self.api.objects[KINDS["Pod"].path(metadata["namespace"], name)]
        status = {
            "observedGeneration": metadata["generation"],
            "updateRevision": revision,
            "replicas": spec["replicas"],
        }
        if found.get("status") != status:
            self.api._store(
                KINDS["StatefulSet"].path(metadata["namespace"], metadata["name"]), {**found, "status": status}
            )

    def _run_pod(self, pod: dict[str, Any]) -> None:
        if pod.get("status") or pod["metadata"].get("deletionTimestamp"):
            return
        changed = copy.deepcopy(pod)
        now = timestamp(self.clock.now())
        node = pod["spec"].get("nodeName") or self._schedule(pod)
        path = KINDS["Pod"].path(pod["metadata"]["namespace"], pod["metadata"]["name"])
        if node is None:
            text = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
            scheduled = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": text,
                "lastTransitionTime": now,
            }
            changed["status"] = {"phase": "Pending", "conditions": [scheduled]}
        else:
            if not self.started(pod):
                return
            changed["spec"]["nodeName"] = node
            containers = [
                {"name": c["name"], "ready": True, "state": {"running": {}}} for c in pod["spec"]["containers"]
            ]
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
            changed["status"] = {"phase": "Running", "conditions": [ready], "containerStatuses": containers}
            if any(each["name"] == "report" for each in pod["spec"].get("initContainers", [])):
                ended = {"exitCode": 0, "reason": "Completed", "message": json.dumps(self.reports(changed))}
                changed["status"]["initContainerStatuses"] = [{"name": "report", "state": {"terminated": ended}}]
        self.api._store(path, changed)

    def _schedule(self, pod: dict[str, Any]) -> str | None:
        pinned, kept_off = next(iter(_named(pod, "In")), None), _named(pod, "NotIn")
        for node in self.all("Node"):
            name = node["metadata"]["name"]
            if pinned not in (None, name) or name in kept_off or node["spec"].get("unschedulable"):
                continue
            if pod["spec"].get("resourceClaims") and not self._allocate(pod, name):
                continue
            if not _requests_gpu(pod):
                return name
            held = [p for p in self.all("Pod") if p["spec"].get("nodeName") == name and _requests_gpu(p)]
            if len(held) < int(node["status"]["allocatable"].get(labels.GPU_RESOURCE, 0)):
                return name
        return None

    def _allocate(self, pod: dict[str, Any], node: str) -> bool:
        """Give the pod's claim a GPU of the node, as the scheduler does; False where its GPU is elsewhere, or none is free."""
        namespace, wanted = pod["metadata"]["namespace"], pod["spec"]["resourceClaims"][0]["resourceClaimName"]
        claim = self.api.find("ResourceClaim", namespace, wanted)
        if claim is None:
            return False
        taken = {pair for each in self.all("ResourceClaim") for pair in dra.allocated(each)}
        there = [gpu for gpu in dra.gpus(self.store) if gpu.node == node]
        if mine := dra.allocated(claim):
            return any((gpu.pool, gpu.device) in mine for gpu in there)
        free = [gpu for gpu in there if (gpu.pool, gpu.device) not in taken]
        if not free:
            return False
        given = {"request": "gpu", "driver": labels.DRA_DRIVER, "pool": free[0].pool, "device": free[0].device}
        status = {"allocation": {"devices": {"results": [given]}}}
        self.api._store(KINDS["ResourceClaim"].path(namespace, wanted), {**claim, "status": status})
        return True

    def _release(self) -> None:
        """Take the GPU back from claims that no pod uses any more, as Kubernetes' controller does."""
        used = {
            (pod["metadata"]["namespace"], each["resourceClaimName"])
            for pod in self.all("Pod")
            if pod["spec"].get("nodeName")
            for each in pod["spec"].get("resourceClaims", [])
        }
        for claim in self.all("ResourceClaim"):
            key = claim["metadata"]["namespace"], claim["metadata"]["name"]
            if key not in used and claim.get("status") and labels.PACK in claim["metadata"].get("labels", {}):
                self.api._store(KINDS["ResourceClaim"].path(*key), {**claim, "status": {}})

    def seen_by(self, pod: dict[str, Any]) -> dict[str, Any]:
        """What the preflight of a pod that has a GPU of its own reports: the one its claim has, or one of its own."""
        name = next((each["resourceClaimName"] for each in pod["spec"].get("resourceClaims", [])), None)
        claim = self.api.find("ResourceClaim", pod["metadata"]["namespace"], name) if name else None
        mine = dra.allocated(claim) if claim else []
        uuid = next((gpu.uuid for gpu in dra.gpus(self.store) if (gpu.pool, gpu.device) in mine), None)
        return {
            "uuid": uuid or f"GPU-of-{pod['metadata']['name']}",
            "name": PRODUCT.replace("-", " "),
            "total": 80 * GIB,
            "free": 79 * GIB,
            "mps": True if name else None,
        }

    def _publish(self) -> None:
        """What the holders' watchers say."""
        for pod in self.all("Pod"):
            if pod["metadata"]["labels"].get(labels.COMPONENT) != "holder" or not pod["spec"].get("nodeName"):
                continue
            pack = pod["metadata"]["labels"][labels.PACK]
            uuid = self.uuids.setdefault(pack, f"GPU-{pack}")
            engines = [
                p
                for p in self.all("Pod")
                if p["metadata"]["labels"].get(labels.PACK) == pack
                and p["metadata"]["labels"][labels.COMPONENT] == "replica"
                and p.get("status")
                and p["metadata"]["name"] not in self.unattached
            ]
            clients = [{"pid": 100 + i, "podUID": p["metadata"]["uid"]} for i, p in enumerate(engines)]
            said = {
                labels.ANNOTATION_GPU: json.dumps(
                    {"uuid": uuid, "product": PRODUCT, "memory": 80 * GIB, "driver": "580.1"}
                ),
                labels.ANNOTATION_MPS: json.dumps(
                    {"state": self.mps_states.get(pack, self.mps_state), "server": 7, "clients": clients}
                ),
            }
            if self.preflights:
                said[labels.ANNOTATION_PREFLIGHT] = json.dumps(self.preflights)
            if pod["metadata"].get("annotations", {}).items() >= said.items():
                continue
            changed = copy.deepcopy(pod)
            changed["metadata"]["annotations"] = {**changed["metadata"].get("annotations", {}), **said}
            self.api._store(KINDS["Pod"].path(pod["metadata"]["namespace"], pod["metadata"]["name"]), changed)


def make_node(name: str, gpus: int, cores: int = 8, product: str = PRODUCT) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {labels.NODE_GPU_PRODUCT: product} if gpus else {}},
        "spec": {},
        "status": {
            "allocatable": {labels.GPU_RESOURCE: str(gpus), "cpu": str(cores), "memory": "256Gi"},
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        },
    }


def make_slice(node: str, gpus: int, product: str = PRODUCT, generation: int = 1) -> dict[str, Any]:
    """What NVIDIA's DRA driver publishes of a node, MIG slices apart."""
    devices = [
        {
            "name": f"gpu-{index}",
            "attributes": {
                "type": {"string": "gpu"},
                "uuid": {"string": f"GPU-{node}-{index}"},
                "productName": {"string": product.replace("-", " ")},
                "driverVersion": {"version": "580.105.8"},
            },
            "capacity": {"memory": {"value": "80Gi"}},
        }
        for index in range(gpus)
    ]
    pool = {"name": node, "generation": generation, "resourceSliceCount": 1}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node}-{labels.DRA_DRIVER}-{generation}"},
        "spec": {"driver": labels.DRA_DRIVER, "nodeName": node, "pool": pool, "devices": devices},
    }


def make_class() -> dict[str, Any]:
    """The DeviceClass that comes with the driver."""
    selector = f"device.driver == '{labels.DRA_DRIVER}' && device.attributes['{labels.DRA_DRIVER}'].type == 'gpu'"
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": labels.DRA_DRIVER},
        "spec": {"selectors": [{"cel": {"expression": selector}}]},
    }


def trial(batch: int, replicas: int, rate: float, itl: float) -> dict[str, Any]:
    """A packing that was measured: total tokens per second, and mean inter-token latency in ms."""
    return {
        "batch": batch,
        "replicas": replicas,
        "totalTokensPerSecond": str(rate),
        "interTokenLatency": {"mean": f"{itl}ms"},
        "requests": 2000,
        "preemptions": 0,
    }


TRIALS = (trial(96, 2, 12313.9, 18.98), trial(256, 2, 14669.5, 37.07))
"""Two replicas of OPT-1.3B on one H100, of the same source as the curve (arXiv:2503.08311)."""


def complete(
    profile: dict[str, Any],
    *,
    replica: str = "20Gi",
    points: list[dict[str, Any]] | None = None,
    trials: Iterable[dict[str, Any]] = TRIALS,
) -> None:
    """What profiler and BatchProfile reconciler leave behind after a measurement."""
    # From mean lengths the context is worked out; from the lengths themselves the profiler does it.
    known = {} if "inputTokens" in profile["spec"]["key"]["workload"] else {"contextMean": "403", "contextStd": "330"}
    profile["status"] = {
        "trials": list(trials),
        "points": points or curve(),
        "gpu": {"product": PRODUCT, "memory": "80Gi"},
        "engine": {"maxNumBatchedTokens": 8192, "captureSizes": [1, 2, 4, 8], "blockSize": 16, "maxModelLen": 2048},
        "memory": {"confirmedBatch": 96, "kvCacheTokens": 60000, "kvCache": "10Gi", "replica": replica, **known},
        "conditions": [{"type": "Complete", "status": "True", "reason": "Completed", "message": "6 points"}],
    }


def measured(profile: Mapping[str, Any], *, answers: bool = True, **found: Any) -> dict[str, Any]:
    """What the profiler writes: what it found and, unless it is still at work, the outcome for what the profile asks now."""
    written = {"spec": profile["spec"]}
    complete(written, **found)
    told: dict[str, Any] = written["status"]
    del told["conditions"]
    measurement = profile["spec"].get("measurement") or {}
    outcome = {"state": "Completed", "message": "T no longer rises", "rerun": measurement.get("rerun")}
    outcome["extend"] = (measurement.get("extend") or {}).get("request")
    if answers:
        told["outcome"] = {name: value for name, value in outcome.items() if value is not None}
    return told


def profile(world: World) -> dict[str, Any]:
    """The one profile of a world."""
    (found,) = world.all("BatchProfile")
    return found


def name_of(world: World) -> str:
    """Its name."""
    return str(profile(world)["metadata"]["name"])


def jobs(world: World) -> list[str]:
    """What the names of its Jobs add to its own."""
    return [job["metadata"]["name"].removeprefix(name_of(world) + "-") for job in world.all("Job")]


def end_jobs(world: World, how: str = "Complete") -> None:
    """Every Job that runs ends."""
    for job in world.all("Job"):
        if not job.get("status"):
            ended = {"type": how, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "Ended"}
            path = (job["metadata"]["namespace"], job["metadata"]["name"])
            world.change("Job", *path, lambda obj: obj.update(status={"conditions": [ended]}))  # noqa: B023


def make_lengths(text: str = "111,292\n", name: str = "chat", *, labelled: bool = True, **data: str) -> dict[str, Any]:
    """A ConfigMap with lengths in the entry `lengths.csv`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default", "labels": {labels.LENGTHS: ""} if labelled else {}},
        "data": {"lengths.csv": text} | data,
    }


def curve() -> list[dict[str, Any]]:
    rows = [(1, 381.4, 3.62, 0.865), (32, 5734.1, 7.51, 0.643), (96, 9032.8, 13.89, 0.575), (256, 10870.9, 29.26, 0.53)]
    return [
        {
            "batch": batch,
            "totalTokensPerSecond": str(rate),
            "interTokenLatency": {"mean": f"{itl}ms"},
            "gpuUtilization": str(busy),
            "requests": 2000,
            "preemptions": 0,
            "kvCacheTokensPeak": batch * 400,
        }
        for batch, rate, itl, busy in rows
    ]


def ref(obj: Mapping[str, Any]) -> Ref:
    return Ref.of(obj)


def _carries(obj: Mapping[str, Any], selector: str | None) -> bool:
    """Whether an object matches a selector of the form `label` or `label=value`; None matches all."""
    carried = obj["metadata"].get("labels") or {}
    name, equals, value = (selector or "").partition("=")
    return selector is None or (carried.get(name) == value if equals else name in carried)


def _controller(obj: Mapping[str, Any]) -> str | None:
    return next((each["uid"] for each in obj["metadata"].get("ownerReferences") or [] if each.get("controller")), None)


def _requests_gpu(pod: Mapping[str, Any]) -> bool:
    limits = [(each.get("resources") or {}).get("limits", {}) for each in pod["spec"]["containers"]]
    return any(labels.GPU_RESOURCE in each for each in limits)


def _named(pod: Mapping[str, Any], operator: str) -> list[str]:
    """The nodes that a pod's affinity names with an operator (In, NotIn)."""
    required = (
        pod["spec"]
        .get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    terms = required.get("nodeSelectorTerms", [])
    fields = [each for term in terms for each in term.get("matchFields", []) if each["operator"] == operator]
    return [str(each["values"][0]) for each in fields]


def _pod_of(found: Mapping[str, Any], name: str, revision: str) -> dict[str, Any]:
    metadata, template = found["metadata"], copy.deepcopy(found["spec"]["template"])
    owner = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **template["metadata"],
            "name": name,
            "namespace": metadata["namespace"],
            "labels": {**template["metadata"]["labels"], "controller-revision-hash": revision},
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
    }

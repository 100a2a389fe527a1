"""One pack as it is observed: the objects that belong to it, and what its holder says of the device. Pure over the store.

The holder's annotations are the only word on which GPU it is; the pack's own status remembers the first one, and a later
holder that says otherwise does not move the pack, it makes it unusable (`GPUMismatch`). A pack without a holder has a GPU only while
a replica of it is there: the allocation of its claim says which (else the replicas' reports do), it may be another one after the last
replica has left, and replicas that see another one make the pack unusable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import GPUPack, PackGPU, PackPreflight
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.core.conditions import timestamp
from tightship.core.rollout import Replica
from tightship.kube.store import Object, Store, labels_of
from tightship.manifests import claims
from tightship.manifests import holder as holder_manifests
from tightship.manifests.replicas import Place, memory_of
from tightship.reconcile import dra, modes, podstate, reading, reports
from tightship.reconcile.reading import pack_model
from tightship.reconcile.snapshot import NODE_GONE_SECONDS, not_ready_since, owner_of

_REVISION = "controller-revision-hash"


@dataclass(frozen=True)
class Problem:
    """Something that could not be done: a reason and a message for one of the pack's conditions."""

    reason: str
    message: str
    gate: str = names.REPLICAS_READY


@dataclass(frozen=True)
class View:
    """The pack and what belongs to it.

    `opener` is the service whose template its holder gets: the one that opened it, or where that is gone or can't be read, another one on it.
    `claim` is its ResourceClaim, if it has one, and `claimed` the GPU allocated to that; `why` says how the GPU is shared and why so,
    and `limits` what the device plugin forces on its replicas. `node_gone`: the pack has a node, and the cluster has others but not that one.
    """

    obj: Object
    pack: GPUPack
    holder: Object | None
    sets: tuple[Object, ...]
    pods: tuple[Object, ...]
    node: Object | None
    opener: LLMService | None
    claim: Object | None = None
    claimed: dra.Gpu | None = None
    why: str = ""
    limits: str = ""
    node_gone: bool = False

    @property
    def cpu(self) -> bool:
        """Whether the pack is a set of cores, which needs no holder."""
        return self.pack.spec.device == "cpu"

    @property
    def finished(self) -> bool:
        """Whether nobody is assigned, and nothing of anybody is left."""
        return not self.pack.spec.assignments and not self.sets and not replica_pods(self)


@dataclass(frozen=True)
class Mps:
    """What the holder's watcher published: the server's state, its clients' number, the UIDs of their pods, and how many of them are of
    a pod that could not be told.

    Of a pack without a holder, what its replicas told; `untold` are the UIDs of those that could not tell whether they are attached.
    """

    state: str
    server: int | None
    clients: int
    pods: frozenset[str]
    unknown: int = 0
    untold: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Holding:
    """How it stands with the device: a condition (status, reason, message), and what is known of it.

    `place` is there only while replicas may be made: the device is held and is the one it always was. `watched` tells whether the
    watcher runs, whose word `mps` is (where it is a watcher's), and `watched_since` since when (None: not known). `preflights` are what
    replicas saw, by pod UID.
    """

    status: str
    reason: str
    message: str
    place: Place | None = None
    node: str | None = None
    gpu: PackGPU | None = None
    mps: Mps | None = None
    watched: bool = True
    watched_since: datetime | None = None
    preflights: Mapping[str, PackPreflight] = field(default_factory=dict)


def gather(store: Store, obj: Object, absent: frozenset[str] = frozenset()) -> View:
    """Collect what belongs to a pack; `absent`: optional kinds that the cluster lacks."""
    pack = store.derive(store.get("GPUPack", "", obj["metadata"]["name"]) or obj, pack_model)
    mine = (labels.PACK, pack.metadata.name)
    pods = store.list("Pod", label=mine)
    uid = pack.metadata.uid
    holders = [
        pod for pod in pods if labels_of(pod).get(labels.COMPONENT) == labels.COMPONENT_HOLDER and _owned(pod, uid)
    ]
    owner = owner_of(pack)
    name = pack.spec.node or pack.status.node
    openers = [owner.name, *(each.service for each in pack.spec.assignments)]
    opener = next(
        filter(None, (readable(store, store.get("LLMService", owner.namespace, each)) for each in openers)), None
    )
    return View(
        obj,
        pack,
        next((pod for pod in holders if pod["metadata"]["name"] == holder_manifests.holder_name(pack)), None),
        tuple(store.list("StatefulSet", label=mine)),
        tuple(pods),
        store.get("Node", "", name) if name else None,
        opener,
        dra.claim_of(store, pack) if pack.spec.claims else None,
        dra.gpu_of(store, pack) if pack.spec.claims else None,
        modes.explain(pack, opener, store, absent),
        modes.limits(pack, store) if pack.spec.mode == modes.DEVICE_PLUGIN else "",
        # A cluster without nodes is one whose nodes have not been listed yet.
        bool(name) and store.get("Node", "", name or "") is None and store.summarise("Node", len) > 0,
    )


def replica_pods(view: View) -> list[Object]:
    """The replica pods on the pack, those that are going included."""
    return [pod for pod in view.pods if podstate.is_replica(pod)]


def pods_of(view: View, service: str) -> list[Object]:
    """The replica pods of one service on the pack."""
    return [pod for pod in replica_pods(view) if labels_of(pod).get(labels.SERVICE) == service]


def rollout_pods(view: View, service: str, live: Object | None) -> tuple[Replica, ...]:
    """The same as the roll-out sees them."""
    return replicas_of(pods_of(view, service), live)


def replicas_of(pods: Iterable[Object], live: Object | None) -> tuple[Replica, ...]:
    """Pods of one StatefulSet as the roll-out sees them. None is outdated as long as the set's status is behind its spec."""
    revision = current_revision(live)
    return tuple(
        Replica(
            ordinal=int(pod["metadata"]["name"].rpartition("-")[2]),
            memory=memory_of(pod),
            ready=podstate.is_ready(pod),
            going=podstate.is_going(pod),
            outdated=revision is not None and revision_of(pod) not in (None, revision),
            failed=podstate.trouble(pod) is not None,
        )
        for pod in pods
        if pod["metadata"]["name"].rpartition("-")[2].isdigit()
    )


def granted_to_others(store: Store, pack: GPUPack, service: str) -> int:
    """Bytes that replicas of other services hold on the pack, those that are going and those about to be made included.

    As in a roll-out of its own, a pod counts at the larger of its own memory and its template's, since it may come back at either.
    """
    mine, total = (labels.PACK, pack.metadata.name), 0
    pods = [pod for pod in store.list("Pod", label=mine) if podstate.is_replica(pod)]
    sets = {labels_of(found).get(labels.SERVICE): found for found in store.list("StatefulSet", label=mine)}
    for other in {labels_of(pod).get(labels.SERVICE) for pod in pods} | set(sets):
        if other == service:
            continue
        found, theirs = sets.get(other), [pod for pod in pods if labels_of(pod).get(labels.SERVICE) == other]
        each = memory_of(found["spec"]["template"]) if found else 0
        count = int(found["spec"].get("replicas", 1)) if found else 0
        total += sum(max(memory_of(pod), each) for pod in theirs) + max(0, count - len(theirs)) * each
    return total


def current_revision(live: Object | None) -> str | None:
    """The revision that pods should have; None while the StatefulSet's controller has not seen its newest spec."""
    status = (live or {}).get("status") or {}
    if live is None or status.get("observedGeneration") != live["metadata"].get("generation"):
        return None
    return status.get("updateRevision")


def revision_of(pod: Object) -> str | None:
    """The revision a pod was made from."""
    return labels_of(pod).get(_REVISION)


def holding(view: View) -> Holding:
    """How it stands with the pack's device."""
    if view.cpu:
        return _core_set(view)
    if not view.pack.spec.has_holder:
        told = {uid: report.as_preflight() for uid, report in reports.of(replica_pods(view)).items()}
        return replace(_own_gpu(view), preflights=told)
    held = _gpu(view)
    watcher = holder_manifests.WATCH_CONTAINER
    if view.holder is None:
        return held
    return replace(
        held,
        watched=podstate.is_running(view.holder, watcher),
        watched_since=podstate.running_since(view.holder, watcher),
        preflights=_preflights(view.holder),
    )


def _core_set(view: View) -> Holding:
    spec = view.pack.spec
    memory = units.parse_quantity(spec.memory) if spec.memory else None
    gpu = PackGPU(memory=spec.memory) if spec.memory else None
    if view.node is None or not spec.node:
        text = f"node {spec.node} is gone; the placement pass replaces this pack"
        return Holding("False", Reason.HOLDER_LOST, text, node=spec.node, gpu=gpu)
    text = f"{spec.cores} cores and {spec.memory} of node {spec.node}"
    return Holding("True", Reason.CPU_SET, text, Place(spec.node, None, memory), spec.node, gpu)


def _gpu(view: View) -> Holding:
    recorded, holder = view.pack.status.gpu, view.holder
    node = (podstate.node_of(holder) if holder else None) or view.pack.status.node
    if recorded is not None and (away := _node_away(view)) is not None:
        return Holding("False", Reason.HOLDER_LOST, away, node=node, gpu=recorded)
    if holder is None or podstate.is_going(holder) or podstate.is_over(holder):
        return _without_holder(view, node)
    published, mps = _published(holder), _mps(holder)
    if recorded and recorded.uuid and published and published.uuid and published.uuid != recorded.uuid:
        text = (
            f"{holder['metadata']['name']} now holds {published.uuid}, the pack was made for {recorded.uuid}: "
            "a pack never moves, so the placement pass replaces it"
        )
        return Holding("False", Reason.GPU_MISMATCH, text, node=node, gpu=recorded)
    gpu = published or recorded
    trouble = podstate.trouble(holder)
    running = podstate.is_running(holder, holder_manifests.MPS_CONTAINER)
    name = holder["metadata"]["name"]
    if published and published.uuid and node and running:
        memory = units.parse_quantity(published.memory) if published.memory else None
        text = f"{published.uuid} ({published.product}, {published.memory}) on node {node}, held by {name}"
        return Holding("True", Reason.GPU_HELD, text, Place(node, published.uuid, memory), node, gpu, mps)
    if trouble:
        return Holding("False", trouble.reason, f"holder {name}: {trouble.message}", node=node, gpu=gpu, mps=mps)
    # A holder that has only just begun is starting; one that takes the place of another stops replicas that serve already.
    if podstate.has_run(holder, holder_manifests.MPS_CONTAINER) if published else recorded:
        text = (
            f"container {holder_manifests.MPS_CONTAINER} of holder {name} does not run, or has not said yet which GPU it has; "
            "its replicas stop until it does"
        )
        return Holding("False", Reason.HOLDER_LOST, text, node=node, gpu=gpu, mps=mps)
    return Holding("Unknown", Reason.NOT_YET_KNOWN, f"holder {name} is starting", node=node, gpu=gpu)


def _node_away(view: View) -> str | None:
    """That the pack's node is gone, or silent: what runs there can't be told, so nobody may count on it."""
    if view.node_gone:
        return f"node {view.pack.status.node} is gone; the placement pass replaces this pack"
    since = not_ready_since(view.node) if view.node is not None else None
    if since is None:
        return None
    return (
        f"node {view.pack.status.node} has not been ready since {timestamp(since)}; "
        f"after {NODE_GONE_SECONDS:g} s it counts as gone, and the placement pass replaces this pack"
    )


def _without_holder(view: View, node: str | None) -> Holding:
    recorded, name = view.pack.status.gpu, holder_manifests.holder_name(view.pack)
    if not view.pack.spec.assignments:
        return Holding(
            "False", Reason.NOT_ASSIGNED, "nobody is assigned; the GPU is given back", node=node, gpu=recorded
        )
    if recorded is None:
        return Holding("Unknown", Reason.NOT_YET_KNOWN, f"holder {name} is being made", node=node)
    ended = ": " + text if view.holder and (text := (view.holder.get("status") or {}).get("message")) else ""
    text = f"holder {name} is gone{ended}; it is made anew on node {node}, and the replicas stop until then"
    return Holding("False", Reason.HOLDER_LOST, text, node=node, gpu=recorded)


def _own_gpu(view: View) -> Holding:
    """How it stands with a GPU that the replicas themselves have."""
    pods = [pod for pod in replica_pods(view) if podstate.node_of(pod) and not podstate.is_over(pod)]
    told = reports.of(pods)
    node = view.claimed.node if view.claimed else next((podstate.node_of(pod) for pod in pods), None)
    gpu = view.claimed.as_pack_gpu() if view.claimed else next((each.as_pack_gpu() for each in told.values()), None)
    mps = _told_mps(pods, told) if told and view.pack.spec.mode != modes.EXCLUSIVE else None
    # What the device plugin gave apart it would give apart again: the pack serves on, and `SharingReady` says so.
    strayed = None if view.pack.spec.mode == modes.DEVICE_PLUGIN else _strayed(pods, gpu)
    if strayed is not None:
        return Holding("False", Reason.GPU_MISMATCH, strayed, node=node, gpu=gpu, mps=mps)
    if gpu and view.pack.spec.mode == modes.DEVICE_PLUGIN:
        gpu = gpu.model_copy(update={"memory": None})  # what CUDA shows may be the share, which the ledger is not of
    recorded = view.pack.status.gpu
    known = gpu or (PackGPU(product=recorded.product, memory=recorded.memory) if recorded else None)
    memory = units.parse_quantity(known.memory) if known and known.memory else None
    claim = f"ResourceClaim {claims.claim_name(view.pack)}"
    if not view.pack.spec.assignments:
        text = "nobody is assigned; the GPU is given back with the last replica"
        return Holding("False", Reason.NOT_ASSIGNED, text, node=node, gpu=known, mps=mps)
    if view.pack.spec.claims and view.claim is None:
        return Holding("Unknown", Reason.NOT_YET_KNOWN, f"{claim} is being made", gpu=known)
    place = Place(None, None, memory)
    by = f"by {claim}" if view.pack.spec.claims else f"requested by {pods[0]['metadata']['name']}" if pods else ""
    if gpu and gpu.uuid and pods:
        text = f"{gpu.uuid} ({', '.join(filter(None, (gpu.product, gpu.memory)))}) on node {node}, {by}"
        return Holding("True", Reason.GPU_HELD, text, place, node, gpu, mps)
    if any(podstate.is_ready(pod) for pod in pods):
        # What serves has its GPU, whether it has told which or not.
        return Holding(
            "True", Reason.GPU_HELD, f"a GPU on node {node}, {by}; which one is not known", place, node, known, mps
        )
    waiting = [
        (pod, found) for pod in replica_pods(view) if (found := podstate.trouble(pod)) and not podstate.node_of(pod)
    ]
    if waiting and not pods:
        pod, found = waiting[0]
        return Holding("False", found.reason, f"{pod['metadata']['name']}: {found.message}", place, node, known)
    text = f"no replica on node {node} has told yet which GPU it sees" if pods else "the first replica is to get a GPU"
    kept = next(((pod, found) for pod in pods if (found := podstate.trouble(pod))), None)
    if kept is not None:
        # Where nobody else holds the GPU this gate comes before the replicas', and the cause would hide behind it.
        pod, found = kept
        text = f"{text}; {pod['metadata']['name']}: {found.message}"
        return Holding("Unknown", found.reason, text, place, node, known, mps)
    return Holding("Unknown", Reason.NOT_YET_KNOWN, text, place, node, known, mps)


def _strayed(pods: list[Object], gpu: PackGPU | None) -> str | None:
    """The replicas that see another GPU than the pack's, in words."""
    others = [f"{name} sees {uuid}" for name, uuid in reports.strayed(pods, gpu.uuid)] if gpu and gpu.uuid else []
    if not others or gpu is None:
        return None
    return (
        f"{', '.join(others)}, the pack has {gpu.uuid}: its replicas can't share, so the placement pass replaces it, and leaves the node alone "
        "for a while (the service's status.avoidedNodes says until when); the DRA driver's logs on the node may tell why"
    )


def apart(view: View) -> str | None:
    """The GPUs that replicas of one pack see, in words, where they are not the same; None where they are."""
    seen: dict[str, list[str]] = {}
    told = reports.of(replica_pods(view))
    for pod in replica_pods(view):
        if (report := told.get(str(pod["metadata"]["uid"]))) and not podstate.is_going(pod):
            seen.setdefault(report.uuid.lower(), []).append(f"{pod['metadata']['name']} on {report.uuid}")
    return ", ".join(name for names_here in seen.values() for name in names_here) if len(seen) > 1 else None


def _told_mps(pods: Iterable[Object], told: Mapping[str, reports.Report]) -> Mps:
    """MPS as the replicas told of it; nobody here sees the daemon itself. What a driver doesn't say is no proof of anything."""
    uids = {str(pod["metadata"]["uid"]) for pod in pods}
    attached = frozenset(uid for uid, report in told.items() if report.mps)
    denied = {uid for uid, report in told.items() if report.mps is False}
    return Mps(
        "ACTIVE" if attached else "IDLE", None, len(attached), attached, untold=frozenset(uids - attached - denied)
    )


def _published(holder: Object) -> PackGPU | None:
    said = _annotation(holder, labels.ANNOTATION_GPU)
    if not said.get("uuid"):
        return None
    memory = said.get("memory")
    return PackGPU(
        uuid=str(said["uuid"]),
        product=str(said["product"]) if said.get("product") else None,
        memory=units.format_quantity(int(memory)) if isinstance(memory, int) else None,
        driver=str(said["driver"]) if said.get("driver") else None,
    )


def _mps(holder: Object) -> Mps | None:
    said = _annotation(holder, labels.ANNOTATION_MPS)
    if said.get("state") not in ("ACTIVE", "IDLE", "FAULT", "DOWN"):
        return None
    clients = [each for each in said.get("clients") or [] if isinstance(each, Mapping)]
    server = said.get("server")
    return Mps(
        str(said["state"]),
        server if isinstance(server, int) else None,
        len(clients),
        frozenset(str(each["podUID"]) for each in clients if each.get("podUID")),
        sum(not each.get("podUID") for each in clients),
    )


def _preflights(holder: Object) -> dict[str, PackPreflight]:
    """What replicas saw before their engines started, by pod UID; entries that aren't whole are left out."""
    found = {}
    for uid, seen in _annotation(holder, labels.ANNOTATION_PREFLIGHT).items():
        if isinstance(seen, Mapping) and isinstance(seen.get("total"), int) and isinstance(seen.get("free"), int):
            total, free = units.format_quantity(seen["total"]), units.format_quantity(seen["free"])
            found[uid] = PackPreflight(uuid=str(seen.get("uuid")), total=total, free=free)
    return found


def _annotation(holder: Object, name: str) -> dict[str, Any]:
    """What the holder wrote under a name; empty when that isn't there, or isn't an object (the next write mends it)."""
    try:
        said = json.loads((holder["metadata"].get("annotations") or {}).get(name, "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def refused(service: str) -> str:
    """How a pack's condition begins to tell that admission refuses replicas of one of the services on it."""
    return f"replicas of {service} are refused"


def readable(store: Store, obj: Object | None) -> LLMService | None:
    """The service in a manifest; None where there is none, or its schema isn't ours."""
    return store.derive(obj, reading.readable) if obj is not None else None


def _owned(obj: Object, uid: str | None) -> bool:
    return any(each.get("uid") == uid for each in obj["metadata"].get("ownerReferences") or ())

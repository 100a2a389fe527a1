"""The cluster as the placement planner sees it: demands, packs and devices, taken from the watch cache at one moment.

Reading the store is enough, because it shows this process's own writes at once: what one pass assumed, the next one sees. A snapshot
goes through all services and packs, but what each comes to is worked out only when something of it has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.common import Condition
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import Assignment as PackAssignment
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import LastApplied, LLMService
from tightship.core import placement
from tightship.core.backoff import Avoided
from tightship.core.conditions import find, is_true
from tightship.core.placement import Demand, Devices, Health, Pack, ServiceRef, Shape, Snapshot
from tightship.decide import ledger_from_profile, parse_reserve
from tightship.kube.clock import parse_timestamp
from tightship.kube.store import Object, Store, labels_of
from tightship.manifests.claims import CLAIMED_DEVICE, SHARED_DEVICE
from tightship.manifests.holder import MPS_CONTAINER
from tightship.reconcile import dra, indexes, modes, nodes, podstate, reports
from tightship.reconcile.nodes import Shares
from tightship.reconcile.reading import pack_model
from tightship.reconcile.verdict import Verdict, examine

NODE_GONE_SECONDS = 300.0
"""A node that has not been ready for so long is treated as gone: as Kubernetes does by default when it evicts pods."""

LOST_GPU_SECONDS = 60.0
"""A GPU that its holder has not seen for so long is lost. A holder that starts anew needs seconds to find one that came back."""

LOST_GPU_TRIES = 2

UNFIT_SECONDS = 60.0
"""A replica, or a holder that is made anew, without a place on its pack's node for so long gives the pack back."""

CPU_PRODUCT = "cpu"
_UNKNOWN_COUNT = 10**6


@dataclass(frozen=True)
class Facts:
    """What all nodes together offer, by the device plugin or by claims: devices on those that take pods, and what services hear of the others.

    `products` are GPU products with their nodes (those that are down for the moment included) and GPUs; `divided` a product, node and
    words for each node whose GPUs are not to be had whole; `shares` what device plugins share by MPS; `largest_cores` whole cores of the
    largest node; `nodes` how many there are.
    """

    nodes: int
    devices: tuple[Devices, ...]
    products: tuple[tuple[str, int, int], ...]
    divided: tuple[tuple[str, str, str], ...]
    shares: tuple[Shares, ...]
    largest_cores: int


def facts(store: Store) -> Facts:
    """The nodes as the store shows them; worked out when one of them or a claim has changed, not when somebody asks."""
    return store.summarise_all(("Node", "ResourceSlice", "ResourceClaim"), _facts)


def _facts(store: Store) -> Facts:
    listed, devices = store.list("Node"), tuple(devices_of(store))
    carrying = [
        (product, str(node["metadata"]["name"]), nodes.divided(node))
        for node in listed
        if (product := nodes.product(node))
    ]
    whole = {(product, name) for product, name, how in carrying if how is None}
    counts = Counter(product for product, _ in whole | {(gpu.product, gpu.node) for gpu in dra.gpus(store)} if product)
    gpus: Counter[str] = Counter()
    for each in devices:
        if each.device != "cpu":
            gpus[each.product] += each.units
    return Facts(
        len(listed),
        devices,
        tuple((product, counts[product], gpus[product]) for product in sorted(counts)),
        tuple((product, name, how) for product, name, how in carrying if how),
        tuple(nodes.shares(listed)),
        max((cores_of(node) for node in listed), default=0),
    )


def take(store: Store, now: datetime) -> Snapshot:
    """Everything that placement goes by."""
    services = [obj for obj in store.list("LLMService") if not obj["metadata"].get("deletionTimestamp")]
    return Snapshot(
        demands=tuple(demand(obj, store, now) for obj in services),
        packs=tuple(pack_of(obj, store, now) for obj in store.list("GPUPack")),
        devices=facts(store).devices,
    )


def packs_with(uid: str, store: Store) -> list[GPUPack]:
    """The packs that a service is on."""
    return [store.derive(obj, pack_model) for obj in store.by("GPUPack", indexes.ASSIGNED, uid)]


def demand(obj: Object, store: Store, now: datetime) -> Demand:
    """What one service wants, as the store shows it, and which nodes it is kept off now."""
    wanted, kept_off = _demand(obj, store), avoided(obj, now)
    return replace(wanted, avoids=kept_off) if kept_off else wanted


def _demand(obj: Object, store: Store) -> Demand:
    """The same object as long as nothing of it has changed."""
    verdict = examine(obj, store)
    service = verdict.service
    if service is None:
        return demand_of(obj, verdict, store, choice=_NO_CHOICE, usable=None, approved=False)
    packs = packs_with(obj["metadata"]["uid"], store)
    applied, choice = approved(service, verdict, packs), _same(modes.choose(service, verdict.decision, packs, store))
    usable = store.summarise("Node", _Usable.of(service))
    shares = store.summarise("Node", nodes.shares_by_product)  # what a share comes to, which `demand_of` reads
    return store.derive_with(
        obj,
        _demand,
        (verdict, choice, usable, shares, applied),
        lambda: demand_of(obj, verdict, store, choice=choice, usable=usable, approved=applied),
    )


_NO_CHOICE = modes.Choice(modes.RESERVATION)


@cache
def _same(choice: modes.Choice) -> modes.Choice:
    """One object for all that are equal; there are few."""
    return choice


def demand_of(
    obj: Object,
    verdict: Verdict,
    store: Store,
    *,
    choice: modes.Choice,
    usable: frozenset[str] | None,
    approved: bool,
) -> Demand:
    """What one service wants of these nodes, as its mode lets it. Without a decision that may be applied it has no shape: it keeps what it has."""
    ref, uid, since = _ref(obj), obj["metadata"]["uid"], obj["metadata"].get("creationTimestamp") or ""
    service = verdict.service
    if service is None:
        # Nobody can tell how many an unreadable manifest wants: nothing is taken away for it.
        return Demand(ref, uid, _UNKNOWN_COUNT, "", "", "", since=since)
    accelerator, packing = service.spec.accelerator, service.spec.packing
    exclusive = choice.mode == modes.EXCLUSIVE
    shape = verdict.shape if accepted(obj) and approved else None
    if shape is not None and modes.too_small(service, shape.memory, store):
        shape = None
    cpu = accelerator.device == "cpu"
    return Demand(
        ref,
        uid,
        service.spec.replicas,
        choice.device,
        CPU_PRODUCT if cpu else accelerator.product or "",
        _sharing(choice, service.spec.template.spec.run_as_user, accelerator.memory),
        shape,
        _per_device(choice, verdict, accelerator.product or "", store),
        (accelerator.cores or 1) if cpu else 1,
        usable,
        since,
        memory=units.parse_quantity(accelerator.memory or "0") if cpu else 0,
        # What else a pod wants of its node than can be told here would keep it off a pack that stands already.
        shared=packing.shared_with == "SameNamespace" and not exclusive and not _requires_affinity(service),
        priority=service.spec.template.spec.priority_class_name or "",
        spread=packing.spread,
        reserve=parse_reserve(packing.memory_reserve),
        device_memory=_device_memory(verdict),
        least=service.spec.rollout.least_serving(service.spec.replicas),
    )


def _per_device(choice: modes.Choice, verdict: Verdict, product: str, store: Store) -> int:
    """Replicas that may share a device, as measured and as its mode lets them."""
    if choice.mode == modes.EXCLUSIVE:
        return min(1, verdict.per_device)
    if choice.mode == modes.DEVICE_PLUGIN:
        return min(modes.most_shares(store, product), verdict.per_device)
    return verdict.per_device


def avoided(service: Object | None, now: datetime) -> frozenset[str]:
    """Nodes that a service's replicas are kept off for now, as its status remembers them."""
    return frozenset(each.node for each in remembered(service) if each.until > now)


def remembered(service: Object | None) -> list[Avoided]:
    """All that a service's status remembers of nodes that turned out not to fit."""
    return [
        Avoided(each["node"], parse_timestamp(each["since"]), parse_timestamp(each["until"]), int(each["times"]))
        for each in ((service or {}).get("status") or {}).get("avoidedNodes") or ()
    ]


def _device_memory(verdict: Verdict) -> int | None:
    """Bytes of a device of the service's product, as its profile has it."""
    if verdict.profile is None or verdict.shape is None:
        return None
    ledger = ledger_from_profile(verdict.profile)
    return ledger.device_total if ledger is not None else None


def accepted(obj: Object) -> bool:
    """Whether the service's own reconciler found nothing in the way (what only it can see: a Service that isn't ours)."""
    return is_true(_conditions(obj), names.ACCEPTED)


def approved(service: LLMService, verdict: Verdict, packs: Iterable[GPUPack]) -> bool:
    """Whether the decision may be applied: by itself, because it is what already runs, or because it was applied before.

    The last needs nothing that runs: a service that lost its last pack comes back as it was.
    """
    if service.spec.auto_apply:
        return True
    if verdict.shape is None:
        return False
    last = service.status.last_applied
    running = {shape_of(each) for pack in packs for each in pack.spec.assignments if each.uid == service.metadata.uid}
    return running == {verdict.shape} or (last is not None and shape_of(last) == verdict.shape)


def shape_of(assignment: PackAssignment | LastApplied) -> Shape:
    """The shape that an assignment, or what a service's status remembers of one, stands for."""
    return Shape(
        assignment.profile,
        assignment.batch,
        units.parse_quantity(assignment.kv_cache),
        units.parse_quantity(assignment.memory_per_replica),
    )


def owner_of(pack: GPUPack) -> ServiceRef:
    """The service that a pack was opened for."""
    name = pack.metadata.labels.get(labels.SERVICE) or next((each.service for each in pack.spec.assignments), "")
    return ServiceRef(pack.spec.namespace, name)


def pack_of(obj: Object, store: Store, now: datetime) -> Pack:
    """A pack as the planner sees it: what its text says, and what its node and its pods say now."""
    pack = store.derive(obj, pack_model)
    as_written = store.derive_with(obj, pack_of, (), lambda: written(pack))
    homeless = _homeless(pack, store, now)
    health = health_of(pack, store, now, homeless)
    unfit = frozenset(ServiceRef(pack.spec.namespace, name) for name in homeless)
    apart = as_written.waiting and _kept_apart(pack, store)
    cordoned = _cordoned(store.get("Node", "", as_written.node or ""))
    if health is Health.SOUND and not (unfit or apart or cordoned):
        return as_written
    return replace(as_written, health=health, unfit=unfit, apart=apart, cordoned=cordoned)


def written(pack: GPUPack) -> Pack:
    """What a pack's own text says of it."""
    spec, cpu, choice = pack.spec, pack.spec.device == "cpu", modes.of_pack(pack)
    return Pack(
        name=pack.metadata.name,
        owner=owner_of(pack),
        ordinal=placement.ordinal_of(pack.metadata.name),
        device=choice.device,
        product=CPU_PRODUCT if cpu else spec.product or "",
        mode=_sharing(choice, spec.run_as_user, spec.memory),
        units=(spec.cores or 1) if cpu else 1,
        node=spec.node if cpu else pack.status.node,
        capacity=memory_of(pack),
        assignments=tuple(
            placement.Assignment(ServiceRef(spec.namespace, each.service), each.uid, each.replicas, shape_of(each))
            for each in sorted(spec.assignments, key=lambda each: each.service)
        ),
        excluded=frozenset(spec.excluded_nodes),
        memory=units.parse_quantity(spec.memory or "0") if cpu else 0,
        waiting=_waits(pack),
    )


def _held(pack: GPUPack) -> Condition | None:
    """The condition that tells whether a pack has its device."""
    return next((each for each in pack.status.conditions if each.type == names.HELD), None)


def _waits(pack: GPUPack) -> bool:
    """Whether a pack has found no device so far."""
    held = _held(pack)
    return pack.spec.device != "cpu" and pack.status.node is None and held is not None and held.status == "False"


def _kept_apart(pack: GPUPack, store: Store) -> bool:
    """Whether what takes its GPU, the holder or without one a replica, waits for a place that its topology spread allows."""
    takes = labels.COMPONENT_HOLDER if pack.spec.has_holder else labels.COMPONENT_REPLICA
    return any(podstate.is_kept_apart(pod) for pod in _parts(pack, store, takes))


def _parts(pack: GPUPack, store: Store, component: str = labels.COMPONENT_HOLDER) -> list[Object]:
    """The pods of a pack that are one part of it: its holder, or its replicas."""
    pods = store.list("Pod", label=(labels.PACK, pack.metadata.name))
    return [pod for pod in pods if labels_of(pod).get(labels.COMPONENT) == component]


def _outdated(pack: GPUPack, store: Store, now: datetime) -> bool:
    """Whether a pack that waits for a device keeps off a node that its owner may try again: then a new one is opened in its place."""
    if not _waits(pack):
        return False
    owner = owner_of(pack)
    kept_off = avoided(store.get("LLMService", owner.namespace, owner.name), now)
    return any(
        node not in kept_off and store.get("Node", "", node) and not _cordoned(store.get("Node", "", node))
        for node in pack.spec.excluded_nodes
    )


def memory_of(pack: GPUPack) -> int | None:
    """Bytes of a pack's whole device; None until it is known."""
    memory = pack.spec.memory if pack.spec.device == "cpu" else pack.status.gpu.memory if pack.status.gpu else None
    return units.parse_quantity(memory) if memory is not None else None


def capacity_of(pack: GPUPack, reserves: Iterable[str]) -> int | None:
    """Bytes that the replicas of a pack may use together beside the largest of these reserves; None until its device is known."""
    total = memory_of(pack)
    if total is None:
        return None
    return max(0, total - max((parse_reserve(reserve).of(total) for reserve in reserves), default=0))


def health_of(pack: GPUPack, store: Store, now: datetime, homeless: frozenset[str]) -> Health:
    """What a pack is still good for; `homeless`: the services whose replicas have found no room on its node for too long."""
    if pack.metadata.deletion_timestamp:
        return Health.LEAVING
    node = pack.spec.node or pack.status.node
    # A cluster without nodes is one whose nodes have not been listed yet.
    if node and facts(store).nodes and node_gone(store.get("Node", "", node), now):
        return Health.LOST
    held = _held(pack)
    if held is not None and held.status == "False" and held.reason == Reason.GPU_MISMATCH:
        return Health.LOST if pack.spec.has_holder or _left_alone(pack, node, store, now) else Health.SOUND
    since = _without_gpu_since(pack, store)
    if since is not None and (now - since).total_seconds() >= LOST_GPU_SECONDS:
        return Health.LOST
    since = _displaced_since(pack, store)
    if since is not None and (now - since).total_seconds() >= UNFIT_SECONDS:
        return Health.LOST
    if _outdated(pack, store, now):
        return Health.LOST
    if homeless and homeless >= {each.service for each in pack.spec.assignments}:
        return Health.UNFIT
    if node and _cordoned(store.get("Node", "", node)) and (_is_down(pack) or _stranded(pack, store)):
        return Health.UNFIT
    return Health.SOUND


def _left_alone(pack: GPUPack, node: str | None, store: Store, now: datetime) -> bool:
    """Whether all services of a pack are kept off its node: one that is replaced earlier could come back to it at once, again and again."""
    services = [store.get("LLMService", pack.spec.namespace, each.service) for each in pack.spec.assignments]
    return node is None or all(node in avoided(each, now) for each in services if each is not None)


def _without_gpu_since(pack: GPUPack, store: Store) -> datetime | None:
    """Since when the holder of a GPU that was there has not seen it; None where it does, or where another cause is known.

    A pack that never had its GPU is left alone: the next one would fare no better. One try is none: after a reboot the driver may be late.
    """
    held = _held(pack)
    if held is None or pack.status.gpu is None or (held.status, held.reason) != ("False", Reason.GPU_NOT_VISIBLE):
        return None
    if all(podstate.restarts(pod, MPS_CONTAINER) < LOST_GPU_TRIES for pod in _parts(pack, store)):
        return None
    return parse_timestamp(held.last_transition_time) if held.last_transition_time else None


def _displaced_since(pack: GPUPack, store: Store) -> datetime | None:
    """Since when the holder of a pack that had a GPU finds no place on its node any more: while it was away somebody else took the GPU."""
    if pack.status.gpu is None or not pack.spec.has_holder:
        return None
    return next((since for pod in _parts(pack, store) if (since := podstate.short_of_room_since(pod))), None)


def _cordoned(node: Object | None) -> bool:
    return node is not None and bool((node.get("spec") or {}).get("unschedulable"))


def _is_down(pack: GPUPack) -> bool:
    """Whether nothing serves there: a drained node takes neither holder nor replicas back."""
    return pack.status.ready_replicas == 0 and any(
        each.type == names.READY and each.status == "False" for each in pack.status.conditions
    )


def _stranded(pack: GPUPack, store: Store) -> bool:
    """Whether a replica finds no place there: the disruption budget then lets no other one of its service be evicted before it has one."""
    return bool(store.by("Pod", indexes.UNPLACED, pack.metadata.name))


def node_gone(node: Object | None, now: datetime) -> bool:
    """Whether a node is gone, or has not been heard of for so long that it counts as gone."""
    since = not_ready_since(node) if node else None
    return node is None or (since is not None and (now - since).total_seconds() >= NODE_GONE_SECONDS)


def not_ready_since(node: Object) -> datetime | None:
    """Since when a node has not been ready; None while it is (or never said)."""
    condition = find(_conditions(node), "Ready")
    if condition is None or condition.get("status") == "True" or not condition.get("lastTransitionTime"):
        return None
    return parse_timestamp(condition["lastTransitionTime"])


def next_look(store: Store, now: datetime) -> float | None:
    """Seconds until a wait that placement counts ends: of a silent node, a GPU that isn't seen, a replica that finds no place."""
    packs = [store.derive(obj, pack_model) for obj in store.list("GPUPack")]
    waits = [
        (since, NODE_GONE_SECONDS)
        for pack in packs
        if (name := pack.spec.node or pack.status.node)
        and (node := store.get("Node", "", name))
        and (since := not_ready_since(node))
    ]
    waits += [(since, UNFIT_SECONDS) for pack in packs for since in _homeless_since(pack, store).values()]
    waits += [(since, UNFIT_SECONDS) for pack in packs if (since := _displaced_since(pack, store))]
    waits += [(since, LOST_GPU_SECONDS) for pack in packs if (since := _without_gpu_since(pack, store))]
    waits += [
        (each.since, (each.until - each.since).total_seconds())
        for service in store.list("LLMService")
        for each in remembered(service)
    ]
    left = [limit - (now - since).total_seconds() for since, limit in waits]
    return min((seconds + 1 for seconds in left if seconds > 0), default=None)


def devices_of(store: Store) -> Iterable[Devices]:
    """GPUs by product, and cores, of the nodes that take pods."""
    open_nodes = [
        node
        for node in store.list("Node")
        if not (node.get("spec") or {}).get("unschedulable") and not_ready_since(node) is None
    ]
    for name, product, count in nodes.whole_gpus(open_nodes):
        yield Devices(name, "cuda", product, count)
    names_of_open = {node["metadata"]["name"] for node in open_nodes}
    for (name, product), count in sorted(dra.by_node(dra.free(store)).items()):
        if name in names_of_open:
            yield Devices(name, CLAIMED_DEVICE, product, count)
    for each in nodes.shares(open_nodes):
        yield Devices(each.node, SHARED_DEVICE, each.product, each.gpus)
    for node in open_nodes:
        name, there = node["metadata"]["name"], (node.get("status") or {}).get("allocatable") or {}
        if cores_of(node):
            yield Devices(name, "cpu", CPU_PRODUCT, cores_of(node), units.parse_quantity(there.get("memory", "0")))


def cores_of(node: Object) -> int:
    """Whole cores that a node gives to pods."""
    there = (node.get("status") or {}).get("allocatable") or {}
    return units.parse_cpu(there.get("cpu", "0")) // 1000


def _homeless(pack: GPUPack, store: Store, now: datetime) -> frozenset[str]:
    """The services whose replicas have found no room on the pack's node for too long, and whose status remembers that.

    What isn't remembered yet is soon; moved away before, a service could come back at once to where it doesn't fit.
    """
    node = pack.spec.node or pack.status.node
    return frozenset(
        service
        for service, since in _homeless_since(pack, store).items()
        if (now - since).total_seconds() >= UNFIT_SECONDS
        and node in avoided(store.get("LLMService", pack.spec.namespace, service), now)
    )


def rooms(namespace: str, service: str, store: Store, now: datetime) -> tuple[set[str], set[str], float | None]:
    """Nodes on which replicas of a service find no room, nodes on which some serve, and seconds until another one may count as the former.

    A node whose driver shows replicas another GPU than their claim's is none for them either.
    """
    unfit, serving, waits = set(), set(), []
    for pod in store.list("Pod", namespace, (labels.SERVICE, service)):
        if not podstate.is_replica(pod):
            continue
        node, since = podstate.node_of(pod), podstate.short_of_room_since(pod)
        pack = store.get("GPUPack", "", labels_of(pod).get(labels.PACK, "")) or {}
        claimed = (pack.get("spec") or {}).get("allocator") == modes.DRA
        if node is not None and claimed and strayed(store.derive(pack, pack_model), store):
            unfit.add(node)
        if node is not None and (_all_serve(pack, store) if claimed else podstate.is_ready(pod)):
            serving.add(node)
        where = (pack.get("spec") or {}).get("node") or (pack.get("status") or {}).get("node")
        if since is not None and where is not None:
            left = UNFIT_SECONDS - (now - since).total_seconds()
            waits += [left + 1] if left > 0 else []
            unfit |= {str(where)} if left <= 0 else set()
    return unfit, serving, min(waits, default=None)


def strayed(pack: GPUPack, store: Store) -> list[tuple[str, str]]:
    """Replicas of a pack with a claim that see another GPU than the claim's, each with the UUID that it sees."""
    found = [
        pod
        for pod in store.list("Pod", label=(labels.PACK, pack.metadata.name))
        if podstate.is_replica(pod) and podstate.node_of(pod) and not podstate.is_over(pod)
    ]
    claimed = dra.gpu_of(store, pack)
    return reports.strayed(found, claimed.uuid if claimed else None)


def _all_serve(pack: Object, store: Store) -> bool:
    """Whether every replica of a pack serves: while one has yet to tell which GPU it sees nothing is known of the node."""
    found = store.list("Pod", label=(labels.PACK, pack["metadata"]["name"]))
    return all(podstate.is_ready(pod) for pod in found if podstate.is_replica(pod))


def _homeless_since(pack: GPUPack, store: Store) -> dict[str, datetime]:
    """Since when replicas of the pack have found no room on the pack's node, by service.

    Where no node is the pack's yet, none has room: another pack would find none either.
    """
    waits: dict[str, datetime] = {}
    bound = pack.spec.has_holder or pack.spec.device == "cpu" or pack.status.node is not None
    if pack.spec.mode == modes.EXCLUSIVE or not bound:
        return waits
    for pod in store.by("Pod", indexes.UNPLACED, pack.metadata.name):
        since = podstate.short_of_room_since(pod)
        if since is not None:
            service = labels_of(pod).get(labels.SERVICE, "")
            waits[service] = min(since, waits.get(service, since))
    return waits


@dataclass(frozen=True)
class _Usable:
    """The nodes that the packs of some services may be on, as far as can be told without the scheduler.

    Services that ask for the same share the answer, and it is worked out when a node has changed.
    """

    selector: tuple[tuple[str, str], ...]
    tolerations: tuple[tuple[str | None, str | None, str | None, str | None], ...]

    @classmethod
    def of(cls, service: LLMService) -> _Usable:
        template = service.spec.template.spec
        return cls(
            tuple(sorted(template.node_selector.items())),
            tuple((each.key, each.operator, each.value, each.effect) for each in template.tolerations),
        )

    def __call__(self, nodes: list[Object]) -> frozenset[str]:
        return frozenset(str(node["metadata"]["name"]) for node in nodes if self._takes(node))

    def _takes(self, node: Object) -> bool:
        carried = labels_of(node)
        if any(carried.get(key) != value for key, value in self.selector):
            return False
        return all(self._tolerates(taint) for taint in (node.get("spec") or {}).get("taints") or [])

    def _tolerates(self, taint: Mapping[str, Any]) -> bool:
        if taint.get("effect") == "PreferNoSchedule":
            return True
        return any(
            effect in (None, taint.get("effect"))
            and (
                (operator == "Exists" and key in (None, "", taint["key"]))
                or (operator != "Exists" and key == taint["key"] and (value or "") == (taint.get("value") or ""))
            )
            for key, operator, value, effect in self.tolerations
        )


def _requires_affinity(service: LLMService) -> bool:
    """Whether the template's affinity rules out nodes, which only the scheduler can say."""
    affinity = service.spec.template.spec.affinity or {}
    return any(
        isinstance(each, Mapping) and each.get("requiredDuringSchedulingIgnoredDuringExecution")
        for each in affinity.values()
    )


def _sharing(choice: modes.Choice, user: int, memory: str | None) -> str:
    """What must agree for a replica to be put on a pack: the planner calls it the mode."""
    size = f" of {units.parse_quantity(memory or '0')} bytes" if choice.mode == modes.CPU_SET else ""
    return f"{choice.key}{size} as {user}"


def _ref(obj: Object) -> ServiceRef:
    return ServiceRef(obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def _conditions(obj: Object) -> list[Mapping[str, Any]]:
    return (obj.get("status") or {}).get("conditions") or []

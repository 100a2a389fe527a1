"""What must hold: at every moment, read from the nodes' journal and of who serves, and of a settled cluster, read from the API. Pure functions.

A violation is one sentence with names and numbers. `Tracker` follows the journal: no GPU has two owners, an engine only runs on a GPU
of its own pack, starts on one GPU don't overlap. `floors` says how many replicas must serve throughout. `settled` compares what the API
shows with what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos.world import INFEASIBLE, MISSING_IMAGE, annotation
from tightship.api import units
from tightship.manifests.replicas import memory_of
from tightship.sandbox.agent.hollow import journal
from tightship.sandbox.agent.hollow.journal import Entry

Object = Mapping[str, Any]
RESERVE = 0.05
"""The services' `memoryReserve`, which is the default."""


@dataclass
class Tracker:
    """What is open on the nodes' GPUs, entry by entry."""

    holders: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """By GPU, then by the holder's pod UID."""
    engines: dict[str, dict[str, Entry]] = field(default_factory=dict)
    starting: dict[str, dict[str, Entry]] = field(default_factory=dict)
    starts: int = 0
    """Engine starts that were seen so far."""

    def follow(self, entries: Iterable[Entry]) -> Iterator[str]:
        """Take entries in; yields what they violate."""
        for entry in entries:
            yield from self._take(entry)

    def _take(self, entry: Entry) -> Iterator[str]:
        gpu, uid = entry.gpu, entry.uid
        if entry.what == journal.AGENT:
            for table in (self.holders, self.engines, self.starting):
                table.clear()
        elif entry.what == journal.DOWN:
            for table in (self.holders, self.engines, self.starting):
                for open_ones in table.values():
                    for key in [key for key, other in open_ones.items() if other.node == entry.node]:
                        del open_ones[key]
        elif entry.what == journal.HOLD:
            others = [each for each in self.holders.get(gpu, {}).values() if each.uid != uid]
            strangers = [each for each in self.engines.get(gpu, {}).values() if each.pack != entry.pack]
            for other in others:
                yield f"{gpu} is taken by {entry.pod} while {other.pod} still has it"
            for other in strangers:
                yield f"{gpu} is taken by {entry.pod} while {other.pod} of another pack still runs on it"
            self.holders.setdefault(gpu, {})[uid] = entry
        elif entry.what == journal.RELEASE:
            self.holders.get(gpu, {}).pop(uid, None)
        elif entry.what == journal.START:
            self.starts += 1
            for holder in self.holders.get(gpu, {}).values():
                if holder.pack != entry.pack:
                    yield f"{entry.pod} starts on {gpu}, which {holder.pod} holds for another pack"
            for other in self.engines.get(gpu, {}).values():
                if other.pack != entry.pack:
                    yield f"{entry.pod} starts on {gpu}, where {other.pod} of another pack still runs"
            for other in self.starting.get(gpu, {}).values():
                yield f"{entry.pod} starts on {gpu} while {other.pod} is starting there"
            self.starting.setdefault(gpu, {})[uid] = entry
            self.engines.setdefault(gpu, {})[uid] = entry
        elif entry.what == journal.HEALTHY:
            self.starting.get(gpu, {}).pop(uid, None)
        elif entry.what == journal.END:
            self.starting.get(gpu, {}).pop(uid, None)
            self.engines.get(gpu, {}).pop(uid, None)


@dataclass(frozen=True)
class Seen:
    """The cluster as the API shows it, and what was asked for by namespace and name."""

    objects: Mapping[str, list[Object]]
    asked: Mapping[tuple[str, str], Object]

    def of(self, kind: str, component: str | None = None) -> list[Object]:
        """Objects of a kind; of Tightship's parts only those of a component."""
        found = self.objects.get(kind, [])
        return [o for o in found if component is None or _label(o, "app.kubernetes.io/component") == component]


def floors(
    settled: Seen, lowest: Mapping[tuple[str, str], int], faults: int, changes: int
) -> dict[tuple[str, str], int]:
    """How many replicas of each service must serve without a break, from a settled cluster on until it has settled again.

    Args:
        settled: the cluster before anything happens.
        lowest: the fewest replicas that have been asked for since then, by service.
        faults: how many faults of one GPU, or of less, happened since then.
        changes: how many other things did, of those that nobody may notice.

    Changes take one replica at a time (`rollout.maxUnavailable` is 1). A fault takes no service away that serves from another GPU too, if
    nothing else was under way.
    """
    found = {}
    for key, asked in settled.asked.items():
        there = next((each for each in settled.of("LLMService") if _key(each) == key), {})
        mine = [pod for pod in _replicas_of(settled, key) if _is(pod, "Ready")]
        if not there or _condition(there, "Ready").get("status") != "True":
            continue
        number = min(len(mine), lowest.get(key, asked["spec"]["replicas"]))
        apart = len({_label(pod, "tightship.dev/pack") for pod in mine})
        if not faults:
            found[key] = number - 1
        elif faults == 1 and not changes:
            found[key] = min(number, apart - 1)
    return {key: least for key, least in found.items() if least > 0}


def served(seen: Seen, least: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """Services of which fewer replicas serve than must."""
    for key, floor in least.items():
        serving = sum(_is(pod, "Ready") for pod in _replicas_of(seen, key))
        if serving < floor:
            yield f"{serving} replicas of {key[1]} serve, and it must be {floor} throughout"


def _replicas_of(seen: Seen, key: tuple[str, str]) -> list[Object]:
    return [
        pod
        for pod in seen.of("Pod", "replica")
        if pod["metadata"]["namespace"] == key[0] and _label(pod, "tightship.dev/service") == key[1]
    ]


def settled(seen: Seen) -> list[str]:
    """Everything that is not as it must be once nothing goes on any more."""
    return [*packs(seen), *ledgers(seen), *orphans(seen), *pods(seen), *services(seen)]


def packs(seen: Seen) -> Iterator[str]:
    """No GPU is held twice, none for nothing, and each by the one holder of its pack."""
    gpus = Counter(_gpu(pack) for pack in seen.of("GPUPack") if _gpu(pack))
    for gpu, times in gpus.items():
        if times > 1:
            yield f"{gpu} is in the status of {times} packs"
    by_uid = {pack["metadata"]["uid"]: pack for pack in seen.of("GPUPack")}
    published = Counter(annotation(dict(pod), "gpu").get("uuid") for pod in seen.of("Pod", "holder"))
    for gpu, times in published.items():
        if gpu and times > 1:
            yield f"{gpu} is published by {times} holders"
    for pod in seen.of("Pod", "holder"):
        pack = next((by_uid[uid] for uid in _owners(pod) if uid in by_uid), None)
        name = pod["metadata"]["name"]
        if pack is None:
            yield f"holder {name} holds a GPU for a pack that is gone"
        elif (uuid := annotation(dict(pod), "gpu").get("uuid")) and _gpu(pack) not in (None, uuid):
            yield f"holder {name} has {uuid}, its pack was made for {_gpu(pack)}"
    for pack in seen.of("GPUPack"):
        if not any(each["replicas"] for each in pack["spec"].get("assignments") or []):
            yield f"pack {pack['metadata']['name']} holds a GPU for nothing"


def ledgers(seen: Seen) -> Iterator[str]:
    """What is assigned, and what pods may use, stays within a pack's memory less the reserve."""
    for pack in seen.of("GPUPack"):
        memory = ((pack.get("status") or {}).get("gpu") or {}).get("memory")
        if memory is None:
            continue
        name, room = pack["metadata"]["name"], units.parse_quantity(memory) * (1 - RESERVE)
        assigned = sum(
            each["replicas"] * units.parse_quantity(each["memoryPerReplica"])
            for each in pack["spec"].get("assignments") or []
        )
        granted = sum(memory_of(pod) for pod in seen.of("Pod", "replica") if _label(pod, "tightship.dev/pack") == name)
        if assigned > room:
            yield f"pack {name}: {assigned} bytes are assigned, {room:.0f} may be"
        if granted > room:
            yield f"pack {name}: its pods may use {granted} bytes, {room:.0f} may be"


def orphans(seen: Seen) -> Iterator[str]:
    """Everything belongs to something that is there."""
    packs_there = {pack["metadata"]["name"] for pack in seen.of("GPUPack")}
    services_there = {_key(service): service["metadata"]["uid"] for service in seen.of("LLMService")}
    for kind in ("Pod", "StatefulSet", "ServiceAccount", "Role", "RoleBinding"):
        for obj in seen.of(kind):
            pack = _label(obj, "tightship.dev/pack")
            if pack and pack not in packs_there:
                yield f"{kind} {obj['metadata']['name']} is of the pack {pack}, which is gone"
    for kind in ("StatefulSet", "Service"):
        for obj in seen.of(kind):
            service = _label(obj, "tightship.dev/service")
            if not service:
                continue
            key = obj["metadata"]["namespace"], service
            if services_there.get(key) not in _owners(obj):
                yield f"{kind} {obj['metadata']['name']} is of a service {service} that is gone"
    for job in seen.of("Job"):
        yield f"Job {job['metadata']['name']} measures what is measured already"
    for pack in seen.of("GPUPack"):
        for each in pack["spec"].get("assignments") or []:
            if services_there.get((pack["spec"]["namespace"], each["service"])) != each["uid"]:
                yield f"pack {pack['metadata']['name']} is assigned to a service {each['service']} that is gone"


def pods(seen: Seen) -> Iterator[str]:
    """Nothing is on its way out, or over; each ready replica is a client of the daemon of its pack, and nobody else is, or has its
    GPU to itself.
    """
    attached = {
        _label(pod, "tightship.dev/pack"): {
            each["podUID"] for each in annotation(dict(pod), "mps").get("clients") or []
        }
        for pod in seen.of("Pod", "holder")
    }
    for component in ("holder", "replica"):
        for pod in seen.of("Pod", component):
            name = pod["metadata"]["name"]
            if pod["metadata"].get("deletionTimestamp"):
                yield f"pod {name} is still going"
            elif (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded", "Unknown"):
                yield f"pod {name} is over ({pod['status'].get('reason')}) and still there"
    alone = {pack["metadata"]["name"] for pack in seen.of("GPUPack") if pack["spec"].get("mode") == "Exclusive"}
    replicas = Counter(_label(pod, "tightship.dev/pack") for pod in seen.of("Pod", "replica"))
    for pack in alone:
        if replicas[pack] > 1:
            yield f"pack {pack} has {replicas[pack]} replicas in mode Exclusive"
    ready = {pod["metadata"]["uid"]: pod for pod in seen.of("Pod", "replica") if _is(pod, "Ready")}
    for uid, pod in ready.items():
        pack = _label(pod, "tightship.dev/pack")
        if pack not in alone and uid not in attached.get(pack, set()):
            yield f"replica {pod['metadata']['name']} is ready and no client of its pack's daemon"
    there = {pod["metadata"]["uid"] for pod in seen.of("Pod", "replica")}
    for pack, clients in attached.items():
        for uid in clients - there:
            yield f"{uid}, whose pod is gone, is still a client on pack {pack}"


def services(seen: Seen) -> Iterator[str]:
    """Each has as many ready replicas as asked, or a condition that says why not, and rightly."""
    there = {_key(service): service for service in seen.of("LLMService")}
    for key, asked in seen.asked.items():
        service = there.get(key)
        if service is None:
            yield f"service {key[1]} is gone"
            continue
        yield from _service(seen, key, asked, service)


def _service(seen: Seen, key: tuple[str, str], asked: Object, service: Object) -> Iterator[str]:
    name, wanted, status = key[1], asked["spec"]["replicas"], service.get("status") or {}
    ready = _condition(service, "Ready")
    mine = _replicas_of(seen, key)
    serving = sum(_is(pod, "Ready") for pod in mine)
    if status.get("observedGeneration") != service["metadata"]["generation"]:
        yield f"{name}: status is of generation {status.get('observedGeneration')}, not {service['metadata']['generation']}"
    elif status.get("readyReplicas", 0) != serving:
        yield f"{name}: status tells of {status.get('readyReplicas')} ready replicas, {serving} are"
    elif ready.get("status") == "True":
        if serving != wanted or len(mine) != wanted:
            yield f"{name} is Ready with {serving} ready replicas of {len(mine)}, asked for {wanted}"
    elif not _justified(seen, asked, ready):
        yield f"{name} is not Ready and has no good reason: {ready.get('reason')}: {ready.get('message')}"


def _justified(seen: Seen, asked: Object, ready: Object) -> bool:
    """Whether a service has the right to say so."""
    reason, spec = ready.get("reason"), asked["spec"]
    if spec["engine"]["image"] == MISSING_IMAGE and MISSING_IMAGE in str(ready.get("message")):
        return True
    if reason == "SLOInfeasible":
        return bool(spec["slo"]["objectives"][0]["max"] == INFEASIBLE)
    return reason == "InsufficientGPUs" and free_gpus(seen) == 0


def free_gpus(seen: Seen) -> int:
    """GPUs of nodes that take pods, which nobody holds or is about to hold."""
    free = 0
    taken = Counter(pod["spec"].get("nodeName") for pod in seen.of("Pod") if _asks_for_a_gpu(pod))
    for node in seen.of("Node"):
        if not _is(node, "Ready") or (node.get("spec") or {}).get("unschedulable"):
            continue
        there = (node.get("status") or {}).get("allocatable") or {}
        free += max(0, int(there.get("nvidia.com/gpu", 0)) - taken[node["metadata"]["name"]])
    return max(0, free - taken[None])


def _asks_for_a_gpu(pod: Object) -> bool:
    """As holders do, and replicas that share no GPU."""
    return any(
        "nvidia.com/gpu" in (each.get("resources") or {}).get("limits", {}) for each in pod["spec"]["containers"]
    )


def concerned(obj: Object) -> set[tuple[str, str]]:
    """Namespace and name of the services that an object is, or is of."""
    namespace, name = _key(obj)
    if obj["kind"] == "LLMService":
        return {(namespace, name)}
    if obj["kind"] == "GPUPack":
        return {(obj["spec"]["namespace"], each["service"]) for each in obj["spec"].get("assignments") or []}
    return {(namespace, _label(obj, "tightship.dev/service"))}


def _gpu(pack: Object) -> str | None:
    found = ((pack.get("status") or {}).get("gpu") or {}).get("uuid")
    return str(found) if found else None


def _label(obj: Object, name: str) -> str:
    return str((obj["metadata"].get("labels") or {}).get(name, ""))


def _owners(obj: Object) -> set[str]:
    return {each["uid"] for each in obj["metadata"].get("ownerReferences") or []}


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _condition(obj: Object, kind: str) -> Object:
    found = (obj.get("status") or {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind), {})


def _is(obj: Object, kind: str) -> bool:
    return bool(_condition(obj, kind).get("status") == "True" and not obj["metadata"].get("deletionTimestamp"))

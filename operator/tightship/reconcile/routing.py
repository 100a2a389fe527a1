"""Which keys to look at when an object changed.

A pure function of the change and of what the store shows. It errs on the side of too many: a look that finds nothing to
do costs little, a look that never comes leaves an object stuck until the next resync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tightship.api.v1alpha1 import conditions, labels
from tightship.kube.kinds import DRA_KINDS, OPTIONAL
from tightship.kube.store import Object, Store, labels_of, matters
from tightship.manifests.holder import MPS_CONTAINER
from tightship.reconcile import indexes, podstate
from tightship.reconcile.jobstate import end_of
from tightship.reconcile.queue import PLACEMENT, Key
from tightship.reconcile.reading import is_settled, key_hash


def keys_for(store: Store, kind: str, before: Object | None, after: Object | None) -> set[Key]:
    """The keys to look at after an object of `kind` changed from `before` to `after` (None: not there)."""
    versions = [obj for obj in (before, after) if obj is not None]
    if kind == "LLMService":
        return _service(store, before, after, versions[-1])
    if kind == "BatchProfile":
        return _profile(store, versions[-1])
    if kind == "GPUPack":
        return {_key("GPUPack", versions[-1])} | _assigned(versions) | _for_placement(_pack_input, before, after)
    if kind == "ConfigMap":
        return _lengths(store, versions[-1])
    if kind == "Node":
        return _node(store, before, after, versions[-1]) if matters(kind, before, after) else set()
    if kind in DRA_KINDS:
        return _claimable(store, kind, before, after, versions[-1])
    if kind in OPTIONAL and before is not None and after is not None and _same_but_status(before, after):
        return set()  # others write there what they see of pods, and those tell us themselves
    keys = {key for obj in versions for key in _labelled(obj)}
    if kind == "Pod" and _tries(before) != _tries(after):
        keys.add(PLACEMENT)
    if kind == "Job" and (after is None or end_of(after) is not None):
        keys |= _waiting(store)
    return keys


def _key(kind: str, obj: Object) -> Key:
    metadata = obj["metadata"]
    return Key(kind, metadata.get("namespace", ""), metadata["name"])


def _service(store: Store, before: Object | None, after: Object | None, either: Object) -> set[Key]:
    keys = {_key("LLMService", either)}
    if before is None or after is None or _asked(before) != _asked(after):
        # A measurement may have become wanted, or nobody's.
        found = store.by("BatchProfile", indexes.STATE, indexes.OPEN, either["metadata"].get("namespace", ""))
        keys |= {_key("BatchProfile", profile) for profile in found}
    return keys | _for_placement(_service_input, before, after)


def _asked(service: Object) -> tuple[object, ...]:
    metadata = service["metadata"]
    return metadata.get("generation"), metadata.get("deletionTimestamp")


def _for_placement(what: Callable[[Object], object], before: Object | None, after: Object | None) -> set[Key]:
    """A pass, where something has changed that a pass looks at."""
    return {PLACEMENT} if before is None or after is None or what(before) != what(after) else set()


def _service_input(service: Object) -> tuple[object, ...]:
    """What of a service the placement pass looks at."""
    status = service.get("status") or {}
    gates = tuple(
        (condition["type"], condition["status"])
        for condition in status.get("conditions") or ()
        if condition["type"] in (conditions.ACCEPTED, conditions.PROFILED, conditions.RECOMMENDED)
    )
    metadata = service["metadata"]
    decided = status.get("recommendation"), status.get("avoidedNodes")
    return metadata.get("generation"), metadata.get("deletionTimestamp"), decided, gates


def _pack_input(pack: Object) -> tuple[object, ...]:
    """What of a pack the placement pass looks at, and what tells of replicas without a place, whose pods it looks at."""
    status, metadata = pack.get("status") or {}, pack["metadata"]
    gates = tuple(
        (condition["type"], condition["status"], condition.get("reason"))
        for condition in status.get("conditions") or ()
        if condition["type"] in (conditions.HELD, conditions.READY)
    )
    homeless = tuple(
        (each.get("name"), each["message"])
        for each in status.get("replicas") or ()
        if str(each.get("message") or "").startswith(conditions.Reason.UNSCHEDULABLE)
    )
    marks = pack.get("spec"), metadata.get("deletionTimestamp"), metadata.get("labels")
    device = status.get("node"), status.get("gpu") is not None, (status.get("gpu") or {}).get("memory")
    return *marks, *device, gates, homeless, not status.get("readyReplicas")


def _tries(pod: Object | None) -> int:
    """How often a holder's daemon was started anew, by which the placement pass tells a GPU that is lost; 0 for other pods."""
    held = pod is not None and labels_of(pod).get(labels.COMPONENT) == labels.COMPONENT_HOLDER
    return podstate.restarts(pod, MPS_CONTAINER) if held and pod is not None else 0


def _profile(store: Store, profile: Object) -> set[Key]:
    """The profile, and the services of its namespace that use it or could."""
    own = _key("BatchProfile", profile)
    using = store.by("LLMService", indexes.PROFILE, own.name, own.namespace)
    could = store.by("LLMService", indexes.KEY, key_hash(profile), own.namespace)
    # What takes its lengths from a ConfigMap has the key that it was last seen with.
    unsure = [
        each
        for each in store.by("LLMService", indexes.KEY, "", own.namespace)
        if ((each.get("status") or {}).get("profile") or {}).get("key") == key_hash(profile)
    ]
    return {own} | {_key("LLMService", service) for service in (*using, *could, *unsure)}


def _lengths(store: Store, config_map: Object) -> set[Key]:
    """The services that take their lengths from a ConfigMap, and the measurements that would mount it."""
    namespace, name = config_map["metadata"].get("namespace", ""), config_map["metadata"]["name"]
    services = store.by("LLMService", indexes.LENGTHS, name, namespace)
    profiles = store.by("BatchProfile", indexes.LENGTHS, name, namespace)
    return {_key("LLMService", each) for each in services} | {
        _key("BatchProfile", each) for each in profiles if not is_settled(each)
    }


def _assigned(packs: Iterable[Object]) -> set[Key]:
    keys = set()
    for pack in packs:
        spec = pack.get("spec") or {}
        for assignment in spec.get("assignments") or ():
            keys.add(Key("LLMService", spec.get("namespace", ""), assignment["service"]))
    return keys


def _node(store: Store, before: Object | None, after: Object | None, node: Object) -> set[Key]:
    name = node["metadata"]["name"]
    packs = store.by("GPUPack", indexes.NODE, name)
    keys = {PLACEMENT} | {_key("GPUPack", pack) for pack in packs}
    # A node that comes may be what a waiting profile or pack needs; one that goes takes Jobs with it.
    if before is None or after is None:
        keys |= {_key("BatchProfile", profile) for profile in store.by("BatchProfile", indexes.STATE, indexes.OPEN)}
    return keys


def _claimable(store: Store, kind: str, before: Object | None, after: Object | None, either: Object) -> set[Key]:
    """A pack's claim concerns the pack; everybody's, and what the driver offers, which GPUs there are and which are free."""
    changed = matters(kind, before, after)
    keys = {PLACEMENT} if changed else set()
    if kind == "ResourceClaim":
        return keys | set(_labelled(either))
    if changed:
        # Whether services may be as they are depends on what is offered, and packs are told by it which GPU they have.
        keys |= {_key("GPUPack", pack) for pack in store.by("GPUPack", indexes.ALLOCATOR, "DRA")}
        keys |= {_key("LLMService", service) for service in store.list("LLMService")}
    return keys


def _labelled(obj: Object) -> set[Key]:
    """What an object we made belongs to, by its labels."""
    carried = labels_of(obj)
    namespace = obj["metadata"].get("namespace", "")
    keys = set()
    if labels.PACK in carried:
        keys.add(Key("GPUPack", "", carried[labels.PACK]))
    # What a holder says of its device reaches services by the pack's status.
    if labels.SERVICE in carried and carried.get(labels.COMPONENT) != labels.COMPONENT_HOLDER:
        keys.add(Key("LLMService", carried.get(labels.SERVICE_NAMESPACE, namespace), carried[labels.SERVICE]))
    if labels.PROFILE in carried:
        keys.add(Key("BatchProfile", namespace, carried[labels.PROFILE]))
    return keys


def _same_but_status(before: Object, after: Object) -> bool:
    def ours(obj: Object) -> tuple[object, ...]:
        metadata = obj["metadata"]
        marks = (metadata.get("uid"), metadata.get("deletionTimestamp"), metadata.get("ownerReferences"))
        return obj.get("spec"), labels_of(obj), marks

    return ours(before) == ours(after)


def _waiting(store: Store) -> set[Key]:
    """Profiles that wait for another's Job to end."""
    return {_key("BatchProfile", profile) for profile in store.by("BatchProfile", indexes.STATE, indexes.WAITING)}

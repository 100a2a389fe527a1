"""Which keys to look at when an object changed.

A pure function of the change and of what the store shows. It errs on the side of too many: a look that finds nothing to
do costs little, a look that never comes leaves an object stuck until the next resync.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tightship.api.v1alpha1 import conditions, labels
from tightship.core.conditions import find
from tightship.kube.kinds import DRA_KINDS, OPTIONAL
from tightship.kube.store import Object, Store, labels_of
from tightship.reconcile import dra
from tightship.reconcile.jobstate import end_of
from tightship.reconcile.queue import PLACEMENT, Key
from tightship.reconcile.verdict import is_settled


def keys_for(store: Store, kind: str, before: Object | None, after: Object | None) -> set[Key]:
    """The keys to look at after an object of `kind` changed from `before` to `after` (None: not there)."""
    versions = [obj for obj in (before, after) if obj is not None]
    if kind == "LLMService":
        return _service(store, before, after, versions[-1])
    if kind == "BatchProfile":
        return _profile(store, versions[-1])
    if kind == "GPUPack":
        return {_key("GPUPack", versions[-1]), PLACEMENT} | _assigned(versions)
    if kind == "ConfigMap":
        return _lengths(store, versions[-1])
    if kind == "Node":
        return _node(store, before, after, versions[-1]) if _node_matters(before, after) else set()
    if kind in DRA_KINDS:
        return _claimable(store, kind, before, after, versions[-1])
    if kind in OPTIONAL and before is not None and after is not None and _same_but_status(before, after):
        return set()  # others write there what they see of pods, and those tell us themselves
    keys = {key for obj in versions for key in _labelled(obj)}
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
        found = store.list("BatchProfile", either["metadata"].get("namespace", ""))
        keys |= {_key("BatchProfile", profile) for profile in found if not is_settled(profile)}
    if before is None or after is None or _placement_input(before) != _placement_input(after):
        keys.add(PLACEMENT)
    return keys


def _asked(service: Object) -> tuple[object, ...]:
    metadata = service["metadata"]
    return metadata.get("generation"), metadata.get("deletionTimestamp")


def _placement_input(service: Object) -> tuple[object, ...]:
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


def _profile(store: Store, profile: Object) -> set[Key]:
    """The profile, and the services of its namespace that use it or could."""
    own = _key("BatchProfile", profile)
    keyed = profile["spec"]["key"]["hash"]
    keys = {own}
    for service in store.list("LLMService", own.namespace):
        used = (service.get("status") or {}).get("profile") or {}
        named = (service["spec"].get("profileRef") or {}).get("name")
        if own.name in (used.get("name"), named) or used.get("key") == keyed:
            keys.add(_key("LLMService", service))
    return keys


def _lengths(store: Store, config_map: Object) -> set[Key]:
    """The services that take their lengths from a ConfigMap, and the measurements that would mount it."""
    namespace, name = config_map["metadata"].get("namespace", ""), config_map["metadata"]["name"]

    def named(where: Mapping[str, Any] | None) -> bool:
        found = ((where or {}).get("lengthsFrom") or {}).get("configMap") or {}
        return bool(found.get("name") == name)

    services = [each for each in store.list("LLMService", namespace) if named(each["spec"].get("workload"))]
    profiles = [each for each in store.list("BatchProfile", namespace) if named(each["spec"].get("measurement"))]
    waiting = {_key("BatchProfile", each) for each in profiles if not is_settled(each)}
    return {_key("LLMService", each) for each in services} | waiting


def _assigned(packs: Iterable[Object]) -> set[Key]:
    keys = set()
    for pack in packs:
        spec = pack.get("spec") or {}
        for assignment in spec.get("assignments") or ():
            keys.add(Key("LLMService", spec.get("namespace", ""), assignment["service"]))
    return keys


def _node(store: Store, before: Object | None, after: Object | None, node: Object) -> set[Key]:
    name = node["metadata"]["name"]
    packs = [pack for pack in store.list("GPUPack") if (pack.get("status") or {}).get("node") == name]
    keys = {PLACEMENT} | {_key("GPUPack", pack) for pack in packs}
    # A node that comes may be what a waiting profile or pack needs; one that goes takes Jobs with it.
    if before is None or after is None:
        keys |= {_key("BatchProfile", profile) for profile in store.list("BatchProfile") if not is_settled(profile)}
    return keys


def _claimable(store: Store, kind: str, before: Object | None, after: Object | None, either: Object) -> set[Key]:
    """A pack's claim concerns the pack; everybody's, and what the driver offers, which GPUs there are and which are free."""

    def facts(obj: Object | None) -> object:
        return None if obj is None else dra.allocated(obj) if kind == "ResourceClaim" else obj.get("spec")

    changed = facts(before) != facts(after)
    keys = {PLACEMENT} if changed else set()
    if kind == "ResourceClaim":
        return keys | set(_labelled(either))
    if changed:
        # Whether services may be as they are depends on what is offered, and packs are told by it which GPU they have.
        keys |= {_key("GPUPack", pack) for pack in store.list("GPUPack") if pack["spec"].get("allocator") == "DRA"}
        keys |= {_key("LLMService", service) for service in store.list("LLMService")}
    return keys


def _node_matters(before: Object | None, after: Object | None) -> bool:
    """Heartbeats touch every node all the time: only what scheduling depends on counts."""
    return before is None or after is None or _node_facts(before) != _node_facts(after)


def _node_facts(node: Object) -> tuple[object, ...]:
    status, spec = node.get("status") or {}, node.get("spec") or {}
    ready = [(c["type"], c["status"]) for c in status.get("conditions") or ()]
    return (
        labels_of(node),
        status.get("capacity"),
        status.get("allocatable"),
        ready,
        spec.get("unschedulable"),
        spec.get("taints"),
        node["metadata"].get("deletionTimestamp"),
    )


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
    keys = set()
    for profile in store.list("BatchProfile"):
        progressing = find(_conditions(profile), conditions.PROGRESSING)
        if progressing is not None and progressing["reason"] == conditions.Reason.WAITING:
            keys.add(_key("BatchProfile", profile))
    return keys


def _conditions(obj: Object) -> list[Mapping[str, Any]]:
    return (obj.get("status") or {}).get("conditions") or []

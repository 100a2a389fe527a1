"""By what the reconcilers find objects, beside their labels: the store keeps these indexes, so that no look goes through a whole kind.

Each index names what it answers. An object is found under what its own text says, so a change of another object never makes an index
wrong; where the answer rests on more (the lengths in a ConfigMap), the object is found under `""` by all who ask, and they look closer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.core.conditions import find
from tightship.kube.store import Indexer, Object, Store, labels_of
from tightship.reconcile import podstate
from tightship.reconcile.jobstate import end_of
from tightship.reconcile.reading import is_settled, key_hash, plain_key

KEY: Final = "key"
"""Profiles by the hash of their key; services by the hash of the key that their manifest asks for, `""` where a ConfigMap decides."""
PROFILE: Final = "profile"
"""Services by the names of the profiles they use or name."""
LENGTHS: Final = "lengths"
"""Services and profiles by the ConfigMap that has their lengths."""
STATE: Final = "state"
"""Profiles that are `OPEN` or `WAITING`, and profiling Jobs that are `OPEN`."""
ASSIGNED: Final = "assigned"
"""Packs by the UIDs of the services on them."""
NODE: Final = "node"
"""Packs by their node."""
ALLOCATOR: Final = "allocator"
"""Packs by who hands their GPU out."""
UNPLACED: Final = "unplaced"
"""Replica pods that find no node, by their pack."""

OPEN: Final = "open"
"""There is something left to measure, or to run."""
WAITING: Final = "waiting"
"""Waits for another profile's Job to end."""


def _service_key(store: Store, obj: Object) -> Iterator[str]:
    key = store.derive(obj, plain_key)
    yield key.hash if key is not None else ""


def _service_profile(store: Store, obj: Object) -> Iterator[str]:
    used, named = (obj.get("status") or {}).get("profile") or {}, (obj.get("spec") or {}).get("profileRef") or {}
    yield from {str(each["name"]) for each in (used, named) if each.get("name")}


def _service_lengths(store: Store, obj: Object) -> Iterator[str]:
    yield from _config_map((obj.get("spec") or {}).get("workload"))


def _profile_key(store: Store, obj: Object) -> Iterator[str]:
    yield key_hash(obj)


def _profile_lengths(store: Store, obj: Object) -> Iterator[str]:
    yield from _config_map(obj["spec"].get("measurement"))


def _profile_state(store: Store, obj: Object) -> Iterator[str]:
    if not is_settled(obj):
        yield OPEN
    progressing = find((obj.get("status") or {}).get("conditions") or (), names.PROGRESSING)
    if progressing is not None and progressing.get("reason") == Reason.WAITING:
        yield WAITING


def _job_state(store: Store, obj: Object) -> Iterator[str]:
    if labels_of(obj).get(labels.COMPONENT) == labels.COMPONENT_PROFILER and end_of(obj) is None:
        yield OPEN


def _assigned(store: Store, obj: Object) -> Iterator[str]:
    yield from {str(each["uid"]) for each in (obj.get("spec") or {}).get("assignments") or () if each.get("uid")}


def _node(store: Store, obj: Object) -> Iterator[str]:
    named = ((obj.get("spec") or {}).get("node"), (obj.get("status") or {}).get("node"))
    yield from {str(name) for name in named if name}


def _allocator(store: Store, obj: Object) -> Iterator[str]:
    yield str((obj.get("spec") or {}).get("allocator") or "DevicePlugin")


def _unplaced(store: Store, obj: Object) -> Iterator[str]:
    if podstate.is_replica(obj) and podstate.is_unschedulable(obj):
        yield labels_of(obj).get(labels.PACK, "")


def _config_map(where: Mapping[str, object] | None) -> Iterator[str]:
    source = (where or {}).get("lengthsFrom")
    found = source.get("configMap") if isinstance(source, Mapping) else None
    if isinstance(found, Mapping) and found.get("name"):
        yield str(found["name"])


INDEXERS: Final[Mapping[str, Mapping[str, Indexer]]] = {
    "LLMService": {KEY: _service_key, PROFILE: _service_profile, LENGTHS: _service_lengths},
    "BatchProfile": {KEY: _profile_key, LENGTHS: _profile_lengths, STATE: _profile_state},
    "GPUPack": {ASSIGNED: _assigned, NODE: _node, ALLOCATOR: _allocator},
    "Job": {STATE: _job_state},
    "Pod": {UNPLACED: _unplaced},
}
"""What an operator's store is made with."""

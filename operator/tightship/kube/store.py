"""The watch cache: what the operator knows of the cluster, newest first, readable without asking anybody.

Fed from three sides: a listing at the start and at every resync (`replace`), watch events (`observe`, `forget`), and the
answers to the operator's own writes (`observe` again), so that a reconciler that looks right after a write sees it,
though watches lag. What must always hold:

- of one object the store shows the newest version it was ever given: an older one that arrives late changes nothing;
- an object seen deleted doesn't come back by a late answer to a write (its UID is remembered for a while); one that only lost
  the label it is watched by comes back, with a later version, when it carries the label again;
- what a listing doesn't contain is gone, unless it was written after the listing began;
- a look-up costs what it finds, however large the cluster is: by name, by `INDEXED_LABELS`, or by an index that the owner of the
  store gives (`indexers`); what is worked out of one version of an object (`derive`), or of all of a kind (`summarise`), is worked out once.

Resource versions are compared as integers, which Kubernetes has always used and promises since 1.35; a version that
isn't a number is taken as newer. Objects handed out are the store's own: read them, never change them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from tightship.api.v1alpha1 import labels
from tightship.kube.kinds import Ref

Object = Mapping[str, Any]
T = TypeVar("T")

#: Labels that get an index, so that a look-up by them never scans.
INDEXED_LABELS = (labels.SERVICE, labels.PACK, labels.PROFILE, labels.PROFILE_KEY, labels.NODE_GPU_PRODUCT)

_TOMBSTONES = 4096
_SHARED_LENGTH = 80
_Name = tuple[str, str]  # namespace and name


OnChange = Callable[[str, "Object | None", "Object | None"], None]
Indexer = Callable[["Store", Object], Iterable[str]]
"""The values under which an object is found. It may read the object alone (`derive` included): it is called once for each version."""


class Store:
    """Objects by kind, namespace and name, with indexes on `INDEXED_LABELS`. For one event loop, without locks.

    `on_change` is called with (kind, before, after) at every change, whoever brought the news; None stands for "not
    there". `indexers` are more indexes: by kind, the name of an index and what gives an object's values in it.
    """

    def __init__(
        self, on_change: OnChange | None = None, indexers: Mapping[str, Mapping[str, Indexer]] | None = None
    ) -> None:
        self._on_change = on_change or (lambda kind, before, after: None)
        self._indexers = indexers or {}
        self._objects: dict[str, dict[_Name, Object]] = defaultdict(dict)
        self._index: dict[tuple[str, str, str], set[_Name]] = defaultdict(set)
        self._entries: dict[tuple[str, _Name], list[tuple[str, str, str]]] = {}
        self._derived: dict[tuple[str, _Name], dict[Any, tuple[tuple[Any, ...], Any]]] = {}
        self._summaries: dict[str, tuple[int, dict[Any, Any]]] = {}
        self._joint: dict[Any, tuple[tuple[int, ...], Any]] = {}
        self._versions: dict[str, int] = defaultdict(int)
        self._gone: OrderedDict[str, int | None] = OrderedDict()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None. `namespace` is "" for cluster-scoped kinds. Returned objects are read-only."""
        return self._objects[kind].get((namespace, name))

    def find(self, ref: Ref) -> Object | None:
        """The object that `ref` names, or None."""
        return self.get(ref.kind, ref.namespace, ref.name)

    def by(self, kind: str, index: str, value: str, namespace: str | None = None) -> list[Object]:
        """The objects that an index (a label, or one of `indexers`) has under a value, sorted by namespace and name.

        Raises LookupError when there is no such index.
        """
        if index not in INDEXED_LABELS and index not in self._indexers.get(kind, ()):
            raise LookupError(f"{kind} has no index {index}: the store was made without it")
        found, objects = self._index.get((kind, index, value)), self._objects[kind]
        if not found:
            return []
        return [objects[key] for key in sorted(found) if namespace is None or key[0] == namespace]

    def derive(self, obj: Object, what: Callable[[Object], T]) -> T:
        """`what(obj)`, worked out once as long as this very version is shown. The result is shared: read it, never change it."""
        return self.derive_with(obj, what, (), lambda: what(obj))

    def derive_with(self, obj: Object, what: Any, others: tuple[Any, ...], work: Callable[[], T]) -> T:
        """`work()`, once as long as this very version is shown and `others` (what else it rests on) are the same objects.

        `what` tells the results about one object apart.
        """
        place = (obj["kind"], (obj["metadata"].get("namespace", ""), obj["metadata"]["name"]))
        if self._objects[place[0]].get(place[1]) is not obj:
            return work()
        known = self._derived.setdefault(place, {})
        last = known.get(what)
        if last is None or len(last[0]) != len(others) or any(a is not b for a, b in zip(last[0], others, strict=True)):
            last = known[what] = (others, work())
        found: T = last[1]
        return found

    def summarise(self, kind: str, what: Callable[[list[Object]], T]) -> T:
        """`what` of all objects of a kind, worked out once as long as none of them changed in a way that matters (see `matters`)."""
        version, known = self._summaries.get(kind, (-1, {}))
        if version != self._versions[kind]:
            version, known = self._summaries[kind] = self._versions[kind], {}
        if what not in known:
            known[what] = what(self.list(kind))
        found: T = known[what]
        return found

    def summarise_all(self, kinds: tuple[str, ...], what: Callable[[Store], T]) -> T:
        """`what` of the store, which reads objects of these kinds alone, worked out once as long as none of them changed (see `matters`)."""
        versions, last = tuple(self._versions[kind] for kind in kinds), self._joint.get(what)
        if last is None or last[0] != versions:
            last = self._joint[what] = (versions, what(self))
        found: T = last[1]
        return found

    def list(self, kind: str, namespace: str | None = None, label: tuple[str, str] | None = None) -> list[Object]:
        """All objects of a kind, sorted by namespace and name.

        `namespace` None means everywhere. `label` is a (key, value) pair; a key of `INDEXED_LABELS` is looked up, any
        other is compared object by object.
        """
        objects = self._objects[kind]
        if label is not None and label[0] in INDEXED_LABELS:
            return self.by(kind, *label, namespace)
        listed = [objects[key] for key in sorted(objects) if namespace is None or key[0] == namespace]
        return listed if label is None else [obj for obj in listed if labels_of(obj).get(label[0]) == label[1]]

    def observe(self, obj: Object) -> bool:
        """Take in a version of an object. Returns whether it was news (newer than what is shown, and not deleted)."""
        ref = Ref.of(obj)
        uid = obj["metadata"].get("uid", "")
        if not self._may_be_back(uid, obj):
            return False
        shown = self.find(ref)
        if shown is not None and not _newer(obj, shown):
            return False
        self._drop(ref)
        self._show(ref, obj)
        if matters(ref.kind, shown, obj):
            self._versions[ref.kind] += 1
        self._on_change(ref.kind, shown, obj)
        return True

    def forget(self, obj: Object, at: str | None = None) -> bool:
        """Take in that an object is gone. Returns whether it was shown until now.

        Another object of the same name (a newer UID) stays. `at` is the resource version at which it is known to be gone from what
        is watched; without it the object is deleted for good.
        """
        ref = Ref.of(obj)
        uid = obj["metadata"].get("uid", "")
        if uid:
            self._gone[uid] = None if at is None else _number(at)
            while len(self._gone) > _TOMBSTONES:
                self._gone.popitem(last=False)
        shown = self.find(ref)
        if shown is None or shown["metadata"].get("uid", "") != uid:
            return False
        self._drop(ref)
        self._versions[ref.kind] += 1
        self._on_change(ref.kind, shown, None)
        return True

    def replace(self, kind: str, listed: Iterable[Object], resource_version: str) -> None:
        """Take in a whole listing of a kind, made at `resource_version`."""
        present = set()
        for obj in listed:
            present.add(obj["metadata"].get("uid", ""))
            self.observe(obj)
        for obj in self.list(kind):
            if obj["metadata"].get("uid", "") not in present and not _later(obj, resource_version):
                self.forget(obj, resource_version)

    def _may_be_back(self, uid: str, obj: Object) -> bool:
        if uid not in self._gone:
            return True
        gone, version = self._gone[uid], _number(obj["metadata"].get("resourceVersion", ""))
        if gone is None or version is None or version <= gone:
            return False
        del self._gone[uid]
        return True

    def _show(self, ref: Ref, obj: Object) -> None:
        key = (ref.namespace, ref.name)
        self._objects[ref.kind][key] = obj
        carried = labels_of(obj)
        entries = [(ref.kind, label, carried[label]) for label in INDEXED_LABELS if label in carried]
        for index, values in self._indexers.get(ref.kind, {}).items():
            entries += [(ref.kind, index, value) for value in values(self, obj)]
        for entry in entries:
            self._index[entry].add(key)
        self._entries[ref.kind, key] = entries

    def _drop(self, ref: Ref) -> None:
        key = (ref.namespace, ref.name)
        if self._objects[ref.kind].pop(key, None) is None:
            return
        self._derived.pop((ref.kind, key), None)
        for entry in self._entries.pop((ref.kind, key), ()):
            self._index[entry].discard(key)
            if not self._index[entry]:
                del self._index[entry]


def matters(kind: str, before: Object | None, after: Object | None) -> bool:
    """Whether anybody's decision about the cluster can depend on what changed.

    Heartbeats touch every node all the time, and say nothing else; of a claim it counts whose it is and what it has.
    """
    facts = _FACTS.get(kind)
    return facts is None or before is None or after is None or facts(before) != facts(after)


def _node_facts(node: Object) -> tuple[object, ...]:
    status, spec = node.get("status") or {}, node.get("spec") or {}
    ready = [(each["type"], each["status"]) for each in status.get("conditions") or ()]
    return (
        labels_of(node),
        status.get("capacity"),
        status.get("allocatable"),
        ready,
        spec.get("unschedulable"),
        spec.get("taints"),
        node["metadata"].get("deletionTimestamp"),
    )


def _claim_facts(claim: Object) -> tuple[object, ...]:
    return labels_of(claim), (claim.get("status") or {}).get("allocation")


def _spec_facts(obj: Object) -> tuple[object, ...]:
    return (obj.get("spec"),)


_FACTS: Mapping[str, Callable[[Object], tuple[object, ...]]] = {
    "Node": _node_facts,
    "ResourceClaim": _claim_facts,
    "ResourceSlice": _spec_facts,
    "DeviceClass": _spec_facts,
}


def lean(obj: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that is cheap to keep: without `managedFields`, which nobody here reads and which are half of many an object, and with
    its strings shared with those of all others, which halves the rest (a pod of a pack: 34 KB as parsed, 18 KB).
    """
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    shared: dict[str, Any] = _shared({**obj, "metadata": metadata})
    return shared


def _shared(value: Any) -> Any:
    if isinstance(value, str):
        # longer ones are messages, which hardly repeat
        return sys.intern(value) if len(value) <= _SHARED_LENGTH else value
    if isinstance(value, Mapping):
        return {sys.intern(key): _shared(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shared(each) for each in value]
    return value


def labels_of(obj: Object) -> Mapping[str, str]:
    """The labels of an object; empty when it has none."""
    return obj["metadata"].get("labels") or {}


def _number(version: str) -> int | None:
    return int(version) if version.isdigit() else None


def _newer(candidate: Object, shown: Object) -> bool:
    new = _number(candidate["metadata"].get("resourceVersion", ""))
    old = _number(shown["metadata"].get("resourceVersion", ""))
    return new is None or old is None or new > old


def _later(obj: Object, resource_version: str) -> bool:
    own, listing = _number(obj["metadata"].get("resourceVersion", "")), _number(resource_version)
    return own is not None and listing is not None and own > listing

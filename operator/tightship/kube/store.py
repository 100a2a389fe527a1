"""The watch cache: what the operator knows of the cluster, newest first, readable without asking anybody.

Fed from three sides: a listing at the start and at every resync (`replace`), watch events (`observe`, `forget`), and the
answers to the operator's own writes (`observe` again), so that a reconciler that looks right after a write sees it,
though watches lag. What must always hold:

- of one object the store shows the newest version it was ever given: an older one that arrives late changes nothing;
- an object seen deleted doesn't come back by a late answer to a write (its UID is remembered for a while); one that only lost
  the label it is watched by comes back, with a later version, when it carries the label again;
- what a listing doesn't contain is gone, unless it was written after the listing began.

Resource versions are compared as integers, which Kubernetes has always used and promises since 1.35; a version that
isn't a number is taken as newer. Objects handed out are the store's own: read them, never change them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tightship.api.v1alpha1 import labels
from tightship.kube.kinds import Ref

Object = Mapping[str, Any]

#: Labels that get an index, so that a look-up by them never scans.
INDEXED_LABELS = (labels.SERVICE, labels.PACK, labels.PROFILE, labels.PROFILE_KEY)

_TOMBSTONES = 4096


OnChange = Callable[[str, "Object | None", "Object | None"], None]


class Store:
    """Objects by kind, namespace and name, with indexes on `INDEXED_LABELS`. For one event loop, without locks.

    `on_change` is called with (kind, before, after) at every change, whoever brought the news; None stands for "not
    there".
    """

    def __init__(self, on_change: OnChange | None = None) -> None:
        self._on_change = on_change or (lambda kind, before, after: None)
        self._objects: dict[str, dict[tuple[str, str], Object]] = defaultdict(dict)
        self._labels: dict[tuple[str, str, str], set[tuple[str, str]]] = defaultdict(set)
        self._gone: OrderedDict[str, int | None] = OrderedDict()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None. `namespace` is "" for cluster-scoped kinds. Returned objects are read-only."""
        return self._objects[kind].get((namespace, name))

    def find(self, ref: Ref) -> Object | None:
        """The object that `ref` names, or None."""
        return self.get(ref.kind, ref.namespace, ref.name)

    def list(self, kind: str, namespace: str | None = None, label: tuple[str, str] | None = None) -> list[Object]:
        """All objects of a kind, sorted by namespace and name.

        `namespace` None means everywhere. `label` is a (key, value) pair; a key of `INDEXED_LABELS` is looked up, any
        other is compared object by object.
        """
        objects = self._objects[kind]
        if label is not None and label[0] in INDEXED_LABELS:
            found: Iterable[tuple[str, str]] = self._labels.get((kind, *label), ())
        else:
            found = objects
        keys = sorted(key for key in found if namespace is None or key[0] == namespace)
        listed = [objects[key] for key in keys]
        if label is not None and label[0] not in INDEXED_LABELS:
            listed = [obj for obj in listed if labels_of(obj).get(label[0]) == label[1]]
        return listed

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
        key = (ref.namespace, ref.name)
        self._objects[ref.kind][key] = obj
        for index in self._indexes(ref.kind, obj):
            self._labels[index].add(key)
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

    def _drop(self, ref: Ref) -> None:
        key = (ref.namespace, ref.name)
        shown = self._objects[ref.kind].pop(key, None)
        if shown is None:
            return
        for index in self._indexes(ref.kind, shown):
            self._labels[index].discard(key)
            if not self._labels[index]:
                del self._labels[index]

    @staticmethod
    def _indexes(kind: str, obj: Object) -> Iterable[tuple[str, str, str]]:
        carried = labels_of(obj)
        return [(kind, key, carried[key]) for key in INDEXED_LABELS if key in carried]


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

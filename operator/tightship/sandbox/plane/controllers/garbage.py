"""Garbage collection by owner references, and the end of namespaces.

An object whose owners are all gone goes too. Background deletion waits for the owner's end; foreground deletion keeps the
owner until its blocking dependents are gone; orphaning takes the owner out of its dependents first.
"""

from __future__ import annotations

from tightship.sandbox.plane.api import Api, DeleteOptions
from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key
from tightship.sandbox.plane.errors import ApiError, Obj
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import key_of

_Place = tuple[Storage, Key]
_EVENTS: Storage = ("", "events")


class Garbage(Controller):
    """Collects what has lost its owners. Its keys are ("", UID)."""

    name = "generic-garbage-collector"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._live: dict[str, _Place] = {}
        self._dependents: dict[str, set[str]] = {}

    def watches(self) -> dict[Storage, Mapper]:
        """Every change of every kind keeps the graph; few of them lead to work."""
        return {("*", "*"): self._note}

    def _note(self, change: Change) -> list[Key]:
        meta = change.object["metadata"]
        uid = meta["uid"]
        owners = [reference["uid"] for reference in meta.get("ownerReferences") or []]
        if change.type == "DELETED":
            self._live.pop(uid, None)
            for owner in owners:
                self._dependents.get(owner, set()).discard(uid)
            # Its dependents may be orphans now, and its owners may have waited for it.
            return [("", entry) for entry in [*self._dependents.pop(uid, set()), *owners]]
        self._live[uid] = (change.storage, key_of(change.object))
        for owner in owners:
            self._dependents.setdefault(owner, set()).add(uid)
        waits = {"foregroundDeletion", "orphan"} & set(meta.get("finalizers") or [])
        return [("", uid)] if owners or waits else []

    def reconcile(self, key: Key) -> float | None:
        """Looks at one object."""
        uid = key[1]
        obj = self._get(uid)
        if obj is None:
            return None
        meta = obj["metadata"]
        finalizers = meta.get("finalizers") or []
        if meta.get("deletionTimestamp"):
            if "orphan" in finalizers:
                self._orphan(uid, obj)
            elif "foregroundDeletion" in finalizers:
                self._foreground(uid, obj)
            return None
        references = meta.get("ownerReferences") or []
        alive = [reference for reference in references if self._owner_lives(reference, meta.get("namespace") or "")]
        if not references or len(alive) == len(references):
            return None
        if not alive:
            self._delete(uid, obj, "Background")
        else:
            self._keep_owners(uid, obj, {reference["uid"] for reference in alive})
        return None

    def _get(self, uid: str) -> Obj | None:
        place = self._live.get(uid)
        return None if place is None else self.api.store.get(place[0], *place[1])

    def _owner_lives(self, reference: Obj, namespace: str) -> bool:
        place = self._live.get(reference["uid"])
        if place is None:
            return False
        owner = self._get(reference["uid"])
        same_place = place[1][0] in ("", namespace)
        return owner is not None and same_place and owner["kind"] == reference["kind"]

    def _delete(self, uid: str, obj: Obj, policy: str) -> None:
        resource = self.api.registry.stored_as(self._live[uid][0])
        if resource is not None:
            self.api.delete(resource, *key_of(obj), DeleteOptions(policy=policy, uid=uid))

    def _change(self, uid: str, obj: Obj, names: str, kept: list[object]) -> None:
        resource = self.api.registry.stored_as(self._live[uid][0])
        if resource is None:
            return

        def change(target: Obj) -> None:
            target["metadata"][names] = kept
            if not kept:
                del target["metadata"][names]

        self.api.modify(resource, *key_of(obj), change, self.options)

    def _keep_owners(self, uid: str, obj: Obj, kept: set[str]) -> None:
        references = obj["metadata"].get("ownerReferences") or []
        self._change(uid, obj, "ownerReferences", [entry for entry in references if entry["uid"] in kept])

    def _drop_finalizer(self, uid: str, obj: Obj, name: str) -> None:
        finalizers = obj["metadata"].get("finalizers") or []
        self._change(uid, obj, "finalizers", [entry for entry in finalizers if entry != name])

    def _orphan(self, uid: str, obj: Obj) -> None:
        for dependent in list(self._dependents.get(uid, ())):
            child = self._get(dependent)
            if child is not None:
                references = child["metadata"].get("ownerReferences") or []
                self._keep_owners(dependent, child, {entry["uid"] for entry in references} - {uid})
        self._dependents.pop(uid, None)
        self._drop_finalizer(uid, obj, "orphan")

    def _foreground(self, uid: str, obj: Obj) -> None:
        blocking = False
        for dependent in list(self._dependents.get(uid, ())):
            child = self._get(dependent)
            if child is None:
                continue
            meta = child["metadata"]
            reference = next((entry for entry in meta.get("ownerReferences") or [] if entry["uid"] == uid), None)
            if reference is None:
                continue
            if not meta.get("deletionTimestamp"):
                self._delete(dependent, child, "Foreground")
            still = self._get(dependent) is not None
            blocking = blocking or (still and bool(reference.get("blockOwnerDeletion")))
        if not blocking and (fresh := self._get(uid)) is not None:
            self._drop_finalizer(uid, fresh, "foregroundDeletion")


class Namespaces(Controller):
    """Empties namespaces that are being deleted, and lets them go."""

    name = "namespace-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """Namespaces, and the leaving of what is in them."""

        def leaving(change: Change) -> list[Key]:
            namespace = change.object["metadata"].get("namespace")
            return [("", namespace)] if change.type == "DELETED" and namespace else []

        return {("", "namespaces"): own_key, ("*", "*"): leaving}

    def reconcile(self, key: Key) -> float | None:
        """Deletes what is left in a namespace that ends."""
        namespace = self.find("", "namespaces", key)
        if namespace is None or not namespace["metadata"].get("deletionTimestamp"):
            return None
        left = 0
        for storage in list(self.api.store.storages()):
            resource = self.api.registry.stored_as(storage)
            if resource is None or not resource.namespaced:
                continue
            for obj in self.api.store.all(storage, key[1]):
                if not obj["metadata"].get("deletionTimestamp"):
                    try:
                        self.api.delete(resource, *key_of(obj), DeleteOptions(policy="Background"))
                    except ApiError as error:
                        if error.code != 404:
                            raise
                left += self.api.store.get(storage, *key_of(obj)) is not None
        if left:
            return 5.0

        def finalize(target: Obj) -> None:
            target["spec"]["finalizers"] = []

        self.modify("", "namespaces", namespace, finalize)
        return None

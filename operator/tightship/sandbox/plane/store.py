"""The objects, their versions, and who is told about changes.

One counter gives every write its ``resourceVersion``. Objects in the store are never changed in place, so readers need no
copies. Every write is appended to a bounded history, from which watches resume; a watch from before the history's
beginning gets 410 (Expired), as from a compacted etcd.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tightship.sandbox.plane.errors import Obj, expired
from tightship.sandbox.plane.values import key_of

Storage = tuple[str, str]
Key = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """One write: ``type`` is ADDED, MODIFIED or DELETED; ``old`` is the object before it."""

    version: int
    type: str
    storage: Storage
    object: Obj
    old: Obj | None


Listener = Callable[[Change], None]


class Store:
    """All objects of the plane, in memory.

    Args:
        history: how many writes a watch may lag behind before it must list again.
    """

    def __init__(self, history: int = 20_000) -> None:
        self.version = 1
        self._objects: dict[Storage, dict[Key, Obj]] = {}
        self._history: deque[Change] = deque(maxlen=history)
        self._compacted = 0
        self._listeners: dict[Storage, list[Listener]] = {}
        self._everything: list[Listener] = []

    def get(self, storage: Storage, namespace: str, name: str) -> Obj | None:
        """The stored object (not to be changed), or None."""
        return self._objects.get(storage, {}).get((namespace, name))

    def all(self, storage: Storage, namespace: str = "") -> list[Obj]:
        """All objects of a kind in the order of (namespace, name), of one namespace when given."""
        objects = self._objects.get(storage, {})
        return [objects[key] for key in sorted(objects) if not namespace or key[0] == namespace]

    def storages(self) -> Iterator[Storage]:
        """Every storage that holds objects."""
        return iter([storage for storage, objects in self._objects.items() if objects])

    def put(self, storage: Storage, obj: Obj) -> Obj:
        """Stores an object under the next version; the object belongs to the store from then on."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        objects = self._objects.setdefault(storage, {})
        old = objects.get(key_of(obj))
        objects[key_of(obj)] = obj
        self._tell(Change(self.version, "MODIFIED" if old else "ADDED", storage, obj, old))
        return obj

    def remove(self, storage: Storage, obj: Obj) -> Obj:
        """Removes an object; returns its last state, with the version of the removal."""
        old = self._objects[storage].pop(key_of(obj))
        self.version += 1
        last = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        self._tell(Change(self.version, "DELETED", storage, last, old))
        return last

    def _tell(self, change: Change) -> None:
        if len(self._history) == self._history.maxlen:
            self._compacted = self._history[0].version
        self._history.append(change)
        for listener in [*self._listeners.get(change.storage, ()), *self._everything]:
            listener(change)

    def since(self, storage: Storage, version: int) -> list[Change]:
        """The changes after ``version``. Raises ApiError 410 where history has forgotten some of them."""
        if version < self._compacted:
            raise expired(f"too old resource version: {version} ({self._compacted})")
        return [change for change in self._history if change.version > version and change.storage == storage]

    def compact(self) -> None:
        """Forgets the history: older watches must list again."""
        self._history.clear()
        self._compacted = self.version

    def subscribe(self, storage: Storage | None, listener: Listener) -> Callable[[], None]:
        """Calls ``listener`` on every change of a kind (of any, for None), until the returned function is called."""
        listeners = self._everything if storage is None else self._listeners.setdefault(storage, [])
        listeners.append(listener)

        def unsubscribe() -> None:
            if listener in listeners:
                listeners.remove(listener)

        return unsubscribe

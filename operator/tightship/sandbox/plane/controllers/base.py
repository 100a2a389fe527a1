"""How controllers run: keys in one queue, one reconcile at a time.

A controller says which changes concern which keys, and reconciles a key as a plain function of the store. Since every
call of the API is synchronous, a reconcile sees one consistent state and needs no cache. Failures are tried again with a
growing delay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from tightship.sandbox.plane.api import Api, DeleteOptions, Options
from tightship.sandbox.plane.errors import ApiError, Obj
from tightship.sandbox.plane.registry import Resource
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import controller_of, key_of, random_suffix, stamp

log = logging.getLogger(__name__)

Mapper = Callable[[Change], Iterable[Key]]
_MAX_DELAY = 30.0


class Controller:
    """One control loop. Subclasses set ``name`` and ``watches``, and implement ``reconcile``."""

    name = "controller"

    def __init__(self, api: Api) -> None:
        self.api = api
        self.options = Options(manager=self.name)
        self.status_options = Options(manager=self.name, subresource="status")

    def watches(self) -> dict[Storage, Mapper]:
        """Which changes of a kind concern which keys."""
        raise NotImplementedError

    def reconcile(self, key: Key) -> float | None:
        """Brings one key in order; returns after how many seconds to look again, if at all."""
        raise NotImplementedError

    # What controllers share

    def resource(self, group: str, plural: str) -> Resource:
        """A built-in resource."""
        return self.api.registry.get(group, plural)

    def find(self, group: str, plural: str, key: Key) -> Obj | None:
        """A stored object, not to be changed."""
        return self.api.store.get((group, plural), *key)

    def all(self, group: str, plural: str, namespace: str = "") -> list[Obj]:
        """All stored objects of a kind, not to be changed."""
        return self.api.store.all((group, plural), namespace)

    def pods_of(self, owner: Obj) -> list[Obj]:
        """The pods that an object controls."""
        uid = owner["metadata"]["uid"]
        pods = self.all("", "pods", owner["metadata"]["namespace"])
        return [pod for pod in pods if (controller_of(pod) or {}).get("uid") == uid]

    def create(self, group: str, plural: str, obj: Obj) -> Obj:
        """Creates an object."""
        return self.api.create(self.resource(group, plural), obj["metadata"].get("namespace", ""), obj, self.options)

    def modify(self, group: str, plural: str, obj: Obj, change: Callable[[Obj], None]) -> Obj:
        """Changes an object through its main endpoint."""
        return self.api.modify(self.resource(group, plural), *key_of(obj), change, self.options)

    def set_status(self, group: str, plural: str, obj: Obj, change: Callable[[Obj], None]) -> Obj:
        """Changes an object's status; ``change`` gets the status."""
        return self.api.modify(
            self.resource(group, plural),
            *key_of(obj),
            lambda target: change(target.setdefault("status", {})),
            self.status_options,
        )

    def delete(self, group: str, plural: str, obj: Obj, options: DeleteOptions | None = None) -> None:
        """Deletes an object if it is still there."""
        if self.find(group, plural, key_of(obj)) is not None:
            self.api.delete(self.resource(group, plural), *key_of(obj), options or DeleteOptions(policy="Background"))

    def event(self, about: Obj, kind: str, reason: str, message: str) -> None:
        """Reports an event; one that repeats is counted up."""
        record(self.api, about, kind, reason, message, component=self.name)


def record(api: Api, about: Obj, kind: str, reason: str, message: str, *, component: str) -> None:
    """Creates an Event about an object, or counts up the same event."""
    resource = api.registry.get("", "events")
    meta = about["metadata"]
    namespace = meta.get("namespace") or "default"
    if api.store.get(("", "namespaces"), "", namespace) is None:
        return
    for old in api.store.all(("", "events"), namespace):
        involved = old.get("involvedObject") or {}
        same = involved.get("uid") == meta["uid"] and old.get("reason") == reason and old.get("message") == message
        if same:

            def count(event: Obj) -> None:
                event["count"] = (event.get("count") or 1) + 1
                event["lastTimestamp"] = stamp()

            api.modify(resource, namespace, old["metadata"]["name"], count, Options(component))
            return
    body = {
        "metadata": {"name": f"{meta['name']}.{random_suffix(16)}", "namespace": namespace},
        "involvedObject": {
            "kind": about["kind"],
            "apiVersion": about["apiVersion"],
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
            **({"namespace": meta["namespace"]} if meta.get("namespace") else {}),
        },
        "reason": reason,
        "message": message,
        "type": kind,
        "count": 1,
        "firstTimestamp": stamp(),
        "lastTimestamp": stamp(),
        "source": {"component": component},
        "reportingComponent": component,
    }
    try:
        api.create(resource, namespace, body, Options(component))
    except ApiError as error:
        # A namespace that is going away takes no more events.
        log.info("event %s about %s was refused: %s", reason, meta["name"], error)


def own_key(change: Change) -> list[Key]:
    """The changed object's own key."""
    return [key_of(change.object)]


def owner_key(kind: str) -> Mapper:
    """The key of the controlling owner of a kind, before and after the change."""

    def keys(change: Change) -> list[Key]:
        found = []
        for obj in filter(None, (change.object, change.old)):
            owner = controller_of(obj)
            if owner and owner["kind"] == kind:
                found.append((obj["metadata"].get("namespace") or "", owner["name"]))
        return found

    return keys


class Manager:
    """Runs controllers over one queue, in one task."""

    def __init__(self, controllers: list[Controller]) -> None:
        self._controllers = controllers
        self._queue: asyncio.Queue[tuple[Controller, Key]] = asyncio.Queue()
        self._waiting: set[tuple[int, Key]] = set()
        self._failures: dict[tuple[int, Key], int] = {}
        self._timers: dict[tuple[int, Key], asyncio.TimerHandle] = {}
        self._ends: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins with every object there is."""
        for controller in self._controllers:
            for storage, mapper in controller.watches().items():
                self._subscribe(controller, storage, mapper)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def _subscribe(self, controller: Controller, storage: Storage, mapper: Mapper) -> None:
        store = controller.api.store

        def changed(change: Change) -> None:
            for key in mapper(change):
                self._add(controller, key)

        everything = storage == ("*", "*")
        self._ends.append(store.subscribe(None if everything else storage, changed))
        for kind in list(store.storages()) if everything else [storage]:
            for obj in store.all(kind):
                changed(Change(store.version, "ADDED", kind, obj, None))

    def _add(self, controller: Controller, key: Key) -> None:
        if (id(controller), key) not in self._waiting:
            self._waiting.add((id(controller), key))
            self._queue.put_nowait((controller, key))

    def _add_later(self, controller: Controller, key: Key, delay: float) -> None:
        mark = (id(controller), key)
        loop = asyncio.get_running_loop()
        timer = self._timers.get(mark)
        if timer is not None and not timer.cancelled() and loop.time() < timer.when() <= loop.time() + delay:
            return
        if timer is not None:
            timer.cancel()

        def due() -> None:
            self._timers.pop(mark, None)
            self._add(controller, key)

        self._timers[mark] = loop.call_later(max(0.01, delay), due)

    async def _run(self) -> None:
        while True:
            controller, key = await self._queue.get()
            mark = (id(controller), key)
            self._waiting.discard(mark)
            try:
                delay = controller.reconcile(key)
                self._failures.pop(mark, None)
            except ApiError as error:
                log.info("%s %s: %s", controller.name, key, error)
                delay = self._failed(mark)
            except Exception:
                log.exception("%s failed on %s", controller.name, key)
                delay = self._failed(mark)
            if delay is not None:
                self._add_later(controller, key, delay)
            # Requests get their turn between two reconciles.
            await asyncio.sleep(0)

    def _failed(self, mark: tuple[int, Key]) -> float:
        self._failures[mark] = self._failures.get(mark, 0) + 1
        return float(min(_MAX_DELAY, 0.05 * 2 ** self._failures[mark]))

    async def stop(self) -> None:
        """Ends the task and forgets all timers."""
        for end in self._ends:
            end()
        for timer in self._timers.values():
            timer.cancel()
        self._ends, self._timers = [], {}
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

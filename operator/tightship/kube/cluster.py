"""The operator's hands: every write and every uncached read goes through `Cluster`.

Ideas: objects are applied server-side as whole desired objects under one field manager, status under another (one
manager for both makes Kubernetes 1.20 bump the object for ever), and an object of the wanted name that isn't ours is
never applied over. What must always hold:

- `apply` of the same desired object twice in a row sends nothing the second time, as long as the watch cache still
  shows what the first one left behind; any doubt (a restart, a field that somebody else changed) is settled by asking
  the server, where an apply that changes nothing is no event;
- no apply touches an object unless it is controlled by the owner that the desired object names or, when it names none,
  carries our managed-by label: else `NameConflict`;
- the answer to a write is put into the watch cache before the caller sees it;
- every request is reported to `on_request` (verb, kind, HTTP status or 0 when none came, seconds).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tightship.api.v1alpha1 import labels
from tightship.kube.clock import Clock, SystemClock
from tightship.kube.deadline import Deadline
from tightship.kube.errors import NameConflict, NotFound, NotServed, OutlivedOwner, Unreachable, from_response
from tightship.kube.kinds import KINDS, WATCHED, WATCHED_BY_LABEL, Kind, Ref
from tightship.kube.store import Object, Store, labels_of, lean

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

_METHODS = {
    "get": "GET",
    "list": "GET",
    "create": "POST",
    "dryrun": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "apply": "PATCH",
    "delete": "DELETE",
}
_READS = frozenset({"get", "list", "dryrun"})
_PAGE = 500
_REMEMBERED = 20_000
#: Seconds for which an applied object of a kind that isn't watched is taken to be still there.
_TRUST_UNWATCHED = 240.0


class Transport(Protocol):
    """Sends one request to the API server."""

    async def request(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, dict[str, Any]]:
        """Returns the HTTP status and the decoded JSON body ({} when there is none).

        Raises `Unreachable` when no answer comes; a failure status is returned, not raised.
        """

    async def close(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True)
class Listing:
    """The objects of one listing and the resource version it was made at."""

    items: list[dict[str, Any]]
    resource_version: str


@dataclass(frozen=True)
class _Applied:
    """What an apply sent and what came of it, as digests: enough to tell later whether it still holds."""

    desired: str
    uid: str
    outcome: str
    at: float


class Cluster:
    """Reads and writes of Kubernetes objects as plain dicts.

    All methods raise the exceptions of `tightship.kube.errors`; `Unreachable`, `Unavailable` and `Forbidden` can come
    from each of them and are not repeated below.
    """

    def __init__(
        self,
        transport: Transport,
        store: Store,
        *,
        on_request: Callable[[str, str, int, float], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._transport = transport
        self._store = store
        self._on_request = on_request or (lambda verb, kind, status, seconds: None)
        self._clock = clock or SystemClock()
        self._guard: Callable[[], float | None] = lambda: None
        self._applied: OrderedDict[tuple[Ref, str], _Applied] = OrderedDict()

    def guard_writes(self, check: Callable[[], float]) -> None:
        """Have `check` called right before each write but those of Leases; what it raises, the write raises instead of being sent.

        It returns the seconds that are left to send it and to be answered. A write that hasn't been by then is given up, wherever it waits
        (for credentials, a connection, an answer): also when the whole process stood still meanwhile, since the event loop ends what
        is overdue before it lets anything go on.
        """
        self._guard = check

    async def apply(self, obj: Object) -> dict[str, Any]:
        """Create or update `obj` by server-side apply (manager `tightship`, forced), and return what the server has.

        `obj` is the whole of what we want: a field left out since the last apply is removed. When the object names a
        controller in its ownerReferences, an existing one must be controlled by the same UID; when it names none, an
        existing one must carry `app.kubernetes.io/managed-by: tightship`.

        Raises `NameConflict` (not ours), `OutlivedOwner` (an earlier owner's, about to be collected), `Conflict`
        (somebody took the name, or it was deleted, at the same moment; the next look tells), `Invalid`,
        `NamespaceTerminating`.
        """
        ref = Ref.of(obj)
        if ref.kind not in WATCHED and self._recently_applied(ref, obj):
            return dict(obj)
        shown = self._store.find(ref) or await self._find(ref)
        if shown is None:
            # Unforced: should somebody take the name between the look and the write, their fields aren't taken over.
            return await self._apply(ref, obj, "", labels.FIELD_MANAGER, force=False)
        check_ours(obj, shown)
        if ref.kind in WATCHED and self._still_holds(ref, "", obj, shown):
            return dict(shown)
        return await self._apply(ref, _with_uid(obj, shown), "", labels.FIELD_MANAGER, force=True)

    async def apply_status(self, obj: Object) -> dict[str, Any]:
        """Apply `{apiVersion, kind, metadata{name, namespace}, status}` to the status (manager `tightship-status`).

        `status` is everything that the operator owns of it: what is left out is removed. When `metadata.uid` is given,
        an object of another UID raises `Conflict`. Raises `NotFound`, `Conflict`, `Invalid`.
        """
        ref = Ref.of(obj)
        shown = self._store.find(ref)
        if shown is not None and self._still_holds(ref, "status", obj, shown):
            return dict(shown)
        return await self._apply(ref, obj, "status", labels.STATUS_FIELD_MANAGER, force=True)

    def status_age(self, obj: Object) -> float | None:
        """Seconds since this process wrote the status of this very object; None where it never has."""
        last = self._applied.get((Ref.of(obj), "status"))
        if last is None or last.uid != obj["metadata"].get("uid", ""):
            return None
        return self._clock.monotonic() - last.at

    async def create(self, obj: Object) -> dict[str, Any]:
        """POST `obj`. Raises `AlreadyExists`, `Invalid`, `NamespaceTerminating`."""
        ref = Ref.of(obj)
        path = KINDS[ref.kind].path(ref.namespace)
        query = {"fieldManager": labels.FIELD_MANAGER}
        return self._seen(await self._send("create", ref, path, query=query, body=obj))

    async def dry_run(self, obj: Object) -> None:
        """Ask whether `obj` could be created: the server does everything but store it.

        Raises what `create` raises. `AlreadyExists` comes only after admission has let the object pass.
        """
        ref = Ref.of(obj)
        query = {"fieldManager": labels.FIELD_MANAGER, "dryRun": "All"}
        await self._send("dryrun", ref, KINDS[ref.kind].path(ref.namespace), query=query, body=obj)

    async def replace(self, obj: Object) -> dict[str, Any]:
        """PUT the whole of `obj`, which must carry `metadata.resourceVersion`. Raises `Conflict`, `NotFound`."""
        ref = Ref.of(obj)
        if not obj["metadata"].get("resourceVersion"):
            raise ValueError(f"replacing {ref} needs the resourceVersion it was read at")
        query = {"fieldManager": labels.FIELD_MANAGER}
        return self._seen(await self._send("update", ref, _path(ref), query=query, body=obj))

    async def merge_patch(self, ref: Ref, patch: Mapping[str, Any], *, subresource: str = "") -> dict[str, Any]:
        """JSON merge patch. Put `metadata.resourceVersion` or `metadata.uid` in it to make it conditional.

        Raises `NotFound`, `Conflict`, `Invalid`.
        """
        query = {"fieldManager": labels.FIELD_MANAGER}
        path = _path(ref, subresource)
        return self._seen(await self._send("patch", ref, path, query=query, body=patch, content_type=MERGE))

    async def delete(
        self, ref: Ref, *, uid: str | None = None, grace_seconds: int | None = None, propagation: str = "Background"
    ) -> None:
        """Delete the object. One that is gone already is success.

        `uid`: delete only that very object (`Conflict` when another one has the name now). `grace_seconds`: for pods,
        how long they may take. `propagation`: Background, Foreground or Orphan.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        shown = self._store.find(ref)
        try:
            answer = await self._send("delete", ref, _path(ref), body=options)
        except NotFound:
            answer = {"kind": "Status"}
        self._forget_applied(ref)
        if answer.get("kind") == ref.kind:
            self._seen(answer)  # it goes in its own time: the answer carries its deletionTimestamp
        elif shown is not None and uid in (None, shown["metadata"].get("uid")) and not _has_finalizers(shown):
            self._store.forget(shown)

    async def get(self, ref: Ref) -> dict[str, Any]:
        """Read the object from the server, past the cache. Raises `NotFound`."""
        return self._seen(await self._send("get", ref, _path(ref)))

    async def list(
        self, kind: str, namespace: str | None = None, *, selector: str = "", fields: str = "", limit: int | None = None
    ) -> Listing:
        """List from the server, past the cache, page by page.

        `namespace` None means everywhere. `selector` is a label selector, `fields` a field selector. `limit` stops after
        the first page of that many.
        """
        resource = KINDS[kind]
        query = {"limit": str(limit or _PAGE)}
        query |= {key: value for key, value in (("labelSelector", selector), ("fieldSelector", fields)) if value}
        items: list[dict[str, Any]] = []
        while True:
            ref = Ref(kind, namespace or "", "")
            page = await self._send("list", ref, resource.path(namespace or ""), query=query)
            items += [lean(_typed(item, resource)) for item in page.get("items") or ()]
            metadata = page.get("metadata") or {}
            if limit is not None or not metadata.get("continue"):
                return Listing(items, str(metadata.get("resourceVersion", "")))
            query["continue"] = metadata["continue"]

    async def serves(self, kind: str) -> bool:
        """Whether the server has a kind at all, in the version that we use, by its discovery document."""
        resource = KINDS[kind]
        root = "/apis/" if resource.group else "/api/"
        try:
            found = await self._send("get", Ref(kind, "", ""), root + resource.api_version)
        except (NotFound, NotServed):
            return False
        return any(each.get("name") == resource.plural for each in found.get("resources") or ())

    async def close(self) -> None:
        """Let go of connections."""
        await self._transport.close()

    async def _find(self, ref: Ref) -> Object | None:
        try:
            return await self.get(ref)
        except NotFound:
            return None

    async def _apply(self, ref: Ref, obj: Object, subresource: str, manager: str, *, force: bool) -> dict[str, Any]:
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        self._applied.pop((ref, subresource), None)
        answer = await self._send("apply", ref, _path(ref, subresource), query=query, body=obj, content_type=APPLY)
        self._applied[(ref, subresource)] = _Applied(
            _fingerprint(obj),
            answer["metadata"].get("uid", ""),
            _digest(_outcome(obj, answer)),
            self._clock.monotonic(),
        )
        while len(self._applied) > _REMEMBERED:
            self._applied.popitem(last=False)
        return self._seen(answer)

    def _still_holds(self, ref: Ref, subresource: str, obj: Object, shown: Object) -> bool:
        last = self._applied.get((ref, subresource))
        return (
            last is not None
            and last.uid == shown["metadata"].get("uid", "")
            and last.desired == _fingerprint(obj)
            and last.outcome == _digest(_outcome(obj, shown))
        )

    def _recently_applied(self, ref: Ref, obj: Object) -> bool:
        last = self._applied.get((ref, ""))
        age = self._clock.monotonic() - last.at if last else _TRUST_UNWATCHED
        return last is not None and age < _TRUST_UNWATCHED and last.desired == _fingerprint(obj)

    def _forget_applied(self, ref: Ref) -> None:
        for subresource in ("", "status"):
            self._applied.pop((ref, subresource), None)

    def _seen(self, answer: dict[str, Any]) -> dict[str, Any]:
        if answer.get("kind") in WATCHED and _is_watched(answer):
            self._store.observe(lean(answer))
        return answer

    async def _send(
        self,
        verb: str,
        ref: Ref,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = JSON,
    ) -> dict[str, Any]:
        left = self._guard() if verb not in _READS and ref.kind != "Lease" else None
        started = self._clock.monotonic()
        status = 0
        try:
            async with Deadline(left):
                status, answer = await self._transport.request(_METHODS[verb], path, query or {}, body, content_type)
        except asyncio.TimeoutError:
            raise Unreachable(f"{verb} {ref}: no answer within the {left:.1f} s that the lease allowed") from None
        finally:
            self._on_request(verb, ref.kind, status, self._clock.monotonic() - started)
        if status >= 300:
            raise from_response(f"{verb} {ref}", status, answer)
        return _typed(answer, KINDS[ref.kind]) if ref.name and "metadata" in answer else answer


def check_ours(desired: Object, live: Object) -> None:
    """Check that `live` may be written as `desired`: the same controller, or without one our managed-by label.

    Raises `NameConflict` when it is somebody else's, `OutlivedOwner` when it belongs to an earlier object of the owner's
    kind and name, which the garbage collector is about to remove.
    """
    ref = Ref.of(live)
    wanted, actual = controller_of(desired), controller_of(live)
    if wanted is None and actual is None and labels_of(live).get(labels.MANAGED_BY) == labels.PRODUCT:
        return
    if wanted is not None and actual is not None:
        if wanted["uid"] == actual["uid"]:
            return
        if (wanted["kind"], wanted["name"]) == (actual["kind"], actual["name"]):
            raise OutlivedOwner(f"{ref} still belongs to an earlier {actual['kind']} {actual['name']}, which is gone")
    owner = f"{actual['kind']} {actual['name']}" if actual else ""
    raise NameConflict(ref.kind, ref.namespace, ref.name, owner)


def controller_of(obj: Object) -> Mapping[str, Any] | None:
    """The ownerReference of an object's controller, or None."""
    for reference in obj["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            found: Mapping[str, Any] = reference
            return found
    return None


def owner_reference(owner: Object) -> dict[str, Any]:
    """The ownerReference that makes `owner` the controller; it doesn't block the owner's deletion."""
    metadata = owner["metadata"]
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _path(ref: Ref, subresource: str = "") -> str:
    return KINDS[ref.kind].path(ref.namespace, ref.name, subresource)


def _typed(obj: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """List items and some answers come without their type."""
    if obj.get("kind") != "Status":
        obj.setdefault("apiVersion", kind.api_version)
        obj.setdefault("kind", kind.name)
    return obj


def _is_watched(obj: Object) -> bool:
    if obj["kind"] == "ConfigMap":
        return labels.LENGTHS in labels_of(obj)
    return obj["kind"] not in WATCHED_BY_LABEL or labels_of(obj).get(labels.PART_OF) == labels.PRODUCT


def _has_finalizers(obj: Object) -> bool:
    return bool(obj["metadata"].get("finalizers"))


def _with_uid(obj: Object, shown: Object) -> dict[str, Any]:
    """`obj`, conditional on the object shown: one made anew by somebody else isn't taken over."""
    return {**obj, "metadata": {**obj["metadata"], "uid": shown["metadata"]["uid"]}}


def _fingerprint(obj: Object) -> str:
    metadata = {key: value for key, value in obj["metadata"].items() if key != "uid"}
    return _digest({**obj, "metadata": metadata})


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _outcome(desired: Any, live: Any) -> Any:
    """The part of `live` that `desired` speaks of, as the server has it (its defaults and spellings); lists whole."""
    if isinstance(desired, Mapping) and isinstance(live, Mapping):
        return {key: _outcome(value, live.get(key)) for key, value in desired.items() if key != "uid"}
    return live

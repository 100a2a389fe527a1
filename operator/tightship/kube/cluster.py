"""The operator's hands: every write and every uncached read goes through `Cluster`.

Ideas: objects are applied server-side as whole desired objects under one field manager, status under another (one
manager for both makes Kubernetes 1.20 bump the object for ever), and an object of the wanted name that isn't ours is
never applied over. What must always hold:

- `apply` of the same desired object twice in a row sends nothing the second time, as long as the watch cache still
  shows what the first one left behind; any doubt (a restart, a field that somebody else changed) is settled by asking
  the server, where an apply that changes nothing is no event;
- no write touches an object unless it is controlled by the owner that the desired object names or, when it names none,
  carries our managed-by label: else `NameConflict`;
- the answer to a write is put into the watch cache before the caller sees it;
- every request is reported to `on_request` (verb, kind, HTTP status or 0 when none came, seconds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tightship.kube.kinds import Ref
from tightship.kube.store import Object, Store

OBJECT_MANAGER = "tightship"
STATUS_MANAGER = "tightship-status"


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
class Capabilities:
    """Which group versions the API serves, e.g. `"policy/v1" in capabilities`; and the server's version string."""

    group_versions: frozenset[str] = frozenset()
    version: str = ""

    def __contains__(self, group_version: object) -> bool:
        return group_version in self.group_versions


@dataclass(frozen=True)
class Listing:
    """The objects of one listing and the resource version it was made at."""

    items: list[dict[str, Any]]
    resource_version: str


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
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        raise NotImplementedError

    async def apply(self, obj: Object) -> dict[str, Any]:
        """Create or update `obj` by server-side apply (manager `tightship`, forced), and return what the server has.

        `obj` is the whole of what we want: a field left out since the last apply is removed. When the object names a
        controller in its ownerReferences, an existing one must be controlled by the same UID; when it names none, an
        existing one must carry `app.kubernetes.io/managed-by: tightship`.

        Raises `NameConflict` (not ours), `Conflict` (somebody took the name at the same moment; the next look tells),
        `Invalid`, `NamespaceTerminating`.
        """
        raise NotImplementedError

    async def apply_status(self, obj: Object) -> dict[str, Any]:
        """Apply `{apiVersion, kind, metadata{name, namespace}, status}` to the status (manager `tightship-status`).

        `status` is everything that the operator owns of it: what is left out is removed. When `metadata.uid` is given,
        an object of another UID raises `Conflict`. Raises `NotFound`, `Conflict`, `Invalid`.
        """
        raise NotImplementedError

    async def create(self, obj: Object) -> dict[str, Any]:
        """POST `obj`. Raises `AlreadyExists`, `Invalid`, `NamespaceTerminating`."""
        raise NotImplementedError

    async def replace(self, obj: Object) -> dict[str, Any]:
        """PUT the whole of `obj`, which must carry `metadata.resourceVersion`. Raises `Conflict`, `NotFound`."""
        raise NotImplementedError

    async def merge_patch(self, ref: Ref, patch: Mapping[str, Any], *, subresource: str = "") -> dict[str, Any]:
        """JSON merge patch. Put `metadata.resourceVersion` or `metadata.uid` in it to make it conditional.

        Raises `NotFound`, `Conflict`, `Invalid`.
        """
        raise NotImplementedError

    async def delete(
        self, ref: Ref, *, uid: str | None = None, grace_seconds: int | None = None, propagation: str = "Background"
    ) -> None:
        """Delete the object. One that is gone already is success.

        `uid`: delete only that very object (`Conflict` when another one has the name now). `grace_seconds`: for pods,
        how long they may take. `propagation`: Background, Foreground or Orphan.
        """
        raise NotImplementedError

    async def get(self, ref: Ref) -> dict[str, Any]:
        """Read the object from the server, past the cache. Raises `NotFound`."""
        raise NotImplementedError

    async def list(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        """List from the server, past the cache, page by page. `labels`, `fields`: selectors. None: everywhere."""
        raise NotImplementedError

    async def capabilities(self) -> Capabilities:
        """Ask which API groups and versions the server serves."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of connections."""
        raise NotImplementedError

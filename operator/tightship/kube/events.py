"""Events (core v1): what happened, said once, after it is true.

An event is emitted when a condition turned (its status or its reason changed), and only after the status that says so was
written: an event without its status would be a lie, and a status repeated is no news. Events are best effort: one that
can't be written is logged, never an error of the reconcile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightship.kube.cluster import Cluster
from tightship.kube.store import Object


class Events:
    """Writes events for objects."""

    async def emit(self, obj: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """Write one event about `obj`. `reason` is CamelCase; the message is cut at 1024 characters."""
        raise NotImplementedError

    async def report(self, cluster: Cluster, obj: Object, status: Mapping[str, Any]) -> bool:
        """See `Context.report`."""
        raise NotImplementedError

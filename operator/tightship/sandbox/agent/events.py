"""Events about pods and nodes, aggregated: the same event again only counts up."""

from __future__ import annotations

import asyncio
import datetime
import logging
import uuid
from dataclasses import dataclass

import aiohttp

from tightship.sandbox.agent.api import Api, ApiError, Object

log = logging.getLogger(__name__)


def now() -> str:
    """Now in RFC 3339, whole seconds, as API objects carry times."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Event:
    """One event of `kind` Normal or Warning about an object with kind and metadata; `field`: the part it is about."""

    host: str
    about: Object
    kind: str
    reason: str
    message: str
    field: str = ""


class Recorder:
    """Writes events in the background, in order; an event that cannot be written is dropped with a line in the log."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: asyncio.Queue[Event] = asyncio.Queue(1000)
        self._known: dict[tuple[str, ...], Object] = {}

    def emit(self, event: Event) -> None:
        """Record an event."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("event dropped: %s %s", event.reason, event.message)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            entry = await self._queue.get()
            try:
                await self._write(entry)
            except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                log.info("event %s not written: %s", entry.reason, error)

    async def _write(self, event: Event) -> None:
        metadata = event.about["metadata"]
        namespace = metadata.get("namespace") or "default"
        path = f"/api/v1/namespaces/{namespace}/events"
        key = (str(metadata.get("uid")), event.kind, event.reason, event.message, event.field)
        known = self._known.get(key)
        if known is not None:
            count = int(known["count"]) + 1
            try:
                patch = {"count": count, "lastTimestamp": now()}
                self._known[key] = await self._api.merge(f"{path}/{known['metadata']['name']}", patch)
                return
            except ApiError as error:
                if error.status != 404:
                    raise
        involved = {
            "apiVersion": "v1",
            "kind": event.about["kind"],
            "name": metadata["name"],
            "uid": metadata.get("uid", ""),
        }
        if "namespace" in metadata:
            involved["namespace"] = namespace
        if event.field:
            involved["fieldPath"] = event.field
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": involved,
            "type": event.kind,
            "reason": event.reason,
            "message": event.message[:1024],
            "source": {"component": "kubelet", "host": event.host},
            "count": 1,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
        }
        self._known[key] = await self._api.create(path, body)
        if len(self._known) > 5000:
            self._known.pop(next(iter(self._known)))

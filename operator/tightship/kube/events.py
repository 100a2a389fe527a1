"""Events (core v1): what happened, said once, after it is true.

An event is emitted when a condition turned (its status or its reason changed), and only after the status that says so
was written: an event without its status would be a lie, and a status repeated is no news. Events are best effort: one
that can't be written is logged, never an error of the reconcile. The same words about the same object within ten minutes
raise the count of the first event instead of making another, so that a flapping condition doesn't flood a namespace.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api.v1alpha1 import conditions as names
from tightship.core.conditions import find, timestamp, transitions
from tightship.kube.clock import Clock
from tightship.kube.cluster import Cluster
from tightship.kube.errors import Conflict, KubeError, NotFound
from tightship.kube.kinds import Ref
from tightship.kube.store import Object

log = logging.getLogger(__name__)

_MESSAGE_LIMIT = 1024
_SERIES_SECONDS = 600.0
_SERIES_REMEMBERED = 1000

#: Conditions that only repeat what another one says.
_SILENT = frozenset({names.RECONCILING, names.STALLED})
#: Conditions that are bad news when True.
_NEGATIVE = frozenset({names.FAILED, names.STALLED, names.PROFILE_STALE})
#: Reasons of a False condition that are nothing to warn about: "not yet", or the good news of another condition.
_QUIET = frozenset(
    {
        names.Reason.WAITING,
        names.Reason.MEASURING,
        names.Reason.AWAITING_APPROVAL,
        names.Reason.NOT_YET_KNOWN,
        names.Reason.PROGRESSING,
        names.Reason.WAITING_FOR_START_SLOT,
        names.Reason.REPLICAS_STARTING,
        names.Reason.NOT_ASSIGNED,
        names.Reason.COMPLETED,
        names.Reason.IMPORTED,
        names.Reason.BUDGET_EXCEEDED,
    }
)
#: The same, but only until the condition has been True once: a start isn't a loss.
_QUIET_AT_FIRST = frozenset({names.Reason.TOO_FEW_REPLICAS})
#: Reasons that are worth a warning also while things still go on.
_LOUD = frozenset({names.Reason.UNSCHEDULABLE, names.Reason.IMAGE_PULL_FAILED, names.Reason.NAME_CONFLICT})


@dataclass(frozen=True)
class Turn:
    """One event to tell: `reason` (CamelCase), `message`, and whether it is a Warning."""

    reason: str
    message: str
    warning: bool


def turns(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """What is worth an event when conditions `old` became `new`.

    A condition counts when its status or reason changed and it is known now. `Ready` counts only when it comes or goes: its
    reason repeats that of the gate that failed. What several conditions say in the same words is told once.
    """
    old = list(old)
    told: dict[tuple[str, str], Turn] = {}
    for condition in transitions(old, new):
        kind, status, reason = condition["type"], condition["status"], condition["reason"]
        was = find(old, kind) or {}
        if status == "Unknown" or kind in _SILENT:
            continue
        if kind == names.READY and "True" not in (status, was.get("status")):
            continue
        if kind in _NEGATIVE and status == "False" and not was:
            continue
        quiet = _QUIET if was.get("status") == "True" else _QUIET | _QUIET_AT_FIRST
        bad = status == "True" if kind in _NEGATIVE else status == "False" and reason not in quiet
        message = condition.get("message", "")
        known = told.get((reason, message))
        told[reason, message] = Turn(reason, message, (bad or reason in _LOUD) or (known is not None and known.warning))
    return list(told.values())


class Events:
    """Writes events, and statuses together with the events they call for."""

    def __init__(self, cluster: Cluster, clock: Clock, *, instance: str | None = None) -> None:
        self._cluster = cluster
        self._clock = clock
        self._instance = instance or socket.gethostname()
        self._sequence = itertools.count()
        self._series: OrderedDict[tuple[str, str, str], tuple[Ref, int, float]] = OrderedDict()

    async def report(self, obj: Object, status: Mapping[str, Any]) -> bool:
        """Write `status` of `obj` once, then the events for conditions that turned. See `Context.report`."""
        metadata = obj["metadata"]
        identity = {key: metadata[key] for key in ("name", "namespace", "uid") if metadata.get(key)}
        body = {"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": identity, "status": status}
        try:
            answer = await self._cluster.apply_status(body)
        except (NotFound, Conflict):
            return False
        written: bool = answer["metadata"].get("resourceVersion") != metadata.get("resourceVersion")
        if written:
            old = (obj.get("status") or {}).get("conditions") or ()
            told = turns(old, status.get("conditions") or ())
            await asyncio.gather(*(self.emit(obj, each.reason, each.message, warning=each.warning) for each in told))
        return written

    async def emit(self, obj: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """Write one event about `obj`. `reason` is CamelCase; the message is cut at 1024 characters."""
        message = message if len(message) <= _MESSAGE_LIMIT else message[: _MESSAGE_LIMIT - 3] + "..."
        try:
            if not await self._repeat(obj, reason, message):
                await self._first(obj, reason, message, "Warning" if warning else "Normal")
        except KubeError as error:
            log.warning("event %s about %s was not written: %s", reason, Ref.of(obj), error)

    async def _first(self, obj: Object, reason: str, message: str, severity: str) -> None:
        metadata, ref = obj["metadata"], Ref.of(obj)
        now = self._clock.now()
        # Events about cluster-scoped objects live in namespace default, where kubectl describe looks for them.
        namespace = ref.namespace or "default"
        # Those of one report are written at the same moment.
        name = f"{ref.name[:200]}.{int(now.timestamp() * 1e9) + next(self._sequence) & (2**64 - 1):016x}"
        involved = {"apiVersion": obj["apiVersion"], "kind": ref.kind, "name": ref.name, "uid": metadata.get("uid", "")}
        if ref.namespace:
            involved["namespace"] = ref.namespace
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "type": severity,
            "source": {"component": "tightship"},
            "reportingComponent": "tightship.dev/operator",
            "reportingInstance": self._instance,
            "firstTimestamp": timestamp(now),
            "lastTimestamp": timestamp(now),
            "count": 1,
        }
        await self._cluster.create(event)
        self._series[(metadata.get("uid", ""), reason, message)] = (
            Ref("Event", namespace, name),
            1,
            self._clock.monotonic(),
        )
        while len(self._series) > _SERIES_REMEMBERED:
            self._series.popitem(last=False)

    async def _repeat(self, obj: Object, reason: str, message: str) -> bool:
        """Raise the count of an event that said the same a short while ago. Returns whether there was one."""
        key = (obj["metadata"].get("uid", ""), reason, message)
        known = self._series.pop(key, None)
        if known is None or self._clock.monotonic() - known[2] > _SERIES_SECONDS:
            return False
        ref, count, _ = known
        try:
            patch = {"count": count + 1, "lastTimestamp": timestamp(self._clock.now())}
            await self._cluster.merge_patch(ref, patch)
        except NotFound:
            return False
        self._series[key] = (ref, count + 1, self._clock.monotonic())
        return True

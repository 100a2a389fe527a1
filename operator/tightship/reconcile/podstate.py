"""What a pod says about itself, in one reason and one sentence. Pure functions over the pod object.

The kubelet tells the same trouble in several places (conditions, waiting reasons, last terminations); the first that
explains it is taken, and the container's own last words are quoted, because they are what a person needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.core.conditions import find, is_true
from tightship.kube.clock import parse_timestamp
from tightship.kube.store import labels_of

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "ContainerCannotRun"}
_OWN_WORDS = re.compile(r"^([A-Z][A-Za-z]+):\s*(.*)$", re.DOTALL)
_OWN_REASONS = {
    Reason.GPU_NOT_VISIBLE,
    Reason.GPU_MISMATCH,
    Reason.MPS_NOT_ATTACHED,
    Reason.MPS_FAULT,
    Reason.HOLDER_LOST,
    Reason.INSUFFICIENT_MEMORY,
    Reason.ENGINE_HUNG,
}
_ROOM = re.compile(r"Insufficient |Too many pods")
_APART = "topology spread constraints"  # the scheduler: "2 node(s) didn't match pod topology spread constraints"
_QUOTE_HEAD, _QUOTE_TAIL = 300, 500


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not run: a reason of the conditions' vocabulary, and a message."""

    reason: str
    message: str


def is_replica(pod: Mapping[str, Any]) -> bool:
    """Whether it serves a model, by its labels."""
    return labels_of(pod).get(labels.COMPONENT) == labels.COMPONENT_REPLICA


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod serves (a pod that is going does not)."""
    return not is_going(pod) and is_true(_conditions(pod), "Ready")


def is_going(pod: Mapping[str, Any]) -> bool:
    """Whether the pod is being deleted."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_over(pod: Mapping[str, Any]) -> bool:
    """Whether the pod has ended for good (evicted, refused by the kubelet, run to its end)."""
    return (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")


def is_running(pod: Mapping[str, Any], container: str) -> bool:
    """Whether one container of the pod runs now."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return any(each["name"] == container and "running" in (each.get("state") or {}) for each in statuses)


def has_run(pod: Mapping[str, Any], container: str) -> bool:
    """Whether one container of the pod runs, or ever ran."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    states = [
        (each.get("state") or {}) | (each.get("lastState") or {}) for each in statuses if each["name"] == container
    ]
    return any("running" in state or "terminated" in state for state in states)


def running_since(pod: Mapping[str, Any], container: str) -> datetime | None:
    """Since when one container of the pod has been running; None where it isn't, or isn't said."""
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        started = ((each.get("state") or {}).get("running") or {}).get("startedAt")
        if each["name"] == container and started:
            return parse_timestamp(started)
    return None


def restarts(pod: Mapping[str, Any], container: str) -> int:
    """How often one container of the pod was started anew."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((int(each.get("restartCount") or 0) for each in statuses if each["name"] == container), 0)


def node_of(pod: Mapping[str, Any]) -> str | None:
    """The node the scheduler chose."""
    node = pod["spec"].get("nodeName")
    return str(node) if node else None


def ready_since(pod: Mapping[str, Any]) -> datetime | None:
    """Since when it has been ready; None while it isn't."""
    return _since(pod, "Ready", "True")


def is_unschedulable(pod: Mapping[str, Any]) -> bool:
    """Whether the scheduler found no node for it."""
    condition = find(_conditions(pod), "PodScheduled")
    return not is_going(pod) and condition is not None and condition.get("reason") == "Unschedulable"


def short_of_room_since(pod: Mapping[str, Any]) -> datetime | None:
    """Since when its node has been short of something the pod requests; None where it isn't.

    Other causes (a claim that doesn't exist, say) would follow the pod to any node, so they don't count.
    """
    condition = find(_conditions(pod), "PodScheduled")
    if condition is None or not is_unschedulable(pod):
        return None
    if not _ROOM.search(condition.get("message") or ""):
        return None
    return _since(pod, "PodScheduled", "False")


def is_kept_apart(pod: Mapping[str, Any]) -> bool:
    """Whether it finds no node because of its topology spread, on some nodes at the least."""
    condition = find(_conditions(pod), "PodScheduled")
    return condition is not None and is_unschedulable(pod) and _APART in (condition.get("message") or "")


def moves(pod: Mapping[str, Any]) -> bool:
    """Whether a replica is leaving or starting, so that memory of its GPU changes hands. One in trouble holds nobody up."""
    return is_going(pod) or not (is_ready(pod) or trouble(pod) is not None)


def trouble(pod: Mapping[str, Any]) -> Trouble | None:
    """What keeps the pod from running; None where nothing does (it is ready, starting, or going)."""
    if is_going(pod) or is_ready(pod):
        return None
    return next(_troubles(pod), None)


def _troubles(pod: Mapping[str, Any]) -> Iterator[Trouble]:
    status = pod.get("status") or {}
    scheduled = find(_conditions(pod), "PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        yield Trouble(Reason.UNSCHEDULABLE, f"cannot be scheduled: {scheduled.get('message', 'no message')}")
    if is_over(pod):
        said = ": ".join(text for text in (status.get("reason"), status.get("message")) if text)
        yield Trouble(Reason.CRASH_LOOP, f"ended as {status['phase']}{': ' + said if said else ''}")
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        yield from _container_troubles(container)


def _container_troubles(container: Mapping[str, Any]) -> Iterator[Trouble]:
    name, state = container["name"], container.get("state") or {}
    waiting, terminated = state.get("waiting") or {}, state.get("terminated") or {}
    reason = waiting.get("reason", "")
    if reason in _IMAGE:
        text = waiting.get("message") or reason
        yield Trouble(Reason.IMAGE_PULL_FAILED, f"image {container.get('image')}: {text}")
    if reason in _CONFIG:
        yield Trouble(Reason.CRASH_LOOP, f"container {name}: {reason}: {waiting.get('message', '')}".rstrip(": "))
    last = terminated or (container.get("lastState") or {}).get("terminated") or {}
    # What ended well is no trouble (init containers do); a container that runs again is judged by how it ended last.
    if last and (last.get("exitCode") or last.get("reason") == "OOMKilled"):
        yield _ended(name, last, int(container.get("restartCount") or 0))


def _ended(name: str, last: Mapping[str, Any], restarts: int) -> Trouble:
    words = str(last.get("message") or "").strip()
    own = _OWN_WORDS.match(words)
    if last.get("reason") == "OOMKilled":
        text = f"container {name} was killed for want of memory (restart {restarts})"
        return Trouble(Reason.OOM_KILLED, text + (f": {_quote(words)}" if words else ""))
    if own and own[1] in _OWN_REASONS:
        return Trouble(own[1], f"{_quote(own[2])} (restart {restarts})")
    text = f"container {name} ended with exit status {last.get('exitCode')} (restart {restarts})"
    return Trouble(Reason.CRASH_LOOP, text + (f": {_quote(words)}" if words else ""))


def _quote(words: str) -> str:
    """The last words; of long ones the beginning (the supervisor's verdict) and the end (the engine's error)."""
    words = words.strip()
    if len(words) <= _QUOTE_HEAD + _QUOTE_TAIL:
        return words
    return f"{words[:_QUOTE_HEAD]} ... {words[-_QUOTE_TAIL:]}"


def _since(pod: Mapping[str, Any], kind: str, status: str) -> datetime | None:
    condition = find(_conditions(pod), kind)
    if condition is None or condition.get("status") != status or not condition.get("lastTransitionTime"):
        return None
    return parse_timestamp(condition["lastTransitionTime"])


def _conditions(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (pod.get("status") or {}).get("conditions") or []

"""A pod's status from the states of its containers. Pure; the same rules as the kubelet's.

Conditions change their `lastTransitionTime` only when their status flips, by what was written last: what a watch shows may be older
than that, and to go by it would be to write the one and the other in turn for ever. What others put into the status (PodScheduled,
readiness gates) is passed through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


@dataclass
class Terminated:
    """One ended run of a container. Times are RFC 3339."""

    exit_code: int
    reason: str
    message: str
    started: str | None
    finished: str | None
    id: str = ""

    def as_object(self) -> Object:
        """As in `state.terminated`."""
        return {
            "exitCode": self.exit_code,
            "reason": self.reason,
            **({"message": self.message} if self.message else {}),
            "startedAt": self.started,
            "finishedAt": self.finished,
            "containerID": self.id,
        }


@dataclass
class ContainerState:
    """What a container does now. Exactly one of waiting, running since, or terminated is what it is in."""

    name: str
    image: str
    waiting: str = "ContainerCreating"
    message: str = ""
    running_since: str | None = None
    terminated: Terminated | None = None
    last: Terminated | None = None
    restarts: int = 0
    ready: bool = False
    started: bool = False
    id: str = ""
    finished_for_good: bool = False

    def as_object(self) -> Object:
        """As in `status.containerStatuses`."""
        state: Object
        if self.terminated is not None:
            state = {"terminated": self.terminated.as_object()}
        elif self.running_since is not None:
            state = {"running": {"startedAt": self.running_since}}
        else:
            state = {"waiting": {"reason": self.waiting, **({"message": self.message} if self.message else {})}}
        return {
            "name": self.name,
            "image": self.image,
            "imageID": f"sandbox://{self.image}" if self.id else "",
            "containerID": self.id,
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": state,
            "lastState": {"terminated": self.last.as_object()} if self.last else {},
        }


def phase(policy: str, inits: list[ContainerState], containers: list[ContainerState]) -> str:
    """The pod's phase, as the kubelet's getPhase."""
    for init in inits:
        if init.terminated is None or init.terminated.exit_code != 0:
            failed = init.terminated is not None and init.finished_for_good
            return "Failed" if failed and policy == "Never" else "Pending"
    if any(c.running_since is not None and c.terminated is None for c in containers):
        return "Running"
    ended = [c.terminated for c in containers if c.terminated is not None]
    if len(ended) < len(containers):
        waiting = [c for c in containers if c.terminated is None]
        return "Running" if ended or all(c.last is not None for c in waiting) else "Pending"
    if policy == "Always":
        return "Running"
    if all(run.exit_code == 0 for run in ended):
        return "Succeeded"
    return "Failed" if policy == "Never" or all(c.finished_for_good for c in containers) else "Running"


OWN = ("Initialized", "Ready", "ContainersReady")
"""The conditions that a kubelet writes."""


def with_own(pod: Mapping[str, Any], written: Mapping[str, Any] | None) -> Object:
    """The pod as seen, with the kubelet's conditions as it wrote them last (None: as seen)."""
    if written is None:
        return dict(pod)
    seen = (pod.get("status") or {}).get("conditions") or []
    own = [each for each in written.get("conditions") or [] if each["type"] in OWN]
    others = [each for each in seen if each["type"] not in OWN]
    return {**pod, "status": {**(pod.get("status") or {}), "conditions": [*others, *own]}}


def contradicted(pod: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether somebody else has turned a kubelet's condition: the node controller does, of a node that it hears nothing from."""
    seen = {each["type"]: each["status"] for each in (pod.get("status") or {}).get("conditions") or []}
    return any(
        seen.get(each["type"], each["status"]) != each["status"]
        for each in wanted.get("conditions") or []
        if each["type"] in OWN
    )


def conditions(
    pod: Mapping[str, Any], current: str, inits: list[ContainerState], containers: list[ContainerState], now: str
) -> list[Object]:
    """Initialized, Ready and ContainersReady in the kubelet's words, merged into what the pod has already."""
    done = current == "Succeeded"
    waiting_inits = [c.name for c in inits if c.terminated is None or c.terminated.exit_code != 0]
    unready = [c.name for c in containers if not c.ready]
    initialized = _condition("Initialized", not waiting_inits, "ContainersNotInitialized", _incomplete(waiting_inits))
    ready = _condition(
        "ContainersReady", not unready, "ContainersNotReady", f"containers with unready status: {_names(unready)}"
    )
    if done:
        initialized = {"type": "Initialized", "status": "True", "reason": "PodCompleted"}
        ready = {"type": "ContainersReady", "status": "False", "reason": "PodCompleted"}
    elif current == "Failed" and not unready:
        ready = {"type": "ContainersReady", "status": "False", "reason": "PodFailed"}
    whole = {**ready, "type": "Ready"}
    have = {c["type"]: c for c in (pod.get("status") or {}).get("conditions") or []}
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    closed = [gate for gate in gates if have.get(gate, {}).get("status") != "True"]
    if closed and whole["status"] == "True":
        message = "; ".join(
            f'corresponding condition of pod readiness gate "{gate}" does not exist.' for gate in closed
        )
        whole = {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady", "message": message}
    for condition in (initialized, whole, ready):
        old = have.get(condition["type"])
        moved = old is None or old["status"] != condition["status"]
        have[condition["type"]] = {
            "lastProbeTime": None,
            "lastTransitionTime": now if moved or old is None else old.get("lastTransitionTime", now),
            **condition,
        }
    return list(have.values())


def _condition(kind: str, holds: bool, reason: str, message: str) -> Object:
    if holds:
        return {"type": kind, "status": "True"}
    return {"type": kind, "status": "False", "reason": reason, "message": message}


def _names(names: list[str]) -> str:
    return "[" + " ".join(names) + "]"


def _incomplete(names: list[str]) -> str:
    return f"containers with incomplete status: {_names(names)}"

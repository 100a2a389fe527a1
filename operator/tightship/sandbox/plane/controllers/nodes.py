"""Nodes that fall silent, and the pods on them.

A kubelet shows that it lives by renewing its Lease in ``kube-node-lease`` or the heartbeat of its Ready condition. When
neither has moved for a while, the node's conditions become Unknown and its pods not ready, and it is tainted; after their
tolerations' time, its pods are deleted. A node that never gave a sign is left alone: nothing runs there that could fall
silent. Pods bound to a node that no longer exists are removed at once.
"""

from __future__ import annotations

import time
from datetime import timedelta

from tightship.sandbox.plane.api import Api, DeleteOptions
from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key
from tightship.sandbox.plane.controllers.pods import is_finished, is_going, is_ready, tolerates
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import condition, dig, now, parse_time, set_condition, stamp

_LEASES = "kube-node-lease"
_NOT_READY = "node.kubernetes.io/not-ready"
_UNREACHABLE = "node.kubernetes.io/unreachable"
_SILENT = "Kubelet stopped posting node status."


class Nodes(Controller):
    """Watches over nodes. Keys are ("", node name).

    Args:
        grace: seconds of silence after which a node counts as lost.
        eviction: seconds that pods stay on a lost node, instead of what their tolerations say; None for the latter.
    """

    name = "node-controller"

    def __init__(self, api: Api, grace: float = 40.0, eviction: float | None = None) -> None:
        super().__init__(api)
        self.grace, self.eviction = grace, eviction
        self._signs: dict[str, tuple[str, float]] = {}

    def watches(self) -> dict[Storage, Mapper]:
        """Nodes, their leases, and the pods bound to them."""

        def lease(change: Change) -> list[Key]:
            namespace, name = change.object["metadata"]["namespace"], change.object["metadata"]["name"]
            return [("", name)] if namespace == _LEASES else []

        def pod(change: Change) -> list[Key]:
            node = change.object["spec"].get("nodeName")
            moved = change.old is None or change.old["spec"].get("nodeName") != node
            return [("", node)] if node and moved and change.type != "DELETED" else []

        return {("", "nodes"): own_key, ("coordination.k8s.io", "leases"): lease, ("", "pods"): pod}

    def reconcile(self, key: Key) -> float | None:
        """Looks at one node; returns when its silence would be too long, or a pod's time is up."""
        name = key[1]
        node = self.find("", "nodes", key)
        pods = [pod for pod in self.all("", "pods") if pod["spec"].get("nodeName") == name]
        if node is None:
            self._signs.pop(name, None)
            for pod in pods:
                self.delete("", "pods", pod, DeleteOptions(grace=0))
            return None
        silence = self._silence(node)
        if silence is not None and silence >= self.grace:
            self._lose(node, pods)
        node = self.find("", "nodes", key) or node
        self._taint(node)
        due = self._evict(self.find("", "nodes", key) or node, pods)
        left = None if silence is None or silence >= self.grace else self.grace - silence + 0.05
        return min((value for value in (due, left) if value is not None), default=None)

    def _silence(self, node: Obj) -> float | None:
        """Seconds since the last sign was seen, or None where there never was one."""
        name = node["metadata"]["name"]
        lease = self.find("coordination.k8s.io", "leases", (_LEASES, name))
        ready = condition(node, "Ready") or {}
        # What the plane itself wrote about a lost node is no sign of life.
        beat = "" if ready.get("reason") == "NodeStatusUnknown" else ready.get("lastHeartbeatTime", "")
        renewed = dig(lease, "spec", "renewTime", default="")
        if not beat and not renewed:
            return None if ready.get("reason") != "NodeStatusUnknown" else self.grace
        seen = self._signs.get(name)
        sign = f"{renewed} {beat}"
        if seen is None or (seen[0] != sign and not self._only_lost(seen[0], sign)):
            seen = (sign, time.monotonic())
        self._signs[name] = seen
        return time.monotonic() - seen[1]

    def _only_lost(self, before: str, after: str) -> bool:
        """Whether the sign differs only because the heartbeat was replaced by the plane's own verdict."""
        return after.endswith(" ") and before.split(" ", maxsplit=1)[0] == after.split(" ", maxsplit=1)[0]

    def _lose(self, node: Obj, pods: list[Obj]) -> None:
        if (condition(node, "Ready") or {}).get("status") != "Unknown":

            def change(status: Obj) -> None:
                for kind in ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure"):
                    set_condition(status, kind, "Unknown", "NodeStatusUnknown", _SILENT)

            self.set_status("", "nodes", node, change)
            name = node["metadata"]["name"]
            self.event(node, "Normal", "NodeNotReady", f"Node {name} status is now: NodeNotReady")
        for pod in pods:
            if is_ready(pod) and not is_finished(pod):
                self.set_status("", "pods", pod, lambda status: set_condition(status, "Ready", "False", "NodeNotReady"))
                self.event(pod, "Warning", "NodeNotReady", "Node is not ready")

    def _taint(self, node: Obj) -> None:
        state = (condition(node, "Ready") or {}).get("status")
        wanted = {"False": _NOT_READY, "Unknown": _UNREACHABLE}.get(state or "", "")
        taints = node["spec"].get("taints") or []
        have = {(taint["key"], taint["effect"]) for taint in taints if taint["key"] in (_NOT_READY, _UNREACHABLE)}
        need = {(wanted, effect) for effect in ("NoSchedule", "NoExecute")} if wanted else set()
        if have == need:
            return
        kept = [taint for taint in taints if taint["key"] not in (_NOT_READY, _UNREACHABLE)]
        kept += [{"key": key, "effect": effect, "timeAdded": stamp()} for key, effect in sorted(need, reverse=True)]

        def change(target: Obj) -> None:
            target["spec"]["taints"] = kept
            if not kept:
                del target["spec"]["taints"]

        self.modify("", "nodes", node, change)

    def _evict(self, node: Obj, pods: list[Obj]) -> float | None:
        """Deletes pods that don't bear the node's taints any longer; returns when the next one's time is up."""
        due: list[float] = []
        for taint in node["spec"].get("taints") or []:
            if taint["effect"] != "NoExecute":
                continue
            for pod in pods:
                if is_going(pod) or is_finished(pod) or self.find("", "pods", _key(pod)) is None:
                    continue
                left = self._left(pod, taint)
                if left is not None and left <= 0:
                    self.event(pod, "Normal", "TaintManagerEviction", f"Marking for deletion Pod {'/'.join(_key(pod))}")
                    self.delete("", "pods", pod)
                elif left is not None:
                    due.append(left)
        return min(due, default=None)

    def _left(self, pod: Obj, taint: Obj) -> float | None:
        toleration = tolerates(pod, taint)
        if toleration is None:
            return 0.0
        seconds = toleration.get("tolerationSeconds")
        if seconds is None:
            return None
        if self.eviction is not None and taint["key"] in (_NOT_READY, _UNREACHABLE):
            seconds = self.eviction
        added = parse_time(taint.get("timeAdded") or stamp())
        return (added + timedelta(seconds=seconds) - now()).total_seconds()


def _key(pod: Obj) -> Key:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]

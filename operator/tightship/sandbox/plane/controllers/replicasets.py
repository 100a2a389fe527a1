"""ReplicaSets and Deployments: a number of equal pods, and their replacement by a new template.

A Deployment keeps one ReplicaSet a template. A rolling update grows the new set within ``maxSurge`` and shrinks the old ones
as far as ``maxUnavailable`` allows; ``Recreate`` empties the old ones first.
"""

from __future__ import annotations

import math

from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key, owner_key
from tightship.sandbox.plane.controllers.pods import from_template, is_finished, is_going, is_ready, template_hash
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Key, Storage
from tightship.sandbox.plane.values import copy, dig, is_controlled_by, key_of, owner_reference, set_condition

_HASH = "pod-template-hash"
_REVISION = "deployment.kubernetes.io/revision"


class ReplicaSets(Controller):
    """Reconciles ReplicaSets."""

    name = "replicaset-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """The sets themselves and their pods."""
        return {("apps", "replicasets"): own_key, ("", "pods"): owner_key("ReplicaSet")}

    def reconcile(self, key: Key) -> float | None:
        """Creates and deletes pods until their number is right."""
        workload = self.find("apps", "replicasets", key)
        if workload is None or workload["metadata"].get("deletionTimestamp"):
            return None
        name = workload["metadata"]["name"]
        live = [pod for pod in self.pods_of(workload) if not is_going(pod) and not is_finished(pod)]
        for _ in range(workload["spec"]["replicas"] - len(live)):
            made = self.create("", "pods", from_template(workload, workload["spec"]["template"], generate=f"{name}-"))
            self.event(workload, "Normal", "SuccessfulCreate", f"Created pod: {made['metadata']['name']}")
            live.append(made)
        # Pods that serve least go first.
        live.sort(key=lambda pod: (is_ready(pod), bool(pod["spec"].get("nodeName"))))
        for pod in live[: max(0, len(live) - workload["spec"]["replicas"])]:
            self.delete("", "pods", pod)
            self.event(workload, "Normal", "SuccessfulDelete", f"Deleted pod: {pod['metadata']['name']}")
        self._report(workload)
        return None

    def _report(self, workload: Obj) -> None:
        pods = [pod for pod in self.pods_of(workload) if not is_finished(pod) and not is_going(pod)]
        ready = sum(is_ready(pod) for pod in pods)
        counts = {
            "replicas": len(pods),
            "fullyLabeledReplicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "observedGeneration": workload["metadata"]["generation"],
        }
        status = {key: value for key, value in counts.items() if value or key == "replicas"}
        if workload.get("status") != status:
            self.api.modify(
                self.resource("apps", "replicasets"),
                *key_of(workload),
                lambda target: target.update(status=status),
                self.status_options,
            )


def _absolute(value: int | str, total: int, up: bool) -> int:
    if isinstance(value, int):
        return value
    share = int(value.rstrip("%")) * total / 100
    return math.ceil(share) if up else math.floor(share)


class Deployments(Controller):
    """Reconciles Deployments."""

    name = "deployment-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """The deployments themselves and their sets."""
        return {("apps", "deployments"): own_key, ("apps", "replicasets"): owner_key("Deployment")}

    def reconcile(self, key: Key) -> float | None:
        """Moves pods from the old sets to the new one."""
        workload = self.find("apps", "deployments", key)
        if workload is None or workload["metadata"].get("deletionTimestamp"):
            return None
        sets = [
            entry
            for entry in self.all("apps", "replicasets", key[0])
            if is_controlled_by(entry, workload["metadata"]["uid"])
        ]
        new = self._new_set(workload, sets)
        old = [entry for entry in sets if entry["metadata"]["name"] != new["metadata"]["name"]]
        if not workload["spec"].get("paused"):
            self._move(workload, new, old)
        self._forget(workload, old)
        self._report(workload, new["metadata"]["name"])
        return None

    def _new_set(self, workload: Obj, sets: list[Obj]) -> Obj:
        digest = template_hash(workload["spec"]["template"])
        name = f"{workload['metadata']['name']}-{digest}"
        found = next((entry for entry in sets if entry["metadata"]["name"] == name), None)
        revisions = [int((entry["metadata"].get("annotations") or {}).get(_REVISION, 0)) for entry in sets]
        highest = max(revisions, default=0)
        if found is None:
            template = copy(workload["spec"]["template"])
            template.setdefault("metadata", {}).setdefault("labels", {})[_HASH] = digest
            selector = copy(workload["spec"]["selector"])
            selector.setdefault("matchLabels", {})[_HASH] = digest
            found = self.create(
                "apps",
                "replicasets",
                {
                    "metadata": {
                        "name": name,
                        "namespace": workload["metadata"]["namespace"],
                        "labels": template["metadata"]["labels"],
                        "annotations": {_REVISION: str(highest + 1)},
                        "ownerReferences": [owner_reference(workload)],
                    },
                    "spec": {"replicas": 0, "selector": selector, "template": template},
                },
            )
        mine = (found["metadata"].get("annotations") or {}).get(_REVISION, "1")
        if (workload["metadata"].get("annotations") or {}).get(_REVISION) != mine:
            self.modify(
                "apps",
                "deployments",
                workload,
                lambda target: target["metadata"].setdefault("annotations", {}).update({_REVISION: mine}),
            )
        return found

    def _move(self, workload: Obj, new: Obj, old: list[Obj]) -> None:
        replicas, strategy = workload["spec"]["replicas"], workload["spec"]["strategy"]
        remaining = sum(entry["spec"]["replicas"] for entry in old)
        if strategy["type"] == "Recreate":
            for entry in old:
                self._scale(workload, entry, 0)
            if sum(dig(entry, "status", "replicas", default=0) for entry in old) == 0:
                self._scale(workload, new, replicas)
            return
        rolling = strategy.get("rollingUpdate") or {}
        surge = _absolute(rolling.get("maxSurge", "25%"), replicas, up=True)
        missing = _absolute(rolling.get("maxUnavailable", "25%"), replicas, up=False)
        if surge == 0 and missing == 0:
            missing = 1
        target = min(replicas, max(new["spec"]["replicas"], replicas + surge - remaining))
        self._scale(workload, new, target)
        available = sum(dig(entry, "status", "availableReplicas", default=0) for entry in [new, *old])
        spare = available - (replicas - missing)
        for entry in old:
            broken = entry["spec"]["replicas"] - dig(entry, "status", "availableReplicas", default=0)
            step = min(entry["spec"]["replicas"], max(0, broken) + max(0, spare))
            spare -= max(0, step - max(0, broken))
            self._scale(workload, entry, entry["spec"]["replicas"] - step)

    def _scale(self, workload: Obj, entry: Obj, replicas: int) -> None:
        before = entry["spec"]["replicas"]
        if before == replicas:
            return
        self.modify("apps", "replicasets", entry, lambda target: target["spec"].update(replicas=replicas))
        word = "up" if replicas > before else "down"
        message = f"Scaled {word} replica set {entry['metadata']['name']} from {before} to {replicas}"
        self.event(workload, "Normal", "ScalingReplicaSet", message)

    def _forget(self, workload: Obj, old: list[Obj]) -> None:
        empty = [entry for entry in old if not entry["spec"]["replicas"] and not dig(entry, "status", "replicas")]
        empty.sort(key=lambda entry: int((entry["metadata"].get("annotations") or {}).get(_REVISION, 0)))
        for entry in empty[: max(0, len(empty) - workload["spec"]["revisionHistoryLimit"])]:
            self.delete("apps", "replicasets", entry)

    def _report(self, workload: Obj, newest: str) -> None:
        workload = self.find("apps", "deployments", key_of(workload)) or workload
        sets = [
            entry
            for entry in self.all("apps", "replicasets", workload["metadata"]["namespace"])
            if is_controlled_by(entry, workload["metadata"]["uid"])
        ]

        def total(field: str) -> int:
            return sum(dig(entry, "status", field, default=0) for entry in sets)

        new = next(entry for entry in sets if entry["metadata"]["name"] == newest)
        wanted = workload["spec"]["replicas"]
        updated = dig(new, "status", "replicas", default=0)
        available = total("availableReplicas")
        counts = {
            "replicas": total("replicas"),
            "updatedReplicas": updated,
            "readyReplicas": total("readyReplicas"),
            "availableReplicas": available,
            "unavailableReplicas": max(0, wanted - available),
        }
        missing = _absolute(
            dig(workload, "spec", "strategy", "rollingUpdate", "maxUnavailable", default=0), wanted, False
        )
        done = updated == wanted == available == counts["replicas"]

        def change(status: Obj) -> None:
            for name, value in counts.items():
                status.pop(name, None)
                if value:
                    status[name] = value
            status["observedGeneration"] = workload["metadata"]["generation"]
            if available >= wanted - missing:
                state, reason, text = "True", "MinimumReplicasAvailable", "Deployment has minimum availability."
            else:
                state, reason = "False", "MinimumReplicasUnavailable"
                text = "Deployment does not have minimum availability."
            set_condition(status, "Available", state, reason, text)
            reason = "NewReplicaSetAvailable" if done else "ReplicaSetUpdated"
            verb = "has successfully progressed." if done else "is progressing."
            set_condition(status, "Progressing", "True", reason, f'ReplicaSet "{newest}" {verb}')

        self.set_status("apps", "deployments", workload, change)

"""StatefulSets: pods with names, revisions of their template, and the two orders in which they come and go.

``Parallel`` sets create and delete all pods at once; ``OrderedReady`` ones wait for each. A changed template makes a new
revision; ``RollingUpdate`` replaces pods from the highest ordinal down, ``OnDelete`` only uses it for pods made anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key, owner_key
from tightship.sandbox.plane.controllers.pods import (
    from_template,
    is_finished,
    is_going,
    is_ready,
    is_running_and_ready,
    template_hash,
)
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Key, Storage
from tightship.sandbox.plane.values import controller_of, copy, dig, is_controlled_by, key_of, owner_reference

_HASH = "controller-revision-hash"


@dataclass
class _Revisions:
    current: Obj
    update: Obj


class StatefulSets(Controller):
    """Reconciles StatefulSets."""

    name = "statefulset-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """The sets themselves and their pods."""
        return {("apps", "statefulsets"): own_key, ("", "pods"): owner_key("StatefulSet")}

    def reconcile(self, key: Key) -> float | None:
        """Brings one set in order."""
        workload = self.find("apps", "statefulsets", key)
        if workload is None or workload["metadata"].get("deletionTimestamp"):
            return None
        revisions = self._revisions(workload)
        pods = {self._ordinal(workload, pod): pod for pod in self.pods_of(workload)}
        pods.pop(-1, None)
        try:
            self._arrange(workload, revisions, pods)
        finally:
            self._report(workload, revisions)
        return None

    def _ordinal(self, workload: Obj, pod: Obj) -> int:
        match = re.fullmatch(re.escape(workload["metadata"]["name"]) + r"-(\d+)", pod["metadata"]["name"])
        return int(match.group(1)) if match else -1

    def _revisions(self, workload: Obj) -> _Revisions:
        name, namespace = workload["metadata"]["name"], workload["metadata"]["namespace"]
        data = {"spec": {"template": {**copy(workload["spec"]["template"]), "$patch": "replace"}}}
        known = [
            revision
            for revision in self.all("apps", "controllerrevisions", namespace)
            if is_controlled_by(revision, workload["metadata"]["uid"])
        ]
        known.sort(key=lambda revision: int(revision["revision"]))
        highest = int(known[-1]["revision"]) if known else 0
        update = next((revision for revision in known if revision["data"] == data), None)
        if update is None:
            digest = template_hash(workload["spec"]["template"])
            labels = {**dig(workload, "spec", "selector", "matchLabels", default={}), _HASH: digest}
            update = self.create(
                "apps",
                "controllerrevisions",
                {
                    "metadata": {
                        "name": f"{name}-{digest}",
                        "namespace": namespace,
                        "labels": labels,
                        "ownerReferences": [owner_reference(workload)],
                    },
                    "data": data,
                    "revision": highest + 1,
                },
            )
        elif int(update["revision"]) != highest:
            # A template taken back is the newest revision again.
            update = self.modify(
                "apps", "controllerrevisions", update, lambda target: target.update(revision=highest + 1)
            )
        wanted = dig(workload, "status", "currentRevision", default="")
        current = next((revision for revision in known if revision["metadata"]["name"] == wanted), update)
        self._forget(workload, known, {current["metadata"]["name"], update["metadata"]["name"]})
        return _Revisions(current, update)

    def _forget(self, workload: Obj, known: list[Obj], live: set[str]) -> None:
        used = {(pod["metadata"].get("labels") or {}).get(_HASH) for pod in self.pods_of(workload)}
        old = [entry for entry in known if entry["metadata"]["name"] not in live | used]
        for revision in old[: max(0, len(old) - int(workload["spec"]["revisionHistoryLimit"]))]:
            self.delete("apps", "controllerrevisions", revision)

    def _arrange(self, workload: Obj, revisions: _Revisions, pods: dict[int, Obj]) -> None:
        spec = workload["spec"]
        start = dig(spec, "ordinals", "start", default=0)
        wanted = range(start, start + spec["replicas"])
        parallel = spec["podManagementPolicy"] == "Parallel"
        for ordinal in wanted:
            settled = self._fill(workload, revisions, pods, ordinal)
            if not settled and not parallel:
                return
        for ordinal in sorted((number for number in pods if number not in wanted), reverse=True):
            if not is_going(pods[ordinal]):
                self._remove(workload, pods[ordinal])
            if not parallel:
                return
        if spec["updateStrategy"]["type"] == "RollingUpdate":
            self._roll(workload, revisions, {number: pods[number] for number in wanted if number in pods})

    def _fill(self, workload: Obj, revisions: _Revisions, pods: dict[int, Obj], ordinal: int) -> bool:
        """Makes sure that a pod exists; returns whether it runs and is ready."""
        pod = pods.get(ordinal)
        if pod is not None and is_finished(pod) and not is_going(pod):
            # A pod of a set that ended is replaced, whatever its end was.
            self._remove(workload, pod)
            if self.find("", "pods", key_of(pod)) is not None:
                return False
            pod = None
        if pod is None:
            pods[ordinal] = self._make(workload, revisions, ordinal)
            return False
        return is_running_and_ready(pod) and not is_going(pod)

    def _make(self, workload: Obj, revisions: _Revisions, ordinal: int) -> Obj:
        spec = workload["spec"]
        start = dig(spec, "ordinals", "start", default=0)
        partition = dig(spec, "updateStrategy", "rollingUpdate", "partition", default=0)
        old = spec["updateStrategy"]["type"] == "RollingUpdate" and ordinal < start + partition
        revision = revisions.current if old else revisions.update
        template = {key: value for key, value in revision["data"]["spec"]["template"].items() if key != "$patch"}
        name = f"{workload['metadata']['name']}-{ordinal}"
        pod = from_template(workload, template, name)
        pod["metadata"].setdefault("labels", {}).update(
            {
                _HASH: revision["metadata"]["name"],
                "statefulset.kubernetes.io/pod-name": name,
                "apps.kubernetes.io/pod-index": str(ordinal),
            }
        )
        pod["spec"]["hostname"] = name
        if spec.get("serviceName"):
            pod["spec"]["subdomain"] = spec["serviceName"]
        self._add_claims(workload, pod, name)
        try:
            made = self.create("", "pods", pod)
        except Exception as error:
            message = f"create Pod {name} in StatefulSet {workload['metadata']['name']} failed error: {error}"
            self.event(workload, "Warning", "FailedCreate", message)
            raise
        message = f"create Pod {name} in StatefulSet {workload['metadata']['name']} successful"
        self.event(workload, "Normal", "SuccessfulCreate", message)
        return made

    def _add_claims(self, workload: Obj, pod: Obj, name: str) -> None:
        volumes = list(pod["spec"].get("volumes") or [])
        for template in workload["spec"].get("volumeClaimTemplates") or []:
            kind = template["metadata"]["name"]
            claim = f"{kind}-{name}"
            namespace = workload["metadata"]["namespace"]
            if self.find("", "persistentvolumeclaims", (namespace, claim)) is None:
                labels = dig(workload, "spec", "selector", "matchLabels", default={})
                meta = {**copy(template["metadata"]), "name": claim, "namespace": namespace}
                meta["labels"] = {**(meta.get("labels") or {}), **labels}
                self.create("", "persistentvolumeclaims", {"metadata": meta, "spec": copy(template["spec"])})
            volumes = [volume for volume in volumes if volume["name"] != kind]
            volumes.append({"name": kind, "persistentVolumeClaim": {"claimName": claim}})
        if volumes:
            pod["spec"]["volumes"] = volumes

    def _remove(self, workload: Obj, pod: Obj) -> None:
        self.delete("", "pods", pod)
        name, owner = pod["metadata"]["name"], workload["metadata"]["name"]
        self.event(workload, "Normal", "SuccessfulDelete", f"delete Pod {name} in StatefulSet {owner} successful")

    def _roll(self, workload: Obj, revisions: _Revisions, pods: dict[int, Obj]) -> None:
        start = dig(workload, "spec", "ordinals", "start", default=0)
        partition = start + dig(workload, "spec", "updateStrategy", "rollingUpdate", "partition", default=0)
        wanted = revisions.update["metadata"]["name"]
        for ordinal in sorted(pods, reverse=True):
            pod = pods[ordinal]
            if ordinal < partition:
                return
            if (pod["metadata"].get("labels") or {}).get(_HASH) != wanted:
                if not is_going(pod):
                    self._remove(workload, pod)
                return
            if is_going(pod) or not is_running_and_ready(pod):
                return

    def _report(self, workload: Obj, revisions: _Revisions) -> None:
        fresh = self.find("apps", "statefulsets", key_of(workload))
        if fresh is None:
            return
        pods = [pod for pod in self.pods_of(workload) if (controller_of(pod) or {})]
        current, update = revisions.current["metadata"]["name"], revisions.update["metadata"]["name"]

        def at(revision: str) -> int:
            return sum(
                (pod["metadata"].get("labels") or {}).get(_HASH) == revision for pod in pods if not is_going(pod)
            )

        ready = sum(is_ready(pod) and not is_finished(pod) for pod in pods)
        replicas = workload["spec"]["replicas"]
        rolling = workload["spec"]["updateStrategy"]["type"] == "RollingUpdate"
        if rolling and at(update) == replicas == len(pods) == ready:
            current = update
        wanted = {
            "observedGeneration": workload["metadata"]["generation"],
            "replicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "currentReplicas": at(current),
            "updatedReplicas": at(update),
            "currentRevision": current,
            "updateRevision": update,
            "collisionCount": 0,
        }
        status = {
            key: value
            for key, value in wanted.items()
            if value or key in ("replicas", "availableReplicas", "collisionCount")
        }
        if {key: value for key, value in (fresh.get("status") or {}).items() if key != "conditions"} != status:

            def change(target: Obj) -> None:
                for name in wanted:
                    target.pop(name, None)
                target.update(status)

            self.set_status("apps", "statefulsets", fresh, change)

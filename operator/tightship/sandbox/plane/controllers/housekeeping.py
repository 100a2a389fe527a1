"""Small duties: what every namespace holds, budgets' arithmetic, and the end of old events."""

from __future__ import annotations

import math
from datetime import timedelta

from tightship.sandbox.plane.api import Api, Options
from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key
from tightship.sandbox.plane.controllers.pods import is_finished, is_going, is_ready
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.selectors import matches
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import dig, now, parse_time, set_condition

_SCALED = {"StatefulSet": "statefulsets", "ReplicaSet": "replicasets"}
ROOT_CA = "kube-root-ca.crt"


def furnish(api: Api, ca: str) -> None:
    """Gives every new namespace its ``default`` ServiceAccount and ``kube-root-ca.crt``, in the step that makes it.

    In the same step, so that a pod can follow its namespace at once.
    """

    def added(change: Change) -> None:
        if change.type != "ADDED":
            return
        name = change.object["metadata"]["name"]
        meta = {"name": "default", "namespace": name}
        options = Options("kube-controller-manager")
        api.create(api.registry.get("", "serviceaccounts"), name, {"metadata": meta}, options)
        bundle = {"metadata": {"name": ROOT_CA, "namespace": name}, "data": {"ca.crt": ca}}
        api.create(api.registry.get("", "configmaps"), name, bundle, options)

    api.store.subscribe(("", "namespaces"), added)


class OldEvents(Controller):
    """Removes events that have not happened again for an hour."""

    name = "event-ttl"
    keep = timedelta(hours=1)

    def watches(self) -> dict[Storage, Mapper]:
        """Each event asks for its own end."""
        return {("", "events"): own_key}

    def reconcile(self, key: Key) -> float | None:
        """Removes the event when its time is up."""
        event = self.find("", "events", key)
        if event is None:
            return None
        last = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
        left = (parse_time(last) + self.keep - now()).total_seconds()
        if left > 0:
            return left
        self.delete("", "events", event)
        return None


class Budgets(Controller):
    """Keeps the status of PodDisruptionBudgets."""

    name = "disruption-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """Budgets, and the budgets that select a changed pod."""

        def budgets(change: Change) -> list[Key]:
            meta = change.object["metadata"]
            return [
                (entry["metadata"]["namespace"], entry["metadata"]["name"])
                for entry in self.all("policy", "poddisruptionbudgets", meta["namespace"])
                if matches(entry["spec"].get("selector"), meta.get("labels"))
            ]

        return {("policy", "poddisruptionbudgets"): own_key, ("", "pods"): budgets}

    def reconcile(self, key: Key) -> float | None:
        """Counts the healthy pods and how many may go.

        Of `maxUnavailable`, and of percentages, the whole is what the pods' controllers ask for, whether it is there or not.
        """
        budget = self.find("policy", "poddisruptionbudgets", key)
        if budget is None:
            return None
        spec = budget["spec"]
        pods = [
            pod
            for pod in self.all("", "pods", key[0])
            if matches(spec.get("selector"), pod["metadata"].get("labels")) and not is_finished(pod)
        ]
        healthy = sum(is_ready(pod) and not is_going(pod) for pod in pods)
        least, most = spec.get("minAvailable", 0), spec.get("maxUnavailable")
        total = len(pods) if most is None and isinstance(least, int) else self._asked_for(pods)
        desired = _absolute(least, total) if most is None else max(0, total - _absolute(most, total))
        allowed = max(0, healthy - desired)
        counts = {
            "currentHealthy": healthy,
            "desiredHealthy": desired,
            "disruptionsAllowed": allowed,
            "expectedPods": total,
            "observedGeneration": budget["metadata"]["generation"],
        }

        def change(status: Obj) -> None:
            status.update(counts)
            reason = "SufficientPods" if allowed else "InsufficientPods"
            set_condition(status, "DisruptionAllowed", "True" if allowed else "False", reason)

        if any(dig(budget, "status", name) != value for name, value in counts.items()):
            self.set_status("policy", "poddisruptionbudgets", budget, change)
        return None

    def _asked_for(self, pods: list[Obj]) -> int:
        """Replicas that the controllers of some pods ask for; a pod without one asks for nothing."""
        owners = {
            (kind, pod["metadata"]["namespace"], reference["name"])
            for pod in pods
            for reference in pod["metadata"].get("ownerReferences") or []
            if reference.get("controller") and (kind := _SCALED.get(reference["kind"]))
        }
        found = [self.find("apps", kind, (namespace, name)) for kind, namespace, name in owners]
        return sum(int(owner["spec"].get("replicas", 1)) for owner in found if owner is not None)


def _absolute(value: int | str, total: int) -> int:
    return value if isinstance(value, int) else math.ceil(int(value.rstrip("%")) * total / 100)

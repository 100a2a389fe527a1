"""The scheduler: one pass over all pending pods, the most important first, each onto the emptiest node that fits.

A node fits by resources, ports, taints, node selector, required node and pod affinity, and the affinity of bound volumes. A
pod that fits nowhere gets the condition and the event that the real scheduler gives it; the next change tries again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from tightship.api.units import exact_quantity
from tightship.sandbox.plane.api import Options
from tightship.sandbox.plane.controllers import claims
from tightship.sandbox.plane.controllers.base import Controller, Mapper
from tightship.sandbox.plane.controllers.pods import is_finished, requests_of, tolerates
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.selectors import expression_holds, matches
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import condition, dig, key_of, set_condition

_PASS: list[Key] = [("", "pass")]


@dataclass
class _Place:
    """A node with what is left of it."""

    node: Obj
    free: dict[str, Fraction]
    pods: list[Obj] = field(default_factory=list)

    def take(self, pod: Obj) -> None:
        for name, amount in requests_of(pod).items():
            self.free[name] = self.free.get(name, Fraction(0)) - amount
        self.pods.append(pod)


def node_matches(node: Obj, pod: Obj) -> bool:
    """Whether the pod's node selector and required node affinity select the node."""
    labels = node["metadata"].get("labels") or {}
    selector = pod["spec"].get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    required = dig(pod, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    return required is None or terms_match(node, required.get("nodeSelectorTerms") or [])


def terms_match(node: Obj, terms: list[Obj]) -> bool:
    """Whether any node selector term selects the node; an empty term selects none."""
    labels = node["metadata"].get("labels") or {}
    fields = {"metadata.name": node["metadata"]["name"]}
    for term in terms:
        rules, by_field = term.get("matchExpressions") or [], term.get("matchFields") or []
        if not rules and not by_field:
            continue
        if all(expression_holds(rule, labels) for rule in rules) and all(
            expression_holds(rule, fields) for rule in by_field
        ):
            return True
    return False


class Scheduler(Controller):
    """Binds pending pods to nodes."""

    name = "default-scheduler"

    def watches(self) -> dict[Storage, Mapper]:
        """Any change of what a pass looks at starts one pass."""

        def always(change: Change) -> list[Key]:
            return _PASS

        def pods(change: Change) -> list[Key]:
            # A pod's heartbeat is no reason to look again; its coming, its end and its leaving are.
            old = change.old
            if old is None or change.type != "MODIFIED" or is_finished(old) != is_finished(change.object):
                return _PASS
            waits = not dig(change.object, "spec", "nodeName") and old["spec"] != change.object["spec"]
            return _PASS if waits else []

        def nodes(change: Change) -> list[Key]:
            old = change.old
            same = old is not None and all(
                dig(old, *path) == dig(change.object, *path)
                for path in (("spec",), ("metadata", "labels"), ("status", "allocatable"))
            )
            return [] if same and change.type == "MODIFIED" else _PASS

        return {
            ("", "pods"): pods,
            ("", "nodes"): nodes,
            ("", "persistentvolumeclaims"): always,
            ("", "persistentvolumes"): always,
            (claims.GROUP, claims.CLAIMS): always,
            (claims.GROUP, "resourceslices"): always,
            (claims.GROUP, "deviceclasses"): always,
        }

    def reconcile(self, key: Key) -> float | None:
        """One pass."""
        pods = self.all("", "pods")
        pending = [pod for pod in pods if self._waits(pod)]
        if not pending:
            return None
        places = self._places(pods)
        pending.sort(key=lambda pod: (-pod["spec"].get("priority", 0), pod["metadata"]["creationTimestamp"]))
        for pod in pending:
            place, why = self._choose(pod, places)
            if place is None:
                self._report(pod, why)
            else:
                self._bind(pod, place)
        return None

    def _waits(self, pod: Obj) -> bool:
        spec = pod["spec"]
        if spec.get("nodeName") or pod["metadata"].get("deletionTimestamp") or is_finished(pod):
            return False
        return spec.get("schedulerName") == "default-scheduler" and not spec.get("schedulingGates")

    def _places(self, pods: list[Obj]) -> list[_Place]:
        places = {}
        for node in self.all("", "nodes"):
            amounts = dig(node, "status", "allocatable", default={})
            free = {name: exact_quantity(amount) for name, amount in amounts.items()}
            free.setdefault("pods", Fraction(110))
            places[node["metadata"]["name"]] = _Place(node, free)
        for pod in pods:
            place = places.get(pod["spec"].get("nodeName") or "")
            if place is not None and not is_finished(pod):
                place.take(pod)
        return list(places.values())

    def _choose(self, pod: Obj, places: list[_Place]) -> tuple[_Place | None, str]:
        missing = self._volume_problem(pod) or self._claim_problem(pod)
        if missing:
            return None, f"0/{len(places)} nodes are available: {missing}."
        if not places:
            return None, "no nodes available to schedule pods"
        fitting, reasons = [], Counter[str]()
        for place in places:
            found = self._refusals(pod, place, places)
            reasons.update(found)
            if not found:
                fitting.append(place)
        if fitting:
            # The emptiest first, so that pods spread; the name decides between equals.
            return min(fitting, key=lambda place: (len(place.pods), place.node["metadata"]["name"])), ""
        listed = ", ".join(sorted(f"{count} {reason}" for reason, count in reasons.items()))
        return None, f"0/{len(places)} nodes are available: {listed}."

    def _refusals(self, pod: Obj, place: _Place, places: list[_Place]) -> list[str]:
        node = place.node
        if node["spec"].get("unschedulable"):
            taint = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
            if tolerates(pod, taint) is None:
                return ["node(s) were unschedulable"]
        for taint in node["spec"].get("taints") or []:
            if taint["effect"] in ("NoSchedule", "NoExecute") and tolerates(pod, taint) is None:
                return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
        if not node_matches(node, pod):
            return ["node(s) didn't match Pod's node affinity/selector"]
        if self._ports(pod) & {port for other in place.pods for port in self._ports(other)}:
            return ["node(s) didn't have free ports for the requested pod ports"]
        short = [name for name, amount in requests_of(pod).items() if amount > place.free.get(name, Fraction(0))]
        if short:
            return ["Too many pods" if name == "pods" else f"Insufficient {name}" for name in short]
        if not self._volumes_reach(pod, node):
            return ["node(s) had volume node affinity conflict"]
        if self._allocations(pod, node["metadata"]["name"]) is None:
            return ["cannot allocate all claims"]
        return self._affinity_refusals(pod, place, places)

    def _ports(self, pod: Obj) -> set[tuple[str, int]]:
        return {
            (port.get("protocol", "TCP"), port["hostPort"])
            for container in pod["spec"].get("containers") or []
            for port in container.get("ports") or []
            if port.get("hostPort")
        }

    def _affinity_refusals(self, pod: Obj, place: _Place, places: list[_Place]) -> list[str]:
        for kind, wanted, why in (
            ("podAffinity", True, "node(s) didn't match pod affinity rules"),
            ("podAntiAffinity", False, "node(s) didn't match pod anti-affinity rules"),
        ):
            terms = dig(pod, "spec", "affinity", kind, "requiredDuringSchedulingIgnoredDuringExecution", default=[])
            if any(self._near(pod, term, place, places) != wanted for term in terms):
                return [why]
        return []

    def _near(self, pod: Obj, term: Obj, place: _Place, places: list[_Place]) -> bool:
        """Whether a pod that the term selects runs in the same topology domain as this node."""
        domain = (place.node["metadata"].get("labels") or {}).get(term["topologyKey"])
        namespaces = term.get("namespaces") or [pod["metadata"]["namespace"]]
        return domain is not None and any(
            other["metadata"]["namespace"] in namespaces
            and matches(term.get("labelSelector"), other["metadata"].get("labels"))
            for near in places
            if (near.node["metadata"].get("labels") or {}).get(term["topologyKey"]) == domain
            for other in near.pods
        )

    def _claims(self, pod: Obj) -> list[str]:
        volumes = pod["spec"].get("volumes") or []
        return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]

    def _volume_problem(self, pod: Obj) -> str:
        for name in self._claims(pod):
            claim = self.find("", "persistentvolumeclaims", (pod["metadata"]["namespace"], name))
            if claim is None:
                return f'persistentvolumeclaim "{name}" not found'
            if dig(claim, "status", "phase") != "Bound":
                return "pod has unbound immediate PersistentVolumeClaims"
        return ""

    def _claim_problem(self, pod: Obj) -> str:
        for claim, name in zip(self._resource_claims(pod), claims.names_of(pod), strict=True):
            if claim is None or claim["metadata"].get("deletionTimestamp"):
                return f'resourceclaim "{name}" not found'
            if len(dig(claim, "status", "reservedFor", default=[])) >= claims.MOST_CONSUMERS:
                return f'resourceclaim "{name}" is used by {claims.MOST_CONSUMERS} pods already'
        return ""

    def _resource_claims(self, pod: Obj) -> list[Obj | None]:
        namespace = pod["metadata"]["namespace"]
        return [self.find(claims.GROUP, claims.CLAIMS, (namespace, name)) for name in claims.names_of(pod)]

    def _allocations(self, pod: Obj, node: str) -> dict[str, claims.Results | None] | None:
        """What each of the pod's claims would get on a node (None: it has it already); None where one can't be had there."""
        found: dict[str, claims.Results | None] = {}
        if not claims.names_of(pod):
            return found
        used = claims.taken(self.all(claims.GROUP, claims.CLAIMS))
        slices = self.all(claims.GROUP, "resourceslices")
        classes = {each["metadata"]["name"]: each for each in self.all(claims.GROUP, "deviceclasses")}
        for claim in filter(None, self._resource_claims(pod)):
            name, there = claim["metadata"]["name"], claims.node_of(claim)
            if there is not None and there != node:
                return None
            found[name] = None if there else claims.allocate(claim, node, slices, classes, used)
            if there is None and found[name] is None:
                return None
            used |= {(each["driver"], each["pool"], each["device"]) for each in found[name] or []}
        return found

    def _volumes_reach(self, pod: Obj, node: Obj) -> bool:
        for name in self._claims(pod):
            claim = self.find("", "persistentvolumeclaims", (pod["metadata"]["namespace"], name)) or {}
            volume = self.find("", "persistentvolumes", ("", dig(claim, "spec", "volumeName", default=""))) or {}
            required = dig(volume, "spec", "nodeAffinity", "required")
            if required is not None and not terms_match(node, required.get("nodeSelectorTerms") or []):
                return False
        return True

    def _bind(self, pod: Obj, place: _Place) -> None:
        node = place.node["metadata"]["name"]

        def change(target: Obj) -> None:
            target["spec"]["nodeName"] = node
            set_condition(target["status"], "PodScheduled", "True")

        for name, results in (self._allocations(pod, node) or {}).items():
            claim = self.find(claims.GROUP, claims.CLAIMS, (pod["metadata"]["namespace"], name))
            if claim is not None:
                self._reserve(claim, pod, node, results)
        options = Options(manager="kube-scheduler", subresource="binding")
        bound = self.api.modify(self.resource("", "pods"), *key_of(pod), change, options)
        place.take(bound)
        namespace, name = key_of(pod)
        self.event(bound, "Normal", "Scheduled", f"Successfully assigned {namespace}/{name} to {node}")

    def _reserve(self, claim: Obj, pod: Obj, node: str, results: claims.Results | None) -> None:
        def change(target: Obj) -> None:
            claims.reserve(target, pod, node, results)

        self.api.modify(self.resource(claims.GROUP, claims.CLAIMS), *key_of(claim), change, self.status_options)

    def _report(self, pod: Obj, why: str) -> None:
        known = condition(pod, "PodScheduled") or {}
        if known.get("status") == "False" and known.get("message") == why:
            return
        self.set_status(
            "", "pods", pod, lambda status: set_condition(status, "PodScheduled", "False", "Unschedulable", why)
        )
        self.event(pod, "Warning", "FailedScheduling", why)

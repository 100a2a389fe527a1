"""Dynamic resource allocation, as far as whole devices of one node go: which claims a pod waits for, and which devices they get.

The scheduler allocates a pod's claims together with the pod's node (`allocate`) and reserves them for it; `Claims` takes the
reservation back when the pod has ended or is gone, and the allocation with the last of them. Selectors are CEL, evaluated where
`cel-python` is installed; without it nothing can be allocated, and pods say so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key
from tightship.sandbox.plane.controllers.pods import is_finished
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import dig, key_of

try:
    import celpy
    from celpy import celtypes
    from celpy.adapter import json_to_cel
except ImportError:  # pragma: no cover - the package is optional
    celpy = None

GROUP, CLAIMS = "resource.k8s.io", "resourceclaims"
MOST_CONSUMERS = 256
Results = list[dict[str, str]]


def names_of(pod: Obj) -> list[str]:
    """The claims that a pod names; those it would have made from templates are not made here."""
    return [
        each["resourceClaimName"] for each in pod["spec"].get("resourceClaims") or [] if each.get("resourceClaimName")
    ]


def results_of(claim: Obj) -> Results:
    """The devices that a claim has."""
    found: Results = dig(claim, "status", "allocation", "devices", "results", default=[])
    return found


def taken(claims: Iterable[Obj]) -> set[tuple[str, str, str]]:
    """Driver, pool and name of every device that a claim has."""
    return {(each["driver"], each["pool"], each["device"]) for claim in claims for each in results_of(claim)}


def node_of(claim: Obj) -> str | None:
    """The one node that an allocated claim can be used on."""
    terms = dig(claim, "status", "allocation", "nodeSelector", "nodeSelectorTerms", default=[])
    fields = [field for term in terms for field in term.get("matchFields") or []]
    return fields[0]["values"][0] if fields else None


def allocate(
    claim: Obj, node: str, slices: list[Obj], classes: Mapping[str, Obj], used: set[tuple[str, str, str]]
) -> Results | None:
    """Devices of a node for all requests of a claim; None where they aren't there."""
    results: Results = []
    gone = set(used)
    for request in claim["spec"]["devices"].get("requests") or []:
        exact = request.get("exactly") or {}
        rules = classes.get(exact.get("deviceClassName", ""))
        if rules is None:
            return None
        selectors = [*(dig(rules, "spec", "selectors", default=[]) or []), *(exact.get("selectors") or [])]
        for _ in range(int(exact.get("count") or 1)):
            found = next(
                (each for each in _devices(node, slices) if each[:3] not in gone and _fits(each, selectors)), None
            )
            if found is None:
                return None
            driver, pool, name, _device = found
            gone.add((driver, pool, name))
            results.append({"request": request["name"], "driver": driver, "pool": pool, "device": name})
    return results


def _devices(node: str, slices: list[Obj]) -> list[tuple[str, str, str, Obj]]:
    """The devices of a node, by the newest slices of each pool."""
    here = [each for each in slices if each["spec"].get("nodeName") == node]
    newest: dict[tuple[str, str], int] = {}
    for each in here:
        pool = each["spec"]["pool"]
        key = (each["spec"]["driver"], pool["name"])
        newest[key] = max(newest.get(key, 0), int(pool.get("generation") or 0))
    return [
        (each["spec"]["driver"], each["spec"]["pool"]["name"], device["name"], device)
        for each in here
        if int(each["spec"]["pool"].get("generation") or 0)
        == newest[(each["spec"]["driver"], each["spec"]["pool"]["name"])]
        for device in each["spec"].get("devices") or []
    ]


def _fits(found: tuple[str, str, str, Obj], selectors: list[Obj]) -> bool:
    driver, _, _, device = found
    return celpy is not None and all(_holds(each["cel"]["expression"], driver, device) for each in selectors)


def _holds(expression: str, driver: str, device: Obj) -> bool:
    """Whether a selector is true of a device; what it can't be asked about (an attribute that isn't there) it isn't true of."""
    attributes: dict[str, dict[str, Any]] = {}
    for name, value in (device.get("attributes") or {}).items():
        domain, _, own = name.rpartition("/")
        attributes.setdefault(domain or driver, {})[own] = next(iter(value.values()))
    try:
        return bool(
            _program(expression).evaluate({"device": json_to_cel({"driver": driver, "attributes": attributes})})
        )
    except celpy.CELEvalError:
        return False


@functools.lru_cache(maxsize=64)
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions={"replace": _replace})


def _replace(text: Any, old: Any, new: Any) -> Any:
    """`replace` of CEL's string extensions, which Kubernetes has and cel-python lacks."""
    return celtypes.StringType(str(text).replace(str(old), str(new)))


def reserve(claim: Obj, pod: Obj, node: str, results: Results | None) -> None:
    """Note in a claim's status that a pod uses it, and with `results` what it got."""
    status = claim.setdefault("status", {})
    if results is not None:
        configs = [
            {"source": "FromClaim", **config} for config in dig(claim, "spec", "devices", "config", default=[]) or []
        ]
        terms = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]
        devices = {"results": results, **({"config": configs} if configs else {})}
        status["allocation"] = {"devices": devices, "nodeSelector": {"nodeSelectorTerms": terms}}
    users = status.setdefault("reservedFor", [])
    if not any(each["uid"] == pod["metadata"]["uid"] for each in users):
        users.append({"resource": "pods", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]})


class Claims(Controller):
    """Takes claims back from pods that have ended, and devices from claims that nobody uses."""

    name = "resource-claim-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """Claims, and the pods that name them."""

        def named(change: Change) -> list[Key]:
            return [(change.object["metadata"]["namespace"], name) for name in names_of(change.object)]

        return {(GROUP, CLAIMS): own_key, ("", "pods"): named}

    def reconcile(self, key: Key) -> float | None:
        """One claim."""
        claim = self.find(GROUP, CLAIMS, key)
        users = dig(claim or {}, "status", "reservedFor", default=[])
        if claim is None or not dig(claim, "status", "allocation"):
            return None
        pods = {pod["metadata"]["uid"]: pod for pod in self.all("", "pods", key_of(claim)[0])}
        left = [each for each in users if each["uid"] in pods and not is_finished(pods[each["uid"]])]
        if left == users and left:
            return None

        def give_back(status: Obj) -> None:
            status["reservedFor"] = left
            if not left:
                status.pop("allocation", None)
                status.pop("reservedFor", None)

        self.set_status(GROUP, CLAIMS, claim, give_back)
        return None

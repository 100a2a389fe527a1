"""What several controllers need to know about pods."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction

from tightship.api.units import exact_quantity
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.values import condition, copy, dig, owner_reference, safe_encode


def is_ready(pod: Obj) -> bool:
    """Whether the pod's Ready condition is True."""
    return (condition(pod, "Ready") or {}).get("status") == "True"


def is_finished(pod: Obj) -> bool:
    """Whether the pod has succeeded or failed."""
    return dig(pod, "status", "phase") in ("Succeeded", "Failed")


def is_going(pod: Obj) -> bool:
    """Whether the pod is being deleted."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_running_and_ready(pod: Obj) -> bool:
    """Whether the pod runs and is ready."""
    return dig(pod, "status", "phase") == "Running" and is_ready(pod)


def template_hash(template: Obj) -> str:
    """A short hash of a pod template, in the alphabet of generated names."""
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return safe_encode(int(digest[:8], 16))


def from_template(owner: Obj, template: Obj, name: str = "", generate: str = "") -> Obj:
    """A pod from a template, controlled by ``owner``."""
    meta = copy(template.get("metadata") or {})
    meta["namespace"] = owner["metadata"]["namespace"]
    meta.update({"name": name} if name else {"generateName": generate})
    meta["ownerReferences"] = [owner_reference(owner)]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": copy(template["spec"])}


def requests_of(pod: Obj) -> dict[str, Fraction]:
    """What a pod asks a node for: the larger of its containers together and any init container, plus overhead."""
    total: dict[str, Fraction] = {"pods": Fraction(1)}
    for container in pod["spec"].get("containers") or []:
        for name, amount in dig(container, "resources", "requests", default={}).items():
            total[name] = total.get(name, Fraction(0)) + exact_quantity(amount)
    for container in pod["spec"].get("initContainers") or []:
        for name, amount in dig(container, "resources", "requests", default={}).items():
            total[name] = max(total.get(name, Fraction(0)), exact_quantity(amount))
    for name, amount in (pod["spec"].get("overhead") or {}).items():
        total[name] = total.get(name, Fraction(0)) + exact_quantity(amount)
    return total


def tolerates(pod: Obj, taint: Obj) -> Obj | None:
    """The toleration with which a pod bears a taint, or None."""
    for toleration in pod["spec"].get("tolerations") or []:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        key = toleration.get("key")
        if key and key != taint["key"]:
            continue
        if toleration.get("operator", "Equal") == "Exists":
            return dict(toleration)
        if key and toleration.get("value", "") == taint.get("value", ""):
            return dict(toleration)
    return None

"""Label and field selectors, as in query strings and as in objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tightship.sandbox.plane.errors import Obj, bad_request
from tightship.sandbox.plane.values import dig

Predicate = Callable[[Obj], bool]
Labels = dict[str, str]

_KEY = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
_SET = re.compile(rf"^({_KEY})\s+(in|notin)\s*\(([^)]*)\)$")
_EQUAL = re.compile(rf"^({_KEY})\s*(==|=|!=)\s*([-A-Za-z0-9_.]*)$")
_ORDER = re.compile(rf"^({_KEY})\s*([<>])\s*(-?\d+)$")
_EXISTS = re.compile(rf"^(!?)\s*({_KEY})$")


def _split(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [part for part in [*parts, current.strip()] if part]


def parse_labels(text: str) -> Callable[[Labels], bool]:
    """A label selector of a query, e.g. ``app=a,tier in (x,y),!old``. Raises ApiError 400."""
    tests = [_label_test(part) for part in _split(text)]
    return lambda labels: all(test(labels) for test in tests)


def _label_test(part: str) -> Callable[[Labels], bool]:
    if match := _SET.match(part):
        key, operator, listed = match.groups()
        values = {value.strip() for value in listed.split(",")}
        if operator == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := _EQUAL.match(part):
        key, operator, value = match.groups()
        if operator == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _ORDER.match(part):
        key, operator, number = match.groups()
        sign = 1 if operator == ">" else -1
        return lambda labels: _is_int(labels.get(key)) and sign * int(labels[key]) > sign * int(number)
    if match := _EXISTS.match(part):
        absent, key = match.groups()
        return lambda labels: (key not in labels) if absent else (key in labels)
    raise bad_request(f"unable to parse requirement: found '{part}', expected: a label selector")


def _is_int(value: Any) -> bool:
    return value is not None and re.match(r"^-?\d+$", value) is not None


def matches(selector: Obj | None, labels: Labels | None) -> bool:
    """Whether a ``metav1.LabelSelector`` selects the labels; None selects nothing, ``{}`` everything."""
    if selector is None:
        return False
    labels = labels or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(expression_holds(rule, labels) for rule in selector.get("matchExpressions") or [])


def expression_holds(rule: Obj, labels: Labels) -> bool:
    """One requirement with ``key``, ``operator`` and ``values`` (label selectors and node affinity)."""
    key, values = rule["key"], rule.get("values") or []
    has = key in labels
    operator = rule["operator"]
    if operator in ("Gt", "Lt"):
        number = labels.get(key)
        if not _is_int(number) or not values:
            return False
        return int(number or 0) > int(values[0]) if operator == "Gt" else int(number or 0) < int(values[0])
    return {
        "In": has and labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": has,
        "DoesNotExist": not has,
    }[operator]


def selector_text(selector: Obj | None) -> str:
    """A ``metav1.LabelSelector`` as the text of a query."""
    if not selector:
        return ""
    parts = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for rule in selector.get("matchExpressions") or []:
        values = ",".join(sorted(rule.get("values") or []))
        parts.append(
            {
                "In": f"{rule['key']} in ({values})",
                "NotIn": f"{rule['key']} notin ({values})",
                "Exists": rule["key"],
                "DoesNotExist": f"!{rule['key']}",
            }[rule["operator"]]
        )
    return ",".join(parts)


# What each kind's field selector knows beside metadata.name and metadata.namespace; the value is what an absent field
# compares as.
_FIELDS: dict[str, dict[str, str]] = {
    "Pod": {
        "spec.nodeName": "",
        "spec.restartPolicy": "",
        "spec.schedulerName": "",
        "spec.serviceAccountName": "",
        "spec.hostNetwork": "false",
        "status.phase": "",
        "status.podIP": "",
        "status.nominatedNodeName": "",
    },
    "Event": {
        f"involvedObject.{name}": ""
        for name in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
    }
    | {"reason": "", "reportingComponent": "", "source": "", "type": ""}
    | {f"regarding.{name}": "" for name in ("kind", "namespace", "name", "uid", "apiVersion", "fieldPath")}
    | {"reportingController": ""},
    "Namespace": {"status.phase": ""},
    "Node": {"spec.unschedulable": "false"},
    "Secret": {"type": ""},
    "Job": {"status.successful": "0"},
    "ReplicaSet": {"status.replicas": "0"},
    "ReplicationController": {"status.replicas": "0"},
    "Service": {"spec.clusterIP": "", "spec.type": ""},
}
_ALIASES = {"status.successful": "status.succeeded", "source": "source.component"}


def parse_fields(text: str, kind: str, selectable: tuple[str, ...] = ()) -> Predicate:
    """A field selector of a query. Raises ApiError 400 for a field that the kind doesn't select by."""
    tests: list[Predicate] = []
    for part in filter(None, text.split(",")):
        match = re.match(r"^([^=!]+?)(==|!=|=)(.*)$", part)
        if not match:
            raise bad_request(f"invalid selector: '{part}'; can't understand '{part}'")
        tests.append(_field_test(match.group(1), match.group(2), match.group(3), kind, selectable))
    return lambda obj: all(test(obj) for test in tests)


def _field_test(name: str, operator: str, wanted: str, kind: str, selectable: tuple[str, ...]) -> Predicate:
    known = {"metadata.name": "", "metadata.namespace": "", **_FIELDS.get(kind, {})}
    known |= dict.fromkeys(selectable, "")
    if name not in known:
        raise bad_request(f"field label not supported: {name}")
    path = _ALIASES.get(name, name).split(".")

    def test(obj: Obj) -> bool:
        value = dig(obj, *path, default=known[name])
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return (text == wanted) != (operator == "!=")

    return test

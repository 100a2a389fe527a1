"""CEL rules (``x-kubernetes-validations``) of custom resources.

Rules run where ``cel-python`` is installed; without it a cluster older than 1.25 is imitated, which ignores them. A rule
that mentions ``oldSelf`` is a transition rule: it runs on updates only, where an old value exists at the same place.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

from tightship.sandbox.plane.errors import Cause
from tightship.sandbox.plane.fieldsets import element_of
from tightship.sandbox.plane.schema import Node

try:
    import celpy
    from celpy.adapter import json_to_cel
except ImportError:  # pragma: no cover - the package is optional
    celpy = None

_OLD = re.compile(r"\boldSelf\b")
_REASONS = {
    "FieldValueRequired": "required",
    "FieldValueForbidden": "forbidden",
    "FieldValueDuplicate": "duplicate",
}


@functools.lru_cache(maxsize=512)
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def _evaluate(expression: str, value: Any, old: Any) -> Any:
    names = {"self": json_to_cel(value)}
    if old is not None:
        names["oldSelf"] = json_to_cel(old)
    return _program(expression).evaluate(names)


def available() -> bool:
    """Whether rules are evaluated at all."""
    return celpy is not None


def check_rules(node: Node, value: Any, old: Any = None, path: str = "") -> list[Cause]:
    """All violated rules in ``value``; ``old`` is what it replaces, None on create."""
    return list(_check(node, value, old, path)) if available() else []


def _check(node: Node, value: Any, old: Any, path: str) -> Iterator[Cause]:
    for rule in node.raw.get("x-kubernetes-validations") or []:
        yield from _rule(rule, node, value, old, path)
    if isinstance(value, dict):
        before: dict[str, Any] = old if isinstance(old, dict) else {}
        for name, item in value.items():
            if path or name not in ("metadata", "apiVersion", "kind"):
                yield from _check(node.child(name), item, before.get(name), f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        # Only items with keys correspond to items of the old list.
        items = old if isinstance(old, list) and node.list_type == "map" else []
        by_key = {element_of(node, item): item for item in items}
        for index, item in enumerate(value):
            counterpart = by_key.get(element_of(node, item)) if by_key else None
            yield from _check(node.item(), item, counterpart, f"{path}[{index}]")


def _rule(rule: dict[str, Any], node: Node, value: Any, old: Any, path: str) -> Iterator[Cause]:
    expression = rule["rule"]
    if _OLD.search(expression) and old is None:
        return
    where = (path or "<nil>") + rule.get("fieldPath", "")
    shown = node.type if isinstance(value, (dict, list)) else value
    try:
        if bool(_evaluate(expression, value, old)):
            return
    except (celpy.CELEvalError, celpy.CELParseError) as error:
        yield Cause("invalid", where, f"rule evaluation error: {expression}: {error}", shown)
        return
    message = rule.get("message") or f"failed rule: {expression}"
    if rule.get("messageExpression"):
        with contextlib.suppress(celpy.CELEvalError):
            message = str(_evaluate(rule["messageExpression"], value, old))
    yield Cause(_REASONS.get(rule.get("reason", ""), "invalid"), where, message, shown)

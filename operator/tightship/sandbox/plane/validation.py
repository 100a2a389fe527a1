"""Validation of custom resources against their structural schemas, with the wording of the real server.

Covers types, enum, bounds, patterns, required fields, sizes, unique lists and keys, the ``allOf``/``anyOf``/``oneOf``/``not``
junctors, and CEL rules (by :mod:`tightship.sandbox.plane.cel`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from tightship.sandbox.plane.errors import Cause
from tightship.sandbox.plane.schema import Node
from tightship.sandbox.plane.values import parse_time

_DURATION = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*$")


@functools.lru_cache(maxsize=512)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text.replace("\\z", "\\Z"))


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def validate(node: Node, value: Any, path: str = "") -> list[Cause]:
    """All violations of the schema in ``value``; empty when there are none."""
    return list(_validate(node, value, path))


def _validate(node: Node, value: Any, path: str) -> Iterator[Cause]:
    where = path or "<nil>"
    if value is None and (node.raw.get("nullable") or not node.type):
        return
    found = _type_of(value)
    if node.int_or_string:
        if found not in ("integer", "string"):
            yield Cause("type", where, f'{where} in body must be of type integer,string: "{found}"', found)
            return
    elif node.type and found != node.type and not (node.type == "number" and found == "integer"):
        yield Cause("type", where, f'{where} in body must be of type {node.type}: "{found}"', found)
        return
    yield from _enum(node, value, where)
    if found in ("integer", "number"):
        yield from _bounds(node, value, where)
    elif found == "string":
        yield from _string(node, value, where)
    elif found == "array":
        yield from _array(node, value, path, where)
    elif found == "object":
        yield from _object(node, value, path, where)
    yield from _junctors(node, value, path, where)


def _enum(node: Node, value: Any, where: str) -> Iterator[Cause]:
    allowed = node.raw.get("enum")
    if allowed is not None and value not in allowed:
        options = ", ".join(json.dumps(option) for option in allowed)
        yield Cause("unsupported", where, f"supported values: {options}", value)


def _bounds(node: Node, value: float, where: str) -> Iterator[Cause]:
    low, high, step = node.raw.get("minimum"), node.raw.get("maximum"), node.raw.get("multipleOf")
    if low is not None:
        strict = bool(node.raw.get("exclusiveMinimum"))
        if value < low or (strict and value == low):
            word = "greater than" if strict else "greater than or equal to"
            yield Cause("invalid", where, f"{where} in body should be {word} {low}", value)
    if high is not None:
        strict = bool(node.raw.get("exclusiveMaximum"))
        if value > high or (strict and value == high):
            word = "less than" if strict else "less than or equal to"
            yield Cause("invalid", where, f"{where} in body should be {word} {high}", value)
    if step and (value / step) != int(value / step):
        yield Cause("invalid", where, f"{where} in body should be a multiple of {step}", value)


def _string(node: Node, value: str, where: str) -> Iterator[Cause]:
    low, high, pattern = node.raw.get("minLength"), node.raw.get("maxLength"), node.raw.get("pattern")
    if low is not None and len(value) < low:
        yield Cause("invalid", where, f"{where} in body should be at least {low} chars long", value)
    if high is not None and len(value) > high:
        yield Cause("toolong", where, f"may not be more than {high} bytes", value)
    if pattern and not _pattern(pattern).search(value):
        yield Cause("invalid", where, f"{where} in body should match '{pattern}'", value)
    form = node.raw.get("format")
    if form and not _format_holds(form, value):
        yield Cause("invalid", where, f'{where} in body must be of type {form}: "{value}"', value)


def _format_holds(form: str, value: str) -> bool:
    if form == "date-time":
        try:
            parse_time(value)
        except ValueError:
            return False
    if form == "duration":
        return bool(_DURATION.match(value))
    if form == "date":
        return bool(re.match(r"^\d{4}-\d\d-\d\d$", value))
    if form == "uuid":
        return bool(re.match(r"(?i)^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$", value))
    return True


def _array(node: Node, value: list[Any], path: str, where: str) -> Iterator[Cause]:
    low, high = node.raw.get("minItems"), node.raw.get("maxItems")
    if low is not None and len(value) < low:
        yield Cause("invalid", where, f"{where} in body should have at least {low} items", len(value))
    if high is not None and len(value) > high:
        yield Cause("toomany", where, f"{len(value)}: must have at most {high} items")
    for index, item in enumerate(value):
        yield from _validate(node.item(), item, f"{path}[{index}]")
    seen: set[str] = set()
    for index, item in enumerate(value):
        key = _list_key(node, item)
        if key is None:
            continue
        text = json.dumps(key, sort_keys=True)
        if text in seen:
            yield Cause("duplicate", f"{path}[{index}]", "", key)
        seen.add(text)


def _list_key(node: Node, item: Any) -> Any:
    if node.list_type == "set" or node.raw.get("uniqueItems"):
        return item
    if node.list_type == "map" and isinstance(item, dict):
        return {key: item.get(key, node.item().child(key).raw.get("default")) for key in node.keys}
    return None


def _object(node: Node, value: dict[str, Any], path: str, where: str) -> Iterator[Cause]:
    for name in node.required:
        if name not in value:
            yield Cause("required", f"{path}.{name}" if path else name)
    low, high = node.raw.get("minProperties"), node.raw.get("maxProperties")
    if low is not None and len(value) < low:
        yield Cause("invalid", where, f"{where} in body should have at least {low} properties", len(value))
    if high is not None and len(value) > high:
        yield Cause("toomany", where, f"{len(value)}: must have at most {high} items")
    for name, item in value.items():
        if not path and name in ("apiVersion", "kind", "metadata"):
            continue
        if name in node.fields or node.element is not None:
            yield from _validate(node.child(name), item, f"{path}.{name}" if path else name)


def _junctors(node: Node, value: Any, path: str, where: str) -> Iterator[Cause]:
    def holds(part: Any) -> bool:
        return not validate(Node(part, {}), value, path)

    raw = node.raw
    for part in raw.get("allOf") or []:
        yield from _validate(Node(part, {}), value, path)
    if raw.get("anyOf") and not node.int_or_string and not any(holds(part) for part in raw["anyOf"]):
        yield Cause("invalid", where, f"{where} in body must validate at least one schema (anyOf)", value)
    if raw.get("oneOf") and sum(holds(part) for part in raw["oneOf"]) != 1:
        yield Cause("invalid", where, f"{where} in body must validate one and only one schema (oneOf)", value)
    if raw.get("not") and holds(raw["not"]):
        yield Cause("invalid", where, f"{where} in body must not validate the schema (not)", value)

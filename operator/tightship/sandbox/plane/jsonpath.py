"""The JSONPath of printer columns: fields, indices, wildcards, slices, unions of names, and comparing filters.

``.status.conditions[?(@.type=="Ready")].status`` and its like. Paths are parsed once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

Step = Callable[[list[Any]], list[Any]]

_FILTER = re.compile(r"^\?\(\s*@(\.?[^=!<>\s]*)\s*(?:(==|!=|<=|>=|<|>)\s*(.+?))?\s*\)$")


def find(path: str, value: Any) -> list[Any]:
    """All values at a path, in order; a path that leads nowhere gives none. Raises ValueError for a malformed path."""
    values = [value]
    for step in _compile(path.strip().removeprefix("{").removesuffix("}").removeprefix("$")):
        values = step(values)
    return values


@functools.lru_cache(maxsize=512)
def _compile(path: str) -> tuple[Step, ...]:
    steps: list[Step] = []
    position = 0
    while position < len(path):
        if path[position] == ".":
            position += 1
            continue
        if path[position] == "[":
            end = _closing(path, position)
            steps.append(_bracket(path[position + 1 : end].strip()))
            position = end + 1
            continue
        name, position = _name(path, position)
        steps.append(_wildcard if name == "*" else _field(name))
    return tuple(steps)


def _name(path: str, position: int) -> tuple[str, int]:
    name = ""
    while position < len(path) and path[position] not in ".[":
        if path[position] == "\\" and position + 1 < len(path):
            position += 1
        name += path[position]
        position += 1
    return name, position


def _closing(path: str, start: int) -> int:
    depth, quote = 0, ""
    for position in range(start, len(path)):
        char = path[position]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError(f"unclosed bracket in the JSONPath {path!r}")


def _field(name: str) -> Step:
    return lambda values: [value[name] for value in values if isinstance(value, dict) and value.get(name) is not None]


def _wildcard(values: list[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, list):
            found += value
    return found


def _bracket(inner: str) -> Step:
    if inner == "*":
        return _wildcard
    if inner.startswith("?"):
        return _filter(inner)
    if inner[:1] in "'\"":
        return _field(inner[1:-1])
    if ":" in inner:
        start, stop = (int(part) if part else None for part in inner.split(":")[:2])
        return lambda values: [item for value in values if isinstance(value, list) for item in value[start:stop]]
    if not re.match(r"^-?\d+$", inner):
        raise ValueError(f"can't read [{inner}] in a JSONPath")
    index = int(inner)
    return lambda values: [
        value[index] for value in values if isinstance(value, list) and -len(value) <= index < len(value)
    ]


def _filter(inner: str) -> Step:
    match = _FILTER.match(inner)
    if not match:
        raise ValueError(f"can't read the filter {inner!r} in a JSONPath")
    path, operator, literal = match.groups()
    wanted = _literal(literal) if literal else None

    def holds(item: Any) -> bool:
        found = find(path, item)
        if not operator:
            return bool(found)
        return any(_compare(value, operator, wanted) for value in found)

    return lambda values: [item for value in values if isinstance(value, list) for item in value if holds(item)]


def _literal(text: str) -> Any:
    if text[:1] == "'":
        return text[1:-1]
    return json.loads(text)


def _compare(value: Any, operator: str, wanted: Any) -> bool:
    if operator == "==":
        return bool(value == wanted)
    if operator == "!=":
        return bool(value != wanted)
    if isinstance(value, str) != isinstance(wanted, str):
        return False
    return bool({"<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted}[operator])

"""Sets of field paths: what server-side apply reasons with.

A path is a tuple of path elements in the notation of ``fieldsV1``: ``f:name`` (a field), ``k:{"name":"a"}`` (an item of
a list that is a map), ``v:"x"`` (an item of a set). A set is a plain Python set of paths.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.schema import Node

Path = tuple[str, ...]
Paths = set[Path]


class _Container:
    """Stands for the value of a path that only holds others: equal to every other container."""


CONTAINER = _Container()


@dataclass
class Flat:
    """An object as paths.

    Attributes:
        values: every path to its leaf value, or to ``CONTAINER``.
        owned: the paths that an applier of exactly this object owns.
    """

    values: dict[Path, Any] = field(default_factory=dict)
    owned: Paths = field(default_factory=set)


def element_of(node: Node, item: Any) -> str:
    """The path element of a list item."""
    if node.list_type == "map" and isinstance(item, dict):
        keys: Obj = {}
        for key in node.keys:
            value = item.get(key, node.item().child(key).raw.get("default"))
            if value is not None:
                keys[key] = value
        return "k:" + json.dumps(keys, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "v:" + json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def flatten(node: Node, value: Any) -> Flat:
    """All paths of an object."""
    flat = Flat()
    _flatten(node, value, (), flat)
    return flat


def _flatten(node: Node, value: Any, path: Path, flat: Flat) -> None:
    if isinstance(value, dict) and not node.atomic:
        if path:
            flat.values[path] = CONTAINER
        for name, item in value.items():
            child_path = (*path, f"f:{name}")
            _flatten(node.child(name), item, child_path, flat)
            if item is None or item == {} or name not in node.fields:
                flat.owned.add(child_path)
    elif isinstance(value, list) and node.granular:
        flat.values[path] = CONTAINER
        for item in value:
            child_path = (*path, element_of(node, item))
            _flatten(node.item(), item, child_path, flat)
            flat.values.setdefault(child_path, CONTAINER)
            flat.owned.add(child_path)
    else:
        flat.values[path] = value
        flat.owned.add(path)


def to_fields(paths: Paths) -> Obj:
    """A set as the ``fieldsV1`` object."""
    root: Obj = {}
    for path in sorted(paths):
        here = root
        for element in path:
            here = here.setdefault(element, {})
        here["."] = {}
    _drop_lone_dots(root)
    return root


def _drop_lone_dots(node: Obj) -> None:
    for child in node.values():
        if list(child) == ["."]:
            del child["."]
        else:
            _drop_lone_dots(child)


def from_fields(fields: Obj) -> Paths:
    """The set of a ``fieldsV1`` object."""
    found: Paths = set()
    _from_fields(fields, (), found)
    return found


def _from_fields(fields: Obj, path: Path, found: Paths) -> None:
    for element, child in fields.items():
        if element == ".":
            found.add(path)
            continue
        here = (*path, element)
        if child:
            _from_fields(child, here, found)
        else:
            found.add(here)


def show(path: Path) -> str:
    """A path as messages write it: ``.spec.containers[name="a"].image``."""
    text = ""
    for element in path:
        kind, _, rest = element.partition(":")
        if kind == "f":
            text += f".{rest}"
        elif kind == "k":
            keys = json.loads(rest)
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in keys.items()) + "]"
        else:
            text += f"[={rest}]"
    return text


def remove(node: Node, value: Any, paths: Paths, path: Path = ()) -> Any:
    """The value without what the paths name; containers that this empties go too (None is returned then)."""
    if isinstance(value, dict) and not node.atomic:
        out: Obj = {}
        for name, item in value.items():
            here = (*path, f"f:{name}")
            if here in paths:
                continue
            if any(other[: len(here)] == here for other in paths):
                rest = remove(node.child(name), item, paths, here)
                if rest is not None:
                    out[name] = rest
            else:
                out[name] = item
        return out or None
    if isinstance(value, list) and node.granular:
        kept = []
        for item in value:
            here = (*path, element_of(node, item))
            if here in paths:
                continue
            rest = remove(node.item(), item, paths, here)
            kept.append(item if rest is None else rest)
        return kept or None
    return value

"""The three classic patches: JSON patch, JSON merge patch, and strategic merge patch.

Each is a pure function from an object and a patch to a new object. Failures are ApiErrors with the real server's status.
"""

from __future__ import annotations

from typing import Any

from tightship.sandbox.plane.errors import ApiError, Obj, bad_request
from tightship.sandbox.plane.schema import Node
from tightship.sandbox.plane.values import copy


def _pointer(text: str) -> list[str]:
    if text == "":
        return []
    if not text.startswith("/"):
        raise bad_request(f"invalid JSON pointer {text!r}: it must start with '/'")
    return [part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/")]


def _failed(message: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request due to an error in our request: {message}")


def _step(value: Any, part: str) -> Any:
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and part.isdigit() and int(part) < len(value):
        return value[int(part)]
    raise _failed(f"the path segment {part!r} does not exist")


def _parent(root: Any, path: list[str]) -> Any:
    for part in path[:-1]:
        root = _step(root, part)
    return root


def _add(root: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _parent(root, path), path[-1]
    if isinstance(parent, list):
        index = len(parent) if last == "-" else int(last) if last.isdigit() else -1
        if not 0 <= index <= len(parent):
            raise _failed(f"no index {last!r} in an array of {len(parent)}")
        parent.insert(index, value)
    elif isinstance(parent, dict):
        parent[last] = value
    else:
        raise _failed(f"can't add {last!r} to a scalar")
    return root


def _remove(root: Any, path: list[str]) -> Any:
    parent, last = _parent(root, path), path[-1]
    removed = _step(parent, last)
    del parent[int(last) if isinstance(parent, list) else last]
    return removed


def json_patch(target: Obj, operations: Any) -> Obj:
    """RFC 6902. Raises ApiError 400 for an unreadable patch, 422 for one that doesn't apply."""
    if not isinstance(operations, list):
        raise bad_request("json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    root: Any = copy(target)
    for operation in operations:
        kind, path = operation.get("op"), _pointer(operation.get("path", ""))
        value = copy(operation.get("value"))
        if kind == "add":
            root = _add(root, path, value)
        elif kind == "remove":
            _remove(root, path)
        elif kind == "replace":
            if not path:
                root = value
                continue
            parent = _parent(root, path)
            _step(parent, path[-1])
            parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = value
        elif kind in ("move", "copy"):
            source = _pointer(operation.get("from", ""))
            moved = _remove(root, source) if kind == "move" else copy(_step(_parent(root, source), source[-1]))
            root = _add(root, path, moved)
        elif kind == "test":
            if (_step(_parent(root, path), path[-1]) if path else root) != value:
                raise _failed(f"testing path {operation.get('path')} value failed")
        else:
            raise bad_request(f"unknown JSON patch operation {kind!r}")
    return dict(root)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return copy(patch)
    out = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = merge_patch(out.get(name), value)
    return out


def strategic_patch(node: Node, target: Any, patch: Any) -> Any:
    """Strategic merge patch of a built-in kind, with ``$patch``, ``$retainKeys``, ``$setElementOrder`` and
    ``$deleteFromPrimitiveList``."""
    if not isinstance(patch, dict):
        return copy(patch)
    if patch.get("$patch") == "replace":
        return _clean({key: value for key, value in patch.items() if key != "$patch"})
    if patch.get("$patch") == "delete":
        return {}
    out = dict(target) if isinstance(target, dict) else {}
    retained = patch.get("$retainKeys")
    if retained is not None:
        out = {key: value for key, value in out.items() if key in retained}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        if value is None:
            out.pop(name, None)
            continue
        child = node.child(name)
        if isinstance(value, list) and "merge" in child.strategies:
            order = patch.get(f"$setElementOrder/{name}")
            out[name] = _merge_list(child, out.get(name) or [], value, order)
        elif isinstance(value, dict):
            out[name] = strategic_patch(child, out.get(name), value)
        else:
            out[name] = copy(value)
    for name, value in patch.items():
        kind, _, field = name.partition("/")
        if kind == "$deleteFromPrimitiveList" and isinstance(out.get(field), list):
            out[field] = [item for item in out[field] if item not in value]
        elif kind == "$setElementOrder" and field not in patch and isinstance(out.get(field), list):
            out[field] = _ordered(node.child(field), out[field], value)
    return out


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if not key.startswith("$") and item is not None}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _merge_list(node: Node, target: list[Any], patch: list[Any], order: list[Any] | None) -> list[Any]:
    key = node.merge_key
    if not key:
        merged = [*target, *(item for item in patch if item not in target)]
        return _ordered(node, merged, order)
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [_clean(item) for item in patch if item.get("$patch") != "replace"]
    out = list(target)
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        index = next((i for i, old in enumerate(out) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            out = [old for old in out if old.get(key) != item[key]]
        elif index is None:
            out.append(_clean(item))
        elif item.get("$patch") == "replace":
            out[index] = _clean(item)
        else:
            out[index] = strategic_patch(node.item(), out[index], item)
    return _ordered(node, out, order)


def _ordered(node: Node, items: list[Any], order: list[Any] | None) -> list[Any]:
    if not order:
        return items
    key = node.merge_key

    def rank(item: Any) -> Any:
        return item.get(key) if key and isinstance(item, dict) else item

    ranks = {_hashable(rank(item)): index for index, item in enumerate(order)}
    # What the order doesn't name keeps its place behind its predecessor.
    place, placed = -1, []
    for position, item in enumerate(items):
        place = ranks.get(_hashable(rank(item)), place)
        placed.append((place, position, item))
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, (dict, list)) else value

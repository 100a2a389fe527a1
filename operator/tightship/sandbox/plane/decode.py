"""Reading objects by a schema: unknown fields out, values in their stored form, defaults in.

For built-in kinds a wrong type is an unreadable body (400), as for a server that decodes into Go structs; for custom
resources it is left in place and found by validation (422).
"""

from __future__ import annotations

import datetime
from typing import Any

from tightship.sandbox.plane.errors import Obj, bad_request
from tightship.sandbox.plane.schema import Node
from tightship.sandbox.plane.values import canonical_quantity, copy, micro_stamp, parse_time, stamp

_GO_TYPES = {"string": "string", "integer": "int64", "number": "float64", "boolean": "bool"}
_GO_VALUES = {str: "string", bool: "bool", int: "number", float: "number", dict: "object", list: "array"}


class Decoder:
    """Decodes one object of a built-in kind.

    Attributes:
        unknown: the paths of fields that the schema doesn't have, e.g. ``spec.foo``.
    """

    def __init__(self, kind: str, version: str) -> None:
        self.kind, self.version = kind, version
        self.unknown: list[str] = []

    def decode(self, node: Node, value: Any, path: str = "") -> Any:
        """The value in its stored form. Raises ApiError 400 for a value of the wrong type."""
        if node.quantity:
            return self._quantity(value, path)
        if node.int_or_string:
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise self._mismatch(value, path, "intstr.IntOrString")
            return value
        if node.type == "object":
            return self._object(node, value, path)
        if node.type == "array":
            if not isinstance(value, list):
                raise self._mismatch(value, path, "[]" + str(node.item().raw.get("type", "object")))
            return [self.decode(node.item(), item, f"{path}[{index}]") for index, item in enumerate(value)]
        if node.type in _GO_TYPES:
            return self._scalar(node, value, path)
        return copy(value)

    def _object(self, node: Node, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise self._mismatch(value, path, node.raw.get("title", "struct"))
        if node.open and not node.fields:
            return copy(value)
        out: Obj = {}
        for name, item in value.items():
            where = f"{path}.{name}" if path else name
            if name not in node.fields and node.element is None:
                if node.open:
                    out[name] = copy(item)
                else:
                    self.unknown.append(where)
                continue
            if item is None:
                continue
            out[name] = self.decode(node.child(name), item, where)
        return out

    def _scalar(self, node: Node, value: Any, path: str) -> Any:
        fits = {
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "integer": isinstance(value, int) and not isinstance(value, bool),
            "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        }[node.type]
        if node.type == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        if not fits:
            raise self._mismatch(value, path, _GO_TYPES[node.type])
        form = node.raw.get("format")
        if form in ("date-time", "micro-time") and value:
            return self._time(value, form == "micro-time")
        return value

    def _time(self, text: str, micro: bool) -> str:
        try:
            at: datetime.datetime = parse_time(text)
        except ValueError as error:
            raise self._unreadable(f'parsing time "{text}" as "2006-01-02T15:04:05Z07:00": {error}') from error
        return micro_stamp(at) if micro else stamp(at)

    def _quantity(self, value: Any, path: str) -> str:
        try:
            return canonical_quantity(value)
        except ValueError as error:
            raise self._unreadable(
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
            ) from error

    def _mismatch(self, value: Any, path: str, wanted: str) -> Exception:
        got = _GO_VALUES.get(type(value), "null")
        return self._unreadable(
            f"json: cannot unmarshal {got} into Go struct field {self.kind}.{path} of type {wanted}"
        )

    def _unreadable(self, why: str) -> Exception:
        return bad_request(f'{self.kind} in version "{self.version}" cannot be handled as a {self.kind}: {why}')


def apply_defaults(node: Node, value: Any) -> None:
    """Fills in the defaults of a structural schema, in place.

    A null in a field that has a default and isn't nullable counts as missing.
    """
    if isinstance(value, dict):
        for name, child in node.fields.items():
            if "default" not in child.raw:
                continue
            if name not in value or (value[name] is None and not child.raw.get("nullable")):
                value[name] = copy(child.raw["default"])
        for name, item in value.items():
            apply_defaults(node.child(name), item)
    elif isinstance(value, list):
        for item in value:
            apply_defaults(node.item(), item)


def prune(node: Node, value: Any, path: str = "") -> list[str]:
    """Drops fields that a structural schema doesn't have, in place; returns their paths.

    Nulls in non-nullable fields go too, as in the real server.
    """
    gone: list[str] = []
    if isinstance(value, dict):
        for name in list(value):
            where = f"{path}.{name}" if path else name
            known = name in node.fields or node.element is not None
            if node.embedded and name in ("apiVersion", "kind", "metadata"):
                continue
            if not known:
                if not node.open:
                    del value[name]
                    gone.append(where)
                continue
            child = node.child(name)
            if value[name] is None and not child.raw.get("nullable") and "default" in child.raw:
                del value[name]
                continue
            gone += prune(child, value[name], where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            gone += prune(node.item(), item, f"{path}[{index}]")
    return gone

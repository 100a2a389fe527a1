"""One view of a schema for decoding, patching, defaulting and server-side apply.

A ``Node`` is an OpenAPI schema with its references resolved and its Kubernetes extensions read. The same class serves
built-in kinds (schemas derived from the ``kubernetes`` package) and custom resources (structural schemas), so every
algorithm of the plane is written once. Nodes are immutable and may form cycles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from tightship.sandbox.plane.errors import Obj

_REF = "#/components/schemas/"


class Node:
    """A schema node.

    Attributes:
        raw: the OpenAPI schema, without the reference that led here but with the referrer's annotations.
        type: ``object``, ``array``, ``string``, ``integer``, ``number``, ``boolean`` or ``""`` (anything).
    """

    def __init__(self, raw: Mapping[str, Any], definitions: Mapping[str, Obj]) -> None:
        self._definitions = definitions
        merged: Obj = {}
        for part in [raw, *(raw.get("allOf") or [])] if _has_ref(raw) else [raw]:
            if "$ref" in part:
                merged.update(definitions[part["$ref"].rsplit("/", 1)[1]])
        merged.update({key: value for key, value in raw.items() if key != "$ref" and not (key == "allOf" and merged)})
        self.raw = merged
        self.type: str = merged.get("type", "object" if "properties" in merged else "")
        self.int_or_string = bool(merged.get("x-kubernetes-int-or-string")) or merged.get("format") == "int-or-string"
        self.quantity = merged.get("format") == "quantity"
        self.preserve = bool(merged.get("x-kubernetes-preserve-unknown-fields"))
        self.embedded = bool(merged.get("x-kubernetes-embedded-resource"))
        self.list_type: str = merged.get("x-kubernetes-list-type", "atomic")
        self.keys: tuple[str, ...] = tuple(merged.get("x-kubernetes-list-map-keys", ()))
        self.merge_key: str = merged.get("x-kubernetes-patch-merge-key", "")
        self.strategies = set(filter(None, merged.get("x-kubernetes-patch-strategy", "").split(",")))
        self.atomic = merged.get("x-kubernetes-map-type") == "atomic"

    @functools.cached_property
    def fields(self) -> dict[str, Node]:
        """The declared properties of an object."""
        return {name: Node(raw, self._definitions) for name, raw in (self.raw.get("properties") or {}).items()}

    @functools.cached_property
    def element(self) -> Node | None:
        """The schema of a list's items or of a map's values."""
        if self.type == "array":
            items = self.raw.get("items")
            return Node(items, self._definitions) if isinstance(items, dict) else None
        extra = self.raw.get("additionalProperties")
        return Node(extra, self._definitions) if isinstance(extra, dict) else None

    @property
    def open(self) -> bool:
        """Whether unknown fields are kept: a free-form object."""
        return self.preserve or self.raw.get("additionalProperties") is True or not self.type

    @property
    def required(self) -> list[str]:
        """The names of required properties."""
        return list(self.raw.get("required") or [])

    def child(self, name: str) -> Node:
        """The node of a field; ``ANY`` for what the schema does not describe."""
        return self.fields.get(name) or self.element or ANY

    def item(self) -> Node:
        """The node of a list item."""
        return self.element or ANY

    @property
    def granular(self) -> bool:
        """Whether an array is merged by item (a map or a set) instead of being replaced whole."""
        return self.type == "array" and self.list_type in ("map", "set")


def _has_ref(raw: Mapping[str, Any]) -> bool:
    return "$ref" in raw or any("$ref" in part for part in raw.get("allOf") or [])


ANY = Node({}, {})


def reference(name: str) -> Obj:
    """A reference to a named definition."""
    return {"$ref": _REF + name}

"""OpenAPI documents, version 3 (one a group and version) and version 2 (one for all).

They carry what clients use them for: schemas with descriptions (``kubectl explain``), merge keys and group-version-kinds
(``kubectl apply``), and the parameters of each operation (``kubectl`` looks for ``fieldValidation`` on PATCH).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tightship.sandbox.plane.errors import Obj, no_such_page
from tightship.sandbox.plane.registry import Registry, Resource
from tightship.sandbox.plane.schema import reference
from tightship.sandbox.plane.values import copy

# kubectl reads version 2 only as protobuf, and only for kinds that version 3 doesn't have: an empty document (the field
# ``swagger: "2.0"``) is the truth then, and gets the user the message about the missing kind.
PROTOBUF_V2 = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
EMPTY_V2 = b"\n\x032.0"
_INFO = {"title": "Kubernetes", "version": "v1.36.0"}
_PATCHES = ("application/apply-patch+yaml", "application/json-patch+json", "application/merge-patch+json")
_STRATEGIC = "application/strategic-merge-patch+json"
_WRITE = ("dryRun", "fieldManager", "fieldValidation")


def _query(*names: str) -> list[Obj]:
    return [{"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}} for name in names]


def _in_path(name: str) -> Obj:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


class OpenApi:
    """The documents of a registry; each is made once a revision of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._made: dict[str, tuple[int, bytes]] = {}

    def _cached(self, key: str, make: Any) -> bytes:
        found = self._made.get(key)
        if found is None or found[0] != self._registry.revision:
            found = (self._registry.revision, json.dumps(make(), separators=(",", ":")).encode())
            self._made[key] = found
        return found[1]

    def index(self) -> Obj:
        """``/openapi/v3``: where the documents are, with their hashes."""
        paths = {}
        for path in sorted({resource.path.lstrip("/") for resource in self._registry}):
            digest = hashlib.sha256(self.document(path)).hexdigest().upper()
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}
        return {"paths": paths}

    def document(self, path: str) -> bytes:
        """``/openapi/v3/apis/GROUP/VERSION``. Raises ApiError 404."""
        found = [resource for resource in self._registry if resource.path.lstrip("/") == path]
        if not found:
            raise no_such_page()
        return self._cached(path, lambda: self._build(found))

    def _build(self, resources: list[Resource]) -> Obj:
        paths: Obj = {}
        for resource in resources:
            paths.update(_paths(resource))
        names = {resource.definition for resource in resources}
        names |= {"io.k8s.api.v1.DeleteOptions", "io.k8s.api.v1.Status"}
        if any(resource.scale for resource in resources):
            names.add("io.k8s.api.v1.Scale")
        schemas = {name: _published(self._registry.definitions[name]) for name in self._closure(names)}
        return {"openapi": "3.0.0", "info": _INFO, "paths": paths, "components": {"schemas": schemas}}

    def _closure(self, names: set[str]) -> list[str]:
        found: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += _references(self._registry.definitions[name])
        return sorted(found)

    def version2(self) -> bytes:
        """``/openapi/v2``."""
        return self._cached("v2", self._build_version2)

    def _build_version2(self) -> Obj:
        paths: Obj = {}
        for resource in self._registry:
            paths.update(_paths(resource))
        for item in paths.values():
            for operation in item.values():
                if isinstance(operation, dict):
                    _lower(operation)
            item["parameters"] = [_lower_parameter(parameter) for parameter in item.get("parameters", [])]
        definitions = {name: _published(schema) for name, schema in self._registry.definitions.items()}
        text = json.dumps({"swagger": "2.0", "info": _INFO, "paths": paths, "definitions": definitions})
        lowered: Obj = json.loads(text.replace("#/components/schemas/", "#/definitions/"))
        return lowered


def _lower_parameter(parameter: Obj) -> Obj:
    schema = parameter.get("schema", {})
    return {key: value for key, value in parameter.items() if key != "schema"} | {"type": schema.get("type", "string")}


def _lower(operation: Obj) -> None:
    operation["parameters"] = [_lower_parameter(parameter) for parameter in operation.get("parameters", [])]
    body = operation.pop("requestBody", None)
    if body:
        operation["consumes"] = list(body["content"])
        schema = next(iter(body["content"].values()))["schema"]
        operation["parameters"].append({"name": "body", "in": "body", "required": True, "schema": schema})
    for response in operation.get("responses", {}).values():
        content = response.pop("content", None)
        if content:
            response["schema"] = next(iter(content.values()))["schema"]


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        found = [schema["$ref"].rsplit("/", 1)[1]] if isinstance(schema.get("$ref"), str) else []
        for value in schema.values():
            found += _references(value)
        return found
    if isinstance(schema, list):
        return [name for value in schema for name in _references(value)]
    return []


def _published(schema: Obj) -> Obj:
    out: Obj = copy(schema)
    _standard(out)
    return out


def _standard(node: Any) -> None:
    """Turns the plane's private formats into what the real documents say."""
    if isinstance(node, list):
        for item in node:
            _standard(item)
    if not isinstance(node, dict):
        return
    if node.get("format") == "quantity":
        node.pop("format")
        node.pop("type", None)
        node["oneOf"] = [{"type": "string"}, {"type": "number"}]
    elif node.get("format") == "micro-time":
        node["format"] = "date-time"
    if node.get("format") == "int-or-string" and "x-kubernetes-int-or-string" in node:
        node.pop("x-kubernetes-int-or-string")
        node["oneOf"] = [{"type": "integer"}, {"type": "string"}]
    for value in node.values():
        _standard(value)


def _paths(resource: Resource) -> Obj:
    base = resource.path
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    # kubectl sends the strategic kind to whatever claims to take it, and custom resources don't.
    patches = _PATCHES if resource.custom else (*_PATCHES, _STRATEGIC)
    content = {"content": {"application/json": {"schema": reference(resource.definition)}}}

    def operation(verb: str, action: str, *query: str, body: tuple[str, ...] = (), suffix: str = "") -> Obj:
        scope = "Namespaced" if resource.namespaced else ""
        made: Obj = {
            "tags": [(resource.group or "core") + "_" + resource.version],
            "description": f"{verb} {resource.kind}",
            "operationId": f"{action}{resource.group.title().replace('.', '')}{resource.version.title()}{scope}{resource.kind}{suffix}",
            "parameters": _query(*query),
            "responses": {"200": {"description": "OK", **content}},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk,
        }
        if body:
            schema = {"type": "object"} if "patch" in action else reference(resource.definition)
            made["requestBody"] = {"content": {media: {"schema": schema} for media in body}, "required": True}
        return made

    scoped = (
        f"{base}/namespaces/{{namespace}}/{resource.plural}" if resource.namespaced else f"{base}/{resource.plural}"
    )
    parameters: list[Obj] = [_in_path("namespace")] if resource.namespaced else []
    creating = operation("create", "post", *_WRITE, body=("application/json",))
    if resource.virtual:
        return {scoped: {"parameters": parameters, "post": creating}}
    listing: Obj = operation(
        "list",
        "list",
        "continue",
        "fieldSelector",
        "labelSelector",
        "limit",
        "resourceVersion",
        "timeoutSeconds",
        "watch",
    )
    collection: Obj = {
        "parameters": parameters,
        "get": listing,
        "post": creating,
        "delete": operation("delete collection of", "deletecollection", "dryRun", "fieldSelector", "labelSelector"),
    }
    item: Obj = {
        "parameters": [_in_path("name"), *parameters],
        "get": operation("read", "get"),
        "put": operation("replace", "put", *_WRITE, body=("application/json",)),
        "patch": operation("partially update", "patch", *_WRITE, "force", body=patches),
        "delete": operation("delete", "delete", "dryRun", "gracePeriodSeconds", "propagationPolicy"),
    }
    found = {scoped: collection, f"{scoped}/{{name}}": item}
    if resource.namespaced:
        found[f"{base}/{resource.plural}"] = {"get": {**listing, "operationId": listing["operationId"] + "ForAll"}}
    if resource.status:
        found[f"{scoped}/{{name}}/status"] = {
            "parameters": item["parameters"],
            "get": operation("read status of", "get", suffix="Status"),
            "put": operation("replace status of", "put", *_WRITE, body=("application/json",), suffix="Status"),
            "patch": operation("update status of", "patch", *_WRITE, "force", body=patches, suffix="Status"),
        }
    return found

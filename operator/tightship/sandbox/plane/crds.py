"""Custom resources: what a CustomResourceDefinition makes the plane serve.

Invariant: the registry follows the stored definitions in the same step as their write, so an object can be created right
after its definition.
"""

from __future__ import annotations

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.models import definition_name
from tightship.sandbox.plane.registry import Registry, Resource
from tightship.sandbox.plane.schema import Node, reference
from tightship.sandbox.plane.store import Change, Store
from tightship.sandbox.plane.values import dig

STORAGE = ("apiextensions.k8s.io", "customresourcedefinitions")
_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}


def resources_of(crd: Obj, registry: Registry) -> list[Resource]:
    """The resources that a definition serves, one a version."""
    spec = crd["spec"]
    storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
    return [_resource(spec, version, storage, registry) for version in spec["versions"] if version.get("served")]


def _resource(spec: Obj, version: Obj, storage: str, registry: Registry) -> Resource:
    names, group = spec["names"], spec["group"]
    reverse = ".".join(reversed(group.split(".")))
    definition = f"{reverse}.{version['name']}.{names['kind']}"
    schema = dict(version["schema"]["openAPIV3Schema"])
    schema["properties"] = {
        **(schema.get("properties") or {}),
        "apiVersion": {"type": "string", "description": _API_VERSION},
        "kind": {"type": "string", "description": _KIND},
        "metadata": {
            "allOf": [reference(definition_name("V1ObjectMeta"))],
            "description": "Standard object's metadata.",
        },
    }
    schema["x-kubernetes-group-version-kind"] = [{"group": group, "version": version["name"], "kind": names["kind"]}]
    registry.definitions[definition] = schema
    return Resource(
        group,
        version["name"],
        names["kind"],
        names["plural"],
        spec["scope"] == "Namespaced",
        Node(reference(definition), registry.definitions),
        definition,
        singular=names.get("singular") or names["kind"].lower(),
        short=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        status=dig(version, "subresources", "status") is not None,
        scale=dig(version, "subresources", "scale", default={}),
        generation=True,
        columns=version.get("additionalPrinterColumns") or [_AGE],
        custom=True,
        storage_version=storage,
        selectable=tuple(field["jsonPath"].lstrip(".") for field in version.get("selectableFields") or []),
    )


_API_VERSION = (
    "APIVersion defines the versioned schema of this representation of an object. Servers should convert recognized "
    "schemas to the latest internal value, and may reject unrecognized values."
)
_KIND = (
    "Kind is a string value representing the REST resource this object represents. Servers may infer this from the "
    "endpoint the client submits requests to. Cannot be updated. In CamelCase."
)


def follow(store: Store, registry: Registry) -> None:
    """Keeps the registry in step with the stored definitions."""

    def changed(change: Change) -> None:
        spec = change.object["spec"]
        group, plural = spec["group"], spec["names"]["plural"]
        if change.type != "DELETED":
            if change.old is None or change.old["spec"] != spec:
                registry.replace(group, plural, resources_of(change.object, registry))
            return
        for obj in store.all((group, plural)):
            store.remove((group, plural), obj)
        registry.replace(group, plural, [])

    store.subscribe(STORAGE, changed)
